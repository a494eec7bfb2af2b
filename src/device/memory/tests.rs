//! Layouts as kernels, container runtimes and service managers leave them.

use tempfile::TempDir;

use super::*;

const MIB: u64 = 1 << 20;
/// What a hierarchy of version 1 says where there is no limit.
const UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

/// A machine of files, with 8 GiB available.
struct Machine(TempDir);

impl Machine {
    fn new(groups: &str, mounts: &[&str]) -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        let meminfo =
            "MemTotal:       16384000 kB\nMemFree:         1000 kB\nMemAvailable:    8388608 kB\n";
        machine.with("proc/meminfo", meminfo);
        machine.with("proc/self/cgroup", groups);
        let root = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n";
        machine.with(
            "proc/self/mountinfo",
            &format!("{root}{}\n", mounts.join("\n")),
        );
        machine
    }

    fn with(&self, path: &str, text: &str) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// A group of version 2: its limit, and MiB in use, of which the second are old file pages.
    fn two(&self, folder: &str, max: &str, used: u64, inactive: u64) -> &Self {
        let folder = format!("sys/fs/cgroup/{folder}");
        let stat = format!(
            "anon 1\nfile {}\ninactive_anon 7\ninactive_file {}\nactive_file 3\n",
            inactive * MIB,
            inactive * MIB
        );
        self.with(&format!("{folder}/memory.max"), &format!("{max}\n"))
            .with(
                &format!("{folder}/memory.current"),
                &format!("{}\n", used * MIB),
            )
            .with(&format!("{folder}/memory.stat"), &stat)
    }

    /// The same of version 1, all in MiB but for no limit.
    fn one(&self, folder: &str, limit: Option<u64>, used: u64, inactive: u64) -> &Self {
        let limit = limit.map_or(UNLIMITED, |mib| mib * MIB);
        // Its own pages apart from those of the groups in it.
        let stat = format!(
            "cache 5\ninactive_file 11\ntotal_inactive_file {}\n",
            inactive * MIB
        );
        self.with(
            &format!("{folder}/memory.limit_in_bytes"),
            &format!("{limit}\n"),
        )
        .with(
            &format!("{folder}/memory.usage_in_bytes"),
            &format!("{}\n", used * MIB),
        )
        .with(&format!("{folder}/memory.stat"), &stat)
    }

    /// In MiB.
    fn free(&self) -> u64 {
        free_under(self.0.path()).unwrap() / MIB
    }
}

const V2: &str = "30 22 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot";
const V1: &str = "35 31 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory";

#[test]
fn without_limits_it_is_what_the_machine_has() {
    assert_eq!(Machine::new("", &[]).free(), 8192);
    // The root group of version 2 has no files.
    assert_eq!(Machine::new("0::/\n", &[V2]).free(), 8192);
    let machine = Machine::new("0::/user.slice\n", &[V2]);
    assert_eq!(machine.two("user.slice", "max", 100, 0).free(), 8192);
    // More than there is.
    assert_eq!(
        machine.two("user.slice", "99999999999999", 1, 0).free(),
        8192
    );
    assert_eq!(free_under(Path::new("/nowhere at all")), None);
}

#[test]
fn the_least_of_a_group_and_all_it_lies_in_counts() {
    let path = "user.slice/user-1000.slice/user@1000.service/app.slice/run-7.scope";
    let machine = Machine::new(&format!("0::/{path}\n"), &[V2]);
    machine.two("user.slice", "max", 3000, 0);
    machine.two(
        "user.slice/user-1000.slice",
        &(2000 * MIB).to_string(),
        1500,
        200,
    );
    // Delegated to the user, without the controller below.
    machine.two(
        "user.slice/user-1000.slice/user@1000.service",
        "max",
        900,
        0,
    );
    assert_eq!(machine.free(), 700);
    machine.two(path, &(500 * MIB).to_string(), 100, 0);
    assert_eq!(machine.free(), 400);
    machine.two("user.slice", &(3000 * MIB).to_string(), 2999, 0);
    assert_eq!(machine.free(), 1);
}

#[test]
fn old_file_pages_are_free_and_a_group_over_its_limit_has_nothing_left() {
    let machine = Machine::new("0::/job\n", &[V2]);
    assert_eq!(
        machine
            .two("job", &(1000 * MIB).to_string(), 900, 300)
            .free(),
        400
    );
    // More old pages than are in use: the two files are not read at one time.
    assert_eq!(
        machine
            .two("job", &(1000 * MIB).to_string(), 100, 300)
            .free(),
        1000
    );
    assert_eq!(
        machine
            .two("job", &(1000 * MIB).to_string(), 1500, 0)
            .free(),
        0
    );
    assert_eq!(machine.two("job", "0", 0, 0).free(), 0);
}

#[test]
fn a_container_with_a_namespace_of_its_own_sees_its_group_as_the_root() {
    let machine = Machine::new("0::/\n", &[V2]);
    assert_eq!(
        machine.two("", &(600 * MIB).to_string(), 200, 0).free(),
        400
    );
}

#[test]
fn a_group_outside_of_the_namespace_is_known_by_its_top() {
    // As a process that was moved, or that came into the container from outside, is told.
    for path in ["/..", "/../..", "/../../system.slice/other.service"] {
        let machine = Machine::new(&format!("0::{path}\n"), &[V2]);
        machine.two("", &(600 * MIB).to_string(), 200, 0);
        // What would be found by following the dots is none of ours.
        machine
            .with("sys/memory.max", "5\n")
            .with("sys/memory.current", "0\n");
        assert_eq!(machine.free(), 400, "{path}");
    }
    // The hierarchy was mounted before the namespace was made.
    let above = V2.replace(" / /sys", " /../.. /sys");
    let machine = Machine::new("0::/\n", &[&above]);
    assert_eq!(
        machine.two("", &(600 * MIB).to_string(), 200, 0).free(),
        400
    );
}

#[test]
fn version_1_has_hierarchies_of_its_own_and_counts_in_other_words() {
    let groups = "12:pids:/docker/c1\n11:cpu,cpuacct:/docker/c1\n5:memory:/docker/c1\n1:name=systemd:/docker/c1\n";
    let machine = Machine::new(groups, &[V1]);
    let folder = "sys/fs/cgroup/memory";
    machine.one(folder, None, 4000, 0);
    machine.one(&format!("{folder}/docker"), None, 3000, 0);
    assert_eq!(machine.free(), 8192);
    machine.one(&format!("{folder}/docker/c1"), Some(1000), 800, 500);
    assert_eq!(machine.free(), 700);
    machine.one(&format!("{folder}/docker"), Some(3100), 3000, 0);
    assert_eq!(machine.free(), 100);
    // A group that does not count what is in it.
    machine.with(&format!("{folder}/docker/memory.use_hierarchy"), "0\n");
    assert_eq!(machine.free(), 700);
    machine.with(&format!("{folder}/docker/memory.use_hierarchy"), "1\n");
    assert_eq!(machine.free(), 100);
}

#[test]
fn a_container_of_version_1_finds_its_group_where_it_is_mounted() {
    // Its group's folder alone is mounted; the path is the host's.
    let mount = "35 31 0:32 /kubepods/pod7/c1 /sys/fs/cgroup/memory ro,nosuid master:9 - cgroup cgroup rw,memory";
    let machine = Machine::new("4:memory:/kubepods/pod7/c1\n", &[mount]);
    let folder = "sys/fs/cgroup/memory";
    machine.one(folder, Some(500), 100, 0);
    assert_eq!(machine.free(), 400);
    // A group within it.
    machine.with("proc/self/cgroup", "4:memory:/kubepods/pod7/c1/worker\n");
    machine.one(&format!("{folder}/worker"), Some(300), 50, 0);
    assert_eq!(machine.free(), 250);
    // Another that only begins alike, and is not to be seen.
    machine.with("proc/self/cgroup", "4:memory:/kubepods/pod7/c12/worker\n");
    assert_eq!(machine.free(), 400);
}

#[test]
fn of_both_versions_side_by_side_the_one_that_limits_counts() {
    let mounts = [
        "34 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
        V1,
    ];
    let machine = Machine::new("4:memory:/job\n2:cpu,cpuacct:/job\n0::/job\n", &mounts);
    // The unified hierarchy has no controllers here.
    machine.with("sys/fs/cgroup/unified/job/cgroup.procs", "1\n");
    machine.one("sys/fs/cgroup/memory/job", Some(500), 100, 0);
    assert_eq!(machine.free(), 400);
}

#[test]
fn hierarchies_are_found_wherever_they_are_mounted() {
    let elsewhere = "35 31 0:32 / /mnt/control\\040groups rw - cgroup none rw,cpu,memory";
    let machine = Machine::new("4:cpu,memory:/a:b\n", &[elsewhere]);
    machine.one("mnt/control groups/a:b", Some(500), 100, 0);
    assert_eq!(machine.free(), 400);
}

#[test]
fn what_makes_no_sense_is_passed_over() {
    let machine = Machine::new(
        "\n:\n0:\nx:memory\n0::/job\n",
        &["", "30 22", "30 22 0:26 / - cgroup2", V2],
    );
    machine.two("job", "a lot", 100, 0);
    assert_eq!(machine.free(), 8192);
    // Without what is in use, a limit says nothing.
    machine.with("sys/fs/cgroup/job/memory.max", "1000\n");
    machine.with("sys/fs/cgroup/job/memory.current", "?\n");
    assert_eq!(machine.free(), 8192);
}

#[test]
fn the_processs_own_limit_of_addresses_counts() {
    let machine = Machine::new("", &[]);
    let limits = |soft: &str| {
        format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max resident set          1                    1                    bytes     \n\
             Max address space         {soft:<20} unlimited            bytes     \n"
        )
    };
    machine.with(
        "proc/self/status",
        "Name:\tsd-upscale\nVmPeak:\t  999999 kB\nVmSize:\t  102400 kB\n",
    );
    machine.with("proc/self/limits", &limits("unlimited"));
    assert_eq!(machine.free(), 8192);
    machine.with("proc/self/limits", &limits(&(1100 * MIB).to_string()));
    assert_eq!(machine.free(), 1000);
    machine.with("proc/self/limits", &limits("4096"));
    assert_eq!(machine.free(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn this_machine_tells() {
    let all = kibibytes(&fs::read_to_string("/proc/meminfo").unwrap(), "MemTotal:").unwrap();
    let free = free().unwrap();
    assert!(free > 0 && free < all, "{free} of {all}");
}

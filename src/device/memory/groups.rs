//! Control groups: what containers, service managers and job schedulers let a process have.
//!
//! A process is in one group of each hierarchy, and within the limits of that and of all that it lies in. `/proc/self/cgroup` names the
//! group, `/proc/self/mountinfo` says where its hierarchy is mounted, and from which group down.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// How the kernel spells a hierarchy that limits memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// A hierarchy for each resource.
    One,
    /// One for all.
    Two,
}

/// A hierarchy in the file system.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// The group that is seen at its top, as this process names groups.
    top: String,
    /// The folder of that group.
    folder: PathBuf,
}

/// Bytes that the process's groups leave it, the least of all levels; None where none has a limit. `root` is the folder that `/proc` lies
/// in.
pub fn free(root: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(root.join("proc/self").join(name)).ok();
    let mounts = mounts(&read("mountinfo")?);
    let groups = groups(&read("cgroup")?);
    let of_group = |(version, path): (Version, String)| {
        let its = mounts.iter().filter(move |mount| mount.version == version);
        its.filter_map(move |mount| mount.free(root, &path)).min()
    };
    groups.into_iter().filter_map(of_group).min()
}

/// The groups of `/proc/self/cgroup` that may limit memory. A line is `HIERARCHY:RESOURCES:PATH`; of version 2 it is `0::PATH`.
fn groups(text: &str) -> Vec<(Version, String)> {
    let group = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (hierarchy, resources, path) = (fields.next()?, fields.next()?, fields.next()?);
        let version = match (hierarchy, resources) {
            ("0", "") => Version::Two,
            (_, resources) if resources.split(',').any(|one| one == "memory") => Version::One,
            _ => return None,
        };
        Some((version, path.to_owned()))
    };
    text.lines().filter_map(group).collect()
}

/// The hierarchies of `/proc/self/mountinfo` that may limit memory. A line is `ID PARENT DEVICE TOP FOLDER OPTIONS [MORE...] - TYPE SOURCE
/// OPTIONS`.
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (top, folder) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let version = match kind {
            "cgroup2" => Version::Two,
            "cgroup" if options.split(',').any(|one| one == "memory") => Version::One,
            _ => return None,
        };
        Some(Mount {
            version,
            top: unescaped(top),
            folder: unescaped(folder).into(),
        })
    };
    text.lines().filter_map(mount).collect()
}

/// Blanks, line ends and backslashes in paths, which the kernel writes as three octal digits.
fn unescaped(text: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .into_iter()
    .fold(text.to_owned(), |text, (escape, c)| text.replace(escape, c))
}

impl Mount {
    /// What the group at `path` and those that it lies in leave it, as far up as can be seen.
    fn free(&self, root: &Path, path: &str) -> Option<u64> {
        let top = root.join(self.folder.strip_prefix("/").unwrap_or(&self.folder));
        let mut folder = top.join(self.below_top(path));
        let mut least = None;
        loop {
            least = least.into_iter().chain(self.version.free(&folder)).min();
            if folder == top || !folder.pop() || self.version.stands_alone(&folder) {
                return least;
            }
        }
    }

    /// The group at `path` as seen from the top. One outside of what is mounted, or of this process's namespace (`/..`), cannot be seen:
    /// then the top stands for it, which is the container's own group in such a layout.
    fn below_top(&self, path: &str) -> PathBuf {
        let named = |path: &Path| !path.components().any(|part| part == Component::ParentDir);
        let path = Path::new(path);
        match path.strip_prefix(&self.top) {
            Ok(below) if named(path) => below.to_owned(),
            _ => PathBuf::new(),
        }
    }
}

impl Version {
    /// What a group's own limit leaves, where it has one. Pages of files that were not used for long count as free: the kernel takes
    /// them back before it refuses.
    fn free(self, folder: &Path) -> Option<u64> {
        let (most, used, reclaimable) = match self {
            Version::One => (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
            Version::Two => ("memory.max", "memory.current", "inactive_file"),
        };
        // `max` of version 2 is no number; version 1 has one beyond all memory.
        let most = number(folder, most)?;
        let used = number(folder, used)?;
        let reclaimable = statistic(folder, reclaimable).unwrap_or(0);
        Some(most.saturating_sub(used.saturating_sub(reclaimable)))
    }

    /// Whether a group's limit does not count for the groups in it, as in version 1 it need not.
    fn stands_alone(self, folder: &Path) -> bool {
        self == Version::One && number(folder, "memory.use_hierarchy") == Some(0)
    }
}

fn number(folder: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(folder.join(name)).ok()?;
    text.trim().parse().ok()
}

/// A line `KEY NUMBER` of `memory.stat`.
fn statistic(folder: &Path, key: &str) -> Option<u64> {
    let text = fs::read_to_string(folder.join("memory.stat")).ok()?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .find(|(found, _)| *found == key)?
        .1
        .trim()
        .parse()
        .ok()
}

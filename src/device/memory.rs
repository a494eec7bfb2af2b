//! What of this machine's memory the process may still take: what is free, within the limits of its groups and its own.

mod groups;
#[cfg(target_os = "linux")]
mod reuse;

/// The system's allocator, where the program has none of its own.
#[cfg(not(target_os = "linux"))]
pub use std::alloc::System as Reuse;
use std::fs;
use std::path::Path;

#[cfg(target_os = "linux")]
pub use self::reuse::Reuse;

/// In bytes; None where the system does not tell, as all but Linux.
pub fn free() -> Option<u64> {
    free_under(Path::new("/"))
}

/// `root`: the folder that `/proc` lies in.
fn free_under(root: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(root.join("proc").join(name)).ok();
    let machine = available(&read("meminfo")?)?;
    let own = read("self/limits")
        .zip(read("self/status"))
        .and_then(|(limits, status)| address_space(&limits, &status));
    let limits = [groups::free(root), own].into_iter().flatten();
    Some(limits.fold(machine, u64::min))
}

/// All that the machine has, in bytes; None where the system does not tell.
pub fn total() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Of `/proc/meminfo`: what the kernel can give without swapping.
fn available(meminfo: &str) -> Option<u64> {
    kibibytes(meminfo, "MemAvailable:")
}

/// What `ulimit -v` leaves of the addresses that the process may have; None where it has no such limit. Addresses are not memory,
/// but nothing can be had without them.
fn address_space(limits: &str, status: &str) -> Option<u64> {
    let limit = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max address space"))?;
    // The soft limit, which is the one that counts; `unlimited` is no number.
    let most: u64 = limit.split_whitespace().next()?.parse().ok()?;
    Some(most.saturating_sub(kibibytes(status, "VmSize:")?))
}

/// The number of kB behind `key` at the beginning of a line, in bytes.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

/// Bytes of this machine's memory that the process has now; 0 where the system does not tell.
pub fn resident_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    kibibytes(&status, "VmRSS:").unwrap_or(0)
}

/// From here on, memory that large parts of are freed goes back to the system at once, in place of waiting for the next to need as much.
/// Faulting it in anew takes time, so that this is for runs that are short of it.
pub fn give_memory_back() {
    #[cfg(target_os = "linux")]
    reuse::stop();
    /// Bytes of an allocation from which on it is one of its own.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const LARGE: i32 = 1 << 20;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: both are calls of the C library's own allocator, which may be made at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::malloc_trim(0);
    }
}

/// What a folder has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// In bytes.
    pub free: u64,
    /// Whether the folder is in memory itself (tmpfs).
    pub in_memory: bool,
}

/// The space in a folder; None where it cannot be asked.
#[cfg(target_os = "linux")]
#[allow(
    clippy::unnecessary_cast,
    reason = "the numbers' types differ from one C library and processor to the next"
)]
pub fn space_in(folder: &Path) -> Option<Space> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    // SAFETY: all zeros is a value of this C struct of numbers.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in a zero byte, and `found` is there to be written.
    if unsafe { libc::statfs(path.as_ptr(), &mut found) } != 0 {
        return None;
    }
    Some(Space {
        free: (found.f_bavail as u64).saturating_mul(found.f_bsize as u64),
        in_memory: found.f_type as i64 == libc::TMPFS_MAGIC as i64,
    })
}

/// The space in a folder, which is not asked here: nothing is known against it.
#[cfg(not(target_os = "linux"))]
pub fn space_in(folder: &Path) -> Option<Space> {
    folder.is_dir().then_some(Space {
        free: u64::MAX,
        in_memory: false,
    })
}

#[cfg(test)]
mod tests;

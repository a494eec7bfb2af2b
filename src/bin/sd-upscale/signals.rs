//! Interrupts, and what else the system tells a process by signals and by the files it starts with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::open_files::OpenFiles;
use crate::report::Message;

/// The exit status of an interrupted run.
pub const INTERRUPTED: u8 = 130;
/// How long an interrupted run may take to say so before it ends without: who should say it may be waiting for someone
/// to read what it says.
const PATIENCE: Duration = Duration::from_secs(2);

/// A first interrupt ends the run in order, a second one at once, but neither leaves a file half written.
///
/// # Errors
/// The system refuses.
pub fn watch(messages: Sender<Message>, files: Arc<OpenFiles>) -> Result<()> {
    let interrupted = AtomicBool::new(false);
    let ignored = ignored();
    ctrlc::set_handler(move || {
        let again = interrupted.swap(true, Ordering::SeqCst);
        if again || messages.send(Message::Interrupt).is_err() {
            end(&files);
        }
        let for_later = files.clone();
        let later = move || {
            std::thread::sleep(PATIENCE);
            end(&for_later);
        };
        // Without another thread there is no patience.
        if std::thread::Builder::new().spawn(later).is_err() {
            end(&files);
        }
    })
    .context("cannot watch for interrupts")?;
    ignore(&ignored);
    Ok(())
}

/// What an interrupt sets, for work that looks at it; a second one ends the process at once.
///
/// # Errors
/// The system refuses.
pub fn flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    let ignored = ignored();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    })
    .context("cannot watch for interrupts")?;
    ignore(&ignored);
    Ok(flag)
}

/// Ends the process.
fn end(files: &OpenFiles) {
    let _no_file_is_half_written = files.give_up_soon();
    std::process::exit(i32::from(INTERRUPTED));
}

/// The signals among those watched that whoever started this process has it ignore: `nohup` hangups, a shell's `&`
/// interrupts.
#[cfg(unix)]
fn ignored() -> Vec<libc::c_int> {
    let is_ignored = |signal: &libc::c_int| {
        // SAFETY: all of `sigaction` may be zero bytes; without a new action the call only fills `old`.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(*signal, std::ptr::null(), &raw mut old) == 0
                && old.sa_sigaction == libc::SIG_IGN
        }
    };
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP]
        .into_iter()
        .filter(is_ignored)
        .collect()
}

#[cfg(unix)]
fn ignore(signals: &[libc::c_int]) {
    for signal in signals {
        // SAFETY: ignoring a signal runs no code.
        unsafe { libc::signal(*signal, libc::SIG_IGN) };
    }
}

#[cfg(not(unix))]
fn ignored() {}

#[cfg(not(unix))]
fn ignore((): &()) {}

/// A file that grows beyond the limit (`ulimit -f`) is then an error of writing, and not the end of the process, which
/// would leave its temporary file.
pub fn outlive_file_limits() {
    #[cfg(unix)]
    ignore(&[libc::SIGXFSZ]);
}

/// Whether the process was started without a standard output (`>&-`). Rust opens /dev/null in its place before `main`,
/// so that what is written there is lost without an error.
pub fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

#[cfg(target_os = "linux")]
mod before_main {
    use std::sync::atomic::Ordering;

    extern "C" fn look() {
        // SAFETY: asks for the flags of a file descriptor, whether it is open or not.
        let closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1;
        super::STDOUT_WAS_CLOSED.store(closed, Ordering::Relaxed);
    }

    // SAFETY: the system calls each function pointer of this section once before `main`; `look` needs nothing of Rust's
    // runtime, which is not there yet.
    #[used]
    #[unsafe(link_section = ".init_array")]
    static LOOK: extern "C" fn() = look;
}

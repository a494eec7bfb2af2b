//! Threads that cannot die unheard: a panic is an error like any other, and ends in a message and an exit status.

use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::{env, thread};

use anyhow::{Context, Result, anyhow};

use crate::report::Message;

/// What the last panic said. Those of rayon's threads come through here too, on their way to the thread that waits.
static LAST: Mutex<Option<String>> = Mutex::new(None);

/// Keeps what panics say for [`guarded`], in place of printing it on several lines.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|info| {
        *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(in_words(info));
    }));
}

fn in_words(info: &PanicHookInfo) -> String {
    let payload = info.payload();
    let said = payload.downcast_ref::<&str>().copied();
    let said = said.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let said = said.unwrap_or("no reason given").replace(['\n', '\r'], " ");
    match info.location() {
        Some(at) => format!("{said}, at {}:{}", at.file(), at.line()),
        None => said,
    }
}

/// Does `work`; a panic in it is an error that says what it said.
///
/// # Errors
/// `work` panicked.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| {
        let said = LAST.lock().unwrap_or_else(PoisonError::into_inner).take();
        anyhow!(
            "a fault in this program or in a library that it uses ({}); please report it",
            said.as_deref().unwrap_or("no reason given")
        )
    })
}

/// Starts a thread of a run. If it panics, the run ends in that error.
///
/// # Errors
/// The system gives no more threads.
pub fn start(
    name: &str,
    messages: &Sender<Message>,
    work: impl FnOnce() + Send + 'static,
) -> Result<()> {
    let messages = messages.clone();
    let guard = move || {
        if let Err(error) = guarded(work) {
            // The receiver is gone only where the run has ended.
            let _ = messages.send(Message::Fatal(error));
        }
    };
    thread::Builder::new()
        .name(name.into())
        .spawn(guard)
        .with_context(|| format!("the system gives no more threads (for {name}): raise its limit (ulimit -u), or end other programs"))?;
    Ok(())
}

/// Starts the threads that share the computing: `count`, or what RAYON_NUM_THREADS says, and no more than the processors that this
/// process may use. More would take turns on them and drive each other's data out of the caches.
///
/// # Errors
/// The system gives no more threads.
pub fn start_pool(count: Option<u16>) -> Result<()> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let asked = count.map_or_else(
        || threads_of(env::var("RAYON_NUM_THREADS").ok()),
        usize::from,
    );
    let pool = rayon::ThreadPoolBuilder::new().num_threads(asked.min(processors));
    pool.build_global().context(
        "the system gives no more threads for computing: raise its limit (ulimit -u), or say --threads with fewer",
    )
}

/// What RAYON_NUM_THREADS asks for: without a limit where it is not set, 0 or no number, as rayon takes it.
fn threads_of(value: Option<String>) -> usize {
    let number = value.and_then(|text| text.parse().ok()).unwrap_or(0);
    if number == 0 { usize::MAX } else { number }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_panic_is_an_error_of_one_line_that_says_what_it_said() {
        keep_panics();
        let error = guarded(|| -> u8 { panic!("index 3\nout of bounds") }).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("index 3 out of bounds, at src/"), "{text}");
        assert!(!text.contains('\n'), "{text}");
        assert_eq!(guarded(|| 7).unwrap(), 7);
    }

    #[test]
    fn the_environment_asks_for_a_number_of_threads() {
        let of = |value: &str| threads_of(Some(value.into()));
        assert_eq!((of("3"), of("64")), (3, 64));
        assert_eq!([of("0"), of("many"), threads_of(None)], [usize::MAX; 3]);
    }

    #[test]
    fn a_thread_that_dies_ends_the_run_in_its_error() {
        keep_panics();
        let (messages, inbox) = channel();
        start("testing", &messages, || panic!("the disk is gone")).unwrap();
        drop(messages);
        // Ends, as the thread's own sender goes with it.
        let said: Vec<Message> = inbox.iter().collect();
        assert!(
            matches!(&said[..], [Message::Fatal(error)] if format!("{error}").contains("the disk is gone"))
        );
    }
}

//! `--watch`: files that appear in the input folders, once they are whole.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use sd_upscale::files;
use sd_upscale::plan::{self, Claims, Source, Task};

use crate::args::PromptFrom;
use crate::job::Job;

/// Between two looks at the folders. They are looked at, not listened to: of shared folders no system tells what other machines write.
const PAUSE: Duration = Duration::from_secs(1);
/// Of a look that takes long, the pause is so many times as long.
const SHARE: u32 = 10;
/// A file that stays as it is for so long is taken though it is not whole: its error says what is wrong with it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is known of the files in the folders.
pub struct Watch<'a> {
    job: &'a Job,
    seen: HashMap<PathBuf, Seen>,
    /// Of the last look.
    errors: HashSet<String>,
    /// What the last look took.
    took: Duration,
}

/// A file as it was seen last.
struct Seen {
    stamp: Stamp,
    /// Since when it is as it is.
    since: Instant,
    /// Whether it was taken as it is.
    taken: bool,
}

/// By which a file that was written again is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
}

impl<'a> Watch<'a> {
    pub fn of(job: &'a Job) -> Self {
        Self {
            job,
            seen: HashMap::new(),
            errors: HashSet::new(),
            took: Duration::ZERO,
        }
    }

    /// Looks at the folders after a pause: all that is in them, and what went wrong for the first time.
    pub fn look(&mut self, claims: &mut Claims) -> Look {
        std::thread::sleep(PAUSE.max(self.took * SHARE));
        let start = Instant::now();
        let (tasks, errors) = match plan::look_again(&self.job.request, claims) {
            Ok(plan) => {
                let named =
                    |(path, error): &(PathBuf, String)| format!("{}: {error}", path.display());
                (plan.tasks, plan.failed.iter().map(named).collect())
            }
            Err(error) => (Vec::new(), vec![error.to_string()]),
        };
        let now: HashSet<String> = errors.into_iter().collect();
        let new = now.difference(&self.errors).cloned().collect();
        self.errors = now;
        self.took = start.elapsed();
        Look { tasks, errors: new }
    }

    /// Those of `tasks` whose files came or changed since they were taken last, and are whole.
    pub fn ready(&mut self, tasks: Vec<Task>) -> Vec<Task> {
        let now = Instant::now();
        let mut verdicts: HashMap<PathBuf, bool> = HashMap::new();
        let mut is_ready = |task: &Task| match &task.source {
            Source::Path(path) => *verdicts
                .entry(path.clone())
                .or_insert_with(|| self.takes(path, Stamp::of(path), now)),
            // Once, in the first look.
            _ => true,
        };
        tasks.into_iter().filter(|task| is_ready(task)).collect()
    }

    /// Whether it is time for a file; then it is taken.
    fn takes(&mut self, path: &Path, stamp: Option<Stamp>, now: Instant) -> bool {
        let Some(stamp) = stamp else {
            self.seen.remove(path);
            return false;
        };
        let new = Seen {
            stamp,
            since: now,
            taken: false,
        };
        let seen = match self.seen.get_mut(path) {
            Some(seen) if seen.stamp == stamp => seen,
            _ => self
                .seen
                .entry(path.to_path_buf())
                .insert_entry(new)
                .into_mut(),
        };
        if seen.taken {
            return false;
        }
        let unchanged = now.duration_since(seen.since);
        let settled = unchanged >= PAUSE || stamp.is_of_before();
        seen.taken = settled && (unchanged >= PATIENCE || is_whole(self.job, path));
        seen.taken
    }
}

/// What a look found.
pub struct Look {
    pub tasks: Vec<Task>,
    pub errors: Vec<String>,
}

impl Stamp {
    /// None where it is gone.
    fn of(path: &Path) -> Option<Self> {
        let metadata = path.metadata().ok()?;
        Some(Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        })
    }

    /// Whether it was written a while ago, as far as the clocks agree.
    fn is_of_before(self) -> bool {
        let age = self
            .modified
            .and_then(|time| SystemTime::now().duration_since(time).ok());
        age.is_some_and(|age| age >= PAUSE)
    }
}

/// Whether a file that nobody writes to any more has all that it needs.
fn is_whole(job: &Job, path: &Path) -> bool {
    let is_given = job.prompt.is_some() || job.embeds.is_some() || job.generate;
    let needs_sidecar = job.prompt_from == PromptFrom::Sidecar && !is_given;
    if needs_sidecar && !path.with_extension("txt").is_file() {
        return false;
    }
    // A text has no end of its own.
    job.generate || files::is_complete(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;
    use crate::args::Args;

    fn job(arguments: &str, folder: &Path) -> Job {
        let program = [
            "sd-upscale",
            folder.to_str().unwrap(),
            "-o",
            "out",
            "--watch",
        ];
        let arguments = program.into_iter().chain(arguments.split_whitespace());
        Job::try_from(Args::parse_from(arguments)).unwrap()
    }

    fn png() -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let picture = image::RgbImage::new(3, 2);
        picture
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    /// Of a file that is written right now, whatever the clock says.
    fn stamp(bytes: u64) -> Option<Stamp> {
        Some(Stamp {
            bytes,
            modified: None,
        })
    }

    #[test]
    fn a_file_is_taken_once_it_is_whole_and_again_when_it_changed() {
        let folder = tempfile::tempdir().unwrap();
        let (job, path) = (job("", folder.path()), folder.path().join("a.png"));
        let (mut watch, whole) = (Watch::of(&job), png());
        let start = Instant::now();
        let mut takes = |bytes: Option<Stamp>, seconds: u64| {
            watch.takes(&path, bytes, start + Duration::from_secs(seconds))
        };
        assert!(!takes(None, 0));
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        // New, then settled, but not whole.
        assert!(!takes(stamp(1), 1));
        assert!(!takes(stamp(1), 5));
        fs::write(&path, &whole).unwrap();
        assert!(!takes(stamp(2), 6));
        assert!(takes(stamp(2), 7));
        assert!(!takes(stamp(2), 100));
        // Written again.
        assert!(!takes(stamp(3), 101));
        assert!(takes(stamp(3), 102));
        // Gone, and there again.
        assert!(!takes(None, 103));
        assert!(!takes(stamp(3), 104));
        assert!(takes(stamp(3), 105));
    }

    #[test]
    fn a_file_of_before_is_taken_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let (job, path) = (job("", folder.path()), folder.path().join("a.png"));
        fs::write(&path, png()).unwrap();
        let old = Stamp {
            bytes: 1,
            modified: Some(SystemTime::UNIX_EPOCH),
        };
        let mut watch = Watch::of(&job);
        assert!(watch.takes(&path, Some(old), Instant::now()));
        // A clock that is ahead.
        let ahead = Stamp {
            modified: Some(SystemTime::now() + PATIENCE),
            ..old
        };
        assert!(!watch.takes(&path, Some(ahead), Instant::now()));
    }

    #[test]
    fn what_never_becomes_whole_is_taken_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let (job, path) = (job("", folder.path()), folder.path().join("a.png"));
        let mut watch = Watch::of(&job);
        let start = Instant::now();
        fs::write(&path, b"no picture").unwrap();
        assert!(!watch.takes(&path, stamp(1), start));
        assert!(!watch.takes(&path, stamp(1), start + PATIENCE / 2));
        assert!(watch.takes(&path, stamp(1), start + PATIENCE));
    }

    #[test]
    fn a_file_waits_for_the_prompt_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let job = job("--prompt-from sidecar", folder.path());
        let path = folder.path().join("a.png");
        let mut watch = Watch::of(&job);
        let start = Instant::now();
        fs::write(&path, png()).unwrap();
        assert!(!watch.takes(&path, stamp(1), start));
        assert!(!watch.takes(&path, stamp(1), start + 5 * PAUSE));
        fs::write(folder.path().join("a.txt"), "a cat").unwrap();
        assert!(watch.takes(&path, stamp(1), start + 6 * PAUSE));
        // Not where it is given, in words or in numbers.
        fs::remove_file(folder.path().join("a.txt")).unwrap();
        let numbers = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/data/reference/embeds.safetensors"
        );
        for given in ["-p cat".to_owned(), format!("--prompt-embeds {numbers}")] {
            let job = self::job(&format!("--prompt-from sidecar {given}"), folder.path());
            let mut watch = Watch::of(&job);
            assert!(!watch.takes(&path, stamp(1), start));
            assert!(watch.takes(&path, stamp(1), start + PAUSE), "{given}");
        }
    }
}

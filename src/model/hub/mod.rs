//! Model files from the Hugging Face Hub: found in the standard cache, or downloaded into it.
//!
//! The cache is the one of `huggingface_hub`: what either has fetched, the other uses.

mod cache;
mod environment;
mod errors;
mod fetch;
mod progress;
mod remote;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use indicatif::HumanBytes;

use self::cache::RepoCache;
pub use self::environment::Environment;
use self::errors::{Failure, Fault, explain};
use self::fetch::{Transfer, with_retries};
pub use self::progress::Report;
use self::remote::{Listing, Remote};
pub use crate::model::layout::Part;
use crate::model::layout::{Kind, first_missing, is_index, is_plain, shards, wanted, weight_file};

/// The repository of the published model.
pub const DEFAULT_REPO: &str = "stabilityai/sd-x2-latent-upscaler";

/// The commit of [`DEFAULT_REPO`] that this program is tested with.
pub const DEFAULT_REVISION: &str = "1f2883b22f62cfb29323770ba9cfdcf601757bd3";

/// The repository of the base checkpoint of the published example.
pub const DEFAULT_BASE: &str = "CompVis/stable-diffusion-v1-4";

/// The commit of [`DEFAULT_BASE`] that is fetched.
pub const DEFAULT_BASE_REVISION: &str = "133a221b8aa7292a167afc5127cb63fb5005638b";

/// The Hub and its cache on this machine.
#[derive(Debug, Clone)]
pub struct Hub {
    settings: Environment,
}

impl Hub {
    /// Takes cache, endpoint and token from the environment, see [`Environment::from_env`].
    /// `show_progress` allows messages and progress bars on standard error.
    ///
    /// # Errors
    /// When a variable has a value that cannot be used, or no home folder is known.
    pub fn from_env(show_progress: bool) -> Result<Self> {
        Ok(Hub::new(Environment::from_env(show_progress)?))
    }

    /// A Hub and a cache as `settings` has them.
    pub fn new(settings: Environment) -> Self {
        Hub { settings }
    }

    /// The same, and what messages advise to give instead of a repository is given by this option, `--model` if nothing else is said.
    pub fn named_by(mut self, option: &'static str) -> Self {
        self.settings.named_by = option;
        self
    }

    /// The folder with the files of `parts` of `repo` (`ORG/NAME`) at `revision` (branch, tag or commit),
    /// downloading what the cache lacks. Nothing is asked of the network when all is there, so a branch stays at the
    /// commit that was first fetched.
    ///
    /// # Errors
    /// When a file is neither in the cache nor to be had; the message says what was wanted, from where, why it
    /// failed, and what to do.
    pub fn snapshot(&self, repo: &str, revision: &str, parts: &[Part]) -> Result<PathBuf> {
        check_names(repo, revision)?;
        self.obtain(repo, revision, parts)
            .map_err(|failure| explain(&failure, repo, revision, parts, &self.settings))
    }

    /// The folder with a VAE's `config.json` and weights: the repository's top level
    /// (`stabilityai/sd-vae-ft-mse`), or `vae/` of a pipeline's repository.
    ///
    /// # Errors
    /// As [`Hub::snapshot`].
    pub fn vae(&self, repo: &str, revision: &str) -> Result<PathBuf> {
        check_names(repo, revision)?;
        let bare = [Part::BareVae];
        let in_pipeline = || Ok(self.snapshot(repo, revision, &[Part::Vae])?.join("vae"));
        let is_cached = |part| self.cached(repo, revision, &[part]).is_some();
        if is_cached(Part::Vae) && !is_cached(Part::BareVae) {
            return in_pipeline();
        }
        self.obtain(repo, revision, &bare).or_else(|failure| {
            if failure.fault.is_absent_file() && failure.path == "config.json" {
                return in_pipeline();
            }
            Err(explain(&failure, repo, revision, &bare, &self.settings))
        })
    }

    /// As [`Hub::snapshot`], without the network; `None` when a needed file is not in the cache.
    pub fn cached(&self, repo: &str, revision: &str, parts: &[Part]) -> Option<PathBuf> {
        check_names(repo, revision).ok()?;
        let cache = RepoCache::new(&self.settings.cache, repo, revision);
        let dir = cache.snapshot(&cache.commit()?);
        first_missing(&dir, parts).is_none().then_some(dir)
    }

    /// The model repositories that the cache has something of, in their order, each with the folders of the commits that are there.
    pub fn repositories(&self) -> Vec<(String, Vec<PathBuf>)> {
        cache::repositories(&self.settings.cache)
    }

    fn obtain(&self, repo: &str, revision: &str, parts: &[Part]) -> Result<PathBuf, Failure> {
        let settings = &self.settings;
        let cache = RepoCache::new(&settings.cache, repo, revision);
        let commit = cache.commit();
        let dir = match &commit {
            Some(commit) => cache.snapshot(commit),
            None => cache.folder(),
        };
        let missing = first_missing(&dir, parts);
        if settings.offline {
            return match missing {
                None => Ok(dir),
                Some(path) => Err(Failure::of(&path)(Fault::Offline { looked_in: dir })),
            };
        }
        let unsettled = cache.unsettled(commit.as_deref().unwrap_or_default(), parts);
        let is_usable =
            missing.is_none() && unsettled.iter().all(|(_, kind)| *kind == Kind::Optional);
        // The file to name where the list of them cannot be had.
        let first = unsettled.first().map(|(path, _)| path.to_string());
        let Some(first) = first.or(missing) else {
            return Ok(dir);
        };
        let remote = Remote::new(settings, repo).map_err(Failure::of("anything"))?;
        let list = || remote.list(revision);
        let fetched = with_retries(&remote, &first, || 0, list)
            .map_err(Failure::of(&first))
            .and_then(|listing| {
                Job {
                    remote: &remote,
                    cache: &cache,
                    listing: &listing,
                }
                .run(parts)
            });
        match fetched {
            // Only a file that the model loads without is in doubt.
            Err(Failure { path, fault, .. }) if is_usable => {
                let cause = fault.cause();
                settings
                    .report
                    .note(&format!("using the cached {repo} without {path}: {cause}"));
                Ok(dir)
            }
            result => result,
        }
    }
}

/// The files that a commit has, and the cache that some of them are to be in.
struct Job<'a> {
    remote: &'a Remote<'a>,
    cache: &'a RepoCache,
    listing: &'a Listing,
}

impl Job<'_> {
    /// Sees that no file lacks before it fetches any, so that a wrong name shows at once. Returns the snapshot.
    fn run(&self, parts: &[Part]) -> Result<PathBuf, Failure> {
        let has = |name: &str| self.listing.has(name);
        let (mut files, mut indexes) = (Vec::new(), Vec::new());
        for (path, kind) in wanted(parts) {
            let found = match kind {
                Kind::Weights => weight_file(path, has),
                Kind::Required | Kind::Optional => has(path).then(|| path.to_string()),
            };
            match found {
                Some(file) if kind == Kind::Weights && is_index(&file) => indexes.push(file),
                Some(file) => files.push(file),
                None if kind == Kind::Optional => {}
                None => return Err(absent(path)),
            }
        }
        let commit = &self.listing.commit;
        for (path, _) in wanted(parts).into_iter().filter(|(path, _)| !has(path)) {
            let marked = self.cache.set_absent(commit, path);
            marked.map_err(Failure::of(path))?;
        }
        self.fetch(&indexes)?;
        for index in &indexes {
            let shards = shards(&self.cache.snapshot(commit), index)
                .map_err(|why| Failure::of(index)(Fault::BadIndex(why)))?;
            if let Some(shard) = shards.iter().find(|shard| !has(shard)) {
                return Err(absent(shard));
            }
            files.extend(shards);
        }
        self.fetch(&files)?;
        let noted = self.cache.set_commit(commit);
        noted.map_err(Failure::of("refs"))?;
        Ok(self.cache.snapshot(commit))
    }

    /// Fetches what the cache lacks, and links all of `files` into the snapshot.
    fn fetch(&self, files: &[String]) -> Result<(), Failure> {
        let snapshot = self.cache.snapshot(&self.listing.commit);
        let unlinked = files.iter().filter(|path| !snapshot.join(path).is_file());
        let transfers = unlinked.map(|path| Transfer {
            job: self,
            path,
            meta: self.listing.meta(path),
        });
        let (done, missing): (Vec<_>, Vec<_>) = transfers.partition(Transfer::is_done);
        if missing.len() > 1 {
            let settings = self.remote.settings;
            settings.report.note(&format!(
                "downloading {} ({} files, {}) to {}",
                self.remote.repo,
                missing.len(),
                HumanBytes(missing.iter().filter_map(|file| file.meta.size).sum()),
                settings.cache.display()
            ));
        }
        done.iter().chain(&missing).try_for_each(Transfer::run)
    }
}

/// What the Hub itself would answer for a file that is not in its list.
fn absent(path: &str) -> Failure {
    let code = Some("EntryNotFound".to_string());
    Failure::of(path)(Fault::Status { status: 404, code })
}

/// Refuses names that could lead out of the cache or that no repository can have.
fn check_names(repo: &str, revision: &str) -> Result<()> {
    let parts: Vec<_> = repo.split('/').collect();
    ensure!(
        parts.len() <= 2
            && parts
                .iter()
                .all(|part| is_plain(part) && !part.contains("--")),
        "{repo:?} is not the name of a Hub repository: expected ORG/NAME, such as {DEFAULT_REPO}"
    );
    let harmless = |part: &str| !matches!(part, "" | "." | "..");
    ensure!(
        revision.split('/').all(harmless)
            && !revision.contains(|c: char| c.is_control() || c.is_whitespace() || c == '\\'),
        "--revision: expected a branch, a tag or a commit, found {revision:?}"
    );
    Ok(())
}

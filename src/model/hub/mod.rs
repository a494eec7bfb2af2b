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
use self::remote::{Meta, Remote};
pub use crate::model::layout::Part;
use crate::model::layout::{Kind, first_missing, index_name, is_plain, shards, wanted};

/// The repository of the published model.
pub const DEFAULT_REPO: &str = "stabilityai/sd-x2-latent-upscaler";

/// The commit of [`DEFAULT_REPO`] that this program is tested with.
pub const DEFAULT_REVISION: &str = "1f2883b22f62cfb29323770ba9cfdcf601757bd3";

/// The Hub and its cache on this machine.
#[derive(Debug, Clone)]
pub struct Hub {
    settings: Environment,
}

/// A file that is to be in the snapshot: its path in the repository, and what the Hub says of it.
type Planned = (String, Meta);

impl Hub {
    /// Takes cache, endpoint and token from the environment, see [`Environment::from_env`].
    /// `show_progress` allows messages and progress bars on standard error.
    ///
    /// # Errors
    /// When a variable has a value that cannot be used, or no home folder is known.
    pub fn from_env(show_progress: bool) -> Result<Self> {
        Ok(Hub::new(Environment::from_env(show_progress)?))
    }

    pub fn new(settings: Environment) -> Self {
        Hub { settings }
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
        if let Some(dir) = self.cached(repo, revision, &[Part::BareVae]) {
            return Ok(dir);
        }
        if let Some(dir) = self.cached(repo, revision, &[Part::Vae]) {
            return Ok(dir.join("vae"));
        }
        check_names(repo, revision)?;
        let parts = [Part::BareVae];
        match self.obtain(repo, revision, &parts) {
            Err(failure) if failure.fault.is_absent_file() && failure.path == "config.json" => {
                Ok(self.snapshot(repo, revision, &[Part::Vae])?.join("vae"))
            }
            result => {
                result.map_err(|failure| explain(&failure, repo, revision, &parts, &self.settings))
            }
        }
    }

    /// As [`Hub::snapshot`], without the network; `None` when a needed file is not in the cache.
    pub fn cached(&self, repo: &str, revision: &str, parts: &[Part]) -> Option<PathBuf> {
        check_names(repo, revision).ok()?;
        let cache = RepoCache::new(&self.settings.cache, repo, revision);
        let dir = cache.snapshot(&cache.commit()?);
        first_missing(&dir, parts).is_none().then_some(dir)
    }

    fn obtain(&self, repo: &str, revision: &str, parts: &[Part]) -> Result<PathBuf, Failure> {
        let settings = &self.settings;
        let cache = RepoCache::new(&settings.cache, repo, revision);
        let cached = self.cached(repo, revision, parts);
        let commit = cache.commit();
        if let (Some(dir), Some(commit)) = (&cached, &commit)
            && (settings.offline || !cache.unknown_optional(commit, parts))
        {
            return Ok(dir.clone());
        }
        if settings.offline {
            let looked_in = match &commit {
                Some(commit) => cache.snapshot(commit),
                None => cache.folder(),
            };
            let path = first_missing(&looked_in, parts).unwrap_or_default();
            return Err(Failure::new(&path, Fault::Offline { looked_in }));
        }
        let remote = Remote::new(settings).map_err(|fault| Failure::new("anything", fault))?;
        let job = Job {
            settings,
            remote: &remote,
            cache: &cache,
            repo,
            revision,
        };
        match (job.run(parts), cached) {
            // Only a file that the model loads without is in doubt.
            (Err(failure), Some(dir)) => {
                let (path, cause) = (&failure.path, failure.fault.cause());
                settings
                    .report
                    .note(&format!("using the cached {repo} without {path}: {cause}"));
                Ok(dir)
            }
            (result, _) => result,
        }
    }
}

/// One repository's download.
struct Job<'a> {
    settings: &'a Environment,
    remote: &'a Remote,
    cache: &'a RepoCache,
    repo: &'a str,
    revision: &'a str,
}

impl Job<'_> {
    /// Asks what all files are before it fetches any, so that a wrong name or a closed door shows at once.
    fn run(&self, parts: &[Part]) -> Result<PathBuf, Failure> {
        let mut commit = cache::is_commit(self.revision).then(|| self.revision.to_string());
        let mut plan = Vec::new();
        for (path, kind) in wanted(parts) {
            let known = |commit: &String| self.cache.known_absent(commit, path);
            if kind == Kind::Optional && commit.as_ref().is_some_and(known) {
                continue;
            }
            match self.plan(path, &mut commit, &mut plan) {
                Err(failure) if failure.fault.is_absent_file() => match (kind, &commit) {
                    (Kind::Optional, Some(commit)) => {
                        let marked = self.cache.set_absent(commit, path);
                        marked.map_err(|fault| Failure::new(path, fault))?;
                    }
                    (Kind::Optional, None) => {}
                    (Kind::Weights, Some(_)) => {
                        self.plan_shards(path, &mut commit, &mut plan, failure)?
                    }
                    _ => return Err(failure),
                },
                result => result?,
            }
        }
        let commit = commit.unwrap_or_else(|| self.revision.to_string());
        self.fetch(&commit, &plan)?;
        self.cache
            .set_commit(&commit)
            .map_err(|fault| Failure::new("refs", fault))?;
        Ok(self.cache.snapshot(&commit))
    }

    /// Adds `path` to the plan unless the snapshot has it; the first answer says which commit the revision is.
    fn plan(
        &self,
        path: &str,
        commit: &mut Option<String>,
        plan: &mut Vec<Planned>,
    ) -> Result<(), Failure> {
        let held = |commit: &String| self.cache.snapshot(commit).join(path).is_file();
        if commit.as_ref().is_some_and(held) {
            return Ok(());
        }
        let revision = commit.as_deref().unwrap_or(self.revision);
        let head = || self.remote.head(self.repo, revision, path);
        let meta = with_retries(self.remote, self.settings, path, || 0, head)
            .map_err(|fault| Failure::new(path, fault))?;
        if commit.is_none() {
            let none = || Fault::NotAHub("no X-Repo-Commit tells the revision's commit".into());
            let found = meta.commit.clone().ok_or_else(none);
            *commit = Some(found.map_err(|fault| Failure::new(path, fault))?);
        }
        plan.push((path.to_string(), meta));
        Ok(())
    }

    /// In place of `weights`, which the repository lacks: the index beside it, and the shards that it names.
    fn plan_shards(
        &self,
        weights: &str,
        commit: &mut Option<String>,
        plan: &mut Vec<Planned>,
        absent: Failure,
    ) -> Result<(), Failure> {
        let index = index_name(weights);
        let mut first = Vec::new();
        match self.plan(&index, commit, &mut first) {
            // Neither is there: the single file is the one to tell of.
            Err(failure) if failure.fault.is_absent_file() => return Err(absent),
            result => result?,
        }
        let known = commit.clone().unwrap_or_default();
        self.fetch(&known, &first)?;
        let names = shards(weights, &self.cache.snapshot(&known).join(&index));
        let bad = |why| Failure::new(&index, Fault::BadIndex(why));
        for shard in names.map_err(bad)? {
            self.plan(&shard, commit, plan)?;
        }
        Ok(())
    }

    /// Fetches the planned files that are not in the cache, and links all of them into the snapshot.
    fn fetch(&self, commit: &str, plan: &[Planned]) -> Result<(), Failure> {
        let transfers = plan.iter().map(|(path, meta)| Transfer {
            remote: self.remote,
            cache: self.cache,
            settings: self.settings,
            repo: self.repo,
            commit,
            path,
            meta,
        });
        let (done, missing): (Vec<_>, Vec<_>) = transfers.partition(Transfer::is_done);
        if missing.len() > 1 {
            let bytes: u64 = missing
                .iter()
                .filter_map(|transfer| transfer.meta.size)
                .sum();
            self.settings.report.note(&format!(
                "downloading {} ({} files, {}) to {}",
                self.repo,
                missing.len(),
                HumanBytes(bytes),
                self.settings.cache.display()
            ));
        }
        for transfer in done.iter().chain(&missing) {
            let path = transfer.path;
            transfer.run().map_err(|(fault, kept)| Failure {
                kept,
                ..Failure::new(path, fault)
            })?;
            self.cache
                .link(commit, path, &transfer.meta.etag)
                .map_err(|fault| Failure::new(path, fault))?;
        }
        Ok(())
    }
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

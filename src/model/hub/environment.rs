//! Where the Hub and its cache are, from the environment variables that `huggingface_hub` has.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Report;

const PUBLIC_HUB: &str = "https://huggingface.co";

/// How to reach the Hub. A plain struct, so that tests and other programs can set what the environment would.
#[derive(Clone)]
pub struct Environment {
    /// The folder of the cache, `~/.cache/huggingface/hub` by default (`HF_HUB_CACHE`, `HF_HOME`).
    pub cache: PathBuf,
    /// The Hub's address, without a slash at its end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The access token for private and gated repositories (`HF_TOKEN`, or the file that `hf auth login` writes).
    pub token: Option<String>,
    /// Never to use the network (`HF_HUB_OFFLINE=1`).
    pub offline: bool,
    /// PEM certificates to trust instead of the public ones, for proxies that have their own (`SSL_CERT_FILE`).
    pub certificates: Option<PathBuf>,
    /// What to show of a download.
    pub report: Report,
    /// Longest wait for a name's address, and again for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for an answer, and for the next bytes of it (`HF_HUB_DOWNLOAD_TIMEOUT`, in seconds).
    pub read_timeout: Duration,
    /// The pauses before each new try after a failure that may pass.
    pub retry_pauses: Vec<Duration>,
    /// Longest wait for another process that downloads the same file and makes no progress.
    pub lock_patience: Duration,
    /// The option that messages advise to give a folder to instead.
    pub named_by: &'static str,
}

impl Environment {
    /// Reads the process's environment. `show_progress` allows output to standard error.
    ///
    /// # Errors
    /// When a value cannot be used, or neither `HF_HOME` nor a home folder is known.
    pub fn from_env(show_progress: bool) -> Result<Self> {
        Environment::from_vars(
            show_progress,
            |name| std::env::var_os(name),
            std::env::home_dir(),
        )
    }

    /// As [`Environment::from_env`], with the variables from `var` and the user's home folder from `home`.
    ///
    /// # Errors
    /// As [`Environment::from_env`].
    pub fn from_vars(
        show_progress: bool,
        var: impl Fn(&str) -> Option<OsString>,
        home: Option<PathBuf>,
    ) -> Result<Self> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| {
            var(name)
                .map(|value| {
                    value
                        .into_string()
                        .ok()
                        .with_context(|| format!("{name}: not UTF-8"))
                })
                .transpose()
        };
        let path = |name: &str| var(name).map(|value| expand_home(value.into(), home.as_ref()));
        let hf_home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(home.as_ref()?.join(".cache/huggingface")))
            .context(
                "no place for the model files: set HF_HOME to a folder (there is no home folder)",
            )?;

        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| PUBLIC_HUB.to_string());
        let endpoint = endpoint.trim().trim_end_matches('/').to_string();
        ensure!(
            endpoint.starts_with("https://") || endpoint.starts_with("http://"),
            "HF_ENDPOINT: expected an address such as {PUBLIC_HUB}, found {endpoint:?}"
        );
        let token = match text("HF_TOKEN")? {
            Some(token) => Some(token.trim().to_string()),
            None => hf_hub::Cache::new(hf_home.join("hub")).token(),
        };
        ensure!(
            token
                .as_ref()
                .is_none_or(|token| token.bytes().all(|b| b.is_ascii_graphic())),
            "HF_TOKEN: expected letters, digits and underscores, as copied from {endpoint}/settings/tokens"
        );
        let read_timeout = match text("HF_HUB_DOWNLOAD_TIMEOUT")? {
            None => 30,
            Some(seconds) => seconds
                .trim()
                .parse()
                .ok()
                .filter(|seconds| *seconds > 0)
                .with_context(|| {
                    format!("HF_HUB_DOWNLOAD_TIMEOUT: expected whole seconds, found {seconds:?}")
                })?,
        };
        Ok(Environment {
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| hf_home.join("hub")),
            endpoint,
            token: token.filter(|token| !token.is_empty()),
            offline: text("HF_HUB_OFFLINE")?.is_some_and(|value| is_true(&value)),
            certificates: path("SSL_CERT_FILE"),
            report: Report::on_stderr(show_progress),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(read_timeout),
            retry_pauses: [500, 1000, 2000, 4000, 8000]
                .map(Duration::from_millis)
                .to_vec(),
            lock_patience: Duration::from_secs(300),
            named_by: "--model",
        })
    }
}

/// The values that `huggingface_hub` takes for yes.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_uppercase().as_str())
}

fn expand_home(path: PathBuf, home: Option<&PathBuf>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

impl fmt::Debug for Environment {
    /// Leaves the token out: debug output ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> Result<Environment> {
        let var = |name: &str| {
            let found = vars.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Environment::from_vars(false, var, Some("/nowhere/me".into()))
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        let cache = |vars: &[(&str, &str)]| settings(vars).unwrap().cache;
        let path = |path: &str| PathBuf::from(path);
        assert_eq!(cache(&[]), path("/nowhere/me/.cache/huggingface/hub"));
        assert_eq!(
            cache(&[("HF_HOME", "")]),
            path("/nowhere/me/.cache/huggingface/hub")
        );
        assert_eq!(
            cache(&[("XDG_CACHE_HOME", "/x")]),
            path("/x/huggingface/hub")
        );
        assert_eq!(
            cache(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")]),
            path("/h/hub")
        );
        assert_eq!(cache(&[("HF_HOME", "~/h")]), path("/nowhere/me/h/hub"));
        assert_eq!(
            cache(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]),
            path("/c")
        );
    }

    #[test]
    fn the_environment_sets_endpoint_token_and_offline() {
        let all = settings(&[
            ("HF_ENDPOINT", "http://127.0.0.1:8080/"),
            ("HF_TOKEN", " hf_abc\n"),
            ("HF_HUB_OFFLINE", "True"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "3"),
        ])
        .unwrap();
        assert_eq!(all.endpoint, "http://127.0.0.1:8080");
        assert_eq!(all.token.as_deref(), Some("hf_abc"));
        assert!(all.offline);
        assert_eq!(all.read_timeout, Duration::from_secs(3));
        assert!(!format!("{all:?}").contains("hf_abc"));

        let none = settings(&[("HF_HUB_OFFLINE", "0")]).unwrap();
        assert_eq!(none.endpoint, PUBLIC_HUB);
        assert!(none.token.is_none() && !none.offline);
    }

    #[test]
    fn the_token_of_a_login_is_used_even_with_another_cache_folder() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_login\n").unwrap();
        let home = home.path().to_str().unwrap();
        let found = settings(&[("HF_HOME", home), ("HF_HUB_CACHE", "/c")]).unwrap();
        assert_eq!(found.token.as_deref(), Some("hf_login"));
    }

    #[test]
    fn a_value_that_cannot_be_used_names_its_variable() {
        for (name, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_TOKEN", "hf abc"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0"),
        ] {
            let error = settings(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}

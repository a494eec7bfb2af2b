//! What a download shows on standard error: bars on a terminal, one line per file elsewhere, or nothing.

use std::io::{IsTerminal, Write};

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where no one reads any more, the download goes on.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// How much to show while downloading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// A bar per file: name, bytes, speed, remaining time.
    Bars,
    /// One line per file.
    Lines,
    /// Nothing.
    Quiet,
}

impl Report {
    /// Bars if standard error is a terminal, else lines; nothing without `show`.
    pub fn on_stderr(show: bool) -> Self {
        match (show, std::io::stderr().is_terminal()) {
            (false, _) => Report::Quiet,
            (true, true) => Report::Bars,
            (true, false) => Report::Lines,
        }
    }

    /// One line on what is going on.
    pub(super) fn note(self, text: &str) {
        if self != Report::Quiet {
            say(text);
        }
    }

    /// Announces a file of `size` bytes.
    pub(super) fn file(self, path: &str, size: Option<u64>) -> ProgressBar {
        let size_text = size.map_or(String::new(), |size| format!(" ({})", HumanBytes(size)));
        if self == Report::Lines {
            say(&format!("downloading {path}{size_text}"));
        }
        if self != Report::Bars {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(size, ProgressDrawTarget::stderr());
        // Name first: within 80 columns there is room for all but the bar.
        let template = match size {
            Some(_) => "{msg} {bytes}/{total_bytes} {bytes_per_sec} {eta} {wide_bar}",
            None => "{msg} {bytes} {bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(path.to_string());
        bar
    }
}

//! `--preview`: a file beside the output that shows the steps so far, replaced as they pass and gone with what it is of.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use sd_upscale::Pixels;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::{self, Depth, Format, Outline};

use crate::open_files::{OpenFiles, Passing};

/// Lines of a picture that are encoded at a time.
const LINES: usize = 64;

/// An item's preview. Dropped, its file is removed.
pub struct Preview {
    path: PathBuf,
    format: Format,
    files: Arc<OpenFiles>,
    state: RefCell<State>,
}

enum State {
    /// No step was shown yet.
    New,
    There {
        _until_dropped: Passing,
    },
    /// It cannot be written, which was said.
    Failed,
}

impl Preview {
    /// A preview that will be at `path`.
    pub fn new(path: PathBuf, format: Format, files: &Arc<OpenFiles>) -> Self {
        Self {
            path,
            format,
            files: files.clone(),
            state: RefCell::new(State::New),
        }
    }

    /// Puts a picture in the place of the one before.
    ///
    /// # Errors
    /// It cannot be written; that is told once, and nothing is written from then on.
    pub fn show(&self, picture: &Pixels) -> Result<()> {
        let mut state = self.state.borrow_mut();
        if matches!(*state, State::Failed) {
            return Ok(());
        }
        let shown = self.replace(&mut state, picture);
        if shown.is_err() {
            *state = State::Failed;
        }
        shown.with_context(|| format!("no preview is written to {}", self.path.display()))
    }

    fn replace(&self, state: &mut State, picture: &Pixels) -> Result<()> {
        let mut file = self.files.create(&self.path)?;
        let mut pieces = picture.values.chunks(3 * picture.width * LINES);
        let mut next = || {
            let piece = pieces.next().map(<[f32]>::to_vec);
            piece.context("a preview has fewer lines than it says")
        };
        let encoded =
            picture::encode_lines(&outline(picture), self.format, None, &mut next, &mut file);
        if let Err(error) = encoded {
            return Err(file.failure().unwrap_or(error));
        }
        if matches!(state, State::New) {
            let passing = match self.files.take_place(&self.path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    bail!("{}", taken(&self.path))
                }
                taken => taken.context("cannot write")?,
            };
            *state = State::There {
                _until_dropped: passing,
            };
        }
        self.files.show(file)
    }
}

/// What is said of a file that is in a preview's place.
pub fn taken(path: &Path) -> String {
    format!(
        "{} is there already, and no preview is written over it: remove it if it was left by a run that was killed",
        path.display()
    )
}

/// An opaque picture of 8 bits of which nothing is said.
fn outline(picture: &Pixels) -> Outline<'static> {
    Outline {
        width: picture.width,
        height: picture.height,
        alpha: None,
        gray: false,
        depth: Depth::Eight,
        metadata: std::borrow::Cow::Owned(Metadata::default()),
    }
}

//! Where the tests' files are.

use std::path::{Path, PathBuf};

/// `relative` within `tests/data`.
pub fn data(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(relative)
}

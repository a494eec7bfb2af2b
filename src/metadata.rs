//! (module metadata)

//! (module hub)

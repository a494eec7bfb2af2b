//! The download path against a small Hub on loopback: what is asked for, what ends up in the cache, and what the
//! user is told when something goes wrong.

mod cache;
mod failures;
mod resume;
mod setup;

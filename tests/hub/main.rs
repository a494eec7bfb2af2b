//! The download path against a small Hub on loopback: what is asked for, what ends up in the cache, and what the
//! user is told when something goes wrong.

mod cache;
mod failures;
#[path = "../common/hub_server.rs"]
mod hub_server;
mod resume;
mod setup;

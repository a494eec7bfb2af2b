//! The library: files in and out, damaged ones, the Hub's files.

mod configuration;
#[path = "../common/damage.rs"]
mod damage;
mod damaged;
#[path = "../common/data.rs"]
mod data;
mod examples;
mod house;
mod hub;
#[path = "../common/hub_server.rs"]
mod hub_server;
mod latents;
mod pictures;
mod samples;
mod written;

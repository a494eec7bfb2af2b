//! The library: files in and out, damaged ones, the Hub's files.

mod bounds;
mod config;
mod corpus;
#[path = "../common/damage.rs"]
mod damage;
mod damaged;
#[path = "../common/data.rs"]
mod data;
mod examples;
mod exiftool;
mod heif;
mod house;
mod hub;
#[path = "../common/hub_server.rs"]
mod hub_server;
mod jxl;
mod latents;
mod lines;
mod odd;
mod pictures;
mod samples;
mod written;

//! The program itself, as people and scripts meet it: arguments and files in; exit code, files and messages out.
//! All on the small model in `tests/data/model`, on the CPU.

mod configuration;
mod convert;
#[path = "../common/damage.rs"]
mod damage;
mod damaged;
#[path = "../common/data.rs"]
mod data;
mod effects;
mod embeds;
mod environment;
mod fidelity;
mod folders;
mod generate;
mod grid;
mod hub;
#[path = "../common/hub_server.rs"]
mod hub_server;
#[cfg(target_os = "linux")]
mod interrupts;
mod json_lines;
mod latents;
mod memory;
mod original;
#[cfg(target_os = "linux")]
mod outputs;
mod pipes;
mod preview;
#[cfg(target_os = "linux")]
mod recipes;
mod reference;
mod refusals;
mod samplers;
mod scale;
mod setup;
mod shell;
mod sizes;
mod spellings;
mod taesd;
mod tiny;
#[cfg(target_os = "linux")]
mod watch;

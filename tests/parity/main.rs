//! Every stage and the whole against diffusers' numbers, the samplers against k-diffusion's (tests/data/make_reference.py).
//!
//! Tolerances: two float32 programs that sum in another order differ by about 1e-6 relative at the end of a stage, 1e-6
//! at most is seen. `STAGE` leaves room for other processors' summation orders (Winograd's convolutions reach 7e-6) and is
//! a tenth of what the smallest mistake in a formula does: GELU by tanh in place of erf, 2.2e-4 in the UNet's output
//! (`make_reference.py --check`).

mod bands;
mod base;
mod card;
mod common;
#[path = "../common/data.rs"]
mod data;
mod embeds;
mod layers;
mod networks;
mod oracle;
mod original;
mod passes;
mod precision;
mod samplers;
mod sampling;
mod single_file;
mod taesd;
mod text;
mod whole;

const STAGE: f64 = 2e-5;
/// Twenty steps of a stiff equation amplify the difference of a stage by about ten.
const FINAL_LATENTS: f64 = 1e-3;

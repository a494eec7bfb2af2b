//! (module latents)

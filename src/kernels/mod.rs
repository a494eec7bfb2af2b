//! What the layers are computed with: a room a kind of device.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

/// An elementwise activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    #[default]
    None,
    /// Exact, by the error function: `x / 2 * (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * sigmoid(1.702 x)`, CLIP's.
    QuickGelu,
    /// `max(x, 0)`; what is not a number stays so.
    Relu,
}

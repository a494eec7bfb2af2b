//! By what one input is made several outputs.

/// The settings that may have several values in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Variant {
    /// For `{seed}` in names.
    pub seed: u64,
    /// For `{guidance}` in names.
    pub guidance: f64,
}

impl Default for Variant {
    fn default() -> Self {
        Self {
            seed: 0,
            guidance: 1.0,
        }
    }
}

/// Which settings do have several values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Several {
    pub seeds: bool,
    pub guidances: bool,
}

impl Several {
    pub fn of(variants: &[Variant]) -> Self {
        let differ = |same: fn(&Variant, &Variant) -> bool| {
            variants.iter().any(|variant| !same(variant, &variants[0]))
        };
        Self {
            seeds: differ(|a, b| a.seed == b.seed),
            guidances: differ(|a, b| a.guidance == b.guidance),
        }
    }
}

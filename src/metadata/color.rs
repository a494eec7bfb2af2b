//! The colour space that a PNG states without an ICC profile: the chunks gAMA, cHRM, sRGB and cICP. Kept in PNG; a profile
//! that says the same elsewhere.

use moxcms::{
    Chromaticity, CicpColorPrimaries, ColorPrimaries, ColorProfile, ToneReprCurve,
    TransferCharacteristics,
};

/// What the chunks state; the first of cICP, (an ICC profile,) sRGB, and gAMA with cHRM counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatedColor {
    /// gAMA: the encoding exponent times 100,000 (45,455 is sRGB's).
    pub gamma: Option<u32>,
    /// cHRM: x and y of white, red, green and blue, times 100,000.
    pub chromaticities: Option<[u32; 8]>,
    /// sRGB: the rendering intent.
    pub srgb: Option<u8>,
    /// cICP: primaries, transfer, matrix and range by their numbers in ITU-T H.273.
    pub cicp: Option<[u8; 4]>,
}

/// sRGB's own values, as PNG's specification gives them.
const SRGB_GAMMA: u32 = 45_455;
const SRGB_CHROMATICITIES: [u32; 8] = [
    31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000,
];
/// Primaries and transfer function of sRGB in H.273.
const SRGB_CICP: (u8, u8) = (1, 13);
/// What may differ without a difference to be seen: 1 %.
const NEAR: u32 = 500;

impl StatedColor {
    /// From a PNG's chunks; `None` where it has none of them.
    pub(crate) fn from_png(info: &png::Info) -> Option<Self> {
        let pair =
            |(x, y): (png::ScaledFloat, png::ScaledFloat)| [x.into_scaled(), y.into_scaled()];
        let stated = Self {
            gamma: info.gama_chunk.map(png::ScaledFloat::into_scaled),
            chromaticities: info.chrm_chunk.and_then(|c| {
                [c.white, c.red, c.green, c.blue]
                    .map(pair)
                    .concat()
                    .try_into()
                    .ok()
            }),
            srgb: info.srgb.map(|intent| intent as u8),
            cicp: info.coding_independent_code_points.map(|c| {
                [
                    c.color_primaries,
                    c.transfer_function,
                    c.matrix_coefficients,
                    u8::from(c.is_video_full_range_image),
                ]
            }),
        };
        (stated != Self::default()).then_some(stated)
    }

    /// The chunks, by name.
    pub(crate) fn chunks(&self) -> Vec<([u8; 4], Vec<u8>)> {
        let mut chunks = Vec::new();
        chunks.extend(self.cicp.map(|numbers| (*b"cICP", numbers.to_vec())));
        chunks.extend(self.srgb.map(|intent| (*b"sRGB", vec![intent])));
        chunks.extend(
            self.gamma
                .map(|gamma| (*b"gAMA", gamma.to_be_bytes().to_vec())),
        );
        chunks.extend(
            self.chromaticities
                .map(|c| (*b"cHRM", c.map(u32::to_be_bytes).concat())),
        );
        chunks
    }

    /// Whether it is what pictures are taken for that state nothing.
    pub(crate) fn is_srgb(&self) -> bool {
        if let Some([primaries, transfer, ..]) = self.cicp {
            return (primaries, transfer) == SRGB_CICP;
        }
        let near = |a: u32, b: u32| a.abs_diff(b) <= NEAR;
        let gamma = self.gamma.is_none_or(|gamma| near(gamma, SRGB_GAMMA));
        let colors = self
            .chromaticities
            .is_none_or(|c| c.iter().zip(SRGB_CHROMATICITIES).all(|(&a, b)| near(a, b)));
        self.srgb.is_some() || (gamma && colors)
    }

    /// An ICC profile of the same meaning, for grey or RGB pixels. `None` where none is needed, or the values make none.
    pub(crate) fn profile(&self, gray: bool) -> Option<Vec<u8>> {
        if self.is_srgb() {
            return None;
        }
        // gAMA is what linear light was raised to; a curve is the way back.
        let exponent = self
            .gamma
            .filter(|gamma| (1_000..=1_000_000).contains(gamma))
            .map(|gamma| 1e5 / gamma as f32);
        let mut profile = ColorProfile::new_srgb();
        if let Some(numbers) = self.cicp {
            if gray {
                return None;
            }
            apply(&mut profile, numbers)?;
        } else if gray {
            profile = ColorProfile::new_gray_with_gamma(exponent?);
        } else {
            if let Some(c) = self.chromaticities {
                let point = |i: usize| Chromaticity::new(c[i] as f32 / 1e5, c[i + 1] as f32 / 1e5);
                if c.chunks_exact(2).any(|xy| xy[1] == 0) {
                    return None;
                }
                let primaries = ColorPrimaries {
                    red: point(2),
                    green: point(4),
                    blue: point(6),
                };
                profile.update_rgb_colorimetry(point(0).to_xyyb(), primaries);
            }
            if let Some(exponent) = exponent {
                set_curve(&mut profile, ToneReprCurve::Parametric(vec![exponent]));
            }
        }
        profile.cicp = None;
        profile.encode().ok()
    }
}

/// Gives a profile the primaries and the transfer function of cICP's numbers; `None` where they name none.
fn apply(profile: &mut ColorProfile, [primaries, transfer, _, range]: [u8; 4]) -> Option<()> {
    // Whites other than D65 (H.273, Table 2) belong to film and to television before 1970.
    let d65 = [1, 5, 6, 7, 9, 12, 22].contains(&primaries);
    if range != 1 || !d65 {
        return None;
    }
    let primaries = CicpColorPrimaries::try_from(primaries).ok()?;
    let transfer = TransferCharacteristics::try_from(transfer).ok()?;
    let curve = ToneReprCurve::try_from(transfer).ok()?;
    let primaries = ColorPrimaries::try_from(primaries).ok()?;
    profile.update_rgb_colorimetry(Chromaticity::D65.to_xyyb(), primaries);
    set_curve(profile, curve);
    Some(())
}

fn set_curve(profile: &mut ColorProfile, curve: ToneReprCurve) {
    profile.red_trc = Some(curve.clone());
    profile.green_trc = Some(curve.clone());
    profile.blue_trc = Some(curve);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_srgb_needs_no_profile_and_what_is_not_gets_one_of_the_same_curve() {
        let srgb = StatedColor {
            gamma: Some(45_455),
            chromaticities: Some(SRGB_CHROMATICITIES),
            ..StatedColor::default()
        };
        assert!(srgb.is_srgb() && srgb.profile(false).is_none());
        let linear = StatedColor {
            gamma: Some(100_000),
            ..StatedColor::default()
        };
        for gray in [false, true] {
            let profile = ColorProfile::new_from_slice(&linear.profile(gray).unwrap()).unwrap();
            let curve = if gray {
                profile.gray_trc
            } else {
                profile.red_trc
            };
            match curve.unwrap() {
                ToneReprCurve::Parametric(values) => {
                    assert!((values[0] - 1.0).abs() < 1e-3, "{values:?}")
                }
                ToneReprCurve::Lut(values) => {
                    assert!(values.is_empty() || values[0] == 256, "{values:?}")
                }
            }
        }
        let display_p3 = StatedColor {
            cicp: Some([12, 13, 0, 1]),
            ..StatedColor::default()
        };
        let profile = display_p3.profile(false).unwrap();
        assert_eq!(&profile[16..20], b"RGB ");
        let profile = ColorProfile::new_from_slice(&profile).unwrap();
        // Display P3's red, adapted to D50, as Apple's profile has it.
        assert!(
            (profile.red_colorant.x - 0.5151).abs() < 1e-3,
            "{:?}",
            profile.red_colorant
        );
    }
}

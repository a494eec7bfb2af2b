//! How many pixels a printed length takes: PNG's pHYs, JFIF's density, a BMP's pixels per metre, TIFF's resolution.

use super::exif::{ByteOrder, Directory, Exif};

/// Pixels per metre, or nothing but the ratio of a pixel's sides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Density {
    /// Across and down.
    PerMeter(f64, f64),
    /// A pixel is as wide to as high as the second is to the first.
    Ratio(f64, f64),
}

/// Inches in a metre.
const INCHES: f64 = 1.0 / 0.0254;
/// EXIF's and TIFF's fields of the main directory, and the values of the unit.
const X_RESOLUTION: u16 = 0x011A;
const Y_RESOLUTION: u16 = 0x011B;
const UNIT: u16 = 0x0128;
const NO_UNIT: u16 = 1;
const INCH: u16 = 2;
const CENTIMETER: u16 = 3;

impl Density {
    /// `None` where a number is zero, negative or none: many programs write such.
    fn sound(self) -> Option<Self> {
        let (Self::PerMeter(x, y) | Self::Ratio(x, y)) = self;
        let plain = |v: f64| v.is_finite() && v > 0.0 && v < 1e9;
        // Square pixels without a size say nothing.
        let says = !matches!(self, Self::Ratio(..)) || x != y;
        (plain(x) && plain(y) && says).then_some(self)
    }

    /// PNG's pHYs.
    pub(crate) fn from_png(info: &png::Info) -> Option<Self> {
        let stated = info.pixel_dims?;
        let (x, y) = (f64::from(stated.xppu), f64::from(stated.yppu));
        match stated.unit {
            png::Unit::Meter => Self::PerMeter(x, y),
            png::Unit::Unspecified => Self::Ratio(x, y),
        }
        .sound()
    }

    /// As PNG's pHYs.
    pub(crate) fn to_png(self) -> png::PixelDimensions {
        let (Self::PerMeter(x, y) | Self::Ratio(x, y)) = self;
        png::PixelDimensions {
            xppu: x.round() as u32,
            yppu: y.round() as u32,
            unit: match self {
                Self::PerMeter(..) => png::Unit::Meter,
                Self::Ratio(..) => png::Unit::Unspecified,
            },
        }
    }

    /// JFIF's segment, without its length.
    pub(crate) fn from_jfif(payload: &[u8]) -> Option<Self> {
        let [_, _, unit, x0, x1, y0, y1, ..] = *payload.strip_prefix(b"JFIF\0")? else {
            return None;
        };
        let (x, y) = (
            f64::from(u16::from_be_bytes([x0, x1])),
            f64::from(u16::from_be_bytes([y0, y1])),
        );
        match unit {
            0 => Self::Ratio(x, y),
            1 => Self::PerMeter(x * INCHES, y * INCHES),
            2 => Self::PerMeter(x * 100.0, y * 100.0),
            _ => return None,
        }
        .sound()
    }

    /// JFIF's unit and whole numbers: of dots an inch, or a centimetre where these come nearer. `None` where they do not
    /// fit.
    pub(crate) fn to_jfif(self) -> Option<(u8, u16, u16)> {
        let whole = |v: f64| (0.5..65535.5).contains(&v).then_some(v.round() as u16);
        let error = |x: f64, y: f64| (x - x.round()).abs() + (y - y.round()).abs();
        match self {
            Self::Ratio(x, y) => Some((0, whole(x)?, whole(y)?)),
            Self::PerMeter(x, y) => {
                let (inch, centimeter) = ((x / INCHES, y / INCHES), (x / 100.0, y / 100.0));
                // PNG's pixels per metre are whole: 72 an inch becomes 2835, which is 72.009.
                let (unit, (x, y)) = if error(inch.0, inch.1) < 0.05
                    || error(inch.0, inch.1) <= error(centimeter.0, centimeter.1)
                {
                    (1, inch)
                } else {
                    (2, centimeter)
                };
                Some((unit, whole(x)?, whole(y)?))
            }
        }
    }

    /// A BMP's header.
    pub(crate) fn from_bmp(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        if number(14)? < 40 {
            return None;
        }
        Self::PerMeter(f64::from(number(38)?), f64::from(number(42)?)).sound()
    }

    /// Puts it into a BMP's header of 40 bytes or more.
    pub(crate) fn into_bmp(self, bytes: &mut [u8]) {
        if let Self::PerMeter(x, y) = self {
            for (at, value) in [(38, x), (42, y)] {
                if let Some(place) = bytes.get_mut(at..at + 4) {
                    place.copy_from_slice(&(value.round() as u32).to_le_bytes());
                }
            }
        }
    }

    /// The fields that EXIF and TIFF share.
    pub(crate) fn from_exif(exif: &Exif) -> Option<Self> {
        let value = |tag| exif.field(Directory::Main, tag).map(|field| &*field.value);
        let number = |bytes: &[u8]| {
            let push = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
            match exif.order {
                ByteOrder::Big => bytes.iter().fold(0, push),
                ByteOrder::Little => bytes.iter().rev().fold(0, push),
            }
        };
        let ratio = |tag| {
            let bytes = value(tag).filter(|v| v.len() == 8)?;
            Some(number(&bytes[..4]) as f64 / number(&bytes[4..]) as f64)
        };
        let (x, y) = (ratio(X_RESOLUTION)?, ratio(Y_RESOLUTION)?);
        let unit = value(UNIT)
            .filter(|v| v.len() == 2)
            .map_or(u64::from(INCH), number);
        match unit as u16 {
            NO_UNIT => Self::Ratio(x, y),
            CENTIMETER => Self::PerMeter(x * 100.0, y * 100.0),
            _ => Self::PerMeter(x * INCHES, y * INCHES),
        }
        .sound()
    }

    /// Puts it into a block that states none.
    pub(crate) fn into_exif(self, exif: &mut Exif) {
        if exif.field(Directory::Main, X_RESOLUTION).is_some() {
            return;
        }
        const RATIONAL: u16 = 5;
        const SHORT: u16 = 3;
        let (unit, x, y) = match self {
            Self::PerMeter(x, y) => (INCH, x / INCHES, y / INCHES),
            Self::Ratio(x, y) => (NO_UNIT, x, y),
        };
        let order = exif.order;
        let ordered = |bytes: Vec<u8>| match order {
            ByteOrder::Big => bytes,
            ByteOrder::Little => bytes.into_iter().rev().collect(),
        };
        let ratio = |v: f64| {
            // Whole numbers of dots as such, through pHYs and back; others to a thousandth.
            let (top, bottom) = if (v - v.round()).abs() < 0.02 {
                (v.round(), 1u32)
            } else {
                ((v * 1e3).round(), 1000)
            };
            [
                ordered((top as u32).to_be_bytes().to_vec()),
                ordered(bottom.to_be_bytes().to_vec()),
            ]
            .concat()
        };
        exif.set(Directory::Main, X_RESOLUTION, RATIONAL, ratio(x));
        exif.set(Directory::Main, Y_RESOLUTION, RATIONAL, ratio(y));
        exif.set(
            Directory::Main,
            UNIT,
            SHORT,
            ordered(unit.to_be_bytes().to_vec()),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_an_inch_survive_every_format() {
        let jfif = b"JFIF\0\x01\x02\x01\x01\x2C\x01\x2C\0\0";
        let density = Density::from_jfif(jfif).unwrap();
        assert_eq!(density.to_jfif(), Some((1, 300, 300)));
        let png = density.to_png();
        assert_eq!((png.xppu, png.yppu), (11811, 11811));
        let through_png = Density::PerMeter(f64::from(png.xppu), f64::from(png.yppu));
        assert_eq!(through_png.to_jfif(), Some((1, 300, 300)));
        for order in [ByteOrder::Big, ByteOrder::Little] {
            let mut exif = Exif::new(order);
            through_png.into_exif(&mut exif);
            assert_eq!(
                Density::from_exif(&exif).unwrap().to_jfif(),
                Some((1, 300, 300))
            );
        }
        let mut bmp = vec![0; 54];
        bmp[14] = 40;
        density.into_bmp(&mut bmp);
        assert_eq!(
            Density::from_bmp(&bmp).unwrap().to_jfif(),
            Some((1, 300, 300))
        );
    }

    #[test]
    fn square_pixels_of_no_size_and_zeros_say_nothing() {
        assert_eq!(
            Density::from_jfif(b"JFIF\0\x01\x02\0\0\x01\0\x01\0\0"),
            None
        );
        assert_eq!(Density::from_jfif(b"JFIF\0\x01\x02\x01\0\0\0\0\0\0"), None);
        let ratio = Density::from_jfif(b"JFIF\0\x01\x02\0\0\x02\0\x01\0\0").unwrap();
        assert_eq!(ratio.to_jfif(), Some((0, 2, 1)));
    }
}

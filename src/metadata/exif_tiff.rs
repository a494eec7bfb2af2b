//! EXIF out of a TIFF file's own directories, and into those of one that is written.

use crate::metadata::exif::{ByteOrder, EXIF_IFD, Exif, Field, GPS_IFD, MAKE, MODEL, unit};

/// Points to a directory that few write and none read; not carried into another file's structure.
const INTEROP_IFD: u16 = 0xA005;

/// Descriptive tags that a TIFF's main directory shares with EXIF's: what, who, when, with what, resolution.
const DESCRIPTIVE: [u16; 10] = [
    0x010E, MAKE, MODEL, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x8298,
];

impl Exif {
    /// What a TIFF file's directories say about the picture (not about its storage), as an EXIF block.
    pub fn from_tiff(file: &[u8]) -> Option<Self> {
        let tiff = Self::parse(file)?;
        let mut exif = Self::new(tiff.order);
        for field in tiff.fields(tiff.main()?)? {
            if DESCRIPTIVE.contains(&field.tag) {
                exif.set(
                    None,
                    field.tag,
                    field.kind,
                    tiff.value(field).unwrap_or_default(),
                );
            }
        }
        for directory in [EXIF_IFD, GPS_IFD] {
            let fields = tiff.directory(directory).and_then(|at| tiff.fields(at));
            for field in fields
                .into_iter()
                .flatten()
                .filter(|f| f.tag != INTEROP_IFD)
            {
                exif.set(
                    Some(directory),
                    field.tag,
                    field.kind,
                    tiff.value(field).unwrap_or_default(),
                );
            }
        }
        let any = exif
            .main()
            .and_then(|at| exif.fields(at))
            .is_some_and(|f| !f.is_empty());
        any.then_some(exif)
    }

    /// The fields that a TIFF file written on this machine can take over: tag, type, and value in its byte order.
    /// `directory` is [`EXIF_IFD`], [`GPS_IFD`], or `None` for the descriptive ones of the main directory.
    pub fn for_tiff(&self, directory: Option<u16>) -> Vec<(u16, u16, Vec<u8>)> {
        let at = directory.map_or(self.main(), |tag| self.directory(tag));
        let fields = at.and_then(|at| self.fields(at)).unwrap_or_default();
        let wanted = |f: &Field| match directory {
            None => DESCRIPTIVE.contains(&f.tag),
            Some(_) => f.tag != INTEROP_IFD,
        };
        let convert = |f: Field| {
            let mut value = self.value(f)?.to_vec();
            if self.order != ByteOrder::NATIVE {
                value
                    .chunks_exact_mut(number(f.kind))
                    .for_each(<[u8]>::reverse);
            }
            Some((f.tag, f.kind, value))
        };
        fields
            .into_iter()
            .filter(wanted)
            .filter_map(convert)
            .collect()
    }
}

/// Bytes of the numbers in it: a rational is two.
fn number(kind: u16) -> usize {
    match kind {
        5 | 10 => 4,
        other => unit(other).unwrap_or(1),
    }
}

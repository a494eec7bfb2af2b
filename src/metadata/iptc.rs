//! IPTC records (captions, credits, keywords), and the Photoshop resource that a JPEG keeps them in.

/// What begins an APP13 segment of Photoshop's.
pub(crate) const PHOTOSHOP: &[u8] = b"Photoshop 3.0\0";
/// The resource of IPTC records.
const RECORDS: u16 = 0x0404;

/// The records in a block of Photoshop's resources. The others describe the old pixels (a thumbnail, paths, guides).
pub(crate) fn from_resources(mut block: &[u8]) -> Option<Vec<u8>> {
    while let Some(rest) = block.strip_prefix(b"8BIM") {
        let id = u16::from_be_bytes(rest.get(..2)?.try_into().ok()?);
        // A name of one length byte, padded to an even number with it.
        let name = (1 + usize::from(*rest.get(2)?)).next_multiple_of(2);
        let rest = rest.get(2 + name..)?;
        let length = u32::from_be_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let data = rest.get(4..)?.get(..length)?;
        if id == RECORDS {
            return (!data.is_empty()).then(|| data.to_vec());
        }
        block = rest.get(4 + length.next_multiple_of(2)..)?;
    }
    None
}

/// A block with nothing but records.
pub(crate) fn to_resources(records: &[u8]) -> Vec<u8> {
    let mut block = [
        b"8BIM",
        &RECORDS.to_be_bytes()[..],
        &[0, 0],
        &(records.len() as u32).to_be_bytes(),
        records,
    ]
    .concat();
    block.resize(block.len().next_multiple_of(2), 0);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_behind_other_resources_and_damage_gives_none() {
        let other = b"8BIM\x04\x25\x03abc\0\0\0\x01x\0";
        let block = [&other[..], &to_resources(b"\x1c\x02\x78\0\x01a")].concat();
        assert_eq!(from_resources(&block).unwrap(), b"\x1c\x02\x78\0\x01a");
        for end in 0..block.len() - 1 {
            assert_eq!(from_resources(&block[..end]), None, "{end}");
        }
    }
}

//! A stable share of the inputs, so that several machines spread a folder with nothing to agree on but a number.

use std::path::Path;
use std::str::FromStr;

use super::UsageError;

/// Share `index` (from 0) of `count`. Parsed from `I/N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: u64,
    count: u64,
}

impl Shard {
    /// Whether the input at `relative` belongs to this share: its hash modulo the count is the index. It depends on
    /// nothing but the path, so shares stay the same on every platform and whatever else the folder holds.
    pub fn holds(&self, relative: &Path) -> bool {
        hash(relative) % self.count == self.index
    }
}

impl FromStr for Shard {
    type Err = UsageError;

    fn from_str(text: &str) -> Result<Self, UsageError> {
        let parts = text.split_once('/').map(|(i, n)| (i.parse(), n.parse()));
        let Some((Ok(index), Ok(count))) = parts else {
            return Err(UsageError(format!(
                "`{text}` is not of the form I/N, such as 0/4 (I counts from 0)"
            )));
        };
        if count == 0 {
            return Err(UsageError(format!(
                "`{text}`: N is the number of shares, at least 1"
            )));
        }
        if index >= count {
            let last = count - 1;
            return Err(UsageError(format!(
                "`{text}`: I counts from 0, so the {count} shares are 0/{count} to {last}/{count}"
            )));
        }
        Ok(Self { index, count })
    }
}

/// FNV-1a (64 bits; offset and prime from isthe.com/chongo/tech/comp/fnv) of the path's UTF-8 bytes with `/` between its parts, the upper
/// half folded onto the lower one, since FNV's low bits alone see only the low bits of each byte.
fn hash(relative: &Path) -> u64 {
    let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in parts.join("/").bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_part_the_inputs_evenly() {
        let paths: Vec<String> = (0..1000).map(|i| format!("set/img{i:04}.png")).collect();
        for count in [1, 2, 3, 4, 7, 8, 16] {
            let shards: Vec<Shard> = (0..count).map(|index| Shard { index, count }).collect();
            let mut sizes = vec![0u64; count as usize];
            for path in &paths {
                let holders: Vec<_> = shards.iter().filter(|s| s.holds(Path::new(path))).collect();
                assert_eq!(holders.len(), 1, "{path} of {count}");
                sizes[holders[0].index as usize] += 1;
            }
            // Five standard deviations of a fair draw: far more than any sound hash strays.
            let mean = 1000.0 / count as f64;
            let slack = 5.0 * (mean * (1.0 - 1.0 / count as f64)).sqrt();
            for size in &sizes {
                assert!((*size as f64 - mean).abs() <= slack, "{count}: {sizes:?}");
            }
        }
    }

    /// Worked out outside this program (FNV-1a in Python). A change here would make running arrays redo and miss files.
    #[test]
    fn shares_never_change() {
        assert_eq!(hash(Path::new("img0001.png")), 0x6efe_b95a_5a3a_fb24);
        assert_eq!(
            hash(&Path::new("sub").join("b").join("é.jpg")),
            0x7a5b_6ca7_6ad8_6f73
        );
    }

    #[test]
    fn a_share_out_of_range_is_told_that_counting_starts_at_0() {
        let error = |text: &str| text.parse::<Shard>().unwrap_err().to_string();
        assert!(error("4/4").contains("counts from 0"), "{}", error("4/4"));
        assert!(error("4/4").contains("0/4 to 3/4"), "{}", error("4/4"));
        assert!(error("0/0").contains("at least 1"));
        for text in ["", "3", "/", "a/4", "-1/4", "0/4/2", "0 / 4", "/8"] {
            assert!(error(text).contains("I/N"), "{text}");
        }
        assert_eq!("3/4".parse(), Ok(Shard { index: 3, count: 4 }));
    }
}

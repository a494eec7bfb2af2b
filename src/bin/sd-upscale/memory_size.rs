//! `--max-memory`: amounts of memory as people write them.

/// What a suffix multiplies by, decimal and binary.
const UNITS: [(&str, u128); 9] = [
    ("KB", 1000),
    ("MB", 1000_u128.pow(2)),
    ("GB", 1000_u128.pow(3)),
    ("TB", 1000_u128.pow(4)),
    ("KIB", 1 << 10),
    ("MIB", 1 << 20),
    ("GIB", 1 << 30),
    ("TIB", 1 << 40),
    ("B", 1),
];

/// `8GB`, `600MiB`, `1.5GB` or a number of bytes, as bytes. Case does not matter. A letter without its B is refused: some programs
/// mean 1000 by it and some 1024.
///
/// # Errors
/// It is nothing of the kind, nothing at all, or more than can be counted.
pub fn parse(text: &str) -> Result<u64, String> {
    bytes(text).ok_or_else(|| {
        "expected an amount above 0 such as 8GB, 1.5GB or 600MiB (KB, MB, GB, TB of 1000s; KiB, MiB, GiB, TiB of 1024s), or \
         a number of bytes"
            .into()
    })
}

fn bytes(text: &str) -> Option<u64> {
    let upper = text.trim().to_ascii_uppercase();
    let end = upper.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = upper.split_at(end.unwrap_or(upper.len()));
    let unit = match unit.trim_start() {
        "" => 1,
        name => UNITS.iter().find(|(unit, _)| *unit == name)?.1,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| text.parse::<u64>().ok().map(u128::from);
    let of_fraction = digits(fraction)? * unit / 10_u128.checked_pow(fraction.len() as u32)?;
    let bytes = digits(whole)?.checked_mul(unit)? + of_fraction;
    u64::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_people_write_them() {
        for (text, expected) in [
            ("8GB", 8_000_000_000),
            ("600MiB", 600 << 20),
            ("1.5GB", 1_500_000_000),
            ("800MB", 800_000_000),
            ("1.1GB", 1_100_000_000),
            ("0.5GiB", 1 << 29),
            ("2TiB", 2 << 40),
            ("3tb", 3_000_000_000_000),
            ("64KiB", 65536),
            ("64kb", 64000),
            ("4 GB", 4_000_000_000),
            (" 4GB ", 4_000_000_000),
            ("4000000000", 4_000_000_000),
            ("512B", 512),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            " ",
            "GB",
            "8G",
            "8g",
            "8Gi",
            "8GBs",
            "8 G B",
            "-8GB",
            "+8GB",
            "0",
            "0GB",
            "0.0001KB",
            "1e9",
            "1,5GB",
            "1.GB",
            ".5GB",
            "1.5.5GB",
            "nan",
            "inf",
            "0x10",
            "8EB",
            "half",
            "50%",
            "18446744073709551616",
            "16777217TiB",
            "1.00000000000000000000000000000000000000001GB",
            "٣GB",
        ] {
            let refused = parse(text).expect_err(text);
            assert!(refused.contains("8GB, 1.5GB or 600MiB"), "{text}");
        }
    }
}

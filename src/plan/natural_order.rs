//! The order people expect of numbered files: img2 before img10.

use std::cmp::Ordering;
use std::ffi::OsStr;

/// Compares file names: runs of digits as numbers of any length, other characters without regard to case; names equal
/// so far (`a1` and `A01`) by their bytes. A total order.
pub fn compare(a: &OsStr, b: &OsStr) -> Ordering {
    by_value(&a.to_string_lossy(), &b.to_string_lossy()).then_with(|| a.cmp(b))
}

fn by_value(mut a: &str, mut b: &str) -> Ordering {
    loop {
        let (left, right) = (leading_digits(a), leading_digits(b));
        let order = if !left.is_empty() && !right.is_empty() {
            (a, b) = (&a[left.len()..], &b[right.len()..]);
            let left = left.trim_start_matches('0');
            let right = right.trim_start_matches('0');
            left.len().cmp(&right.len()).then_with(|| left.cmp(right))
        } else {
            let (mut left, mut right) = (a.chars(), b.chars());
            let order = match (left.next(), right.next()) {
                (None, None) => return Ordering::Equal,
                (Some(x), Some(y)) => x.to_lowercase().cmp(y.to_lowercase()),
                (x, y) => x.cmp(&y),
            };
            (a, b) = (left.as_str(), right.as_str());
            order
        };
        if order.is_ne() {
            return order;
        }
    }
}

fn leading_digits(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_digit());
    &text[..end.unwrap_or(text.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_as_numbers_and_case_only_breaks_ties() {
        let sorted = [
            "1.png",
            "2.png",
            "010.png",
            "10.png",
            "a-2.png",
            "A.png",
            "a.png",
            "a1b2.png",
            "a1b10.png",
            "B.png",
            "img.png",
            "IMG1.png",
            "img2.png",
            "img10.png",
            "img99999999999999999999999.png",
            "img100000000000000000000000.png",
            "z.png",
            "é.png",
        ];
        // Every pair, both ways round: also shows that the order is consistent.
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                let order = compare(OsStr::new(a), OsStr::new(b));
                assert_eq!(order, i.cmp(&j), "{a} against {b}");
            }
        }
    }
}

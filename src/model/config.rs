//! A model's configuration files: read so that a wrong value is named by its key, and held to what a model can have.

use std::ops::RangeInclusive;

use anyhow::{Result, anyhow, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The largest width, in channels or features, that a configuration may state: four times the widest that is published.
pub(crate) const MOST_CHANNELS: usize = 1 << 16;
/// The most layers of one kind that a configuration may state.
pub(crate) const MOST_LAYERS: usize = 1 << 10;
/// The most levels, each of half the side of the one before: sides are multiples of 2 to the power of this less 1.
pub(crate) const MOST_LEVELS: usize = 10;
/// What a norm adds to a variance: above what vanishes in float32, and no more than the variance itself.
pub(crate) const EPS: RangeInclusive<f64> = 1e-20..=1.0;

/// Holds a configuration's number to a range, so that sizes and loops made of it stay what a model can have.
///
/// # Errors
/// It lies outside, or is no number; the message names `key`, such as `unet/config.json: out_channels`.
pub(crate) fn within<T: PartialOrd + std::fmt::Debug>(
    key: &str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<()> {
    ensure!(
        range.contains(&value),
        "{key} is {value:?}; expected {:?} to {:?}",
        range.start(),
        range.end()
    );
    Ok(())
}

/// Reads JSON into a type; `name` is the file's in messages.
///
/// # Errors
/// It is not JSON, or a value is not of the kind that `T` wants; the message names its key.
pub(super) fn from_json<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| match wrong_key::<T>(bytes) {
        Some((key, error)) => anyhow!("{name}: {}: {}", shortened(&key), shortened(&error)),
        None => anyhow!(
            "{name}: not the configuration expected here: {}",
            shortened(&error.to_string())
        ),
    })
}

/// The first key whose value alone keeps an object from being a `T`, and what is wrong with it. serde's own message names
/// a line at best.
fn wrong_key<T: DeserializeOwned>(bytes: &[u8]) -> Option<(String, String)> {
    let Value::Object(fields) = serde_json::from_slice(bytes).ok()? else {
        return None;
    };
    fields.into_iter().find_map(|(key, value)| {
        let alone = Map::from_iter([(key.clone(), value)]);
        let error = serde_json::from_value::<T>(Value::Object(alone)).err()?;
        let error = error.to_string();
        (!error.starts_with("missing field")).then_some((key, error))
    })
}

/// A text of a file's own as it may stand in a message.
pub(super) fn shortened(text: &str) -> String {
    const MOST: usize = 160;
    let line: String = text.chars().take(MOST).collect();
    let line = line.replace(char::is_control, " ");
    match text.chars().nth(MOST) {
        Some(_) => line + "...",
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Config {
        #[allow(dead_code, reason = "read through `Debug` alone")]
        width: usize,
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_named_by_its_key_in_one_line() {
        for (value, what) in [
            ("1e308", "floating point"),
            ("-1", "integer `-1`"),
            ("null", "null"),
            ("[]", "sequence"),
            (r#""text""#, "string \"text\""),
        ] {
            let json = format!(r#"{{"a": 1, "width": {value}, "z": []}}"#);
            let error = from_json::<Config>("unet/config.json", json.as_bytes()).unwrap_err();
            let error = error.to_string();
            let named = error.starts_with("unet/config.json: width: invalid");
            assert!(named && error.contains(what), "{error}");
        }
        let long = format!(r#"{{"width": "{}\n"}}"#, "x".repeat(9999));
        let error = from_json::<Config>("a", long.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.len() < 200 && !error.contains('\n'), "{error}");
        let error = from_json::<Config>("a", b"[").unwrap_err().to_string();
        assert!(error.contains("not the configuration"), "{error}");
    }

    #[test]
    fn numbers_that_are_none_lie_in_no_range() {
        assert!(within("a: b", 3, 1..=3).is_ok());
        assert_eq!(
            within("a: b", 4, 1..=3).unwrap_err().to_string(),
            "a: b is 4; expected 1 to 3"
        );
        for value in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1e308, 1e-30] {
            assert!(within("a: b", value, EPS).is_err(), "{value}");
        }
    }
}

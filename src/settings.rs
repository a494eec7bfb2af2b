//! What we did to a picture, in the words of A1111's `parameters`, and how that joins the text of the picture's maker.

use crate::prompt::{
    split_settings, {self},
};

/// The settings of one upscale, as they go into the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub prompt: String,
    pub negative_prompt: String,
    /// Key and value in the order to be written, e.g. `Steps`: `20`, `Seed`: `0`, `Size`: `1024x1024`.
    pub fields: Vec<(String, String)>,
}

impl Settings {
    /// A1111's form: prompt, `Negative prompt: ...`, and one line of settings.
    pub fn to_parameters(&self) -> String {
        let mut lines = Vec::new();
        if !self.prompt.is_empty() {
            lines.push(self.prompt.clone());
        }
        if !self.negative_prompt.is_empty() {
            lines.push(format!("Negative prompt: {}", self.negative_prompt));
        }
        lines.push(line(
            self.fields.iter().map(|(k, v)| (k.clone(), v.as_str())),
        ));
        lines.join("\n")
    }

    /// The text for a file that had one already; nothing of that is lost.
    ///
    /// After A1111's own text our settings continue its last line, as `Upscale steps: 20, ...`: viewers read that line
    /// into a table, and a second `Steps` or `Seed` would replace the picture's own. Other text becomes a field of our
    /// line. JSON (SwarmUI, Fooocus) is left as it is, since its readers parse the whole: `None`.
    pub fn after(&self, existing: &str) -> Option<String> {
        let existing = existing.trim();
        if existing.is_empty() {
            return Some(self.to_parameters());
        }
        if existing.starts_with('{') && serde_json::from_str::<serde_json::Value>(existing).is_ok()
        {
            return None;
        }
        let (body, settings) = split_settings(existing);
        if settings.is_none() && !body.contains("Negative prompt:") {
            let kept = line([("Original comment".to_owned(), existing)].into_iter());
            return Some(format!("{}, {kept}", self.to_parameters()));
        }
        let mut own: Vec<(String, &str)> = self
            .fields
            .iter()
            .map(|(k, v)| (upscale_key(k), v.as_str()))
            .collect();
        // The prompt is mostly the picture's own, and stands there already.
        let theirs = prompt::from_parameters(existing);
        let theirs = |text: &str| {
            theirs
                .as_ref()
                .is_some_and(|t| t.prompt == text || t.negative == text)
        };
        if !self.prompt.is_empty() && !theirs(&self.prompt) {
            own.push(("Upscale prompt".into(), &self.prompt));
        }
        if !self.negative_prompt.is_empty() && !theirs(&self.negative_prompt) {
            own.push(("Upscale negative prompt".into(), &self.negative_prompt));
        }
        let between = if settings.is_some() { ", " } else { "\n" };
        Some(format!(
            "{}{between}{}",
            existing.trim_end_matches([',', ' ']),
            line(own.into_iter())
        ))
    }
}

/// `Steps` -> `Upscale steps`; `CFG scale` -> `Upscale CFG scale`; `Upscaler` stays.
fn upscale_key(key: &str) -> String {
    if key.starts_with("Upscale") {
        return key.to_owned();
    }
    let acronym = key.chars().nth(1).is_some_and(char::is_uppercase);
    match key.chars().next().filter(|_| !acronym) {
        Some(first) => format!(
            "Upscale {}{}",
            first.to_lowercase(),
            &key[first.len_utf8()..]
        ),
        None => format!("Upscale {key}"),
    }
}

/// `Key: value, Key: value`; values that would break the line are quoted as JSON, as A1111 does.
fn line<'a>(fields: impl Iterator<Item = (String, &'a str)>) -> String {
    let field = |(key, value): (String, &str)| {
        if value.contains([',', ':', '\n', '"']) {
            format!("{key}: {}", serde_json::Value::from(value))
        } else {
            format!("{key}: {value}")
        }
    };
    fields.map(field).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Settings {
        let fields = [
            ("Steps", "20"),
            ("Sampler", "Euler"),
            ("CFG scale", "1"),
            ("Seed", "0"),
            ("Upscaler", "sd-upscale"),
        ];
        Settings {
            prompt: "a cat".into(),
            negative_prompt: "blurry".into(),
            fields: fields.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
        }
    }

    #[test]
    fn a_new_text_has_a1111s_three_parts_and_gives_the_prompt_back() {
        let text = ours().to_parameters();
        let want = "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, CFG scale: 1, Seed: 0, Upscaler: sd-upscale";
        assert_eq!(text, want);
        assert_eq!(prompt::from_parameters(&text).unwrap().negative, "blurry");
    }

    #[test]
    fn an_a1111_text_is_kept_to_the_letter_and_its_last_line_goes_on_without_repeating_a_key() {
        let existing =
            "a dog\nNegative prompt: ugly\nSteps: 30, Sampler: DDIM, CFG scale: 7, Seed: 99";
        let text = ours().after(existing).unwrap();
        assert!(text.starts_with(existing));
        let last = text.lines().last().unwrap();
        assert_eq!(last.matches("Seed:").count(), 1);
        assert!(last.ends_with(
            ", Upscale steps: 20, Upscale sampler: Euler, Upscale CFG scale: 1, Upscale seed: 0, Upscaler: sd-upscale, \
             Upscale prompt: a cat, Upscale negative prompt: blurry"
        ));
        assert_eq!(prompt::from_parameters(&text).unwrap().prompt, "a dog");
    }

    #[test]
    fn a_plain_comment_becomes_a_quoted_field_and_json_is_left_alone() {
        let text = ours().after("Rome, 2019\nwith: Anna").unwrap();
        assert!(
            text.ends_with(r#", Original comment: "Rome, 2019\nwith: Anna""#),
            "{text}"
        );
        assert_eq!(prompt::from_parameters(&text).unwrap().prompt, "a cat");
        assert_eq!(ours().after(r#"{"sui_image_params": {}}"#), None);
    }
}

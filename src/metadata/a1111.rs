//! A1111's `parameters`: the prompt that made a picture, read out of them, and what we did to it, written in the same
//! words so that it joins the text of the picture's maker.

use serde_json::{Map, Value};

/// A prompt found in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundPrompt {
    /// What the picture shows.
    pub prompt: String,
    /// Empty where there is none.
    pub negative: String,
    /// Where it was found, for a message: "A1111 parameters", "a ComfyUI graph", ...
    pub origin: &'static str,
}

impl FoundPrompt {
    /// The prompt for a message: one line, cut after 160 characters.
    pub fn in_one_line(&self) -> String {
        const MOST: usize = 160;
        let line: String = self.prompt.chars().take(MOST).collect();
        let line = line.replace(char::is_control, " ");
        match self.prompt.chars().nth(MOST) {
            Some(_) => line + "...",
            None => line,
        }
    }
}

/// Reads A1111's `parameters`: the prompt, `Negative prompt: ...`, and a last line of settings; also the JSON that
/// SwarmUI and Fooocus keep under the same key. `None` where there is no prompt in it.
pub fn from_parameters(text: &str) -> Option<FoundPrompt> {
    let text = text.trim();
    if let Ok(Value::Object(json)) = serde_json::from_str(text) {
        return from_flat_json(&json);
    }
    let (body, _) = split_settings(text);
    let (prompt, negative) = match body.split_once("Negative prompt:") {
        Some((prompt, negative)) if prompt.is_empty() || prompt.ends_with('\n') => {
            (prompt, negative)
        }
        _ => (body, ""),
    };
    found(
        &without_commands(prompt),
        &without_commands(negative),
        "A1111 parameters",
    )
}

/// Splits A1111's text into what is before the settings line and that line, by A1111's own rule: the last line is
/// settings if it holds at least three `Key: value` pairs.
pub(crate) fn split_settings(text: &str) -> (&str, Option<&str>) {
    let text = text.trim_end();
    let (body, last) = text
        .rsplit_once('\n')
        .map_or(("", text), |(body, last)| (body, last));
    let pairs = last.split(',').filter(|part| {
        let key = part.split_once(':').map_or("", |(key, _)| key.trim());
        let word = |c: char| c.is_alphanumeric() || " -_/".contains(c);
        !key.is_empty() && key.chars().all(word)
    });
    if pairs.count() >= 3 {
        (body, Some(last))
    } else {
        (text, None)
    }
}

/// Whether a program that makes pictures wrote a text, and no person or camera: A1111's settings, which have a
/// number of steps, or the guidance of a sampler that takes none; its negative prompt; or JSON with a prompt in it.
pub(crate) fn is_generated(text: &str) -> bool {
    let settings = |line: &str| {
        line.split(',').any(|part| {
            let number = |key: &str| part.trim().strip_prefix(key).map(str::trim);
            number("Steps:").is_some_and(|n| n.parse::<u32>().is_ok())
                || number("CFG scale:").is_some_and(|n| n.parse::<f64>().is_ok())
        })
    };
    let text = text.trim();
    if text.starts_with('{') {
        return from_parameters(text).is_some();
    }
    split_settings(text).1.is_some_and(settings) || text.contains("Negative prompt:")
}

/// Drops `<lora:name:weight>` and its like: commands to A1111, not words for the text encoder.
fn without_commands(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('<') {
        out.push_str(before);
        let command = ["lora:", "lyco:", "hypernet:"]
            .iter()
            .any(|c| after.starts_with(c));
        match after.split_once('>').filter(|_| command) {
            Some((_, after)) => rest = after,
            None => {
                out.push('<');
                rest = after;
            }
        }
    }
    out + rest
}

/// SwarmUI nests its fields under `sui_image_params`; Fooocus has them at the top.
fn from_flat_json(json: &Map<String, Value>) -> Option<FoundPrompt> {
    let json = json
        .get("sui_image_params")
        .and_then(Value::as_object)
        .unwrap_or(json);
    let text = |keys: &[&str]| {
        keys.iter()
            .find_map(|k| json.get(*k)?.as_str())
            .unwrap_or_default()
    };
    found(
        text(&["prompt"]),
        text(&["negativeprompt", "negative_prompt"]),
        "JSON parameters",
    )
}

pub(crate) fn found(prompt: &str, negative: &str, origin: &'static str) -> Option<FoundPrompt> {
    let (prompt, negative) = (prompt.trim().to_owned(), negative.trim().to_owned());
    (!prompt.is_empty() || !negative.is_empty()).then_some(FoundPrompt {
        prompt,
        negative,
        origin,
    })
}

/// The settings of one upscale, as they go into the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// What the picture shows.
    pub prompt: String,
    /// What was steered away from; empty where there is none.
    pub negative_prompt: String,
    /// Key and value in the order to be written, e.g. `Steps`: `20`, `Seed`: `0`, `Size`: `1024x1024`.
    pub fields: Vec<(String, String)>,
}

impl Parameters {
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
        if existing.starts_with('{') && serde_json::from_str::<Value>(existing).is_ok() {
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
        let theirs = from_parameters(existing);
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
        // The line of settings goes on; a text that has none begins one.
        let before = match settings {
            Some(_) => format!("{}, ", existing.trim_end_matches([',', ' '])),
            None => format!("{existing}\n"),
        };
        Some(before + &line(own.into_iter()))
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
            format!("{key}: {}", Value::from(value))
        } else {
            format!("{key}: {value}")
        }
    };
    fields.map(field).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_prompt_of_any_length_is_one_short_line_in_a_message() {
        let shown = |prompt: &str| found(prompt, "", "a test").unwrap().in_one_line();
        assert_eq!(shown("a cat,\r\non two\tlines"), "a cat,  on two lines");
        assert_eq!(shown(&"é".repeat(160)), "é".repeat(160));
        assert_eq!(shown(&"é".repeat(10_000)), "é".repeat(160) + "...");
    }

    #[test]
    fn a1111_text_is_split_into_prompt_negative_and_settings() {
        let settings = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1";
        for (text, prompt, negative) in [
            (
                format!("a cat\nNegative prompt: blurry\n{settings}"),
                "a cat",
                "blurry",
            ),
            (
                format!("a cat,\non two lines\n{settings}"),
                "a cat,\non two lines",
                "",
            ),
            (
                format!("a cat\nNegative prompt: blurry,\nugly\n{settings}"),
                "a cat",
                "blurry,\nugly",
            ),
            (format!("Negative prompt: blurry\n{settings}"), "", "blurry"),
            (
                "time: noon, mood: calm".into(),
                "time: noon, mood: calm",
                "",
            ),
            (
                format!("a <lora:film:0.8>cat, 1 < 2\n{settings}"),
                "a cat, 1 < 2",
                "",
            ),
        ] {
            let found = from_parameters(&text).unwrap();
            assert_eq!(
                (found.prompt.as_str(), found.negative.as_str()),
                (prompt, negative),
                "{text}"
            );
        }
        assert_eq!(from_parameters(settings), None);
        assert_eq!(from_parameters("  \n"), None);
    }

    #[test]
    fn json_parameters_give_their_prompt_and_are_never_taken_as_the_prompt() {
        let swarm = json!({"sui_image_params": {"prompt": "a cat", "negativeprompt": "blurry"}})
            .to_string();
        let found = from_parameters(&swarm).unwrap();
        assert_eq!(
            (found.prompt.as_str(), found.negative.as_str()),
            ("a cat", "blurry")
        );
        assert_eq!(from_parameters(r#"{"seed": 5}"#), None);
    }

    fn ours() -> Parameters {
        let fields = [
            ("Steps", "20"),
            ("Sampler", "Euler"),
            ("CFG scale", "1"),
            ("Seed", "0"),
            ("Upscaler", "sd-upscale"),
        ];
        Parameters {
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
        assert_eq!(from_parameters(&text).unwrap().negative, "blurry");
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
        assert_eq!(from_parameters(&text).unwrap().prompt, "a dog");
    }

    #[test]
    fn a_text_without_a_line_of_settings_is_kept_to_the_letter_too() {
        let existing = "a dog\nNegative prompt: ugly,";
        let text = ours().after(existing).unwrap();
        assert!(text.starts_with(&format!("{existing}\n")), "{text}");
        assert_eq!(from_parameters(&text).unwrap().negative, "ugly,");
    }

    #[test]
    fn a_plain_comment_becomes_a_quoted_field_and_json_is_left_alone() {
        let text = ours().after("Rome, 2019\nwith: Anna").unwrap();
        assert!(
            text.ends_with(r#", Original comment: "Rome, 2019\nwith: Anna""#),
            "{text}"
        );
        assert_eq!(from_parameters(&text).unwrap().prompt, "a cat");
        assert_eq!(ours().after(r#"{"sui_image_params": {}}"#), None);
    }
}

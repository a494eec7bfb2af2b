//! Finds the prompt that made a picture in the metadata that A1111 and ComfyUI leave in it.

use serde_json::{Map, Value};

/// A prompt found in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundPrompt {
    pub prompt: String,
    /// Empty where there is none.
    pub negative: String,
    /// Where it was found, for a message: "A1111 parameters", "a ComfyUI graph", ...
    pub origin: &'static str,
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
}

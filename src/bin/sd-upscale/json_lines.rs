//! What the lines of `--json` have in common, and their description.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

/// The version that every line names; [`DESCRIPTION`] is of it.
pub const SCHEMA: u32 = 1;

/// A JSON Schema of the lines, which the tests hold them to.
const DESCRIPTION: &str = include_str!("../../../assets/json-schema.json");

#[derive(Serialize)]
struct Line<'a, T> {
    schema: u32,
    #[serde(flatten)]
    fields: &'a T,
}

/// A line: the schema's version, and then `fields`, an object of strings and numbers by name.
pub fn line(fields: &impl Serialize) -> String {
    let schema = SCHEMA;
    // Such are always JSON.
    serde_json::to_string(&Line { schema, fields }).unwrap_or_default()
}

/// A kind of line: the options that print it, what a line is of, and its fields with what they say.
pub struct Kind {
    pub options: String,
    pub what: String,
    pub fields: Vec<(String, String)>,
}

/// The kinds of lines, as the schema has them.
///
/// # Errors
/// The schema is no such description, which the tests would have seen.
pub fn kinds() -> Result<Vec<Kind>> {
    let schema: Value = serde_json::from_str(DESCRIPTION)?;
    let text = |of: &Value, name: &str| -> Result<String> {
        let text = of[name].as_str();
        text.map(Into::into)
            .with_context(|| format!("the schema has a part without {name}"))
    };
    ["result", "device", "finding"]
        .iter()
        .map(|name| {
            let kind = &schema["$defs"][name];
            // In the order of the line, which the list of required fields has.
            let fields = kind["required"].as_array().into_iter().flatten();
            let fields = fields.filter_map(Value::as_str).map(|field| {
                let what = text(&kind["properties"][field], "description")?;
                Ok((field.to_owned(), what))
            });
            Ok(Kind {
                options: text(kind, "title")?,
                what: text(kind, "description")?,
                fields: fields.collect::<Result<_>>()?,
            })
        })
        .collect()
}

//! Every kind of line of `--json` is what `assets/json-schema.json` says it is.

use serde_json::{Value, json};

use super::setup::*;

fn schema() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/json-schema.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Whether a value is of a type as JSON Schema names them.
fn is_a(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        other => panic!("the schema has a type that this test does not know: {other}"),
    }
}

/// What is wrong with a field's value by its part of the schema, of which every word is known here.
fn fault(value: &Value, of: &Value) -> Option<String> {
    let right = |(word, wanted): (&String, &Value)| match &**word {
        "description" => true,
        "const" => value == wanted,
        "enum" => wanted.as_array().unwrap().contains(value),
        "type" => match wanted {
            Value::String(name) => is_a(value, name),
            names => {
                let mut names = names.as_array().unwrap().iter();
                names.any(|name| is_a(value, name.as_str().unwrap()))
            }
        },
        // Of numbers alone, as JSON Schema has it.
        "minimum" => value
            .as_f64()
            .is_none_or(|number| number >= wanted.as_f64().unwrap()),
        "maximum" => value
            .as_f64()
            .is_none_or(|number| number <= wanted.as_f64().unwrap()),
        other => panic!("the schema has a word that this test does not know: {other}"),
    };
    let parts = of.as_object().unwrap();
    let wrong = parts.iter().find(|part| !right(*part))?;
    Some(format!("{value} is not {}: {}", wrong.0, wrong.1))
}

/// What is wrong with a line of a kind: a field that is missing, unknown to the schema or no such value.
fn faults(line: &Value, kind: &str) -> Vec<String> {
    let schema = schema();
    let kind = &schema["$defs"][kind];
    let fields = line.as_object().unwrap();
    let required = kind["required"].as_array().unwrap();
    let missing = required
        .iter()
        .filter_map(Value::as_str)
        .filter(|name| !fields.contains_key(*name))
        .map(|name| format!("{name} is missing"));
    let wrong = fields
        .iter()
        .filter_map(|(name, value)| match kind["properties"].get(name) {
            None => Some(format!("{name} is not in the schema")),
            Some(of) => fault(value, of).map(|fault| format!("{name}: {fault}")),
        });
    missing.chain(wrong).collect()
}

#[track_caller]
fn all_are(kind: &str, ran: &Ran) -> Vec<Value> {
    let lines = ran.json();
    assert!(!lines.is_empty(), "no lines: {}", ran.stderr);
    for line in &lines {
        assert_eq!(faults(line, kind), [""; 0], "{line}");
        let mut others = ["result", "device", "finding"].into_iter();
        let is_another = others.any(|other| other != kind && faults(line, other).is_empty());
        assert!(!is_another, "not one kind alone: {line}");
    }
    let mut texts = ran.text().lines();
    assert!(
        texts.all(|text| text.starts_with(r#"{"schema":1,"#)),
        "a line does not begin with the version: {}",
        ran.text()
    );
    lines
}

fn statuses(lines: &[Value]) -> Vec<&str> {
    let each = lines.iter().map(|line| line["status"].as_str().unwrap());
    each.collect()
}

#[test]
fn lines_of_runs_are_what_the_schema_says() {
    let folder = folder_of(&[("a.png", 8, 8), ("b.png", 8, 8)]);
    fs::write(folder.path().join("bad.png"), "no picture").unwrap();
    let run = |arguments: &str| run(folder.path(), arguments);
    let written = all_are("result", &run("a.png bad.png -o out --json").ends_in(1));
    let mut found = statuses(&written);
    found.sort_unstable();
    assert_eq!(found, ["error", "ok"]);
    let again = "a.png b.png -o out --skip-existing --json";
    let lines = all_are("result", &run(again).ends_in(0));
    assert!(statuses(&lines).contains(&"skipped"));
    let dry = "a.png bad.png -o new --dry-run --json";
    let lines = all_are("result", &run(dry).ends_in(1));
    assert!(statuses(&lines).contains(&"planned"));
    let several = "a.png -o several/ --seed 1,18446744073709551615 -g 0,1.5 -p cat --json";
    assert_eq!(all_are("result", &run(several).ends_in(0)).len(), 4);
    all_are("result", &run("a.png -o a.safetensors --json").ends_in(0));
    let latents = "a.safetensors -o latents --format latent --json";
    all_are("result", &run(latents).ends_in(0));
    let adaptive = "a.png -o adaptive/ --sampler dpm-adaptive --tolerance 20 --json";
    let lines = all_are("result", &run(adaptive).ends_in(0));
    assert_eq!(lines[0]["steps"], Value::Null);
    let base = data("base/sd1");
    let generate = format!(
        "--generate -p cat --base {} --base-steps 1 --size 64x64 -o g.png --json",
        base.display()
    );
    let lines = all_are("result", &run(&generate).ends_in(0));
    assert_eq!(statuses(&lines), ["ok"]);
}

#[test]
fn lines_about_devices_are_what_the_schema_says() {
    let folder = folder();
    let plain = |arguments: &str| plain(folder.path(), arguments);
    all_are("device", &plain("--list-devices --json").ends_in(0));
    all_are("finding", &plain("--check-device cpu --json").ends_in(0));
}

#[test]
fn what_is_no_such_line_is_seen() {
    let folder = folder_of(&[("a.png", 8, 8)]);
    let ran = run(folder.path(), "a.png -o out.png --json").ends_in(0);
    let line = ran.json().remove(0);
    for (field, value) in [
        ("schema", json!(2)),
        ("status", json!("done")),
        ("width", json!(0)),
        ("height", json!(1.5)),
        ("input", Value::Null),
        ("seed", json!(-1)),
        ("seconds", json!("1")),
        ("new", json!(1)),
    ] {
        let mut wrong = line.clone();
        wrong[field] = value;
        let found = faults(&wrong, "result");
        assert!(found.len() == 1 && found[0].starts_with(field), "{found:?}");
    }
    let mut less = line.clone();
    less.as_object_mut().unwrap().remove("error");
    assert_eq!(faults(&less, "result"), ["error is missing"]);
}

//! The program's pictures against those that diffusers made with the same model (`tests/data/make_reference.py`).

use super::setup::*;

/// Levels of 255. Both sides compute in float32 and round to 8 bits: a value that lies between two levels may fall
/// either way, and nothing more.
const WORST: u8 = 2;
const MEAN: f64 = 0.05;

fn as_the_reference(name: &str) {
    let text = fs::read_to_string(data("reference/end_to_end.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let case = cases.iter().find(|case| case["name"] == name).unwrap();
    let folder = folder();
    let output = folder.path().join("out.png");
    let mut command = program(folder.path());
    command
        .arg(data(&format!("inputs/{}", case["input"].as_str().unwrap())))
        .arg("--model")
        .arg(data("model"))
        .arg("-o")
        .arg(&output)
        .args(["-p", case["prompt"].as_str().unwrap()])
        .args(["--schedule", case["schedule"].as_str().unwrap()])
        .args(["-g", &case["guidance"].to_string()])
        .args(["-s", &case["steps"].to_string()])
        .args(["--seed", &case["seed"].to_string()]);
    if let Some(negative) = case["negative_prompt"].as_str() {
        command.args(["-n", negative]);
    }
    finish(command, b"").ends_in(0);
    let made = image(output).to_rgb8();
    let expected = image(data(&format!("reference/{name}.png"))).to_rgb8();
    assert_eq!(made.dimensions(), expected.dimensions());
    let differences: Vec<u8> = made
        .iter()
        .zip(expected.iter())
        .map(|(a, b)| a.abs_diff(*b))
        .collect();
    let worst = *differences.iter().max().unwrap();
    let sum: f64 = differences.iter().map(|d| f64::from(*d)).sum();
    let mean = sum / differences.len() as f64;
    println!("{name}: at most {worst} levels, {mean:.5} in the mean");
    assert!(
        worst <= WORST && mean <= MEAN,
        "{name}: up to {worst} levels, {mean:.3} in the mean"
    );
}

#[test]
fn an_image_becomes_the_reference_picture() {
    as_the_reference("square-karras-4");
}

#[test]
fn the_published_schedule_gives_the_reference_picture() {
    as_the_reference("square-log-linear-4");
}

#[test]
fn guidance_with_a_negative_prompt_gives_the_reference_picture() {
    as_the_reference("wide-guided-karras-4");
}

#[test]
fn latents_become_the_reference_picture() {
    as_the_reference("latents-karras-4");
}

#[test]
fn twenty_steps_give_the_reference_picture() {
    as_the_reference("square-karras-20");
}

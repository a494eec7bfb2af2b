//! The corpus of damaged inputs through the program: one run a kind of file.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use sd_upscale::limits::ReadLimits;

use super::setup::*;
use crate::damage;

#[test]
fn damaged_inputs_end_in_a_message_each_and_spoil_no_other() {
    let mut kinds: BTreeMap<String, Vec<damage::Damaged>> = BTreeMap::new();
    for input in damage::corpus() {
        let kind = input.name.rsplit('.').next().unwrap().to_string();
        kinds.entry(kind).or_default().push(input);
    }
    let (mut total, mut refused) = (0, 0);
    for (kind, inputs) in &kinds {
        let folder = folder();
        fs::create_dir(folder.path().join("in")).unwrap();
        for input in inputs {
            fs::write(folder.path().join("in").join(&input.name), &input.bytes).unwrap();
        }
        picture(folder.path(), "in/sound.png", 10, 10);
        let start = Instant::now();
        // A limit, lest a flipped bit make a picture that takes a minute.
        let arguments = "in -o out --json --max-pixels 65536";
        let ran = run(folder.path(), arguments).ends_in(1);
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{kind}: {:?}",
            start.elapsed()
        );
        let lines = ran.json();
        // Each input once, but for batches of latents, which have a line for each.
        let told: BTreeSet<&str> = lines
            .iter()
            .map(|line| line["input"].as_str().unwrap())
            .collect();
        assert_eq!(told.len(), inputs.len() + 1, "{kind}");
        let mut made = BTreeSet::new();
        for line in &lines {
            let input = line["input"].as_str().unwrap();
            match line["status"].as_str().unwrap() {
                "ok" => {
                    let output = line["output"].as_str().unwrap().to_string();
                    let path = folder.path().join(&output);
                    if kind == "jxl" {
                        // Which `image` does not read.
                        sd_upscale::files::read_picture(&path, &ReadLimits::default()).unwrap();
                    } else {
                        image(path);
                    }
                    made.insert(output.strip_prefix("out/").unwrap().to_string());
                }
                "error" => {
                    refused += 1;
                    let error = line["error"].as_str().unwrap();
                    assert!(error.len() > 10, "{input}: {error}");
                    assert!(ran.stderr.contains(input), "{input} is not named");
                }
                other => panic!("{input}: {other}"),
            }
        }
        assert!(made.contains("sound.png"));
        let there: BTreeSet<String> = files(&folder.path().join("out")).into_iter().collect();
        assert_eq!(there, made, "{kind}");
        total += inputs.len();
    }
    println!(
        "{total} damaged inputs of {} kinds, {refused} refused",
        kinds.len()
    );
    assert!(total >= 300, "{total}");
}

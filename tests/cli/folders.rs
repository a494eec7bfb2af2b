//! Many inputs: which are taken, in what order, what the outputs are named, and what one bad file does to the rest.

use super::setup::*;

/// The inputs in the order in which `--json` tells of them.
fn inputs(ran: &Ran) -> Vec<String> {
    let lines = ran.json();
    lines
        .iter()
        .map(|line| line["input"].as_str().unwrap().to_string())
        .collect()
}

#[test]
fn a_folder_is_done_in_natural_order_and_the_rest_of_it_passed_over() {
    let folder = folder_of(&[
        ("in/shot10.png", 8, 8),
        ("in/shot2.png", 8, 8),
        ("in/Shot1.png", 8, 8),
        ("in/.hidden.png", 8, 8),
        ("in/deeper/shot3.png", 8, 8),
    ]);
    for other in ["in/Thumbs.db", "in/notes.txt"] {
        fs::write(folder.path().join(other), "no image").unwrap();
    }
    let ran = run(folder.path(), "in -o out --json -v").ends_in(0);
    assert_eq!(
        inputs(&ran),
        ["in/Shot1.png", "in/shot2.png", "in/shot10.png"]
    );
    let ran = ran.says(&["notes.txt", "Thumbs.db", ".hidden.png"]);
    // Progress is for terminals.
    assert!(!ran.stderr.contains(['\r', '\x1b']), "{:?}", ran.stderr);
    assert_eq!(
        files(&folder.path().join("out")),
        ["Shot1.png", "shot10.png", "shot2.png"]
    );
}

#[test]
fn with_r_the_tree_is_mirrored() {
    let folder = folder_of(&[
        ("in/a.png", 8, 8),
        ("in/x/a.png", 8, 8),
        ("in/x/y/b.jpg", 8, 8),
    ]);
    run(folder.path(), "-r in -o out").ends_in(0);
    assert_eq!(
        files(&folder.path().join("out")),
        ["a.png", "x/a.png", "x/y/b.jpg"]
    );
}

#[test]
fn include_and_exclude_choose_among_what_folders_hold() {
    let folder = folder_of(&[("in/a.png", 8, 8), ("in/b.png", 8, 8), ("in/c.jpg", 8, 8)]);
    run(folder.path(), "in -o out --include *.png --exclude b.*").ends_in(0);
    assert_eq!(files(&folder.path().join("out")), ["a.png"]);
}

#[test]
fn one_bad_file_does_not_stop_the_others() {
    let folder = folder_of(&[("in/a.png", 8, 8), ("in/c.png", 8, 8), ("in/d.png", 8, 8)]);
    fs::write(folder.path().join("in/b.png"), "no image").unwrap();
    let ran = run(folder.path(), "in -o out --json").ends_in(1).says(&[
        "3 done, 0 skipped, 1 failed",
        "failed: ",
        "in/b.png",
    ]);
    let lines = ran.json();
    let of = |name: &str| lines.iter().find(|line| line["input"] == name).unwrap();
    assert_eq!(lines.len(), 4);
    assert_eq!(of("in/b.png")["status"], "error");
    let error = of("in/b.png")["error"].as_str().unwrap();
    assert!(error.contains("it is text"), "{error}");
    assert_eq!(of("in/c.png")["status"], "ok");
    assert_eq!(
        files(&folder.path().join("out")),
        ["a.png", "c.png", "d.png"]
    );
}

#[test]
fn a_line_of_json_has_the_fields_that_scripts_rely_on() {
    let folder = folder_of(&[("in.png", 12, 8)]);
    let ran = run(folder.path(), "in.png -o out.png --json --seed 7 -s 2").ends_in(0);
    let lines = ran.json();
    let line = lines[0].as_object().unwrap();
    let mut keys: Vec<&str> = line.keys().map(|key| &**key).collect();
    keys.sort();
    assert_eq!(
        keys,
        [
            "error",
            "evaluations",
            "guidance",
            "height",
            "input",
            "output",
            "schema",
            "seconds",
            "seed",
            "status",
            "steps",
            "width"
        ]
    );
    for (key, value) in [
        ("schema", 1.into()),
        ("input", "in.png".into()),
        ("output", "out.png".into()),
        ("status", "ok".into()),
        ("error", serde_json::Value::Null),
        ("width", 24.into()),
        ("height", 16.into()),
        ("seed", 7.into()),
        ("steps", 2.into()),
    ] {
        assert_eq!(line[key], value, "{key}");
    }
    assert!(line["seconds"].as_f64().unwrap() >= 0.0);
}

#[test]
fn skip_existing_does_what_is_missing_or_damaged_and_nothing_else() {
    let folder = folder_of(&[("in/a.png", 8, 8), ("in/b.png", 8, 8), ("in/c.png", 8, 8)]);
    run(folder.path(), "in -o out").ends_in(0);
    let output = |name: &str| folder.path().join("out").join(name);
    let whole = fs::read(output("b.png")).unwrap();
    fs::write(output("b.png"), &whole[..whole.len() - 9]).unwrap();
    fs::remove_file(output("c.png")).unwrap();
    let time = |name| fs::metadata(output(name)).unwrap().modified().unwrap();
    let before = time("a.png");
    let ran = run(folder.path(), "in -o out --skip-existing --json")
        .ends_in(0)
        .says(&["2 done, 1 skipped, 0 failed"]);
    let status = |index: usize| ran.json()[index]["status"].clone();
    assert_eq!((status(0), status(1)), ("skipped".into(), "ok".into()));
    assert_eq!(time("a.png"), before);
    assert!(fs::read(output("b.png")).unwrap() == whole);
    assert!(output("c.png").exists());
    // Without the flag, all again.
    run(folder.path(), "in -o out").ends_in(0).says(&["3 done"]);
    assert_ne!(time("a.png"), before);
}

#[test]
fn a_dry_run_says_what_would_be_done_and_writes_nothing() {
    let folder = folder_of(&[("in/a.png", 20, 10), ("in/b.png", 8, 8)]);
    let ran = run(folder.path(), "in -o out --dry-run").ends_in(0);
    for words in [
        "in/a.png 20x10 -> out/a.png 40x20",
        "device: cpu",
        "model: ",
    ] {
        assert!(ran.text().contains(words), "{}", ran.text());
    }
    let ran = run(folder.path(), "in -o out --dry-run --json").ends_in(0);
    let lines = ran.json();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["input"], "in/a.png");
    assert_eq!(lines[0]["output"], "out/a.png");
    assert_eq!(
        (&lines[0]["width"], &lines[0]["height"]),
        (&40.into(), &20.into())
    );
    ran.says(&["device: cpu", "model: "]);
    assert_eq!(files(folder.path()), ["in/a.png", "in/b.png"]);
}

#[test]
fn shards_split_the_inputs_without_overlap_or_gap() {
    let names: Vec<String> = (0..12).map(|i| format!("in/{i}.png")).collect();
    let pictures: Vec<_> = names.iter().map(|name| (&**name, 6, 6)).collect();
    let folder = folder_of(&pictures);
    let mut done = Vec::new();
    for index in 0..3 {
        let arguments = format!("in -o out --json --shard {index}/3");
        let share = inputs(&run(folder.path(), &arguments).ends_in(0));
        assert!(share.len() < 12, "{share:?}");
        done.extend(share);
    }
    done.sort();
    let mut all = names.clone();
    all.sort();
    assert_eq!(done, all);
    assert_eq!(files(&folder.path().join("out")).len(), 12);
}

#[test]
fn outputs_are_named_by_the_template_and_beside_the_input_by_default() {
    let folder = folder_of(&[("a.png", 10, 6), ("b.jpg", 8, 8)]);
    run(folder.path(), "a.png b.jpg").ends_in(0);
    run(
        folder.path(),
        "a.png b.jpg -o out --seed 3 --name {stem}_{seed}_{width}x{height}.{ext}",
    )
    .ends_in(0);
    run(folder.path(), "a.png b.jpg -o as-webp --format webp").ends_in(0);
    assert_eq!(
        files(folder.path()),
        [
            "a-2x.png",
            "a.png",
            "as-webp/a.webp",
            "as-webp/b.webp",
            "b-2x.jpg",
            "b.jpg",
            "out/a_3_20x12.png",
            "out/b_3_16x16.jpg",
        ]
    );
    // A second run over the folder leaves alone what the first one wrote.
    let ran = run(folder.path(), ". --json").ends_in(0);
    assert_eq!(inputs(&ran), ["./a.png", "./b.jpg"]);
}

#[test]
fn two_inputs_for_one_output_are_refused_before_the_work() {
    let folder = folder_of(&[("in/a.png", 8, 8), ("in/a.jpg", 8, 8), ("in/b.png", 8, 8)]);
    run(folder.path(), "in -o out --format png")
        .ends_in(2)
        .says(&["in/a.jpg", "in/a.png", "out/a.png"]);
    run(folder.path(), "in -o out --name one")
        .ends_in(2)
        .says(&["out/one.png"]);
    assert_eq!(files(folder.path()).len(), 3);
}

#[test]
fn no_input_is_ever_written_over() {
    let folder = folder_of(&[("in/a.png", 8, 8), ("in/b.png", 8, 8)]);
    let before = fs::read(folder.path().join("in/a.png")).unwrap();
    fs::hard_link(
        folder.path().join("in/a.png"),
        folder.path().join("link.png"),
    )
    .unwrap();
    for arguments in [
        "in -o in",
        "in/a.png -o in/a.png",
        "in/a.png -o link.png",
        "in/a.png -o in/../in/a.png",
        "in/a.png in/b.png -o in --name {stem}",
    ] {
        run(folder.path(), arguments)
            .ends_in(2)
            .says(&["over the input"]);
    }
    assert!(fs::read(folder.path().join("in/a.png")).unwrap() == before);
    assert_eq!(files(folder.path()).len(), 3);
}

#[test]
fn a_batch_gives_the_bytes_of_one_at_a_time() {
    let folder = folder_of(&[
        ("in/1.png", 20, 12),
        ("in/2.png", 20, 12),
        ("in/3.png", 20, 12),
        ("in/4.png", 12, 20),
        ("in/5.png", 20, 12),
    ]);
    for arguments in ["-s 2", "-s 2 -g 3 -p cat"] {
        run(folder.path(), &format!("in -o one {arguments}")).ends_in(0);
        run(folder.path(), &format!("in -o many --batch 3 {arguments}")).ends_in(0);
        for number in 1..=5 {
            let bytes = |place| fs::read(folder.path().join(format!("{place}/{number}.png")));
            assert!(bytes("one").unwrap() == bytes("many").unwrap(), "{number}");
        }
    }
}

#[test]
fn an_empty_folder_is_no_error_but_is_said() {
    let folder = folder();
    fs::create_dir(folder.path().join("in")).unwrap();
    run(folder.path(), "in -o out")
        .ends_in(0)
        .says(&["nothing to do"]);
}

#[test]
fn several_devices_share_a_folder_and_make_the_same_files() {
    let folder = folder_of(&[
        ("in/a.png", 16, 8),
        ("in/b.png", 24, 8),
        ("in/c.png", 8, 16),
    ]);
    // Two workers on the CPU stand in for two cards.
    run(folder.path(), "in -o one --device cpu").ends_in(0);
    run(folder.path(), "in -o two --device cpu,cpu").ends_in(0);
    for name in ["a.png", "b.png", "c.png"] {
        let read = |out: &str| fs::read(folder.path().join(out).join(name)).unwrap();
        assert_eq!(read("one"), read("two"), "{name}");
    }
}

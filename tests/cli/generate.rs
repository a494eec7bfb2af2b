//! Pictures of words alone, several seeds, lists of prompts, and the refining pass.

use std::process::Command;

use super::setup::*;

const PROMPT: &str = "a cat on a red sofa, wow!!";

/// A copy of a small base checkpoint, its sampler another.
fn base(folder: &Path, name: &str, sampler: Option<&str>) -> PathBuf {
    let copy = folder.join(name);
    for file in files(&data(&format!("base/{name}"))) {
        let to = copy.join(&file);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(data(&format!("base/{name}")).join(&file), &to).unwrap();
    }
    if let Some(sampler) = sampler {
        let path = copy.join("scheduler/scheduler_config.json");
        let text = fs::read_to_string(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["_class_name"] = sampler.into();
        fs::write(path, config.to_string()).unwrap();
    }
    copy
}

/// The program with both small models; arguments with spaces in them come last.
fn command(folder: &Path, base: &Path, arguments: &str, more: &[&str]) -> Command {
    let mut command = small(folder, arguments);
    command.arg("--base").arg(base).args(more);
    command
}

/// Two steps of each.
#[track_caller]
fn generate(folder: &Path, arguments: &str, more: &[&str]) -> Ran {
    let arguments = format!("--generate --base-steps 2 -s 2 {arguments}");
    let command = command(folder, &data("base/sd1"), &arguments, more);
    finish(command, b"")
}

/// Fails unless two pictures are the same but for one level where a rounding falls the other way.
#[track_caller]
fn assert_same(found: &Path, reference: &str) {
    let expected = image(data(&format!("reference/{reference}.png"))).to_rgb8();
    let found = image(found).to_rgb8();
    assert_eq!(found.dimensions(), expected.dimensions());
    let apart = std::iter::zip(found.as_raw(), expected.as_raw());
    let most = apart.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(most <= 1, "{reference}: {most} levels apart");
}

/// What is written of the settings.
fn written(path: &Path) -> String {
    let bytes = fs::read(path).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let start = text.find("Steps: ").unwrap();
    text[start..].chars().take_while(|c| *c >= ' ').collect()
}

/// tests/data/make_base_reference.py, `whole`: diffusers' two pipelines that share one generator.
#[test]
fn pictures_of_a_prompt_are_those_of_diffusers() {
    let folder = folder();
    let card = "--generate -o card.png --base-steps 5 --size 64x96 --seed 3 -s 4 -g 0 --schedule log-linear --save-low-res";
    let words = ["-p", PROMPT, "-n", "blurry"];
    let sd1 = data("base/sd1");
    let ran = finish(command(folder.path(), &sd1, card, &words), b"");
    ran.ends_in(0).never_says("no effect");
    assert_same(&folder.path().join("card.png"), "base_sd1-card");
    let low_res = folder.path().join("card-low-res.png");
    assert_same(&low_res, "base_sd1-card_low-res");
    assert_eq!(
        written(&low_res).split(", Version").next().unwrap(),
        "Steps: 5, CFG scale: 7.5, Seed: 3, Size: 64x96, Model: sd1"
    );
    assert!(
        written(&folder.path().join("card.png"))
            .contains("Base model: sd1, Base steps: 5, Base CFG scale: 7.5, Version")
    );

    let euler = base(folder.path(), "sd1", Some("EulerDiscreteScheduler"));
    let refined = "--generate -o refined.png --base-steps 5 --base-guidance 3 --size 64x64 --seed 5 -s 4 --refine 0.4";
    finish(command(folder.path(), &euler, refined, &words), b"").ends_in(0);
    assert_same(&folder.path().join("refined.png"), "base_sd1-refined-0.4");
    assert!(written(&folder.path().join("refined.png")).contains("Refine: 0.4"));
    // By another VAE where one is named.
    let own = data("model/vae").display().to_string();
    let by_own = [&words[..], &["--vae", &own]].concat();
    let refined = refined.replace("refined.png", "own.png");
    finish(command(folder.path(), &euler, &refined, &by_own), b"").ends_in(0);
    let read = |name: &str| image(folder.path().join(name)).to_rgb8();
    assert!(read("refined.png") != read("own.png"));

    // The latents themselves, and those that they were made from.
    let latents = card.replace("card.png", "card.safetensors");
    finish(command(folder.path(), &sd1, &latents, &words), b"").ends_in(0);
    let reference = fs::read(data("reference/base_end_to_end.safetensors")).unwrap();
    let of = |name: &str| tensor(&fs::read(folder.path().join(name)).unwrap(), "latents");
    for (name, key) in [
        ("card.safetensors", "whole.sd1-card"),
        ("card-low-res.safetensors", "sd1-pndm"),
    ] {
        let (shape, values) = of(name);
        let (expected_shape, expected) = tensor(&reference, key);
        assert_eq!(shape, expected_shape);
        let error: f32 = std::iter::zip(&values, &expected)
            .map(|(a, b)| (a - b) * (a - b))
            .sum();
        let all: f32 = expected.iter().map(|v| v * v).sum();
        // Rounding alone gives 6e-6, and whatever is done otherwise 1e-3 and more (tests/parity/base.rs).
        assert!((error / all).sqrt() < 1e-4, "{name}");
    }
    let low_res = folder.path().join("card-low-res.png");
    assert_same(&low_res, "base_sd1-card_low-res");
    // Latents that were written are upscaled to what was made of them within the process, but for the noise: the generator had gone on.
    run(
        folder.path(),
        "card-low-res.safetensors -o again.png --save-low-res",
    )
    .ends_in(0)
    .says(&["using the prompt of its metadata", PROMPT]);
}

#[test]
fn each_seed_is_a_picture_that_it_would_be_alone() {
    let folder = folder();
    generate(folder.path(), "-o out.png --seed 7,1", &["-p", PROMPT]).ends_in(0);
    generate(folder.path(), "-o one.png --seed 1", &["-p", PROMPT]).ends_in(0);
    assert_eq!(files(folder.path()), ["one.png", "out-1.png", "out-7.png"]);
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert!(read("out-1.png") == read("one.png"));
    assert!(read("out-1.png") != read("out-7.png"));
    // Of pictures too, and guidances.
    picture(folder.path(), "in.png", 12, 8);
    let ran = run(
        folder.path(),
        "in.png -o {stem} --name {stem}-{seed}-{guidance}.{ext} --seed 1,2 -g 0,1.5 --json",
    )
    .ends_in(0);
    let told = ran.json();
    let told: Vec<String> = told
        .iter()
        .map(|line| format!("{} {} {}", line["output"], line["seed"], line["guidance"]))
        .collect();
    assert_eq!(
        told,
        [
            "\"{stem}/in-1-0.png\" 1 0.0",
            "\"{stem}/in-1-1.5.png\" 1 1.5",
            "\"{stem}/in-2-0.png\" 2 0.0",
            "\"{stem}/in-2-1.5.png\" 2 1.5"
        ]
    );
    run(folder.path(), "in.png -o alone.png --seed 2 -g 1.5").ends_in(0);
    assert!(read("alone.png") == read("{stem}/in-2-1.5.png"));
}

/// Status by output of `--json`.
fn told(ran: &Ran) -> Vec<String> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("-").to_owned();
    let mut told: Vec<String> = ran
        .json()
        .iter()
        .map(|line| {
            format!(
                "{} {} {}",
                text(&line["input"]),
                text(&line["output"]),
                text(&line["status"])
            )
        })
        .collect();
    told.sort();
    told
}

#[test]
fn a_list_of_prompts_is_done_once_whatever_interrupts_it() {
    let folder = folder();
    let list = folder.path().join("list.txt");
    fs::write(&list, "a cat\r\n\r\na dog\r\na bird\r\n").unwrap();
    let all = "--prompt-file list.txt -o big --json --skip-existing";
    let ran = generate(folder.path(), all, &[]).ends_in(0);
    let expected = |status: [&str; 3]| -> Vec<String> {
        let names = ["1", "3", "4"].iter().zip(status);
        names
            .map(|(n, status)| format!("list.txt:{n} big/000{n}.png {status}"))
            .collect()
    };
    assert_eq!(told(&ran), expected(["ok"; 3]));
    fs::remove_file(folder.path().join("big/0003.png")).unwrap();
    fs::write(&list, "a cat\n\na dog\na whale\n").unwrap();
    let ran = generate(folder.path(), all, &[]).ends_in(0);
    assert_eq!(told(&ran), expected(["skipped", "ok", "skipped"]));
    let ran = ran.says(&["list.txt:4: big/0004.png is kept, but it was made with other settings"]);
    assert_eq!(ran.stderr.matches("is kept").count(), 1, "{}", ran.stderr);

    // In shares, with seeds, by names.
    fs::write(&list, "x/cat.webp\ta cat\ndog\ta dog\nowl\tan owl\n").unwrap();
    let mut shares = Vec::new();
    for share in ["0/2", "1/2"] {
        let arguments = format!("--prompt-file list.txt -o big2 --json --seed 1,2 --shard {share}");
        shares.extend(told(&generate(folder.path(), &arguments, &[]).ends_in(0)));
    }
    assert_eq!(shares.len(), 6);
    assert_eq!(
        files(&folder.path().join("big2")),
        [
            "dog-1.png",
            "dog-2.png",
            "owl-1.png",
            "owl-2.png",
            "x/cat-1.webp",
            "x/cat-2.webp"
        ]
    );
}

#[test]
fn a_folder_of_prompts_is_as_one_of_pictures() {
    let folder = folder();
    let texts = folder.path().join("texts/sub");
    fs::create_dir_all(&texts).unwrap();
    fs::write(folder.path().join("texts/a.txt"), "a cat\non a sofa\n").unwrap();
    fs::write(folder.path().join("texts/b.txt"), b"\xff\xfe\0").unwrap();
    fs::write(texts.join("c.txt"), "a dog").unwrap();
    fs::write(texts.join("notes.md"), "no prompt").unwrap();
    let arguments = "--prompt-file texts -r -o big --json";
    let ran = generate(folder.path(), arguments, &[]).ends_in(1);
    assert_eq!(
        told(&ran),
        [
            "texts/a.txt big/a.png ok",
            "texts/b.txt big/b.png error",
            "texts/sub/c.txt big/sub/c.png ok"
        ]
    );
    let ran = ran.says(&["texts/b.txt", "no text in UTF-8"]);
    drop(ran);
    let a = fs::read(folder.path().join("big/a.png")).unwrap();
    let text = String::from_utf8_lossy(&a).into_owned();
    assert!(text.contains("a cat on a sofa"));
    generate(folder.path(), "-o one.png", &["-p", "a cat on a sofa"]).ends_in(0);
    assert!(fs::read(folder.path().join("one.png")).unwrap() == a);
    let again = generate(folder.path(), &format!("{arguments} --skip-existing"), &[]);
    assert_eq!(again.code, Some(1));
    assert_eq!(
        told(&again)[..1],
        ["texts/a.txt big/a.png skipped".to_owned()]
    );
    // One that was written anew is told of.
    fs::write(folder.path().join("texts/a.txt"), "a cow").unwrap();
    generate(folder.path(), &format!("{arguments} --skip-existing"), &[])
        .says(&["texts/a.txt: big/a.png is kept, but"]);
}

#[test]
fn what_cannot_be_followed_is_refused_before_any_work() {
    let folder = folder_of(&[("in.png", 12, 8)]);
    fs::write(folder.path().join("up.txt"), "../a\ta cat").unwrap();
    fs::write(folder.path().join("blank.txt"), "\n\n").unwrap();
    for (arguments, code, said) in [
        ("--generate -o a.png", 2, "-p TEXT, or --prompt-file FILE"),
        ("--generate -p cat", 2, "-o FILE"),
        (
            "--generate in.png -p cat -o a.png",
            2,
            "cannot be used with",
        ),
        (
            "--generate -p cat --prompt-file x -o a.png",
            2,
            "cannot be used with",
        ),
        ("--generate --prompt-file none.txt -o a", 2, "none.txt"),
        (
            "--generate --prompt-file blank.txt -o a",
            2,
            "holds no prompt",
        ),
        (
            "--generate --prompt-file up.txt -o a",
            2,
            "in the output folder",
        ),
        ("--generate -p cat --size 500x333 -o a.png", 2, "504x336"),
        (
            "--generate -p cat --size 512 -o a.png",
            2,
            "such as 512x768",
        ),
        ("--generate -p cat --size 0x8 -o a.png", 2, "8x8 is near"),
        (
            "--generate -p cat --base-steps 0 -o a.png",
            2,
            "--base-steps",
        ),
        (
            "--generate -p cat --base-guidance -1 -o a.png",
            2,
            "expected a number of 0 or more",
        ),
        ("in.png --refine 1.1 -o a.png", 2, "0, nothing, to 1"),
        ("in.png --refine 0.01 -o a.png", 2, "0.02 or more"),
        ("in.png --seed 1,x -o a.png", 2, "whole number"),
        ("in.png --seed 1,2 -o -", 2, "one seed"),
        (
            "--generate -p cat --base none/at/all -o a.png",
            1,
            "--base none/at/all: there is no such",
        ),
        ("--generate -p cat --base . -o a.png", 1, "unet/config.json"),
        (
            "in.png --refine 0.5 --base . -o a.png",
            1,
            "unet/config.json",
        ),
        ("--generate -p cat --base in.png -o a.png", 1, "in.png"),
    ] {
        run(folder.path(), arguments).ends_in(code).says(&[said]);
    }
    let upscaler = data("model").display().to_string();
    let words = "--generate -p cat -o a.png --base";
    run(folder.path(), &format!("{words} {upscaler}"))
        .ends_in(1)
        .says(&["in_channels 8"]);
    let base = data("base/sd1").display().to_string();
    plain(folder.path(), &format!("{words} {base} --model tiny"))
        .ends_in(1)
        .says(&["do not belong together"]);
    assert_eq!(files(folder.path()), ["blank.txt", "in.png", "up.txt"]);
}

#[test]
fn what_has_no_effect_is_told() {
    let folder = folder_of(&[("in.png", 12, 8)]);
    for (arguments, said) in [
        ("in.png -o a.png --base x", "--base has no effect"),
        (
            "in.png -o a.png --base-steps 3",
            "--base-steps has no effect",
        ),
        (
            "in.png -o a.png --base-guidance 3",
            "--base-guidance has no effect",
        ),
        ("in.png -o a.png --size 64x64", "--size has no effect"),
        ("in.png -o a.png --refine 0", "--refine 0 changes nothing"),
    ] {
        run(folder.path(), arguments).ends_in(0).says(&[said]);
    }
    for (arguments, said) in [
        ("--batch 3", "--batch has no effect"),
        ("--color-fix adain", "--color-fix has no effect"),
        ("--latent-scale raw", "--latent-scale has no effect"),
        (
            "-n ugly --base-guidance 1",
            "--negative-prompt has no effect",
        ),
        ("--include a -r", "they choose within folders"),
    ] {
        let arguments = format!("-p cat -o a.png {arguments}");
        generate(folder.path(), &arguments, &[])
            .ends_in(0)
            .says(&[said]);
    }
    let quiet = "-p cat -o a.png -n ugly -g 0 --base-guidance 2 --seed 1 --save-low-res";
    generate(folder.path(), quiet, &[])
        .ends_in(0)
        .never_says("no effect");
}

#[test]
fn any_input_is_refined() {
    let folder = folder_of(&[("in.png", 24, 16)]);
    let latents = data("inputs/latents-8x12.safetensors")
        .display()
        .to_string();
    let base = data("base/sd2").display().to_string();
    for input in ["in.png", &latents] {
        let plain = format!("{input} -o plain.safetensors -p cat");
        run(folder.path(), &plain).ends_in(0);
        let of = |name: &str| tensor(&fs::read(folder.path().join(name)).unwrap(), "latents");
        let refined =
            format!("{input} -o r.safetensors -p cat --refine 0.3 --base {base} --base-steps 10");
        run(folder.path(), &refined).ends_in(0);
        assert_eq!(of("plain.safetensors").0, of("r.safetensors").0);
        assert_ne!(of("plain.safetensors").1, of("r.safetensors").1);
        let picture = refined.replace("r.safetensors", "r.png");
        run(folder.path(), &picture).ends_in(0);
        assert!(written(&folder.path().join("r.png")).contains("Refine: 0.3"));
    }
    // Four times as large: once, at the end.
    let command =
        format!("in.png -o big.png -p cat --refine 0.3 --base {base} --base-steps 10 --scale 4 -v");
    let ran = run(folder.path(), &command).ends_in(0);
    assert_eq!(size(folder.path().join("big.png")), (96, 64));
    assert_eq!(ran.stderr.matches(": base 0.").count(), 1, "{}", ran.stderr);
    // The prompt that the input was made with serves the base checkpoint where guidance 0 hides it from the upscaler.
    let command =
        format!("plain.safetensors -o m.png -g 0 --refine 0.3 --base {base} --base-steps 10");
    run(folder.path(), &command)
        .ends_in(0)
        .says(&["using the prompt of its metadata"]);
}

#[test]
fn pictures_get_their_prompts_from_a_file() {
    let folder = folder_of(&[
        ("in/b.png", 12, 8),
        ("in/a.png", 12, 8),
        ("in/sub/a.png", 12, 8),
    ]);
    let prompts = |text: &str| fs::write(folder.path().join("p.txt"), text).unwrap();
    let of = |name: &str| {
        let bytes = fs::read(folder.path().join(name)).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        ["a red cat", "a blue dog", "a green owl"]
            .into_iter()
            .find(|prompt| text.contains(prompt))
            .unwrap()
    };
    prompts("a red cat\na blue dog\n");
    run(
        folder.path(),
        "in/b.png missing.png in/a.png -o x --prompt-file p.txt",
    )
    .ends_in(2)
    .says(&["holds 2 prompts, and there are 3 inputs"]);
    run(
        folder.path(),
        "in/b.png in/a.png -o out --prompt-file p.txt",
    )
    .ends_in(0);
    assert_eq!(
        (of("out/b.png"), of("out/a.png")),
        ("a red cat", "a blue dog")
    );
    prompts("sub/a.png\ta green owl\nb.png\ta blue dog\na.png\ta red cat\nc.png\tnothing\n");
    run(folder.path(), "in -r -o named --prompt-file p.txt")
        .ends_in(0)
        .says(&["1 of its names are of no input, such as c.png"]);
    assert_eq!(
        (of("named/sub/a.png"), of("named/a.png"), of("named/b.png")),
        ("a green owl", "a red cat", "a blue dog")
    );
    prompts("b.png\ta blue dog\n");
    run(folder.path(), "in -r -o none --prompt-file p.txt")
        .ends_in(2)
        .says(&["has no prompt for in/a.png and 1 more"]);
    let mut fed = small(folder.path(), "in/a.png -o fed.png --prompt-file - -s 1");
    fed.arg("-q");
    finish(fed, b"a green owl\n").ends_in(0);
    assert_eq!(of("fed.png"), "a green owl");
    assert!(!folder.path().join("none").exists());
}

#[test]
fn a_dry_run_says_what_the_base_would_do() {
    let folder = folder();
    let ran = generate(folder.path(), "-p cat -o a.png --seed 1,2 --dry-run", &[]).ends_in(0);
    for line in [
        "the prompt 64x64 -> a-1.png 128x128",
        "the prompt 64x64 -> a-2.png 128x128",
        "makes the picture; 2 steps, guidance 7.5",
        "base: about",
    ] {
        assert!(ran.text().contains(line), "{line}: {}", ran.text());
    }
    // Of the checkpoint that would be fetched, as the published one takes it.
    let plan = "--generate -p cat -o a.png --refine 0.2 --dry-run";
    let ran = plain(folder.path(), plan).ends_in(0);
    for line in [
        "the prompt 512x512 -> a.png 1024x1024",
        "base: CompVis/stable-diffusion-v1-4 makes the picture, and refines at 0.2; 50 steps",
    ] {
        assert!(ran.text().contains(line), "{line}: {}", ran.text());
    }
    assert_eq!(
        ran.text().matches("  base: about").count(),
        2,
        "{}",
        ran.text()
    );
    assert!(files(folder.path()).is_empty());
}

#[test]
fn a_prompt_beside_each_input_is_taken_where_that_was_asked_for() {
    let folder = folder_of(&[("in/a.png", 12, 8), ("in/b.png", 12, 8)]);
    fs::write(folder.path().join("in/a.txt"), "a red cat\n").unwrap();
    let said = |name: &str| {
        let bytes = fs::read(folder.path().join(name)).unwrap();
        String::from_utf8_lossy(&bytes).contains("a red cat")
    };
    run(folder.path(), "in -o out --prompt-from sidecar")
        .ends_in(1)
        .says(&["in/b.png", "b.txt", "give -p"]);
    assert!(said("out/a.png") && !folder.path().join("out/b.png").exists());
    // What a picture says of itself counts by default, and not where it is told not to.
    run(folder.path(), "out/a.png -o again.png").ends_in(0);
    assert!(said("again.png"));
    run(
        folder.path(),
        "out/a.png -o none.png --strip --prompt-from none",
    )
    .ends_in(0)
    .never_says("using the prompt");
    fs::write(folder.path().join("in/a.txt"), "a blue dog").unwrap();
    run(
        folder.path(),
        "in/a.png -o out --prompt-from sidecar --skip-existing",
    )
    .ends_in(0)
    .says(&["made with other settings"]);
    run(folder.path(), "in/a.png -o x.png -p cat --prompt-from none")
        .ends_in(0)
        .says(&["--prompt-from has no effect"]);
    let mut fed = small(folder.path(), "- -o fed.png --prompt-from sidecar -s 1");
    fed.arg("-q");
    let bytes = fs::read(folder.path().join("in/a.png")).unwrap();
    finish(fed, &bytes)
        .ends_in(1)
        .says(&["no file beside standard input"]);
}

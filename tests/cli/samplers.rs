//! `--sampler`, `--eta` and `--tolerance`: what they do to a picture, what they say of themselves, and what has no effect.

use sd_upscale::Sampler;

use super::setup::*;

/// A run with the small model and nothing said of steps but by `arguments`.
#[track_caller]
fn ran(folder: &Path, arguments: &str) -> Ran {
    finish(small(folder, arguments), b"")
}

/// The `parameters` of a picture of any format.
fn parameters(path: &Path) -> String {
    let header = sd_upscale::files::read_header(path).unwrap();
    header.metadata.parameters().unwrap()
}

/// What a latents file says of itself.
fn stated(path: &Path) -> std::collections::HashMap<String, String> {
    let bytes = fs::read(path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    header.metadata().clone().unwrap()
}

#[test]
fn each_sampler_and_each_of_its_settings_gives_a_picture_of_its_own_twice() {
    let folder = folder_of(&[("in.png", 16, 16)]);
    let mut all: Vec<String> = Sampler::ALL.map(|one| format!("--sampler {one}")).into();
    for sampler in Sampler::ALL.into_iter().filter(|one| one.takes_eta()) {
        all.push(format!("--sampler {sampler} --eta 0.5"));
    }
    all.push("--sampler dpm-adaptive --tolerance 2".into());
    all.push("--sampler dpmpp-2m --schedule log-linear".into());
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for arguments in all {
        let steps = if arguments.contains("adaptive") {
            ""
        } else {
            " -s 4"
        };
        let mut made = ["a", "b"].map(|name| {
            ran(
                folder.path(),
                &format!("in.png -o {name}.bmp {arguments}{steps}"),
            )
            .ends_in(0)
            .never_says("no effect");
            fs::read(folder.path().join(format!("{name}.bmp"))).unwrap()
        });
        assert!(made[0] == made[1], "{arguments}: not the same twice");
        let made = std::mem::take(&mut made[0]);
        assert!(!seen.contains(&made), "{arguments}: as an earlier one");
        seen.push(made);
    }
    // What is the default is the default.
    for (name, arguments) in [
        ("a", "--sampler euler-ancestral"),
        ("b", "--sampler euler-ancestral --eta 1"),
    ] {
        ran(
            folder.path(),
            &format!("in.png -o {name}.bmp -s 3 {arguments}"),
        )
        .ends_in(0);
    }
    let read = |name| fs::read(folder.path().join(name)).unwrap();
    assert!(read("a.bmp") == read("b.bmp"));
}

#[test]
fn names_and_numbers_that_are_none_are_refused_with_those_that_are() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    for (arguments, words) in [
        ("--sampler dpm++", "dpm-fast, dpm-adaptive"),
        ("--sampler Euler", "euler-ancestral"),
        ("--sampler euler-ancestral --eta 1.01", "to 1, all of it"),
        ("--sampler euler-ancestral --eta -0.5", "from 0, no noise"),
        ("--sampler euler-ancestral --eta nan", "from 0, no noise"),
        ("--sampler dpm-adaptive --tolerance 0", "above 0"),
        ("--sampler dpm-adaptive --tolerance -1", "above 0"),
        ("--sampler dpm-adaptive --tolerance inf", "to 20"),
        ("--sampler dpm-adaptive --tolerance NaN", "to 20"),
        ("--sampler dpm-adaptive --tolerance 21", "to 20"),
    ] {
        ran(folder.path(), &format!("in.png -o out.png {arguments}"))
            .ends_in(2)
            .says(&[words]);
    }
    assert_eq!(files(folder.path()), ["in.png"]);
}

#[test]
fn what_the_sampler_does_not_take_is_said_to_have_no_effect() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    for (arguments, said) in [
        (
            "--sampler dpm-adaptive --steps 20",
            "--steps has no effect with --sampler dpm-adaptive",
        ),
        (
            "--sampler dpm-adaptive --schedule karras",
            "--schedule has no effect with --sampler dpm-adaptive",
        ),
        (
            "--sampler dpm-adaptive --batch 2",
            "--batch has no effect with --sampler dpm-adaptive",
        ),
        (
            "--sampler dpm-fast -s 2 --schedule log-linear",
            "--schedule has no effect with --sampler dpm-fast",
        ),
        (
            "--sampler heun -s 2 --eta 1",
            "--eta has no effect with --sampler heun",
        ),
        ("-s 2 --eta 0", "--eta has no effect with --sampler euler"),
        (
            "--sampler dpmpp-2m -s 2 --eta 0.5",
            "these do: euler-ancestral, dpm2-ancestral, dpm-fast, dpm-adaptive, dpmpp-2s-ancestral",
        ),
        (
            "--sampler dpm-fast -s 2 --tolerance 0.25",
            "--tolerance has no effect with --sampler dpm-fast: it is of dpm-adaptive",
        ),
    ] {
        let ran = ran(folder.path(), &format!("in.png -o out.png {arguments}"));
        let ran = ran.ends_in(0).says(&[said]);
        assert_eq!(ran.stderr.matches("no effect").count(), 1, "{arguments}");
    }
}

#[test]
fn evaluations_are_told() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let evaluations = |arguments: &str| {
        let arguments = format!("in.png -o out.png --json -v {arguments}");
        let ran = ran(folder.path(), &arguments).ends_in(0);
        let line = ran.json().remove(0);
        let count = line["evaluations"].as_u64().unwrap();
        (count, line["steps"].clone(), ran)
    };
    for (arguments, expected) in [
        ("-s 3", 3),
        ("--sampler heun -s 3", 5),
        ("--sampler heun -s 3 --schedule log-linear", 6),
        ("--sampler dpm2-ancestral -s 3", 5),
        ("--sampler dpmpp-2s-ancestral -s 1", 1),
        ("--sampler dpm-fast -s 1", 1),
        ("--sampler dpm-fast -s 3", 3),
        ("--sampler dpm-fast -s 7 -g 2", 7),
        ("--sampler dpmpp-2m -s 2 --scale 4", 4),
        ("--sampler dpm2 -s 2 --scale 8", 9),
    ] {
        let (count, steps, _) = evaluations(arguments);
        assert_eq!(count, expected, "{arguments}");
        assert!(arguments.contains(&format!("-s {steps}")), "{arguments}");
    }
    let (_, _, heun) = evaluations("--sampler heun -s 3");
    heun.says(&["5 evaluations, "]);
    let (_, _, euler) = evaluations("-s 3");
    euler.says(&["(median of 3)"]);
    // Which the adaptive one finds: three a step, more of them for less of an error.
    let (loose, steps, loosely) = evaluations("--sampler dpm-adaptive --tolerance 10");
    let (close, _, closely) = evaluations("--sampler dpm-adaptive --tolerance 0.5");
    assert!(loose > 0 && loose < close, "{loose} {close}");
    assert_eq!((loose % 3, close % 3), (0, 0));
    assert!(steps.is_null());
    loosely.says(&[&format!("{loose} evaluations, ")]);
    closely.says(&[&format!("{close} evaluations, ")]);
    let (twice, ..) = evaluations("--sampler dpm-adaptive --tolerance 10 --scale 4");
    assert!(twice > loose, "{twice}");
}

#[test]
fn pictures_of_every_format_say_how_they_were_sampled() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    for (arguments, there, absent) in [
        (
            "-s 2",
            "Steps: 2, Sampler: Euler, Schedule type: Karras, CFG scale: 1, Seed: 0, Size: 16x16",
            "Eta",
        ),
        (
            "-s 2 --sampler dpmpp-2s-ancestral --eta 0.5 --schedule log-linear",
            "Steps: 2, Sampler: DPM++ 2S a, Schedule type: Log-linear, CFG scale: 1, Seed: 0, Eta: 0.5, Size",
            "Tolerance",
        ),
        (
            "-s 2 --sampler dpm-fast",
            "Steps: 2, Sampler: DPM fast, CFG scale: 1, Seed: 0, Eta: 1, Size",
            "Schedule",
        ),
        (
            "--sampler dpm-adaptive --tolerance 5",
            "Sampler: DPM adaptive, CFG scale: 1, Seed: 0, Eta: 1, Tolerance: 5, Size",
            "Steps",
        ),
    ] {
        for extension in ["png", "jpg", "webp", "tif"] {
            let output = format!("out.{extension}");
            ran(
                folder.path(),
                &format!("in.png -o {output} -p cat {arguments}"),
            )
            .ends_in(0);
            let text = parameters(&folder.path().join(&output));
            assert!(text.contains(there), "{output}: {text}");
            assert!(!text.contains(absent), "{output}: {text}");
            // It is known for what a program wrote: its prompt is found again.
            ran(folder.path(), &format!("{output} -o again.png -s 1"))
                .ends_in(0)
                .says(&["cat"]);
        }
    }
}

#[test]
fn latents_say_how_they_were_sampled_last() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    ran(
        folder.path(),
        "in.png -o one.safetensors --sampler dpm2-ancestral --eta 0.5 -s 2",
    )
    .ends_in(0);
    let said = stated(&folder.path().join("one.safetensors"));
    assert_eq!(said["sd_upscale.sampler"], "dpm2-ancestral");
    assert_eq!(said["sd_upscale.eta"], "0.5");
    assert_eq!(said["sd_upscale.steps"], "2");
    assert_eq!(said["sd_upscale.schedule"], "karras");
    ran(
        folder.path(),
        "one.safetensors -o two.safetensors --sampler dpm-adaptive --tolerance 5 --eta 0",
    )
    .ends_in(0);
    let said = stated(&folder.path().join("two.safetensors"));
    assert_eq!(said["sd_upscale.sampler"], "dpm-adaptive");
    assert_eq!(said["sd_upscale.tolerance"], "5");
    assert_eq!(said["sd_upscale.eta"], "0");
    for gone in ["steps", "schedule"] {
        let key = format!("sd_upscale.{gone}");
        assert!(!said.contains_key(&key), "{gone} is the first run's");
    }
    ran(folder.path(), "two.safetensors -o three.safetensors -s 2").ends_in(0);
    let said = stated(&folder.path().join("three.safetensors"));
    assert_eq!(said["sd_upscale.sampler"], "euler");
    for gone in ["tolerance", "eta"] {
        assert!(!said.contains_key(&format!("sd_upscale.{gone}")));
    }
}

#[test]
fn what_an_earlier_run_sampled_otherwise_is_said_to_be_so() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let made = "in.png -o out.png --skip-existing -s 2 --sampler euler-ancestral";
    ran(folder.path(), made).ends_in(0);
    let words = "made with other settings";
    ran(folder.path(), made).ends_in(0).never_says(words);
    for other in [
        "--eta 0.5",
        "--sampler heun",
        "--sampler dpm-adaptive",
        "--schedule log-linear",
    ] {
        ran(folder.path(), &format!("{made} {other}"))
            .ends_in(0)
            .says(&[words]);
    }
}

#[test]
fn a_dry_run_says_how_it_would_sample() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    for (arguments, line) in [
        (
            "-s 7",
            "sampler: euler, karras, 7 steps; 7 evaluations of the UNet a picture",
        ),
        (
            "--sampler dpm2-ancestral --eta 0.5 -s 7 --scale 4",
            "sampler: dpm2-ancestral, karras, eta 0.5, 7 steps; 26 evaluations",
        ),
        (
            "--sampler dpm-fast -s 7",
            "sampler: dpm-fast, eta 1, 7 steps; 7 evaluations",
        ),
        (
            "--sampler dpm-adaptive",
            "sampler: dpm-adaptive, eta 1, tolerance 0.25; as many evaluations",
        ),
    ] {
        let ran = ran(
            folder.path(),
            &format!("in.png -o o.png --dry-run {arguments}"),
        );
        let ran = ran.ends_in(0);
        assert!(ran.text().contains(line), "{}", ran.text());
    }
    let json = "in.png -o o.png --dry-run --json --sampler heun -s 4";
    let ran = ran(folder.path(), json).ends_in(0);
    assert_eq!(ran.json()[0]["evaluations"], 7);
    ran.says(&["sampler: heun, karras, 4 steps; 7 evaluations"]);
}

#[test]
fn a_folder_gives_each_picture_what_it_gets_alone_with_every_sampler() {
    let folder = folder_of(&[("in/a.png", 24, 16), ("in/b.png", 24, 16)]);
    for sampler in Sampler::ALL {
        let steps = match sampler {
            Sampler::DpmAdaptive => "--tolerance 5",
            _ => "-s 3",
        };
        let arguments = format!("-g 2 --sampler {sampler} {steps} --format bmp");
        ran(
            folder.path(),
            &format!("in -o joint --batch 2 --preview {arguments}"),
        )
        .ends_in(0);
        for name in ["a", "b"] {
            let alone = format!("in/{name}.png -o alone.bmp {arguments}");
            ran(folder.path(), &alone).ends_in(0);
            let read = |path: &str| fs::read(folder.path().join(path)).unwrap();
            assert!(
                read(&format!("joint/{name}.bmp")) == read("alone.bmp"),
                "{sampler} {name}"
            );
        }
        assert_eq!(files(&folder.path().join("joint")), ["a.bmp", "b.bmp"]);
    }
}

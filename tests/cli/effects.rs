//! No option does nothing in silence; repeated ones, odd values and names do what a person expects.

use super::setup::*;

#[test]
fn an_option_without_an_effect_says_so() {
    let folder = folder_of(&[("in.png", 12, 8)]);
    let latents = data("inputs/latents-8x12.safetensors");
    let latents = latents.display();
    for (arguments, said) in [
        (
            format!("{latents} -o l.png --color-fix adain"),
            "--color-fix has no effect on latents",
        ),
        (
            "in.png -o l.safetensors --color-fix wavelet".into(),
            "--color-fix has no effect where latents are written",
        ),
        (
            "in.png -o i.png --save-low-res".into(),
            "--save-low-res has no effect on images",
        ),
        (
            "in.png -o i.png --latent-scale raw".into(),
            "--latent-scale has no effect on images",
        ),
        (
            "in.png -o i.png --quality 80".into(),
            "--quality has no effect",
        ),
        (
            "in.png -o i.png --revision main".into(),
            "--revision has no effect",
        ),
        (
            "in.png -o i.png -r".into(),
            "--recursive, --include and --exclude have no effect",
        ),
        (
            "in.png -o - --skip-existing".into(),
            "have no effect with -o -",
        ),
        (
            "in.png -o i.png -n ugly".into(),
            "--negative-prompt has no effect",
        ),
    ] {
        run(folder.path(), &arguments).ends_in(0).says(&[said]);
    }
    // Where it has one, nothing is said.
    for arguments in [
        format!("{latents} -o l.png --save-low-res --latent-scale raw"),
        "in.png -o i.jpg --quality 80 --color-fix adain".into(),
        ". -o out -r --include in.png".into(),
    ] {
        run(folder.path(), &arguments)
            .ends_in(0)
            .never_says("no effect");
    }
}

#[test]
fn the_built_in_model_says_that_it_reads_no_words_and_refuses_stable_diffusions_latents() {
    let folder = folder_of(&[("in.png", 16, 16)]);
    plain(folder.path(), "in.png --model tiny -s 1 -o out.png -p cat")
        .ends_in(0)
        .says(&["do nothing in the built-in model"]);
    let latents = data("inputs/latents-8x12.safetensors");
    plain(
        folder.path(),
        &format!("{} --model tiny -s 1 -o stamp.png", latents.display()),
    )
    .ends_in(1)
    .says(&["its latents stand for 8x8 pixels each, and those of the model tiny for 1x1"]);
    assert!(!folder.path().join("stamp.png").exists());
    // Its own are welcome, and their names know their size.
    plain(folder.path(), "in.png --model tiny -s 1 -o own.safetensors").ends_in(0);
    plain(
        folder.path(),
        "own.safetensors --model tiny -s 1 -o . --name {stem}-{width}x{height}.png",
    )
    .ends_in(0);
    assert_eq!(size(folder.path().join("own-64x64.png")), (64, 64));
    plain(
        folder.path(),
        "own.safetensors --model tiny --dry-run -o x.png",
    )
    .ends_in(0);
    run(folder.path(), "own.safetensors -o stamp.png")
        .ends_in(1)
        .says(&["1x1 pixels each"]);
}

#[test]
fn of_a_repeated_option_the_last_counts_and_a_prompt_may_begin_with_a_dash() {
    let folder = folder_of(&[("in.png", 12, 8)]);
    let ran = run(
        folder.path(),
        "in.png -s 3 -o a.png -o b.png --seed 1 --seed 2 -s 1 --json",
    );
    let line = &ran.ends_in(0).json()[0];
    assert_eq!((&line["seed"], &line["steps"]), (&2.into(), &1.into()));
    assert_eq!(files(folder.path()), ["b.png", "in.png"]);
    run(folder.path(), "in.png -o c.png -p -dash -n --also -g 2").ends_in(0);
    let text = parameters_of(&folder.path().join("c.png"));
    assert!(
        text.starts_with("-dash\nNegative prompt: --also\n"),
        "{text}"
    );
    // Repeatable ones add up.
    picture(folder.path(), "in/a.png", 8, 8);
    picture(folder.path(), "in/b.png", 8, 8);
    run(folder.path(), "in -o out --include a.png --include b.png")
        .ends_in(0)
        .says(&["2 done"]);
}

/// The `parameters` of a PNG.
fn parameters_of(path: &Path) -> String {
    sd_upscale::files::read_header(path)
        .unwrap()
        .metadata
        .parameters()
        .unwrap()
}

#[test]
fn inputs_that_differ_in_their_extension_alone_can_go_to_one_folder() {
    let folder = folder_of(&[("photo.png", 12, 8), ("photo.bmp", 12, 8)]);
    run(folder.path(), "photo.png photo.bmp -o out --format png")
        .ends_in(2)
        .says(&["{in_ext}"]);
    run(
        folder.path(),
        "photo.png photo.bmp -o out --name {stem}-{in_ext}.png",
    )
    .ends_in(0);
    assert_eq!(
        files(&folder.path().join("out")),
        ["photo-bmp.png", "photo-png.png"]
    );
}

#[test]
fn files_passed_over_are_counted_without_verbose() {
    let folder = folder_of(&[("in/a.png", 8, 8)]);
    for name in ["b.psd", "c.PSD", "d.exr", "notes.txt"] {
        fs::write(folder.path().join("in").join(name), "x").unwrap();
    }
    run(folder.path(), "in -o out")
        .ends_in(0)
        .says(&["passed over 4 files of kinds that are not read (2 .psd, 1 .exr, 1 .txt)"]);
}

#[test]
fn a_missing_model_is_one_error_however_many_inputs_there_are() {
    let folder = folder_of(&[("a.png", 8, 8), ("b.png", 8, 8), ("c.png", 8, 8)]);
    let ran = plain(
        folder.path(),
        "a.png b.png c.png -o out --model ./nowhere --device cpu,cpu --json",
    )
    .ends_in(1);
    assert_eq!(
        ran.stderr.matches("there is no such folder").count(),
        1,
        "{}",
        ran.stderr
    );
    assert_eq!(ran.json().len(), 3);
}

#[test]
fn a_dry_run_checks_what_a_run_would_and_speaks_json() {
    let folder = folder_of(&[("in.png", 12, 8), ("wide.png", 8200, 1)]);
    fs::write(folder.path().join("bad.png"), "no picture").unwrap();
    let ran = plain(
        folder.path(),
        "in.png wide.png bad.png -o out --format webp --model tiny --dry-run --json",
    )
    .ends_in(1);
    let lines = ran.json();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["status"], "planned");
    assert_eq!(
        (&lines[0]["width"], &lines[0]["height"]),
        (&24.into(), &16.into())
    );
    assert!(lines[1]["error"].as_str().unwrap().contains("16383"));
    assert_eq!(lines[2]["status"], "error");
    ran.says(&["memory: about", "model: tiny"]);
    assert!(!folder.path().join("out").exists());
}

#[test]
fn a_device_is_checked_layer_by_layer() {
    let folder = folder();
    let ran = plain(folder.path(), "--check-device cpu --json").ends_in(0);
    let lines = ran.json();
    for part in ["convolution 3x3", "linear", "norm", "attention", "tiny"] {
        let named = |line: &&serde_json::Value| line["layer"].as_str().unwrap().contains(part);
        let found: Vec<_> = lines.iter().filter(named).collect();
        assert!(!found.is_empty(), "no {part}");
        for line in found {
            assert_eq!(line["ok"], true, "{line}");
            // Other orders of summing differ; nothing that was computed twice is equal in every last bit but the simplest. In 16
            // bits what is written is rounded to 11 and 8.
            let most = match line["dtype"].as_str().unwrap() {
                "f32" => 2e-5,
                "f16" => 5e-3,
                "bf16" => 4e-2,
                other => panic!("{other}"),
            };
            assert!(line["error"].as_f64().unwrap() < most, "{line}");
            assert!(line["seconds"].as_f64().unwrap() > 0.0, "{line}");
        }
    }
    for idle in ["a.png", "-o out.png", "--dtype f32", "-s 4", "--model tiny"] {
        plain(folder.path(), &format!("--check-device cpu {idle}"))
            .ends_in(2)
            .says(&["cannot be used with"]);
    }
    plain(folder.path(), "--check-device gpu")
        .ends_in(2)
        .says(&["expected auto, cpu, cuda"]);
}

#[test]
fn the_input_is_shown_beside_the_result() {
    let folder = folder_of(&[("in.png", 12, 8)]);
    let at = |name: &str| folder.path().join(name);
    run(folder.path(), "in.png -o plain.png").ends_in(0);
    run(
        folder.path(),
        "in.png -o out.png --compare --color-fix none",
    )
    .ends_in(0);
    // The result is the same, and what stands beside it is the input enlarged.
    assert!(fs::read(at("plain.png")).unwrap() == fs::read(at("out.png")).unwrap());
    let both = image(at("out-compare.png")).to_rgb8();
    assert_eq!(both.dimensions(), (48, 16));
    let (input, result) = (
        image(at("in.png")).to_rgb8(),
        image(at("out.png")).to_rgb8(),
    );
    let lanczos = image::imageops::FilterType::Lanczos3;
    let expected = image::imageops::resize(&input, 24, 16, lanczos);
    for (x, y, pixel) in both.enumerate_pixels() {
        let (expected, most) = match x {
            0..24 => (expected.get_pixel(x, y), 1),
            _ => (result.get_pixel(x - 24, y), 0),
        };
        let apart = pixel.0.iter().zip(expected.0).map(|(a, b)| a.abs_diff(b));
        assert!(apart.max().unwrap() <= most, "{x} {y}");
    }
    // Of latents, what they show; and of both, beside the low-res picture.
    let latents = data("inputs/latents-8x12.safetensors")
        .display()
        .to_string();
    run(
        folder.path(),
        &format!("{latents} -o l.webp --compare --scale 4"),
    )
    .ends_in(0);
    assert_eq!(size(at("l-compare.webp")), (768, 256));
    assert!(!at("l-low-res.webp").exists());
    run(
        folder.path(),
        &format!("{latents} -o m.png --compare --save-low-res"),
    )
    .ends_in(0);
    assert_eq!(
        (size(at("m-compare.png")), size(at("m-low-res.png"))),
        ((384, 128), (96, 64))
    );
    let base = data("base/sd1").display().to_string();
    let words = format!("--generate -p cat --base {base} --base-steps 1 -o g.png --compare");
    run(folder.path(), &words).ends_in(0);
    assert_eq!(size(at("g-compare.png")), (256, 128));
    for (arguments, said) in [
        (
            "in.png -o l.safetensors --compare",
            "--compare has no effect where latents",
        ),
        ("in.png -o - --compare", "have no effect with -o -"),
    ] {
        run(folder.path(), arguments).ends_in(0).says(&[said]);
    }
}

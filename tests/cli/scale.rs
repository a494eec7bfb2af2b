//! `--scale 4` and `--scale 8`: the upscaler again on its own latents.

use super::setup::*;

fn bytes(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).unwrap()
}

/// Shape and values of a file that was written.
fn latents(folder: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    tensor(&bytes(folder, name), "latents")
}

/// What a latents file says of itself.
fn stated(folder: &Path, name: &str) -> std::collections::HashMap<String, String> {
    let bytes = bytes(folder, name);
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    header.metadata().clone().unwrap()
}

/// Runs of `input` at 2, then of what that wrote, and so on; and at 4 and 8 at once: the same latents to the bit.
#[track_caller]
fn assert_passes_are_runs(folder: &Path, input: &str, options: &str) {
    let run = |from: &str, scale: usize, to: &str| {
        run(
            folder,
            &format!("{from} --scale {scale} -o {to} -p cat {options}"),
        )
        .ends_in(0);
    };
    run(input, 2, "two.safetensors");
    run("two.safetensors", 2, "twice-two.safetensors");
    run(input, 4, "four.safetensors");
    let four = latents(folder, "four.safetensors");
    let two = latents(folder, "two.safetensors");
    assert_eq!(four.0[2..], [2 * two.0[2], 2 * two.0[3]], "{input}");
    assert!(four == latents(folder, "twice-two.safetensors"), "{input}");
    run("four.safetensors", 2, "twice-four.safetensors");
    run(input, 8, "eight.safetensors");
    let eight = latents(folder, "eight.safetensors");
    assert!(eight == latents(folder, "twice-four.safetensors"));
}

#[test]
fn four_times_is_the_latents_of_two_fed_back_in() {
    let folder = folder_of(&[("in.png", 37, 53)]);
    for options in [
        "--seed 7 -s 2",
        "--guidance 3 -n dog",
        "--schedule log-linear -s 2",
        "--guidance 0",
        "--sampler dpm2-ancestral -s 2",
        "--sampler dpm-fast -s 2 -g 2",
        "--sampler dpm-adaptive --tolerance 10",
    ] {
        assert_passes_are_runs(folder.path(), "in.png", options);
    }
}

#[test]
fn latents_of_every_form_go_through_again_too() {
    let folder = folder();
    for name in [
        "files/f32.safetensors",
        "files/unmarked.latent",
        "files/sd-scripts.npz",
        "inputs/latents-8x12.safetensors",
    ] {
        let input = data(name).display().to_string();
        assert_passes_are_runs(folder.path(), &input, "--schedule log-linear");
    }
}

#[test]
fn the_picture_is_that_of_the_latents_cut_to_exactly_four_times_the_input() {
    let folder = folder_of(&[("in.png", 37, 53)]);
    run(folder.path(), "in.png -o two.safetensors").ends_in(0);
    run(folder.path(), "two.safetensors -o covering.png").ends_in(0);
    run(folder.path(), "in.png -o four.png --scale 4").ends_in(0);
    let covering = image(folder.path().join("covering.png"));
    // 10 x 14 positions cover 74 x 106 pixels.
    assert_eq!((covering.width(), covering.height()), (160, 224));
    let four = image(folder.path().join("four.png")).to_rgb8();
    assert_eq!(four.dimensions(), (148, 212));
    assert!(covering.crop_imm(0, 0, 148, 212).to_rgb8() == four);
}

#[test]
fn any_size_comes_out_at_exactly_the_multiple() {
    let folder = folder();
    for (width, height, scale) in [
        (1, 1, 4),
        (1, 1, 8),
        (1, 7, 4),
        (3, 2, 8),
        (5, 9, 8),
        (8, 8, 4),
        (65, 33, 4),
    ] {
        picture(folder.path(), "in.png", width, height);
        let ran = run(
            folder.path(),
            &format!("in.png -o out.png --scale {scale} --json"),
        )
        .ends_in(0);
        let expected = (scale * width, scale * height);
        let of = format!("of {width}x{height}");
        assert_eq!(size(folder.path().join("out.png")), expected, "{of}");
        let told = |key: &str| ran.json()[0][key].as_u64().unwrap() as u32;
        assert_eq!((told("width"), told("height")), expected, "{of}");
    }
}

#[test]
fn a_batch_and_a_file_of_several_give_what_each_gives_alone() {
    let folder = folder_of(&[("in/a.png", 20, 12), ("in/b.png", 20, 12)]);
    run(folder.path(), "in -o alone --scale 4").ends_in(0);
    run(folder.path(), "in -o together --scale 4 --batch 2").ends_in(0);
    for name in ["a.png", "b.png"] {
        let of = |output: &str| bytes(folder.path(), &format!("{output}/{name}"));
        assert!(of("alone") == of("together"), "{name}");
    }
    let input = data("files/batch3.safetensors").display().to_string();
    run(
        folder.path(),
        &format!("{input} -o each.png --scale 4 --save-low-res"),
    )
    .ends_in(0);
    run(
        folder.path(),
        &format!("{input} -o joint.png --scale 4 --batch 3"),
    )
    .ends_in(0);
    for n in 1..=3 {
        let of = |name: &str| folder.path().join(format!("{name}-{n}.png"));
        assert!(fs::read(of("each")).unwrap() == fs::read(of("joint")).unwrap());
        let low = size(folder.path().join(format!("each-{n}-low-res.png")));
        assert_eq!(size(of("each")), (4 * low.0, 4 * low.1));
    }
}

#[test]
fn transparency_and_the_colour_fix_keep_up() {
    let folder = folder();
    let input = data("files/rgba.png").display().to_string();
    let low = image(&input).to_rgba8();
    let mean = |image: &image::RgbaImage, channel: usize| {
        let sum: f64 = image.pixels().map(|p| f64::from(p.0[channel])).sum();
        sum / f64::from(image.width() * image.height())
    };
    let made = |options: &str| {
        run(
            folder.path(),
            &format!("{input} -o out.png --scale 4 {options}"),
        )
        .ends_in(0);
        image(folder.path().join("out.png")).to_rgba8()
    };
    let plain = made("--color-fix none");
    assert_eq!(
        plain.dimensions(),
        (4 * low.width(), 4 * low.height()),
        "alpha of another size than the colours would not be written"
    );
    // Doubling keeps the mean but for the edges' overshoot, which is clamped.
    assert!((mean(&plain, 3) - mean(&low, 3)).abs() < 3.0);
    let off = |image: &image::RgbaImage| -> f64 {
        let means = (0..3).map(|channel| (mean(image, channel), mean(&low, channel)));
        means.map(|(made, low)| (made - low).abs()).sum()
    };
    // The small model's weights are random, so its colours are far off; clipping keeps the fixes from being exact, and so does what
    // lies under transparent pixels.
    for fix in ["adain", "wavelet"] {
        let fixed = off(&made(&format!("--color-fix {fix}")));
        println!("{fix}: {:.1} -> {fixed:.1}", off(&plain));
        assert!(fixed < off(&plain), "{fix}: {fixed:.1}");
    }
}

#[test]
fn through_pipes_it_is_the_same() {
    let folder = folder_of(&[("in.png", 9, 6)]);
    run(folder.path(), "in.png -o out.png --scale 4").ends_in(0);
    let ran = run_fed(
        folder.path(),
        "- -o - --scale 4",
        &bytes(folder.path(), "in.png"),
    )
    .ends_in(0);
    assert!(ran.stdout == bytes(folder.path(), "out.png"));
    let latents = fs::read(data("files/f32.safetensors")).unwrap();
    let ran = run_fed(folder.path(), "- -o - --scale 4", &latents).ends_in(0);
    let made = image::load_from_memory(&ran.stdout).unwrap();
    let (shape, _) = tensor(&latents, "latents");
    let [height, width] = [shape[2], shape[3]].map(|side| 4 * 8 * side as u32);
    assert_eq!((made.width(), made.height()), (width, height));
}

#[test]
fn names_tell_the_scale_and_a_run_at_another_scale_knows_them() {
    let folder = folder_of(&[("a.png", 6, 4)]);
    run(folder.path(), "a.png").ends_in(0);
    run(folder.path(), "a.png --scale 4").ends_in(0);
    run(folder.path(), "a.png --scale 8 --format safetensors").ends_in(0);
    run(
        folder.path(),
        "a.png --scale 4 -o to --name {stem}-{width}x{height}",
    )
    .ends_in(0);
    assert_eq!(
        files(folder.path()),
        [
            "a-2x.png",
            "a-4x.png",
            "a-8x.safetensors",
            "a.png",
            "to/a-24x16.png"
        ]
    );
    for scale in [2, 4, 8] {
        let ran = run(
            folder.path(),
            &format!(". --scale {scale} --dry-run --json"),
        );
        let ran = ran
            .ends_in(0)
            .says(&["3 passed over as what an earlier run wrote"]);
        assert_eq!(ran.json().len(), 1, "{}", ran.text());
        assert_eq!(ran.json()[0]["output"], format!("./a-{scale}x.png"));
    }
}

#[test]
fn what_was_made_at_another_scale_is_made_again() {
    let folder = folder_of(&[("in/a.png", 37, 53)]);
    for format in ["png", "safetensors", "latent"] {
        let again = |scale: usize| {
            let command = format!("in -o out --format {format} --skip-existing --json");
            let ran = run(folder.path(), &format!("{command} --scale {scale}")).ends_in(0);
            let ran = ran.never_says("is kept");
            ran.json()[0]["status"].as_str().unwrap().to_string()
        };
        let told = [2, 2, 4, 4, 8, 8, 2].map(again);
        let expected = ["ok", "skipped", "ok", "skipped", "ok", "skipped", "ok"];
        assert_eq!(told, expected, "{format}");
    }
    // Latents as the input.
    let latents = data("files/f32.safetensors").display().to_string();
    let again = |scale: usize| {
        let command = format!("{latents} -o from.safetensors --skip-existing --json");
        let ran = run(folder.path(), &format!("{command} --scale {scale}")).ends_in(0);
        ran.json()[0]["status"].as_str().unwrap().to_string()
    };
    assert_eq!([2, 2, 4, 4].map(again), ["ok", "skipped", "ok", "skipped"]);
}

#[test]
fn the_scale_is_written_where_it_is_another_than_2() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let parameters = |name: &str| {
        let header = sd_upscale::files::read_header(&folder.path().join(name)).unwrap();
        header.metadata.parameters().unwrap()
    };
    run(folder.path(), "in.png -o two.png").ends_in(0);
    assert!(!parameters("two.png").contains("Scale: "));
    run(folder.path(), "in.png -o four.png --scale 4").ends_in(0);
    let four = parameters("four.png");
    assert!(four.contains("Size: 32x32, Scale: 4, "), "{four}");

    run(folder.path(), "in.png -o four.safetensors --scale 4").ends_in(0);
    let said = stated(folder.path(), "four.safetensors");
    assert_eq!(said["sd_upscale.scale"], "4");
    assert!(said["parameters"].contains("Scale: 4"));
    // Latents keep what was said of them, but this was said of another run.
    run(folder.path(), "four.safetensors -o eight.safetensors").ends_in(0);
    let said = stated(folder.path(), "eight.safetensors");
    assert_eq!(said.get("sd_upscale.scale"), None);
    run(
        folder.path(),
        "in.png -o bare.safetensors --scale 4 --strip",
    )
    .ends_in(0);
    let bare = stated(folder.path(), "bare.safetensors");
    assert!(!bare.contains_key("sd_upscale.scale") && !bare.contains_key("parameters"));
}

#[test]
fn the_last_pass_is_what_is_planned_for() {
    let folder = folder_of(&[("in.png", 20, 10), ("wide.png", 4096, 1)]);
    let ran = run(folder.path(), "in.png --scale 8 --dry-run").ends_in(0);
    let line = "in.png 20x10 -> in-8x.png 160x80";
    assert!(ran.text().contains(line), "{}", ran.text());
    let needs = |scale: usize| {
        let ran = run(
            folder.path(),
            &format!("wide.png --scale {scale} --dry-run"),
        );
        let text = ran.ends_in(0).text().to_string();
        let (_, rest) = text.split_once("decode: about ").unwrap();
        let (needs, _) = rest.split_once(" GB").unwrap();
        needs.parse::<f64>().unwrap()
    };
    let (two, eight) = (needs(2), needs(8));
    // Maps of 4 times the lines and 4 times the columns stand beside what every run takes.
    assert!(eight > two + 0.05, "{two} and {eight} GB");
    // 16384 pixels a side are one too many for WebP: no step is made for that.
    run(folder.path(), "wide.png -o out.webp --scale 4 -v")
        .ends_in(1)
        .says(&["16384x4", "16383"])
        .never_says("step");
    assert_eq!(files(folder.path()), ["in.png", "wide.png"]);
}

#[test]
fn the_steps_of_all_passes_are_told() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let ran = run(folder.path(), "in.png -o out.png --scale 8 -s 3 -v").ends_in(0);
    assert_eq!(ran.stderr.matches("(median of 3)").count(), 3);
    // The picture goes through the encoder once, and the UNet is read once.
    assert_eq!(ran.stderr.matches(": encode ").count(), 1);
    assert_eq!(ran.stderr.matches("reading the denoise weights").count(), 1);
    assert_eq!(ran.stderr.matches(": denoise ").count(), 3);
    assert_eq!(ran.stderr.matches(": decode ").count(), 1);
}

#[test]
fn other_scales_are_refused() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    for scale in ["0", "1", "3", "16", "2.0", "4x", "-2", ""] {
        let mut command = small(folder.path(), "in.png");
        command.arg(format!("--scale={scale}"));
        finish(command, b"")
            .ends_in(2)
            .says(&["--scale", "expected 2, 4 or 8"]);
    }
    assert_eq!(files(folder.path()), ["in.png"]);
}

#[test]
fn what_the_last_pass_has_no_memory_for_is_refused_before_the_first() {
    let folder = folder_of(&[("in.png", 500, 500)]);
    let mut command = small(folder.path(), "in.png");
    command.args(["-o", "out.png", "--max-memory", "260MB", "-s", "1", "-v"]);
    // Twice the size would fit.
    let mut twice = small(folder.path(), "in.png");
    twice.args(["--max-memory", "260MB", "--dry-run"]);
    finish(twice, b"").ends_in(0);
    command.args(["--scale", "8"]);
    finish(command, b"")
        .ends_in(1)
        .says(&["needs at least", "0.26 GB can be had", "--max-memory"])
        .never_says("first step");
}

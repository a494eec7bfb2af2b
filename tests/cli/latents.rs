//! Latents in and out, in every form that programs keep them in.

use super::setup::*;

#[track_caller]
fn input(name: &str) -> String {
    let path = data(&format!("files/{name}"));
    assert!(path.exists());
    path.display().to_string()
}

#[test]
fn a_batch_of_latents_gives_one_numbered_picture_each() {
    let folder = folder();
    let batch = fs::read(data("files/batch3.safetensors")).unwrap();
    run(
        folder.path(),
        &format!("{} -o out.png", input("batch3.safetensors")),
    )
    .ends_in(0);
    assert_eq!(
        files(folder.path()),
        ["out-1.png", "out-2.png", "out-3.png"]
    );
    let one = |n: usize| fs::read(folder.path().join(format!("out-{n}.png"))).unwrap();
    assert!(one(1) != one(2));
    run_fed(folder.path(), "- -o piped.png", &batch).ends_in(0);
    let piped = |n: usize| fs::read(folder.path().join(format!("piped-{n}.png"))).unwrap();
    assert!((1..=3).all(|n| one(n) == piped(n)));
    run_fed(folder.path(), "- -o -", &batch)
        .ends_in(1)
        .says(&["3 latents", "-o"]);
    // All three in one pass, and each by itself.
    let command = format!("{} -o joint.png --batch 3", input("batch3.safetensors"));
    run(folder.path(), &command).ends_in(0);
    let joint = |n: usize| fs::read(folder.path().join(format!("joint-{n}.png"))).unwrap();
    assert!((1..=3).all(|n| one(n) == joint(n)));
}

#[test]
fn a_batch_is_resumed_where_it_ended() {
    let folder = folder();
    let arguments = format!(
        "{} -o out.png --skip-existing --json",
        input("batch3.safetensors")
    );
    run(folder.path(), &arguments).ends_in(0);
    fs::remove_file(folder.path().join("out-2.png")).unwrap();
    let ran = run(folder.path(), &arguments).ends_in(0);
    let mut told: Vec<(String, String)> = Vec::new();
    for line in ran.json() {
        let text = |key: &str| line[key].as_str().unwrap().to_string();
        told.push((text("output"), text("status")));
    }
    told.sort();
    let expected = [
        ("out-1.png", "skipped"),
        ("out-2.png", "ok"),
        ("out-3.png", "skipped"),
    ];
    assert_eq!(
        told,
        expected.map(|(output, status)| (output.into(), status.into()))
    );
}

#[test]
fn a_batch_has_one_scale() {
    let folder = folder();
    // Scaled by their spread together, though the first alone would pass for raw.
    let values = |spread: f32| (0..256).map(move |i| if i % 2 == 0 { spread } else { -spread });
    let all: Vec<f32> = [3.0, 0.5, 0.5].into_iter().flat_map(values).collect();
    let bytes = safetensors("latents", &[3, 4, 8, 8], &all);
    fs::write(folder.path().join("in.safetensors"), bytes).unwrap();
    let ran = run(folder.path(), "in.safetensors -o auto.png").ends_in(0);
    assert_eq!(ran.stderr.matches("their spread is").count(), 1);
    run(
        folder.path(),
        "in.safetensors -o scaled.png --latent-scale scaled",
    )
    .ends_in(0);
    for n in 1..=3 {
        let pixels = |name| image(folder.path().join(format!("{name}-{n}.png"))).to_rgb8();
        assert!(pixels("auto") == pixels("scaled"), "{n}");
    }
}

#[test]
fn every_form_of_the_same_latents_gives_the_same_picture() {
    let folder = folder();
    let of = |name: &str| {
        run(
            folder.path(),
            &format!("{} -o out.png --strip -p cat", input(name)),
        )
        .ends_in(0);
        image(folder.path().join("out.png")).to_rgb8()
    };
    let expected = of("f32.safetensors");
    assert!(of("f64-rank3.safetensors") == expected);
    // Values that 16 bits round, and raw ones that are multiplied by 0.18215 again: a few levels at most.
    for name in [
        "f16.safetensors",
        "bf16.safetensors",
        "marked.latent",
        "unmarked.latent",
        "sd-scripts.npz",
    ] {
        let made = of(name);
        assert_eq!(made.dimensions(), expected.dimensions(), "{name}");
        let sum: u64 = made
            .iter()
            .zip(expected.iter())
            .map(|(a, b)| u64::from(a.abs_diff(*b)))
            .sum();
        let mean = sum as f64 / made.len() as f64;
        println!("{name}: {mean:.4} levels in the mean");
        assert!(mean < 1.0, "{name}: {mean:.2} levels in the mean");
    }
}

#[test]
fn the_scale_is_judged_by_the_spread_and_that_is_said() {
    let folder = folder();
    run(
        folder.path(),
        &format!("{} -o out.png", input("unstated-raw.safetensors")),
    )
    .ends_in(0)
    .says(&["spread", "taken as raw", "--latent-scale"]);
    run(
        folder.path(),
        &format!(
            "{} -o out.png --latent-scale raw",
            input("unstated-raw.safetensors")
        ),
    )
    .ends_in(0)
    .never_says("spread");
}

#[test]
fn upscaled_latents_are_written_scaled_as_float32_with_the_settings() {
    let folder = folder();
    let input = data("inputs/latents-8x12.safetensors");
    run(
        folder.path(),
        &format!("{} -o up.safetensors --seed 5 -p cat", input.display()),
    )
    .ends_in(0);
    let bytes = fs::read(folder.path().join("up.safetensors")).unwrap();
    let (shape, values) = tensor(&bytes, "latents");
    assert_eq!(shape, [1, 4, 16, 24]);
    assert!(values.iter().all(|v| v.is_finite()));
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    let parameters = &metadata["parameters"];
    assert!(parameters.starts_with("cat\n") && parameters.contains("Seed: 5"));
    assert_eq!(metadata["sd_upscale.seed"], "5");
}

#[test]
fn a_latent_for_comfyui_is_raw_and_marked_so() {
    let folder = folder();
    let input = data("inputs/latents-8x12.safetensors");
    for output in ["up.safetensors", "up.latent"] {
        run(folder.path(), &format!("{} -o {output}", input.display())).ends_in(0);
    }
    let read = |name| fs::read(folder.path().join(name)).unwrap();
    let (shape, scaled) = tensor(&read("up.safetensors"), "latents");
    let (comfy_shape, raw) = tensor(&read("up.latent"), "latent_tensor");
    assert_eq!(shape, comfy_shape);
    tensor(&read("up.latent"), "latent_format_version_0");
    for (raw, scaled) in raw.iter().zip(&scaled) {
        // One division in float32.
        assert!((raw * 0.18215 - scaled).abs() <= 1e-6 * (1.0 + scaled.abs()));
    }
}

#[test]
fn the_input_latents_can_be_decoded_too() {
    let folder = folder();
    run(
        folder.path(),
        &format!("{} -o out.png --save-low-res", input("f32.safetensors")),
    )
    .ends_in(0);
    assert_eq!(files(folder.path()), ["out-low-res.png", "out.png"]);
    let (width, height) = size(folder.path().join("out.png"));
    assert_eq!(
        size(folder.path().join("out-low-res.png")),
        (width / 2, height / 2)
    );
}

#[test]
fn latents_that_are_no_latents_are_refused() {
    for name in [
        "refused-channels-last.safetensors",
        "refused-empty.safetensors",
        "refused-flux.safetensors",
        "refused-integers.safetensors",
        "refused-nan.safetensors",
        "refused-rank2.safetensors",
        "refused-weights.safetensors",
    ] {
        let folder = folder();
        run(folder.path(), &format!("{} -o out.png", input(name)))
            .ends_in(1)
            .says(&[name]);
        assert!(files(folder.path()).is_empty());
    }
}

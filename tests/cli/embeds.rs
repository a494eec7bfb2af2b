//! `--prompt-embeds`: prompts in numbers.

use super::setup::*;

/// Two rows, with what to steer away from, and without.
fn rows(name: &str) -> String {
    let path = data(&format!("reference/{name}.safetensors"));
    path.display().to_string()
}

/// What a picture says of the prompt that it was made with.
fn stated(folder: &Path, name: &str) -> String {
    let bytes = fs::read(folder.join(name)).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let start = text.find("Prompt embeds: ").unwrap();
    text[start..].chars().take(25).collect()
}

#[test]
fn a_row_serves_all_inputs_or_each_has_its_own() {
    let folder = folder_of(&[("in/a.png", 12, 8), ("in/b.png", 12, 8)]);
    let path = folder.path();
    let both = rows("embeds");
    let ran = run(path, &format!("in -o out -g 2 --prompt-embeds {both}")).ends_in(0);
    ran.never_says("warning");
    let [a, b] = ["out/a.png", "out/b.png"].map(|name| stated(path, name));
    assert_ne!(a, b);
    // A picture of another row is another picture, and so is one of words.
    fs::copy(path.join("in/a.png"), path.join("in/b.png")).unwrap();
    run(path, &format!("in -o same -g 2 --prompt-embeds {both}")).ends_in(0);
    let read = |name: &str| image(path.join(name)).to_rgb8();
    assert!(read("same/a.png") == read("out/a.png"));
    assert!(read("same/a.png") != read("same/b.png"));
    run(path, "in/a.png -o words.png -g 2 -p cat").ends_in(0);
    assert!(read("words.png") != read("same/a.png"));
    // One row for all: the first of the file's, cut out of it.
    fs::write(path.join("one.safetensors"), first_row()).unwrap();
    run(
        path,
        "in -o all -g 2 --prompt-embeds one.safetensors -n blurry",
    )
    .ends_in(0);
    assert!(read("all/a.png") == read("all/b.png"));
    // What it steers away from came from two text encoders: single levels.
    let (words, numbers) = (read("all/a.png"), read("same/a.png"));
    let mut levels = words.iter().zip(numbers.iter());
    assert!(levels.all(|(a, b)| a.abs_diff(*b) <= 1));
    // Resumed with other numbers it is told.
    run(
        path,
        &format!("in -o out -g 2 --prompt-embeds {both} --skip-existing --json"),
    )
    .ends_in(0);
    run(
        path,
        "in -o out -g 2 --prompt-embeds one.safetensors --skip-existing",
    )
    .ends_in(0)
    .says(&["was made with other settings"]);
}

/// The first row of the prompts without what to steer away from.
fn first_row() -> Vec<u8> {
    let bytes = fs::read(rows("embeds-positive")).unwrap();
    let rows = ["prompt_embeds", "pooled_prompt_embeds"].map(|name| {
        let (mut shape, mut values) = tensor(&bytes, name);
        values.truncate(values.len() / shape[0]);
        shape[0] = 1;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (name, shape, bytes)
    });
    let views = rows.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (*name, view.unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn a_batch_of_latents_takes_a_row_each() {
    let folder = folder();
    let values: Vec<f32> = (0..2 * 4 * 64)
        .map(|i| (i % 256) as f32 / 128.0 - 1.0)
        .collect();
    let twice = safetensors("latents", &[2, 4, 8, 8], &values);
    fs::write(folder.path().join("in.safetensors"), twice).unwrap();
    let both = rows("embeds");
    run(
        folder.path(),
        &format!("in.safetensors -o out.png -g 2 --prompt-embeds {both}"),
    )
    .ends_in(0);
    let [a, b] = ["out-1.png", "out-2.png"].map(|name| stated(folder.path(), name));
    assert_ne!(a, b);
    let batch = data("files/batch3.safetensors").display().to_string();
    run(
        folder.path(),
        &format!("{batch} -o out.png --prompt-embeds {both}"),
    )
    .ends_in(1)
    .says(&["holds 2 prompts, and this input 3 pictures"]);
}

#[test]
fn what_cannot_be_followed_is_refused_before_the_work() {
    let folder = folder_of(&[("a.png", 8, 8), ("b.png", 8, 8), ("c.png", 8, 8)]);
    let path = folder.path();
    let both = rows("embeds");
    let write = |name: &str, bytes: &[u8]| fs::write(path.join(name), bytes).unwrap();
    write("text.safetensors", b"a cat");
    let only = safetensors("prompt_embeds", &[1, 77, 8], &[0.0; 77 * 8]);
    write("only.safetensors", &only);
    write(
        "flat.safetensors",
        &safetensors("prompt_embeds", &[77, 8], &[0.0; 77 * 8]),
    );
    write(
        "none.safetensors",
        &safetensors("latents", &[1, 4, 8, 8], &[0.0; 256]),
    );
    for (arguments, said) in [
        (
            format!("a.png b.png c.png -o out --prompt-embeds {both}"),
            "holds 2 prompts, and there are 3 inputs",
        ),
        (
            format!("a.png b.png -o out --prompt-embeds {both} -n x"),
            "leave that out",
        ),
        (
            format!("a.png b.png -o out --prompt-embeds {both} -p x"),
            "cannot be used with",
        ),
        (
            format!("a.png b.png -o out --prompt-embeds {both} --refine 0.2"),
            "cannot be used with",
        ),
        (
            "a.png --prompt-embeds text.safetensors".into(),
            "not a whole safetensors file",
        ),
        (
            "a.png --prompt-embeds missing.safetensors".into(),
            "No such file",
        ),
        (
            "a.png --prompt-embeds none.safetensors".into(),
            "it has no tensor prompt_embeds; expected prompt_embeds (b, 77, 768)",
        ),
        (
            "a.png --prompt-embeds only.safetensors".into(),
            "it has no tensor pooled_prompt_embeds",
        ),
        (
            "a.png --prompt-embeds flat.safetensors".into(),
            "is of shape [77, 8]; expected (b, 77, 768)",
        ),
    ] {
        run(path, &arguments).ends_in(2).says(&[said]);
    }
    assert_eq!(files(path).len(), 7, "{:?}", files(path));
    let ran = run(
        path,
        &format!("a.png b.png -o out -g 0 --prompt-embeds {both}"),
    );
    ran.ends_in(0).says(&["guidance 0 ignores the prompt"]);
    let mut command = program(path);
    command.args(["a.png", "--model", "tiny", "-s", "1", "--prompt-embeds"]);
    command.arg(&both);
    finish(command, b"")
        .ends_in(1)
        .says(&["made by another one"]);
}

//! `-` on either side: images and latents on standard input, the result on standard output, and nothing else there.

use super::setup::*;

#[test]
fn an_image_goes_through_standard_input_and_output_as_through_files() {
    let folder = folder_of(&[("in.png", 20, 12)]);
    run(folder.path(), "in.png -o file.png").ends_in(0);
    let input = fs::read(folder.path().join("in.png")).unwrap();
    let expected = fs::read(folder.path().join("file.png")).unwrap();
    let ran = run_fed(folder.path(), "- -o -", &input).ends_in(0);
    assert!(ran.stdout == expected, "the bytes differ");
    run_fed(folder.path(), "- -o piped.png", &input).ends_in(0);
    assert!(fs::read(folder.path().join("piped.png")).unwrap() == expected);
    let ran = run(folder.path(), "in.png -o -").ends_in(0);
    assert!(ran.stdout == expected);
}

#[test]
fn latents_on_standard_input_are_told_apart_by_content() {
    let folder = folder();
    let file = data("inputs/latents-8x12.safetensors");
    let input = fs::read(&file).unwrap();
    run(folder.path(), &format!("{} -o file.png", file.display())).ends_in(0);
    let ran = run_fed(folder.path(), "- -o -", &input).ends_in(0);
    assert!(ran.stdout == fs::read(folder.path().join("file.png")).unwrap());
    assert_eq!(size(folder.path().join("file.png")), (192, 128));
}

#[test]
fn the_format_of_standard_output_can_be_named() {
    let folder = folder_of(&[("in.png", 20, 12)]);
    for (format, expected) in [
        ("jpg", image::ImageFormat::Jpeg),
        ("webp", image::ImageFormat::WebP),
        ("tif", image::ImageFormat::Tiff),
    ] {
        let ran = run(folder.path(), &format!("in.png -o - --format {format}")).ends_in(0);
        assert_eq!(image::guess_format(&ran.stdout).unwrap(), expected);
    }
    let ran = run(folder.path(), "in.png -o - --format safetensors").ends_in(0);
    let (shape, _) = tensor(&ran.stdout, "latents");
    assert_eq!(shape[..2], [1, 4]);
}

#[test]
fn an_image_by_way_of_latents_is_the_image_made_at_once() {
    let folder = folder_of(&[("in.png", 64, 128)]);
    run(folder.path(), "in.png -o direct.png -s 2").ends_in(0);
    run(folder.path(), "in.png -o up.safetensors -s 2").ends_in(0);
    let bytes = fs::read(folder.path().join("up.safetensors")).unwrap();
    let (shape, _) = tensor(&bytes, "latents");
    assert_eq!(shape, [1, 4, 32, 16]);
    assert_eq!(
        files(folder.path()),
        ["direct.png", "in.png", "up.safetensors"]
    );
    // The upscaled latents, decoded as they are, are the direct picture.
    run(folder.path(), "up.safetensors -o again.png --save-low-res").ends_in(0);
    assert_eq!(
        image(folder.path().join("again-low-res.png")).to_rgb8(),
        image(folder.path().join("direct.png")).to_rgb8()
    );
}

#[test]
fn nonsense_and_nothing_on_standard_input_are_refused_without_output() {
    let folder = folder();
    for input in [&b""[..], b"hello", &[0; 1000]] {
        let ran = run_fed(folder.path(), "- -o -", input).ends_in(1);
        assert!(ran.stdout.is_empty());
        assert!(!ran.stderr.is_empty());
        run_fed(folder.path(), "- -o out.png", input).ends_in(1);
    }
    assert!(files(folder.path()).is_empty());
}

#[test]
fn standard_output_is_clean_without_json_even_when_verbose() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let ran = run(folder.path(), "in.png -o out.png -v").ends_in(0);
    assert!(ran.stdout.is_empty());
    ran.says(&["denoise", "decode"]);
    let ran = run(folder.path(), "in.png -o out.png -q").ends_in(0);
    assert!(ran.stdout.is_empty() && ran.stderr.is_empty());
}

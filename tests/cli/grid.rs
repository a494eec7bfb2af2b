//! `--grid`: outputs of several values in one picture.

use super::setup::*;

/// A letter's height and a gap above and below it.
const STRIP: u32 = 20 + 2 * GAP;
const GAP: u32 = 8;

/// Whether the part of `grid` at this place is the picture.
fn shows(grid: &image::RgbImage, picture: &image::RgbImage, left: u32, top: u32) -> bool {
    let mut pixels = picture.enumerate_pixels();
    pixels.all(|(x, y, pixel)| grid.get_pixel(left + x, top + y) == pixel)
}

/// Points of letters in a part of it.
fn dark(
    grid: &image::RgbImage,
    columns: std::ops::Range<u32>,
    lines: std::ops::Range<u32>,
) -> usize {
    let points = lines.flat_map(|y| columns.clone().map(move |x| (x, y)));
    points
        .filter(|(x, y)| grid.get_pixel(*x, *y).0 == [0; 3])
        .count()
}

#[test]
fn each_output_stands_under_its_label() {
    let folder = folder_of(&[("in.png", 150, 40)]);
    let path = folder.path();
    let ran = run(
        path,
        "in.png -o out.png --seed 1,2 -g 0,1,4 -p cat --grid grid.png --json",
    )
    .ends_in(0);
    assert_eq!(ran.json().len(), 6);
    let grid = image(path.join("grid.png")).to_rgb8();
    let (column, row) = (300 + GAP, STRIP + 80 + GAP);
    assert_eq!(grid.dimensions(), (GAP + 3 * column, 2 * row));
    let mut labels = Vec::new();
    for (line, seed) in (0..).zip([1, 2]) {
        for (place, guidance) in (0..).zip([0, 1, 4]) {
            let output = image(path.join(format!("out-{seed}-g{guidance}.png"))).to_rgb8();
            let (left, top) = (GAP + place * column, line * row);
            assert!(
                shows(&grid, &output, left, top + STRIP),
                "{seed} {guidance}"
            );
            labels.push(dark(&grid, left..left + column, top..top + STRIP));
        }
    }
    // The letters are black on white; "1" and "2" are of other shapes.
    assert!(labels.iter().all(|points| *points > 300), "{labels:?}");
    assert_ne!(labels[0], labels[3]);
    // From files that were there already, in another format; and with a single value there is nothing to show.
    run(
        path,
        "in.png -o out.png --seed 1,2 -g 0,1,4 -p cat --grid sub/again.jpg --skip-existing -q",
    )
    .ends_in(0);
    assert_eq!(size(path.join("sub/again.jpg")), grid.dimensions());
    run(path, "in.png -o one.png --grid one-grid.png")
        .ends_in(2)
        .says(&["give --seed 1,2,3 or -g 0,1,4"]);
    assert!(!path.join("one.png").exists());
}

#[test]
fn inputs_stand_below_each_other_and_what_failed_is_grey() {
    let folder = folder_of(&[("a.png", 150, 40), ("b.png", 8, 150)]);
    let path = folder.path();
    // It cannot be written over: a folder of that name.
    fs::create_dir_all(path.join("out/b-2.png/x")).unwrap();
    let ran = run(path, "a.png b.png -o out --seed 1,2 --grid grid.png").ends_in(1);
    ran.says(&["grid: grid.png"]);
    let grid = image(path.join("grid.png")).to_rgb8();
    let (first, second) = (STRIP + 80 + GAP, STRIP + 300 + GAP);
    assert_eq!(
        grid.dimensions(),
        (3 * GAP + 2 * 300, 2 * STRIP + first + second)
    );
    let top = 2 * STRIP + first + STRIP;
    let b = image(path.join("out/b-1.png")).to_rgb8();
    assert!(shows(&grid, &b, GAP, top));
    assert_eq!(grid.get_pixel(2 * GAP + 300 + 20, top + 20).0, [191; 3]);
    // A batch of latents, whose pictures are numbered.
    let batch = data("files/batch3.safetensors").display().to_string();
    run(
        path,
        &format!("{batch} -o l.png --seed 1,2 --grid latents.png"),
    )
    .ends_in(0);
    let (width, height) = size(path.join("latents.png"));
    let (w, h) = size(path.join("l-1-1.png"));
    assert_eq!(height, 3 * (2 * STRIP + h + GAP));
    assert!(width >= 3 * GAP + 2 * w);
}

#[test]
fn a_place_that_is_anothers_is_refused_before_the_work() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    for (arguments, said) in [
        (
            "in.png -o out.png --seed 1,2 --grid in.png",
            "is an input and is never written over",
        ),
        (
            "in.png -o out.png --seed 1,2 --grid out-2.png",
            "it is where the output of in.png goes",
        ),
        (
            "in.png -o out.png --seed 1,2 --grid grid.gif",
            "give png, jpg, webp, tif, bmp or jxl",
        ),
        (
            "in.png -o out.png --seed 1,2 --grid grid",
            "give png, jpg, webp, tif, bmp or jxl",
        ),
        (
            "in.png -o out.safetensors --seed 1,2 --grid grid.png",
            "latents are written",
        ),
    ] {
        run(folder.path(), arguments).ends_in(2).says(&[said]);
    }
    assert_eq!(files(folder.path()), ["in.png"]);
}

//! Every size of input gives exactly twice it.

use super::setup::*;

#[test]
fn pictures_of_awkward_sizes_come_out_exactly_twice_as_large() {
    for (width, height) in [(1, 1), (7, 5), (70, 50), (65, 33), (1, 90), (64, 64)] {
        let folder = folder_of(&[("in.png", width, height)]);
        run(folder.path(), "in.png -o out.png").ends_in(0);
        assert_eq!(
            size(folder.path().join("out.png")),
            (2 * width, 2 * height),
            "of {width}x{height}"
        );
        assert_eq!(files(folder.path()), ["in.png", "out.png"]);
    }
}

#[test]
fn a_picture_of_500x375_comes_out_at_1000x750() {
    let folder = folder_of(&[("in.png", 500, 375)]);
    run(folder.path(), "in.png").ends_in(0);
    assert_eq!(size(folder.path().join("in-2x.png")), (1000, 750));
}

#[test]
fn every_format_that_is_read_is_upscaled_and_every_format_that_is_named_is_written() {
    for extension in ["png", "jpg", "webp", "tif", "bmp"] {
        let folder = folder();
        picture(folder.path(), &format!("in.{extension}"), 20, 12);
        let input = format!("in.{extension}");
        run(folder.path(), &format!("{input} -o to.png")).ends_in(0);
        assert_eq!(size(folder.path().join("to.png")), (40, 24));
        let output = format!("out.{extension}");
        run(folder.path(), &format!("{input} -o {output}")).ends_in(0);
        let bytes = fs::read(folder.path().join(&output)).unwrap();
        let written = image::guess_format(&bytes).unwrap();
        assert_eq!(Some(written), image::ImageFormat::from_extension(extension));
        assert_eq!(size(folder.path().join(output)), (40, 24), "{extension}");
    }
}

//! `--max-memory`, `--temp-dir` and what is said of memory before the work.

use super::setup::*;

/// Gigabytes that the process had at its most, as `-v` tells at the end.
#[cfg(target_os = "linux")]
fn peak(ran: &Ran) -> f64 {
    let (_, rest) = ran.stderr.split_once("peak memory ").unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_keeps_to_the_most_memory_and_makes_the_same_picture() {
    let folder = folder_of(&[("in.png", 500, 501)]);
    fs::create_dir(folder.path().join("spilled")).unwrap();
    let random = data("model").display().to_string();
    for (model, most) in [("tiny", 0.3), (&*random, 0.26)] {
        let of = |options: &str| {
            let mut command = program(folder.path());
            command.args("in.png -s 1 -v --temp-dir spilled --model".split(' '));
            command.arg(model).args(options.split(' '));
            finish(command, b"").ends_in(0)
        };
        let free = of("-o free.bmp");
        let limited = of(&format!("-o limited.bmp --max-memory {most}GB"))
            .says(&["denoise: about 0.", "decode: about 0."]);
        assert!(
            limited.stderr.contains("spilled to a file in spilled")
                || limited.stderr.contains("recomputed"),
            "{}",
            limited.stderr
        );
        // What the estimates may be off by, above; below the unlimited run is there to show that the limit did something.
        let (limited, free) = (peak(&limited), peak(&free));
        assert!(
            limited <= 1.1 * most && free > 1.15 * limited,
            "{model}: {limited} GB within {most} GB, {free} GB without"
        );
        let made = |name: &str| fs::read(folder.path().join(name)).unwrap();
        assert!(made("limited.bmp") == made("free.bmp"), "{model}");
        // The file for maps has no name.
        assert_eq!(files(&folder.path().join("spilled")), [""; 0]);
    }
}

#[test]
fn too_little_memory_is_said_before_the_work_and_fails_that_file_alone() {
    let folder = folder_of(&[("large.png", 900, 900), ("small.png", 12, 12)]);
    let mut command = small(folder.path(), "large.png small.png -o out -v --json");
    command.args(["--max-memory", "240MB"]);
    let ran = finish(command, b"").ends_in(1);
    let lines = ran.json();
    let error = lines[0]["error"].as_str().unwrap();
    assert!(
        error.contains("stage needs at least 0.") && error.contains("--max-memory"),
        "{error}"
    );
    assert_eq!(lines[1]["status"], "ok");
    let ran = ran.never_says("large.png: encode 0");
    // What it says would be enough is.
    let least = error.split("at least ").nth(1).unwrap();
    let least: f64 = least.split(' ').next().unwrap().parse().unwrap();
    let mut command = small(folder.path(), "large.png --dry-run");
    command.args(["--max-memory", &format!("{}MB", (least + 0.005) * 1000.0)]);
    let planned = finish(command, b"");
    // Another stage may need more; then it is that one's turn to be named.
    assert!(planned.code == Some(0) || !planned.stderr.contains(&stage_of(error)));
    drop(ran);
}

fn stage_of(error: &str) -> String {
    let before = error.split(" stage needs").next().unwrap();
    format!("the {} stage", before.rsplit(' ').next().unwrap())
}

#[test]
fn a_dry_run_says_how_each_stage_keeps_its_maps() {
    let folder = folder();
    let white = image::GrayImage::from_pixel(2100, 2052, image::Luma([255]));
    white.save(folder.path().join("white.png")).unwrap();
    let model = data("model");
    let ran = plain(
        folder.path(),
        &format!(
            "white.png --dry-run --max-memory 6GB --model {}",
            model.display()
        ),
    )
    .ends_in(0);
    let text = ran.text();
    for part in [
        "memory: about",
        "  encode: about",
        "  denoise: about",
        "  decode: about",
        "in bands",
        // Beyond 4096x4096 pixels.
        "the VAE's attention within windows of 512x512 positions",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Of the published model nothing is at hand, and nothing is fetched.
    let ran = plain(folder.path(), "white.png --dry-run --max-memory 3GB").ends_in(1);
    assert!(
        ran.text().contains("stage needs at least"),
        "{}",
        ran.text()
    );
    let ran = plain(folder.path(), "white.png --dry-run --max-memory 12GB").ends_in(0);
    assert!(
        ran.text().contains("1.49 of them weights"),
        "{}",
        ran.text()
    );
}

#[test]
fn any_number_of_threads_makes_the_same_picture() {
    let folder = folder_of(&[("in.png", 70, 40)]);
    let made = |threads: &str| {
        let mut command = small(
            folder.path(),
            "in.png -s 2 --overwrite -o out.bmp --threads",
        );
        command.arg(threads).env_remove("RAYON_NUM_THREADS");
        finish(command, b"").ends_in(0);
        fs::read(folder.path().join("out.bmp")).unwrap()
    };
    let one = made("1");
    for threads in ["2", "16", "64"] {
        assert!(made(threads) == one, "{threads} threads");
    }
    for wrong in ["0", "1025", "two"] {
        let mut command = small(folder.path(), "in.png -o out.bmp --threads");
        command.arg(wrong);
        finish(command, b"").ends_in(2).says(&["--threads"]);
    }
}

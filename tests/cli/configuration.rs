//! `sd-upscale.toml`.

use super::setup::*;

#[test]
fn a_file_in_the_folder_gives_defaults_and_the_command_line_wins() {
    let folder = folder_of(&[
        ("in.png", 12, 8),
        ("all/a.png", 12, 8),
        ("all/b.jpg", 12, 8),
    ]);
    let write = |text: &str| fs::write(folder.path().join("sd-upscale.toml"), text).unwrap();
    let said = |name: &str| {
        let bytes = fs::read(folder.path().join(name)).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let start = text.find("Steps: ").unwrap();
        text[start..].chars().take(80).collect::<String>()
    };
    write("steps = 2\nseed = [3, 4]\nschedule = \"log-linear\"\nguidance = 0.5\n");
    let mut command = small(folder.path(), "in.png -o out.png");
    command.arg("-q");
    finish(command, b"").ends_in(0);
    let expected = "Steps: 2, Sampler: Euler, Schedule type: Log-linear, CFG scale: 0.5, Seed: 4";
    assert!(
        said("out-4.png").starts_with(expected),
        "{}",
        said("out-4.png")
    );
    assert!(folder.path().join("out-3.png").exists());
    // `run` says -s 1.
    run(
        folder.path(),
        "in.png -o own.png --seed 7 --schedule karras",
    )
    .ends_in(0);
    let expected = "Steps: 1, Sampler: Euler, Schedule type: Karras, CFG scale: 0.5, Seed: 7";
    assert!(said("own.png").starts_with(expected), "{}", said("own.png"));
    // What it says is shown, as far as it counts.
    let ran = run(folder.path(), "in.png -o a.png --seed 7 --dry-run").ends_in(0);
    assert!(
        ran.text()
            .contains("configuration: sd-upscale.toml: guidance = 0.5, schedule = \"log-linear\""),
        "{}",
        ran.text()
    );
    // A flag, and what may be said several times; and what the command line says the opposite of.
    write("include = [\"*.png\", \"*.gif\"]\nskip-existing = true\nquiet = false\n");
    run(folder.path(), "all -o big").ends_in(0);
    assert_eq!(files(&folder.path().join("big")), ["a.png"]);
    let ran = run(folder.path(), "all -o big --json --overwrite").ends_in(0);
    assert_eq!(ran.json()[0]["status"], "ok");
    let ran = run(folder.path(), "all -o big --json").ends_in(0);
    assert_eq!(ran.json()[0]["status"], "skipped");
    // The other modes go on.
    write("model = \"tiny\"\nsteps = 3\ngenerate = true\n");
    plain(folder.path(), "in.png -o t.png").ends_in(0);
    plain(folder.path(), "--export-tiny tiny").ends_in(0);
    plain(folder.path(), "--version").ends_in(0);
    for (text, said) in [
        ("stepz = 3", "`stepz` is no option"),
        ("convert = \"x\"", "`convert` is no option"),
        ("steps = \"many\"", "with the defaults of sd-upscale.toml"),
        ("steps = 3\nseed = ", "line 2"),
        ("recursive = \"yes\"", "expected true or false"),
        ("steps = { a = 1 }", "expected a text or a number"),
        (
            "quiet = true\nverbose = true",
            "with the defaults of sd-upscale.toml",
        ),
    ] {
        write(text);
        plain(folder.path(), "in.png -o no.png")
            .ends_in(2)
            .says(&[said]);
    }
    assert!(!folder.path().join("no.png").exists());
}

#[test]
fn a_file_in_the_configuration_folder_counts_where_the_current_one_has_none() {
    let folder = folder_of(&[("in.png", 12, 8)]);
    let users = folder.path().join("config");
    fs::create_dir(&users).unwrap();
    fs::write(users.join("sd-upscale.toml"), "format = \"webp\"").unwrap();
    let run = || {
        let mut command = small(folder.path(), "in.png -s 1");
        command.env("XDG_CONFIG_HOME", &users);
        finish(command, b"").ends_in(0)
    };
    run();
    assert!(folder.path().join("in-2x.webp").exists());
    fs::write(folder.path().join("sd-upscale.toml"), "format = \"bmp\"").unwrap();
    run();
    assert!(folder.path().join("in-2x.bmp").exists());
}

//! The program at home in a shell: help on one screen, completions, the man page, what it is and what it can compute on.

use std::collections::BTreeSet;
use std::process::Command;

use super::setup::*;

/// Options as `--help` lists them: `--name` where a line of options begins.
fn long_options(help: &str) -> BTreeSet<String> {
    let names = help.lines().filter_map(|line| {
        let line = line.trim_start();
        let option = match line.split_once(", --") {
            Some((short, rest)) if short.len() == 2 && short.starts_with('-') => rest,
            _ => line.strip_prefix("--")?,
        };
        let end = option.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        Some(format!("--{}", &option[..end.unwrap_or(option.len())]))
    });
    names.collect()
}

/// A cache with an upscaler, a base checkpoint and a VAE in it, as far as completions look.
fn cache(folder: &Path) {
    let write = |path: &str, text: &str| {
        let path = folder.join("hub").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    for (name, class) in [
        ("up", "StableDiffusionLatentUpscalePipeline"),
        ("base", "StableDiffusionPipeline"),
    ] {
        let snapshot = format!("models--org--{name}/snapshots/0123");
        let index = format!(r#"{{"_class_name": "{class}"}}"#);
        write(&format!("{snapshot}/model_index.json"), &index);
        write(&format!("{snapshot}/unet/config.json"), "{}");
        write(&format!("{snapshot}/vae/config.json"), "{}");
    }
    let vae = r#"{"_class_name": "AutoencoderKL"}"#;
    write("models--org--vae/snapshots/0123/config.json", vae);
    write("models--words--of--others/snapshots/0123/config.json", "{}");
}

#[test]
fn the_short_help_fits_a_screen_and_the_long_one_has_all() {
    let folder = folder();
    let short = plain(folder.path(), "-h").ends_in(0);
    let lines: Vec<&str> = short.text().trim_end().lines().collect();
    // A line is left for the prompt.
    assert!(lines.len() < 24, "{}", short.text());
    let widest = lines.iter().map(|line| line.chars().count()).max();
    assert!(widest <= Some(80), "{}", short.text());
    let shown = long_options(short.text());
    assert_eq!(shown.len(), 10 + 1, "ten and --help: {shown:?}");
    assert!(short.text().contains("--help has all"), "{}", short.text());
    let long = plain(folder.path(), "--help").ends_in(0);
    let all = long_options(long.text());
    assert!(all.is_superset(&shown) && all.len() > 50, "{all:?}");
    for heading in ["Examples:", "Environment:", "Exit status:"] {
        assert!(long.text().contains(heading), "{heading}");
    }
}

#[test]
fn the_version_is_a_line_and_in_full_says_what_the_program_is_of() {
    let folder = folder();
    let line = format!("sd-upscale {}\n", env!("CARGO_PKG_VERSION"));
    let short = plain(folder.path(), "-V").ends_in(0);
    assert_eq!(short.text(), line);
    let long = plain(folder.path(), "--version").ends_in(0);
    let text = long.text();
    assert!(text.starts_with(&line), "{text}");
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let features = field("features: ").unwrap();
    assert_eq!(features.contains("cuda"), cfg!(feature = "cuda"), "{text}");
    if let Some(commit) = field("commit: ") {
        assert!(commit.bytes().all(|b| b.is_ascii_hexdigit()), "{text}");
    }
    // Every machine has these.
    assert!(field("CPU kernels: ").unwrap().contains("portable"));
    let mut command = program(folder.path());
    command
        .args(["--version"])
        .env("SD_UPSCALE_KERNELS", "portable");
    let chosen = finish(command, b"").ends_in(0);
    assert!(chosen.text().contains("portable computes"));
}

#[test]
fn the_man_page_has_every_option_with_its_words() {
    let folder = folder();
    let help = plain(folder.path(), "--help").ends_in(0);
    let page = plain(folder.path(), "--man").ends_in(0);
    let page = page.text().replace("\\-", "-");
    for option in long_options(help.text()) {
        let at = page.find(&format!("{option}\\fR"));
        let at = at.unwrap_or_else(|| panic!("{option} is not in the page"));
        let words = page[at..].lines().nth(1).unwrap_or_default();
        assert!(
            !words.is_empty() && !words.starts_with('.'),
            "{option}: {words}"
        );
    }
    for section in [
        "OPTIONS",
        "\"EXIT STATUS\"",
        "\"JSON OUTPUT\"",
        "ENVIRONMENT",
        "FILES",
        "EXAMPLES",
    ] {
        assert!(page.contains(&format!(".SH {section}\n")), "{section}");
    }
    // The page is the same on every machine.
    assert!(!page.contains("CPU kernels:"));
    let path = folder.path().join("sd-upscale.1");
    fs::write(&path, plain(folder.path(), "--man").stdout).unwrap();
    for (checker, arguments) in [
        ("mandoc", &["-Tlint", "-Werror"][..]),
        ("groff", &["-man", "-Tutf8", "-ww", "-z"]),
    ] {
        let Ok(ran) = Command::new(checker).args(arguments).arg(&path).output() else {
            println!("passed over {checker}: it is not there");
            continue;
        };
        let said = String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned();
        assert!(ran.status.success() && said.is_empty(), "{checker}: {said}");
    }
}

#[test]
fn devices_are_listed_with_their_memory_and_the_reason_where_there_is_no_cuda() {
    let folder = folder();
    let ran = plain(folder.path(), "--list-devices --json").ends_in(0);
    let lines: Vec<serde_json::Value> = ran
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines[0]["device"], "cpu");
    if cfg!(target_os = "linux") {
        let bytes = |key: &str| lines[0][key].as_u64().unwrap();
        assert!(bytes("free_memory") > 0 && bytes("free_memory") <= bytes("total_memory"));
    }
    assert_eq!(lines.iter().filter(|line| line["auto"] == true).count(), 1);
    let words = plain(folder.path(), "--list-devices").ends_in(0);
    assert!(words.text().starts_with("cpu "), "{}", words.text());
    assert_eq!(words.text().lines().count(), lines.len());
    if !cfg!(feature = "cuda") {
        let reason = lines[1]["error"].as_str().unwrap();
        assert!(reason.contains("--features cuda,cudnn"), "{reason}");
        assert!(words.text().contains(reason), "{}", words.text());
    }
}

#[test]
fn what_prints_and_ends_goes_with_nothing_else() {
    let folder = folder();
    for mode in ["--man", "--list-devices", "--completions bash"] {
        for idle in [
            "a.png",
            "-o out.png",
            "-s 4",
            "--check-device cpu",
            "--quiet",
        ] {
            plain(folder.path(), &format!("{mode} {idle}"))
                .ends_in(2)
                .says(&["cannot be used with"]);
        }
    }
    // Defaults of a run are none of theirs, and they are no defaults.
    let defaults = folder.path().join("sd-upscale.toml");
    fs::write(&defaults, "steps = 4").unwrap();
    for mode in ["--man", "--list-devices", "--completions bash"] {
        plain(folder.path(), mode).ends_in(0);
    }
    fs::write(&defaults, "man = true").unwrap();
    plain(folder.path(), "a.png")
        .ends_in(2)
        .says(&["`man` is no option that has a default"]);
    fs::remove_file(&defaults).unwrap();
    plain(folder.path(), "--completions csh")
        .ends_in(2)
        .says(&["bash, zsh, fish, powershell, elvish"]);
}

/// What a shell that asks in fish's way is answered: a value a line, without the descriptions.
fn answers(folder: &Path, words: &[&str]) -> Vec<String> {
    let mut command = program(folder);
    command.env("SD_UPSCALE_COMPLETE", "fish");
    command.env("HF_HOME", folder.join("cache"));
    command.args(["--", "sd-upscale"]).args(words);
    let ran = finish(command, b"").ends_in(0);
    let value = |line: &str| line.split('\t').next().unwrap_or_default().to_owned();
    ran.text().lines().map(value).collect()
}

#[test]
fn values_are_completed_that_a_shell_cannot_know() {
    let folder = folder_of(&[("in.png", 2, 2)]);
    cache(&folder.path().join("cache"));
    let of = |words: &[&str]| answers(folder.path(), words);
    let models = of(&["--model", ""]);
    assert_eq!(models[..2], ["tiny", "org/up"]);
    assert!(models.contains(&"in.png".into()) && models.contains(&"cache/".into()));
    assert_eq!(of(&["--base", "org"]), ["org/base"]);
    assert_eq!(of(&["--vae", "org"]), ["org/base", "org/up", "org/vae"]);
    assert_eq!(of(&["--format", "t"]), ["tif"]);
    assert_eq!(of(&["--device", "cp"]), ["cpu"]);
    assert_eq!(of(&["--device", "cpu,a"]), ["cpu,auto"]);
    assert_eq!(of(&["--dtype", "b"]), ["bf16"]);
    assert_eq!(of(&["--sampler", "h"]), ["heun"]);
    assert_eq!(of(&["--list"]), ["--list-devices"]);
    assert_eq!(of(&["i"]), ["in.png"]);
}

#[test]
fn every_shell_gets_what_calls_the_program() {
    let folder = folder();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let ran = plain(folder.path(), &format!("--completions {shell}")).ends_in(0);
        let asks = format!("SD_UPSCALE_COMPLETE={shell}");
        let asks_otherwise = format!("SD_UPSCALE_COMPLETE=\"{shell}\"");
        let in_powershell = "$env:SD_UPSCALE_COMPLETE = \"powershell\"";
        let text = ran.text();
        assert!(
            [&asks, &asks_otherwise, in_powershell]
                .iter()
                .any(|way| text.contains(*way)),
            "{text}"
        );
    }
}

#[cfg(unix)]
#[test]
fn bash_completes_words_that_it_splits_and_names_with_spaces() {
    let found = Command::new("bash")
        .args(["-c", "((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404))"])
        .status();
    if !found.is_ok_and(|status| status.success()) {
        println!("passed over: there is no bash 4.4 or newer");
        return;
    }
    let folder = folder_of(&[("my photo.png", 2, 2)]);
    cache(&folder.path().join("cache"));
    let script = r#"
        program=$1
        source <("$program" --completions bash)
        complete -p sd-upscale
        # As bash calls it: its words, the last of them begun; of a lone = or : nothing is begun.
        try() {
            local begun="${@: -1}"
            [[ $begun == [=:] ]] && begun=
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
            # Its options can be set within a real completion alone.
            compopt() { :; }
            _sd_upscale "$program" "$begun" "${@: -2:1}"
            (IFS='|'; echo "${COMPREPLY[*]}")
        }
        try sd-upscale --model o
        try sd-upscale --model = o
        try sd-upscale --model =
        try sd-upscale --device = cpu,
        try sd-upscale --mod
        try sd-upscale my
        try sd-upscale "my photo.png" --model org/u
        try sd-upscale 'my\ ph'
        try sd-upscale ca
        try sd-upscale ""
        try sd-upscale --output x : y
        try sd-upscale -
    "#;
    let mut command = Command::new("bash");
    let program = env!("CARGO_BIN_EXE_sd-upscale");
    command.current_dir(folder.path());
    command.env("HF_HOME", folder.path().join("cache"));
    command.args(["--norc", "-c", script, "bash", program]);
    let ran = finish(command, b"").ends_in(0);
    let lines: Vec<&str> = ran.text().lines().collect();
    assert_eq!(
        lines[0], "complete -o nosort -F _sd_upscale sd-upscale",
        "{}",
        ran.stderr
    );
    assert_eq!(
        lines[1..11],
        [
            "org/up",
            "org/up",
            "tiny|org/up|.|cache|my photo.png",
            "cpu,auto",
            "--model|--model-parts",
            "my photo.png",
            "org/up",
            "my photo.png",
            "cache",
            ".|cache|my photo.png",
        ]
    );
    assert_eq!(lines[11], "");
    assert!(lines[12].starts_with("--output|--prompt|"), "{}", lines[12]);
}

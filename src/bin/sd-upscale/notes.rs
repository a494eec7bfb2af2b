//! What `--help` and the man page say beyond the options.

/// Commands and, where it does not show, what they do.
pub const EXAMPLES: [(&str, &str); 6] = [
    (
        "sd-upscale photo.png -p \"a red bicycle\" -o photo-2x.png",
        "",
    ),
    (
        "sd-upscale photo.png --model tiny -o draft.png",
        "no download",
    ),
    (
        "sd-upscale -r shots/ -p \"film still\" -o big/ --skip-existing",
        "a folder",
    ),
    (
        "generator --latents | sd-upscale - -p \"an astronaut\" -o out.png",
        "",
    ),
    (
        "sd-upscale --generate -p \"an astronaut\" --seed 33 -g 0 -o one.png",
        "",
    ),
    ("source <(sd-upscale --completions bash)", "in ~/.bashrc"),
];

/// Variables and what they say.
pub const ENVIRONMENT: [(&str, &str); 9] = [
    ("HF_HOME", "where models are kept [~/.cache/huggingface]"),
    ("HF_HUB_CACHE", "where in it [$HF_HOME/hub]"),
    ("HF_TOKEN", "what the Hub knows you by"),
    ("HF_ENDPOINT", "another Hub's address"),
    ("HF_HUB_OFFLINE", "1: nothing is fetched"),
    ("NO_COLOR", "set: no colours"),
    ("RAYON_NUM_THREADS", "threads where --threads does not say"),
    (
        "SD_UPSCALE_KERNELS",
        "avx512bf16, avx512, avx2, base or portable [the fastest]",
    ),
    ("CUDA_VISIBLE_DEVICES", "the cards that may be used"),
];

/// The program's exit statuses.
pub const EXIT_STATUS: [(&str, &str); 4] = [
    ("0", "all done"),
    ("1", "an input failed; the others were done"),
    (
        "2",
        "the command line cannot be read, or its options do not go together",
    ),
    ("130", "interrupted"),
];

/// What is read and written without being named on the command line.
pub const FILES: [(&str, &str); 5] = [
    (
        "sd-upscale.toml",
        "in the current folder: defaults for options, a line each, such as steps = 12",
    ),
    (
        "~/.config/sd-upscale.toml",
        "the same, where the current folder has none",
    ),
    (
        "~/.cache/huggingface/hub",
        "models that were fetched, shared with Python's programs",
    ),
    (
        "NAME-2x.EXT",
        "the result beside its input, without -o; -4x and -8x by --scale",
    ),
    (
        "/var/tmp",
        "maps that do not fit in memory, where the system's own folder for such files is in memory; see --temp-dir",
    ),
];

/// All but the files, below the options.
pub fn of_help() -> String {
    let examples = EXAMPLES.map(|(command, what)| match what {
        "" => format!("  {command}"),
        what => format!("  {command}  # {what}"),
    });
    let table = |rows: &[(&str, &str)], width: usize| {
        let lines = rows.iter();
        let lines = lines.map(|(name, what)| format!("  {name:width$}  {what}"));
        lines.collect::<Vec<_>>().join("\n")
    };
    format!(
        "Examples:\n{}\n\nEnvironment:\n{}\n\nExit status:\n{}",
        examples.join("\n"),
        table(&ENVIRONMENT, 20),
        table(&EXIT_STATUS, 3)
    )
}

//! The house stays as CONTRIBUTING.md draws it: its table of who may use whom, held against what the files name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a room may use: rooms, or single items of them (`picture::Format`).
type Table = BTreeMap<String, Vec<String>>;

/// The table of CONTRIBUTING.md: `| rooms | may use |`, of which "nothing of ours" and "everything" are the ends.
fn table() -> Table {
    let text = std::fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let rows = text
        .lines()
        .skip_while(|line| !line.starts_with("| room | may use"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let names = |cell: &str| -> Vec<String> {
        cell.split(',')
            .map(|name| name.trim().trim_matches('`').to_string())
            .collect()
    };
    rows.flat_map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        let used = names(cells[1]);
        names(cells[0])
            .into_iter()
            .map(move |room| (room, used.clone()))
    })
    .collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The room of a file below `src/`: its first folder, or its name.
fn room(relative: &Path) -> String {
    let first = relative.iter().next().unwrap();
    let name = Path::new(first).file_stem().unwrap().to_str().unwrap();
    match name {
        "bin" => "bin/sd-upscale".into(),
        name => name.into(),
    }
}

/// The paths below the crate's root that a line of code names: `picture::Format` of `use crate::picture::Format;`.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices("crate::").map(|(at, prefix)| {
        let path = &code[at + prefix.len()..];
        let end = path.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
        path[..end.unwrap_or(path.len())].trim_end_matches(':')
    })
}

fn allows(table: &Table, from: &str, path: &str) -> bool {
    let to = path.split("::").next().unwrap();
    let within = |allowed: &String| {
        path == allowed
            || path
                .strip_prefix(&**allowed)
                .is_some_and(|rest| rest.starts_with("::"))
    };
    from == to || table.get(from).is_some_and(|used| used.iter().any(within))
}

/// What the lines of a file name and may not, as `FILE:LINE: …`.
fn broken(table: &Table, file: &str, from: &str, text: &str) -> Vec<String> {
    let lines = text.lines().enumerate();
    lines
        .flat_map(|(number, line)| named(line).map(move |path| (number + 1, path)))
        .filter(|(_, path)| !allows(table, from, path))
        .map(|(number, path)| format!("{file}:{number}: {from} may not use {path}"))
        .collect()
}

#[test]
fn no_room_uses_another_than_the_table_allows() {
    let table = table();
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let relative = file.strip_prefix(root().join("src")).unwrap();
        let room = room(relative);
        // The binary is a crate of its own, and may use all of this one; lib.rs is the door.
        if room == "bin/sd-upscale" || room == "lib" {
            continue;
        }
        assert!(
            table.contains_key(&room),
            "CONTRIBUTING.md has no row for the room {room}"
        );
        let text = std::fs::read_to_string(&file).unwrap();
        let name = format!("src/{}", relative.display());
        wrong.extend(broken(&table, &name, &room, &text));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn a_line_that_breaks_the_table_is_named() {
    let table = table();
    let text =
        "use std::fmt;\n\nuse crate::picture::{Format, Picture};\nuse crate::files::sniff;\n";
    assert_eq!(
        broken(&table, "src/plan/new.rs", "plan", text),
        [
            "src/plan/new.rs:3: plan may not use picture",
            "src/plan/new.rs:4: plan may not use files::sniff"
        ]
    );
    let allowed = "use crate::picture::Format; // not crate::files\nuse crate::plan::Task;\n";
    assert!(broken(&table, "src/plan/new.rs", "plan", allowed).is_empty());
}

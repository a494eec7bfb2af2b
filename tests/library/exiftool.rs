//! What exiftool reads from pictures that were rewritten: of this repository's files always, and of other programs'
//! (`SD_UPSCALE_CORPUS`, see CONTRIBUTING.md) where they are. No warning that it has not of the original, and the
//! same camera, date, exposure, position and maker's own fields.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use sd_upscale::files::{self, Loaded};
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::Parameters;
use sd_upscale::picture::{Format, Picture, encode};
use serde_json::{Map, Value};

use crate::data::data;

const FORMATS: [Format; 4] = [Format::Png, Format::Jpeg, Format::WebP, Format::Tiff];

/// What exiftool says of each file, by its name; `None` where there is no exiftool.
fn exiftool(folder: &Path, tags: &[&str]) -> Option<BTreeMap<String, Map<String, Value>>> {
    let output = Command::new("exiftool")
        .args(["-j", "-a", "-G1", "-s", "-Warning"])
        .args(tags)
        .arg(folder)
        .output()
        .ok()?;
    let read: Vec<Map<String, Value>> = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let name = |read: &Map<String, Value>| {
        let path = Path::new(read["SourceFile"].as_str().unwrap());
        path.file_name().unwrap().to_string_lossy().into_owned()
    };
    Some(read.into_iter().map(|read| (name(&read), read)).collect())
}

fn pictures_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        match path.is_dir() {
            true => pictures_below(&path, found),
            false if Format::from_extension(&extension).is_some() => found.push(path),
            false => {}
        }
    }
}

fn with_exif(path: &Path) -> Option<Picture> {
    match files::read_path(path, &ReadLimits::default()) {
        Ok(Loaded::Picture(picture)) if picture.metadata.exif.is_some() => Some(picture),
        _ => None,
    }
}

fn settings() -> Parameters {
    Parameters {
        prompt: "a lighthouse".into(),
        negative_prompt: String::new(),
        fields: [("Steps", "20"), ("Seed", "7"), ("Upscaler", "sd-upscale")]
            .map(|(key, value)| (key.into(), value.into()))
            .into(),
    }
}

/// Fields that are to be other than they were: what the picture's own size, storage, turn, thumbnail and settings say, and
/// where previews lie.
fn changes(key: &str) -> bool {
    let (group, name) = key.split_once(':').unwrap_or(("", key));
    // Segments of a JPEG and what follows its end are not EXIF.
    matches!(group, "IFD1" | "IFD2" | "IFD3" | "CIFF" | "Qualcomm")
        || [
            "Orientation",
            "ImageWidth",
            "ImageHeight",
            "ExifImageWidth",
            "ExifImageHeight",
            "UserComment",
            "ImageHistory",
            "SourceFile",
        ]
        .contains(&name)
        || [
            "PreviewImage",
            "Thumbnail",
            "OtherImage",
            "OriginalDecisionData",
            "EmbeddedAudio",
        ]
        .iter()
        .any(|start| name.starts_with(start))
}

#[test]
fn exiftool_reads_everything_from_a_rewritten_picture_without_a_warning() {
    let corpus = std::env::var_os("SD_UPSCALE_CORPUS").map(PathBuf::from);
    let mut paths = Vec::new();
    pictures_below(&data("files"), &mut paths);
    if let Some(folder) = &corpus {
        pictures_below(folder, &mut paths);
    }
    let (before, after) = (
        tempfile::tempdir().unwrap(),
        FORMATS.map(|_| tempfile::tempdir().unwrap()),
    );
    let mut count = 0;
    for path in paths {
        let Some(mut picture) = with_exif(&path) else {
            continue;
        };
        count += 1;
        let extension = path.extension().unwrap().to_string_lossy();
        std::fs::copy(&path, before.path().join(format!("{count}.{extension}"))).unwrap();
        picture.metadata.add_settings(&settings());
        for (format, folder) in FORMATS.iter().zip(&after) {
            let written = encode(&picture, *format, None).unwrap();
            let name = format!("{count}.{extension}.{}", format.extension());
            std::fs::write(folder.path().join(name), written.bytes).unwrap();
        }
    }
    assert!(count >= 10, "{count} pictures have EXIF");
    // TIFF's own fields are its storage too, and its place is none for most makers' notes.
    let tags = [
        "-IFD0:all",
        "-ExifIFD:all",
        "-GPS:all",
        "-InteropIFD:all",
        "-MakerNotes:all",
    ];
    let Some(originals) = exiftool(before.path(), &tags) else {
        eprintln!("skipped: there is no exiftool here");
        return;
    };
    let mut complaints = Vec::new();
    for (format, folder) in FORMATS.iter().zip(&after) {
        let rewritten = exiftool(folder.path(), &tags).unwrap();
        for (name, original) in &originals {
            let file = format!("{name}.{}", format.extension());
            let read = &rewritten[&file];
            let warning = |of: &Map<String, Value>| of.get("ExifTool:Warning").cloned();
            let known = [warning(original), None];
            // An offset from the file's beginning in one Canon model's note, which only the whole file could hold.
            let elsewhere = warning(read) == Some("Invalid original decision data".into());
            if !known.contains(&warning(read)) && !elsewhere {
                complaints.push(format!("{file}: {:?}", warning(read)));
            }
            let from_tiff = name.ends_with(".tif") || name.ends_with(".tiff");
            if *format == Format::Tiff || from_tiff {
                continue;
            }
            for (key, value) in original.iter().filter(|(key, _)| !changes(key)) {
                if key != "ExifTool:Warning" && read.get(key) != Some(value) {
                    complaints.push(format!("{file}: {key} was {value}, is {:?}", read.get(key)));
                }
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    eprintln!(
        "{count} pictures with EXIF, each in {} formats",
        FORMATS.len()
    );
}

#[test]
fn exiftool_finds_a_persons_comment_as_it_was_and_our_settings_beside_it() {
    // An EXIF directory at 26 with a comment in ASCII.
    let comment = b"ASCII\0\0\0holiday in Rome\0";
    let mut block = b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0".to_vec();
    block.extend(b"\0\x01\x92\x86\0\x07\0\0\0\x18\0\0\0\x2c\0\0\0\0");
    block.extend(comment);
    let folder = tempfile::tempdir().unwrap();
    let mut picture = with_exif(&data("files/orientation-6.jpg")).unwrap();
    picture.metadata.exif = Some(block);
    picture.metadata.add_settings(&settings());
    for format in FORMATS {
        let written = encode(&picture, format, None).unwrap();
        let path = folder.path().join(format!("a.{}", format.extension()));
        std::fs::write(&path, written.bytes).unwrap();
        // The next run takes our prompt, and never the comment.
        let again = with_exif(&path).unwrap();
        assert_eq!(again.metadata.prompt().unwrap().prompt, "a lighthouse");
    }
    let Some(read) = exiftool(
        folder.path(),
        &["-UserComment", "-ImageHistory", "-Parameters"],
    ) else {
        eprintln!("skipped: there is no exiftool here");
        return;
    };
    assert_eq!(read.len(), FORMATS.len());
    for (name, tags) in read {
        assert_eq!(tags["ExifIFD:UserComment"], "holiday in Rome", "{name}");
        let ours = tags
            .get("ExifIFD:ImageHistory")
            .or(tags.get("PNG:Parameters"));
        let ours = ours
            .unwrap_or_else(|| panic!("{name}: {tags:?}"))
            .as_str()
            .unwrap();
        assert!(ours.contains("sd-upscale"), "{name}: {ours}");
        assert_eq!(tags.get("ExifTool:Warning"), None, "{name}");
    }
}

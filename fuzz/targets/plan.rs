//! The plan of a command line over a fixed folder: refused as a usage error, or a plan whose outputs fall on no input
//! and on no other output, and of which the shares of `--shard` are a partition.
#![no_main]

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sd_upscale::device::DeviceChoice;
use sd_upscale::plan::{Numbered, Output, Request, Shard, Source, Variant, plan};
use sd_upscale_fuzz::scratch;

/// What lies in the folder; a name that ends in `/` is a folder, and `->` makes a link.
const TREE: [&str; 21] = [
    "a.png",
    "a-2x.png",
    "b.jpg",
    "B.jpg",
    "b-0.webp",
    "img1.png",
    "img10.png",
    "img2.gif",
    "latents.safetensors",
    "latents-1.png",
    "..png",
    ".hidden.png",
    ".x.png.sd-upscale-AbCdEf.tmp",
    "20261124183932000000000000000000000001.png",
    "sub/a.png",
    "sub/deep/a.png",
    "sub/deep/é日本.tif",
    "out/",
    "notes.txt",
    "link.png->a.png",
    "loop->.",
];

#[derive(Arbitrary, Debug)]
enum Given<'a> {
    Known(u8),
    Named(&'a str),
    Dash,
}

#[derive(Arbitrary, Debug)]
struct Line<'a> {
    inputs: Vec<Given<'a>>,
    output: Option<Given<'a>>,
    slash: bool,
    template: Option<&'a str>,
    recursive: bool,
    include: Vec<&'a str>,
    exclude: Vec<&'a str>,
    format: Option<&'a str>,
    shard: Option<&'a str>,
    device: &'a str,
    seed: u64,
}

fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = scratch().join("tree");
        for name in TREE {
            let path = folder.join(name.split("->").next().unwrap());
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match name.split_once("->") {
                Some((_, to)) => std::os::unix::fs::symlink(to, path).unwrap(),
                None if name.ends_with('/') => std::fs::create_dir(path).unwrap(),
                None => std::fs::write(path, "").unwrap(),
            }
        }
        folder
    })
}

/// A path in the folder. What a name leads out of it stays out of it: other folders of this machine are none of ours.
fn path(given: &Given) -> Option<PathBuf> {
    let name = match given {
        Given::Known(n) if usize::from(*n) % (TREE.len() + 1) == TREE.len() => "",
        Given::Known(n) => TREE[usize::from(*n) % (TREE.len() + 1)],
        Given::Named(name) => name,
        Given::Dash => return None,
    };
    let name = name.split("->").next()?;
    let inside = |c| matches!(c, Component::Normal(_) | Component::CurDir);
    let inside = Path::new(name).components().all(inside);
    Some(folder().join(if inside { name } else { "sub/.." }))
}

fn request(line: &Line) -> Request {
    let texts = |list: &[&str]| list.iter().take(4).map(|s| (*s).to_owned()).collect();
    Request {
        inputs: (line.inputs.iter().take(8))
            .map(|given| path(given).map_or(Source::Stdin, Source::Path))
            .collect(),
        output: line.output.as_ref().map(|given| match path(given) {
            Some(path) if line.slash => Output::Path(path.join("")),
            Some(path) => Output::Path(path),
            None => Output::Stdout,
        }),
        template: line.template.and_then(|text| text.parse().ok()),
        recursive: line.recursive,
        include: texts(&line.include),
        exclude: texts(&line.exclude),
        shard: None,
        format: line.format.map(str::to_owned),
        // Up to three outputs an input.
        variants: (0..=line.seed % 3)
            .map(|more| Variant {
                seed: line.seed.wrapping_add(more),
                guidance: 1.0,
            })
            .collect(),
        times: 2 << (line.seed % 3),
        ..Request::default()
    }
}

fuzz_target!(|line: Line| {
    let _ = line.device.parse::<DeviceChoice>();
    let _ = line.shard.map(str::parse::<Shard>);
    let request = request(&line);
    let mut plan = match plan(&request) {
        Ok(plan) => plan,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let inputs: HashSet<PathBuf> = (plan.tasks.iter())
        .filter_map(|task| match &task.source {
            Source::Path(path) => path.canonicalize().ok(),
            Source::Stdin | Source::Prompt(_) => None,
        })
        .collect();
    let mut outputs = HashSet::new();
    for task in &plan.tasks {
        let Some(naming) = task.target.naming() else {
            continue;
        };
        let pattern = naming.pattern();
        assert!(pattern.file_name().is_some(), "{pattern:?}");
        assert!(pattern.starts_with(folder()), "{pattern:?}");
        assert!(outputs.insert(pattern.clone()), "{pattern:?} twice");
        assert!(
            pattern
                .canonicalize()
                .map_or(true, |p| !inputs.contains(&p))
        );
        assert_eq!(plan.claims.claim(&pattern, &task.origin()), Ok(()));
        let tenth = Numbered {
            number: 1,
            count: 10,
        };
        let _ = naming.path(2, 2, Some(tenth));
    }
    shares(&request, plan.tasks.len());
});

/// Each task is in one share of several.
fn shares(request: &Request, tasks: usize) {
    let of = |index: u32| {
        let shard = format!("{index}/3").parse().unwrap();
        let shard = Request {
            shard: Some(shard),
            ..request.clone()
        };
        plan(&shard).expect("every share comes to the same verdict")
    };
    let parts: usize = (0..3).map(|index| of(index).tasks.len()).sum();
    assert_eq!(parts, tasks);
}

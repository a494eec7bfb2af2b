//! Plans over real folders: helpers, and which inputs are taken.

mod outputs;
mod variants;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::time::Duration;

use tempfile::TempDir;

use super::*;

/// A folder with these (empty) files.
fn folder(files: &[&str]) -> TempDir {
    let folder = TempDir::new().unwrap();
    add(&folder, files);
    folder
}

fn add(folder: &TempDir, files: &[&str]) {
    for file in files {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
}

/// A request for paths below `folder`; "" is the folder itself and "-" standard input.
fn request(folder: &TempDir, inputs: &[&str]) -> Request {
    let source = |input: &&str| match *input {
        "-" => Source::Stdin,
        "" => Source::Path(folder.path().into()),
        path => Source::Path(folder.path().join(path)),
    };
    Request {
        inputs: inputs.iter().map(source).collect(),
        ..Request::default()
    }
}

impl Request {
    fn to(mut self, folder: &TempDir, output: &str) -> Self {
        // Joined as text: a trailing separator counts.
        let text = format!("{}/{output}", folder.path().display());
        self.output = Some(Output::Path(text.into()));
        self
    }

    fn recursive(mut self) -> Self {
        self.recursive = true;
        self
    }

    fn name(mut self, template: &str) -> Self {
        self.template = Some(template.parse().unwrap());
        self
    }

    fn format(mut self, format: &str) -> Self {
        self.format = Some(format.into());
        self
    }

    fn into_stdout(mut self) -> Self {
        self.output = Some(Output::Stdout);
        self
    }

    fn usage_error(&self) -> String {
        plan(self).expect_err("a usage error").to_string()
    }
}

fn below(folder: &TempDir, path: &Path) -> String {
    let path = path.strip_prefix(folder.path()).unwrap_or(path);
    path.to_string_lossy().replace('\\', "/")
}

/// `input -> output` of every task, below `folder`; at an output of 128x96 where the name holds a size.
fn lines(folder: &TempDir, plan: &Plan) -> Vec<String> {
    let line = |task: &Task| {
        let input = match &task.source {
            Source::Path(path) => below(folder, path),
            Source::Stdin => "-".into(),
            Source::Prompt(prompt) => prompt.name.clone(),
        };
        let output = match &task.target {
            Target::File(naming) => below(folder, &naming.path(128, 96, None)),
            Target::Stdout(_) => "-".into(),
        };
        format!("{input} -> {output}")
    };
    plan.tasks.iter().map(line).collect()
}

/// `path: reason` of everything passed over.
fn passed_over(folder: &TempDir, plan: &Plan) -> Vec<String> {
    let line = |(path, why): &(PathBuf, PassedOver)| format!("{}: {why:?}", below(folder, path));
    plan.passed_over.iter().map(line).collect()
}

#[test]
fn a_file_goes_beside_itself_under_a_new_name() {
    let f = folder(&[
        "a.jpg", "B.PNG", "c.gif", "d.latent", "e.apng", "f.jfif", "g",
    ]);
    let inputs = [
        "a.jpg", "B.PNG", "c.gif", "d.latent", "e.apng", "f.jfif", "g",
    ];
    let plan = plan(&request(&f, &inputs)).unwrap();
    let expected = [
        "a.jpg -> a-2x.jpg",
        "B.PNG -> B-2x.PNG",
        "c.gif -> c-2x.png",
        "d.latent -> d-2x.png",
        "e.apng -> e-2x.png",
        "f.jfif -> f-2x.jfif",
        "g -> g-2x.png",
    ];
    assert_eq!(lines(&f, &plan), expected);
    assert!(plan.warnings.is_empty() && plan.passed_over.is_empty());
}

#[test]
fn a_folder_is_read_in_natural_order_without_what_is_no_image() {
    let f = folder(&[
        "img10.png",
        "IMG1.png",
        "img2.png",
        ".hidden.png",
        ".img3.png.sd-upscale-a1b2c3.tmp",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "notes.txt",
        "z.safetensors",
        "sub/x.png",
        ".git/y.png",
    ]);
    let plan = plan(&request(&f, &[""])).unwrap();
    let expected = [
        "IMG1.png -> IMG1-2x.png",
        "img2.png -> img2-2x.png",
        "img10.png -> img10-2x.png",
        "z.safetensors -> z-2x.png",
    ];
    assert_eq!(lines(&f, &plan), expected);
    let expected = [
        ".DS_Store: Hidden",
        ".git: Hidden",
        ".hidden.png: Hidden",
        ".img3.png.sd-upscale-a1b2c3.tmp: Partial",
        "desktop.ini: NotAnImage",
        "notes.txt: NotAnImage",
        "sub: SubFolder",
        "Thumbs.db: NotAnImage",
    ];
    assert_eq!(passed_over(&f, &plan), expected);
}

#[test]
fn a_tree_is_mirrored_and_the_output_folder_inside_it_left_alone() {
    let f = folder(&["in/a.png", "in/x/a.png", "in/x/y/b.webp", "in/out/old.png"]);
    let plan = plan(&request(&f, &["in"]).recursive().to(&f, "in/out")).unwrap();
    let expected = [
        "in/a.png -> in/out/a.png",
        "in/x/a.png -> in/out/x/a.png",
        "in/x/y/b.webp -> in/out/x/y/b.webp",
    ];
    assert_eq!(lines(&f, &plan), expected);
    assert_eq!(passed_over(&f, &plan), ["in/out: OutputFolder"]);
    assert_eq!(plan.tasks[1].relative, Path::new("x").join("a.png"));
}

#[test]
fn a_second_run_over_a_folder_does_not_upscale_the_upscaled() {
    let f = folder(&["a.png", "x/b.latent", "x/c.png"]);
    let first = plan(&request(&f, &[""]).recursive()).unwrap();
    assert!(first.warnings.is_empty());
    add(
        &f,
        &[
            "a-2x.png",
            "a-2x.jpg",
            "x/b-2x-1.png",
            "x/b-2x-2.png",
            "x/c-2x.png",
            // Of a run of several seeds, a number.
            "x/c-2x-1.png",
        ],
    );
    // Not what this tool writes for these: another stem, another folder.
    add(&f, &["b-2x.png", "x/a-2x.png"]);
    let second = plan(&request(&f, &[""]).recursive()).unwrap();
    let kept: Vec<_> = second
        .tasks
        .iter()
        .map(|t| below(&f, &t.relative))
        .collect();
    let expected = ["a.png", "b-2x.png", "x/a-2x.png", "x/b.latent", "x/c.png"];
    assert_eq!(kept, expected);
    let a = f.path().join("a.png");
    let reason = PassedOver::OutputOf(a);
    assert!(
        second
            .passed_over
            .contains(&(f.path().join("a-2x.png"), reason))
    );
    assert_eq!(second.passed_over.len(), 6);
    assert!(
        second.warnings[0].starts_with("6 passed over"),
        "{:?}",
        second.warnings
    );
}

#[test]
fn names_beside_the_input_tell_the_scale_and_a_run_at_another_knows_them() {
    let f = folder(&["a.png", "a-2x.png", "a-4x.jpg", "a-8x.png", "a-3x.png"]);
    add(&f, &["b.latent", "b-4x-1.png", "b-16x.png"]);
    let kept = ["a-3x.png", "a.png", "b-16x.png", "b.latent"];
    for times in [2, 4, 8] {
        let mut request = request(&f, &[""]);
        request.times = times;
        let plan = plan(&request).unwrap();
        let sources = plan.tasks.iter().map(|t| below(&f, &t.relative));
        assert_eq!(sources.collect::<Vec<_>>(), kept, "{times}");
        let a = plan.tasks[1].target.naming().unwrap().pattern();
        assert_eq!(below(&f, &a), format!("a-{times}x.png"));
    }
}

#[test]
fn a_second_run_knows_its_outputs_by_any_template() {
    let f = folder(&["a.png", "a-7-128x96.png", "a-b.png", "up/a.png"]);
    let kept = |request: Request| {
        let plan = plan(&request.recursive()).unwrap();
        let kept = plan.tasks.iter().map(|t| below(&f, &t.relative));
        kept.collect::<Vec<_>>()
    };
    let sized = request(&f, &[""]).name("{stem}-{seed}-{width}x{height}.{ext}");
    assert_eq!(kept(sized), ["a-b.png", "a.png", "up/a.png"]);
    let under = request(&f, &[""]).name("up/{stem}.{ext}");
    assert_eq!(kept(under), ["a-7-128x96.png", "a-b.png", "a.png"]);
}

#[test]
fn a_second_run_over_files_that_the_shell_listed_is_no_error() {
    let f = folder(&["a.png", "a-2x.png"]);
    let both = plan(&request(&f, &["a-2x.png", "a.png"])).unwrap();
    assert_eq!(lines(&f, &both), ["a.png -> a-2x.png"]);
    assert_eq!(both.warnings.len(), 1);
    // Alone, or into another folder, it is an input like any other.
    let alone = plan(&request(&f, &["a-2x.png"])).unwrap();
    assert_eq!(lines(&f, &alone), ["a-2x.png -> a-2x-2x.png"]);
    let elsewhere = plan(&request(&f, &["a-2x.png", "a.png"]).to(&f, "out")).unwrap();
    assert_eq!(elsewhere.tasks.len(), 2);
}

#[test]
fn globs_choose_among_what_folders_hold_and_not_among_named_files() {
    let f = folder(&[
        "in/a.JPG",
        "in/b.png",
        "in/cats/c.jpg",
        "in/thumbs/d.jpg",
        "z.png",
    ]);
    let mut r = request(&f, &["in", "z.png"]).recursive();
    r.include = vec!["*.jpg".into()];
    r.exclude = vec!["thumbs/".into()];
    let chosen = plan(&r).unwrap();
    let expected = [
        "in/a.JPG -> in/a-2x.JPG",
        "in/cats/c.jpg -> in/cats/c-2x.jpg",
        "z.png -> z-2x.png",
    ];
    assert_eq!(lines(&f, &chosen), expected);
    let expected = ["in/b.png: NotIncluded", "in/thumbs: Excluded"];
    assert_eq!(passed_over(&f, &chosen), expected);
    r.include = vec!["cats/*".into()];
    assert_eq!(
        lines(&f, &plan(&r).unwrap())[0],
        "in/cats/c.jpg -> in/cats/c-2x.jpg"
    );
    r.include = vec!["[".into()];
    assert!(
        r.usage_error().starts_with("--include"),
        "{}",
        r.usage_error()
    );
}

#[cfg(unix)]
#[test]
fn what_cannot_be_read_fails_alone() {
    let f = folder(&["a.png"]);
    let some = plan(&request(&f, &["none.png", "a.png", "*.jpg"])).unwrap();
    assert_eq!(lines(&f, &some), ["a.png -> a-2x.png"]);
    assert_eq!(some.failed.len(), 2);
    assert_eq!(
        some.failed[0],
        (f.path().join("none.png"), "no such file or folder".into())
    );
    assert!(
        some.failed[1].1.contains("--include"),
        "{:?}",
        some.failed[1]
    );
    let only = plan(&request(&f, &["none.png"]).to(&f, "x.png")).unwrap();
    assert!(only.tasks.is_empty() && only.failed.len() == 1);
}

#[test]
fn a_folder_without_images_is_said_with_what_would_help() {
    let f = folder(&["sub/a.png", "note.txt"]);
    let warning = |r: &Request| plan(r).unwrap().warnings.concat();
    let mut r = request(&f, &[""]);
    assert!(warning(&r).contains("-r reads its sub-folders"));
    r = r.recursive();
    assert_eq!(warning(&r), "");
    r.exclude = vec!["a.*".into()];
    assert!(warning(&r).contains("--exclude"));
}

#[cfg(unix)]
#[test]
fn links_are_followed_but_not_round_in_circles_and_broken_ones_fail_alone() {
    use std::os::unix::fs::symlink;
    let f = folder(&["in/a.png", "in/sub/b.png", "other/c.png"]);
    let at = |path: &str| f.path().join(path);
    symlink(at("in"), at("in/sub/round")).unwrap();
    symlink(at("in/self.d"), at("in/self.d")).unwrap();
    symlink(at("other"), at("in/other")).unwrap();
    symlink(at("gone.png"), at("in/broken.png")).unwrap();
    let plan = plan(&request(&f, &["in"]).recursive().to(&f, "out")).unwrap();
    let expected = [
        "in/a.png -> out/a.png",
        "in/other/c.png -> out/other/c.png",
        "in/sub/b.png -> out/sub/b.png",
    ];
    assert_eq!(lines(&f, &plan), expected);
    assert_eq!(
        passed_over(&f, &plan),
        ["in/self.d: NotAnImage", "in/sub/round: Loop"]
    );
    let failed: Vec<_> = plan
        .failed
        .iter()
        .map(|(p, e)| (below(&f, p), e.as_str()))
        .collect();
    assert_eq!(
        failed,
        [(
            "in/broken.png".into(),
            "a link to a file that does not exist"
        )]
    );
}

#[cfg(unix)]
#[test]
fn a_sub_folder_that_cannot_be_read_fails_alone() {
    use std::os::unix::fs::PermissionsExt;
    let f = folder(&["a.png", "locked/b.png"]);
    let locked = f.path().join("locked");
    let set = |mode| fs::set_permissions(&locked, fs::Permissions::from_mode(mode)).unwrap();
    set(0o000);
    let readable = fs::read_dir(&locked).is_ok();
    let plan = plan(&request(&f, &[""]).recursive()).unwrap();
    set(0o755);
    // Root reads everything: then there is nothing to see but that the rest is there.
    assert_eq!(lines(&f, &plan)[0], "a.png -> a-2x.png");
    if !readable {
        assert_eq!(plan.failed.len(), 1);
        assert!(
            plan.failed[0].1.contains("cannot be read"),
            "{:?}",
            plan.failed
        );
    }
}

#[cfg(unix)]
#[cfg(target_os = "linux")]
#[cfg(target_os = "linux")]
#[test]
fn shards_part_a_tree_and_check_all_of_it() {
    let files: Vec<String> = (0..60).map(|i| format!("in/d{}/i{i}.png", i % 7)).collect();
    let f = folder(&files.iter().map(String::as_str).collect::<Vec<_>>());
    let mut r = request(&f, &["in"]).recursive().to(&f, "out");
    let whole: BTreeSet<_> = lines(&f, &plan(&r).unwrap()).into_iter().collect();
    let mut together = BTreeSet::new();
    for index in 0..4 {
        r.shard = Some(format!("{index}/4").parse().unwrap());
        let share = plan(&r).unwrap();
        assert!(share.tasks.len() + share.in_other_shards == 60);
        assert!(!share.tasks.is_empty());
        for line in lines(&f, &share) {
            assert!(together.insert(line), "in one share only");
        }
    }
    assert_eq!(together, whole);
    // A clash is every share's business, whoever the two belong to.
    let r = r.name("same");
    assert!(plan(&r).is_err());
}

/// Processor time of this thread, which other programs on the machine do not lengthen.
#[cfg(unix)]
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills `time`.
    let known = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(known, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(unix)]
#[test]
fn planning_takes_time_in_proportion_to_the_number_of_files() {
    let folder_of = |count: usize| {
        let names = (0..count).map(|i| format!("in/d{}/img{i}.png", i % 10));
        let names: Vec<String> = names.collect();
        folder(&names.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let time = |r: &Request, count: usize| {
        let start = cpu_time();
        assert_eq!(plan(r).unwrap().tasks.len(), count);
        cpu_time() - start
    };
    let (few, many) = (folder_of(1000), folder_of(10_000));
    let requests = |f: &TempDir| {
        [
            request(f, &["in"]).recursive(),
            request(f, &["in"])
                .recursive()
                .to(f, "out")
                .name("{stem}-{seed}-{width}"),
        ]
    };
    for (small, large) in requests(&few).iter().zip(&requests(&many)) {
        let (small, large) = (time(small, 1000), time(large, 10_000));
        eprintln!("1000 files in {small:?}, 10,000 in {large:?}");
        // Ten times the files take about ten times as long; anything quadratic, a hundred times.
        assert!(large < 40 * small, "{small:?}, {large:?}");
    }
}

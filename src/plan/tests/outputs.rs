//! Plans over real folders: where outputs go, and what is refused.

use super::*;
use crate::picture::Format;

#[test]
fn the_output_is_a_folder_when_it_is_one_or_must_be() {
    let f = folder(&["a.png", "b.png", "is.png/c.png", "file.png"]);
    let first = |inputs: &[&str], output: &str| {
        let plan = plan(&request(&f, inputs).to(&f, output)).unwrap();
        lines(&f, &plan)[0].clone()
    };
    assert_eq!(first(&["a.png"], "x.webp"), "a.png -> x.webp");
    assert_eq!(first(&["a.png"], "x.webp/"), "a.png -> x.webp/a.png");
    assert_eq!(first(&["a.png"], "is.png"), "a.png -> is.png/a.png");
    assert_eq!(first(&["a.png", "b.png"], "v1.2"), "a.png -> v1.2/a.png");
    assert_eq!(first(&["is.png"], "new"), "is.png/c.png -> new/c.png");
    let several = request(&f, &["a.png", "b.png"]);
    for output in ["x.png", "x.gif", "file.png"] {
        let error = several.clone().to(&f, output).usage_error();
        assert!(error.contains("name a folder"), "{error}");
    }
    let error = request(&f, &["is.png"]).to(&f, "x.png").usage_error();
    assert!(error.contains("name a folder"), "{error}");
    let error = several.clone().to(&f, "file.png/").usage_error();
    assert!(error.contains("is a file"), "{error}");
    let error = several.to(&f, "file.png/deep/out").usage_error();
    assert!(error.contains("file.png is a file"), "{error}");
}

#[test]
fn the_output_format_comes_from_the_name_then_the_flag_then_the_input() {
    let f = folder(&["a.jpg", "b.npz"]);
    let kind = |request: Request| match &plan(&request).unwrap().tasks[0].target {
        Target::File(naming) => naming.kind(),
        Target::Stdout(kind) => *kind,
    };
    let a = || request(&f, &["a.jpg"]);
    assert_eq!(kind(a()), Written::Image(Format::Jpeg));
    assert_eq!(kind(a().format("webp")), Written::Image(Format::WebP));
    assert_eq!(kind(a().to(&f, "x.TIF")), Written::Image(Format::Tiff));
    assert_eq!(kind(a().to(&f, "x.latent")), Written::ComfyLatent);
    assert_eq!(kind(a().name("{stem}.safetensors")), Written::Safetensors);
    assert_eq!(kind(a().into_stdout()), Written::Image(Format::Jpeg));
    assert_eq!(
        kind(a().into_stdout().format("bmp")),
        Written::Image(Format::Bmp)
    );
    assert_eq!(kind(request(&f, &["b.npz"])), Written::Image(Format::Png));
    assert_eq!(
        kind(request(&f, &["-"]).into_stdout()),
        Written::Image(Format::Png)
    );
    // A name without an extension is kept as it is when --format says the kind.
    let plain = plan(&a().to(&f, "plain").format("png")).unwrap();
    assert_eq!(lines(&f, &plain), ["a.jpg -> plain"]);

    for (request, says) in [
        (a().to(&f, "x.png").format("jpg"), "leave one of them out"),
        (
            a().name("{stem}.webp").format("jpg"),
            "leave one of them out",
        ),
        (a().to(&f, "plain"), "has no extension"),
        (a().to(&f, "x.gif"), "read but not written"),
        (a().format("gif"), "--format gif cannot be written"),
        (a().to(&f, "x.png").name("{stem}"), "both name the output"),
        (a().into_stdout().name("{stem}"), "--name"),
    ] {
        let error = request.usage_error();
        assert!(error.contains(says), "{error}");
    }
    assert!(plan(&a().to(&f, "x.jpeg").format("jpg")).is_ok());
}

#[test]
fn pipes_need_to_be_told_where_to_write() {
    let f = folder(&["a.png", "b.png"]);
    let error = request(&f, &["-"]).usage_error();
    assert!(error.contains("-o FILE, or -o -"), "{error}");
    let error = request(&f, &["-", "-"]).to(&f, "out").usage_error();
    assert!(error.contains("only once"), "{error}");
    for inputs in [&["a.png", "b.png"][..], &[""], &["-", "a.png"]] {
        let error = request(&f, inputs).into_stdout().usage_error();
        assert!(error.contains("one result"), "{error}");
    }
    let through = plan(&request(&f, &["-"]).into_stdout()).unwrap();
    assert_eq!(lines(&f, &through), ["- -> -"]);
    let both = plan(&request(&f, &["a.png", "-"]).to(&f, "out")).unwrap();
    assert_eq!(
        lines(&f, &both),
        ["a.png -> out/a.png", "- -> out/stdin.png"]
    );
}

#[test]
fn the_template_fills_every_field_and_numbers_batches() {
    let f = folder(&["a.b.png"]);
    let naming = |request: Request| match plan(&request).unwrap().tasks.remove(0).target {
        Target::File(naming) => naming,
        Target::Stdout(_) => panic!("a file"),
    };
    let mut r = request(&f, &["a.b.png"]).to(&f, "out/");
    r.variants[0].seed = 7;
    let r = r.name("{width}/{stem}_{seed}_{height}.{ext}");
    let sized = naming(r.clone());
    let below = |path: PathBuf| below(&f, &path);
    assert_eq!(below(sized.path(128, 96, None)), "out/128/a.b_7_96.png");
    assert_eq!(
        below(sized.path(
            128,
            96,
            Some(Numbered {
                number: 3,
                count: 12
            })
        )),
        "out/128/a.b_7_96-03.png"
    );
    assert_eq!(
        below(sized.path(
            128,
            96,
            Some(Numbered {
                number: 3,
                count: 9
            })
        )),
        "out/128/a.b_7_96-3.png"
    );
    assert_eq!(below(sized.pattern()), "out/{width}/a.b_7_{height}.png");
    // The extension is added where the template has none of a known kind.
    assert_eq!(
        below(naming(r.clone().name("{stem}.v2")).pattern()),
        "out/a.b.v2.png"
    );
    assert_eq!(
        below(naming(r.name("{stem}-{ext}.webp")).pattern()),
        "out/a.b-webp.webp"
    );
    let plain = naming(request(&f, &["a.b.png"]).to(&f, "x.y.png"));
    assert_eq!(
        below(plain.path(
            1,
            1,
            Some(Numbered {
                number: 1,
                count: 2
            })
        )),
        "x.y-1.png"
    );
}

#[test]
fn a_template_that_is_wrong_or_leaves_the_folder_is_refused() {
    for (template, says) in [
        ("{stem}-{sead}.png", "unknown field {sead}"),
        ("{}.png", "unknown field {}"),
        ("{stem", "without its `}`"),
        ("../{stem}.{ext}", "leaves the output folder"),
        ("a/../../{stem}.{ext}", "leaves the output folder"),
        ("/tmp/{stem}.{ext}", "leaves the output folder"),
        ("", "without a file name"),
        ("up/", "without a file name"),
        (".{ext}", "no name before"),
        ("up/.png", "no name before"),
    ] {
        let error = template.parse::<Template>().unwrap_err().to_string();
        assert!(error.contains(says), "{template}: {error}");
        assert!(
            error.contains("{stem}, {ext}, {in_ext}, {seed}, {guidance}, {width}, {height}"),
            "{error}"
        );
    }
    // Names made of dots cannot leave it either.
    let f = folder(&["...png"]);
    let dots = plan(
        &request(&f, &["...png"])
            .to(&f, "out/")
            .name("{stem}/x.{ext}"),
    )
    .unwrap();
    assert_eq!(lines(&f, &dots), ["...png -> out/...png/x.png"]);
}

#[test]
fn two_inputs_to_one_file_are_refused_with_both_names_and_a_cure() {
    let f = folder(&["a.gif", "a.png", "x/b.png", "y/b.png", "c.png", "d.png"]);
    let error = request(&f, &["a.gif", "a.png"]).to(&f, "out").usage_error();
    for part in [
        "a.gif and ",
        "a.png would both be written to",
        "out/a.png",
        "-o each",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let error = request(&f, &["x/b.png", "y/b.png"])
        .to(&f, "out")
        .usage_error();
    assert!(error.contains("-r, which keeps the tree"), "{error}");
    let error = request(&f, &["c.png", "d.png"]).name("same").usage_error();
    assert!(error.contains("put {stem} into --name"), "{error}");
    // The size may differ, but nobody knows yet.
    let sized = request(&f, &["c.png", "d.png"]).name("{width}x{height}");
    assert!(sized.usage_error().contains("{width}x{height}.png"));
    let error = request(&f, &["a.gif", "a.png"])
        .format("webp")
        .usage_error();
    assert!(error.contains("leave out --format"), "{error}");
}

#[test]
fn one_file_given_twice_is_done_once() {
    let f = folder(&["a.png", "sub/b.png"]);
    let twice = plan(&request(&f, &["a.png", "sub/../a.png", ""])).unwrap();
    assert_eq!(lines(&f, &twice), ["a.png -> a-2x.png"]);
    assert!(passed_over(&f, &twice).contains(&"a.png: NamedTwice".into()));
}

#[test]
fn no_output_falls_on_an_input() {
    let f = folder(&["a.png", "sub/b.png", "c.png"]);
    for output in ["a.png", "./a.png", "sub/../a.png"] {
        let error = request(&f, &["a.png"]).to(&f, output).usage_error();
        assert!(error.contains("over the input"), "{error}");
        assert!(error.contains("-o"), "{error}");
    }
    // The folder itself as the output folder.
    let error = request(&f, &[""]).to(&f, "").usage_error();
    assert!(error.contains("over the input"), "{error}");
    let error = request(&f, &["a.png"]).name("{stem}.{ext}").usage_error();
    assert!(error.contains("{stem}-2x.{ext}"), "{error}");
    // Another input of the same run.
    let error = request(&f, &["a.png", "c.png"]).name("c").usage_error();
    assert!(error.contains("over the input"), "{error}");
}

#[test]
fn no_output_falls_on_an_input_through_a_link() {
    use std::os::unix::fs::symlink;
    let f = folder(&["in/a.png"]);
    symlink(f.path().join("in"), f.path().join("alias")).unwrap();
    symlink(f.path().join("in/a.png"), f.path().join("link.png")).unwrap();
    for (input, output) in [
        ("in/a.png", "link.png"),
        ("link.png", "in/a.png"),
        ("in/a.png", "alias/a.png"),
        ("in", "alias"),
    ] {
        let error = request(&f, &[input]).to(&f, output).usage_error();
        assert!(
            error.contains("over the input"),
            "{input} to {output}: {error}"
        );
    }
}

#[test]
fn paths_known_only_later_are_checked_when_they_are_written() {
    let f = folder(&["a.png", "b.latent", "b-128.png"]);
    let mut plan = plan(&request(&f, &["a.png", "b.latent", "b-128.png"]).to(&f, "out")).unwrap();
    let (a, b) = (plan.tasks[0].origin(), plan.tasks[1].origin());
    let at = |name: &str| f.path().join(name);
    assert_eq!(plan.claims.claim(&at("out/a.png"), &a), Ok(()));
    assert_eq!(plan.claims.claim(&at("out/b-1.png"), &b), Ok(()));
    assert_eq!(
        plan.claims.claim(&at("out/../out/b-1.png"), &a),
        Err(Conflict::Output(b.clone())),
        "`out` does not exist yet, and its name is settled all the same"
    );
    assert_eq!(
        plan.claims.claim(&at("b-128.png"), &b),
        Err(Conflict::Input(at("b-128.png")))
    );
}

#[test]
fn devices_and_pipes_are_neither_written_over_nor_written_beside() {
    let f = folder(&["a.png"]);
    let mut r = request(&f, &["a.png"]);
    r.output = Some(Output::Path("/dev/null".into()));
    assert!(r.usage_error().contains("use -o -"), "{}", r.usage_error());
    let r = Request {
        inputs: vec![Source::Path("/dev/null".into())],
        ..Request::default()
    };
    assert!(r.usage_error().contains("-o FILE"), "{}", r.usage_error());
}

#[test]
fn names_that_are_not_utf8_keep_their_bytes() {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let f = folder(&[]);
    let name = OsString::from_vec(b"caf\xe9.png".to_vec());
    fs::write(f.path().join(&name), "").unwrap();
    let plan = plan(&request(&f, &[""])).unwrap();
    let path = plan.tasks[0].target.naming().unwrap().pattern();
    assert_eq!(path.file_name().unwrap().as_bytes(), b"caf\xe9-2x.png");
}

#[test]
fn names_that_differ_only_in_case_are_two_files_with_a_warning() {
    let f = folder(&["a.png", "A.png"]);
    let plan = plan(&request(&f, &[""]).to(&f, "out")).unwrap();
    assert_eq!(plan.tasks.len(), 2);
    assert!(plan.warnings[0].contains("differ only in case"));
}

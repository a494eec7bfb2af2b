//! Several outputs of one input, and pictures that are made of prompts.

use super::*;

impl Request {
    fn by(mut self, seeds: &[u64], guidances: &[f64]) -> Self {
        let of_seed = |&seed: &u64| {
            guidances
                .iter()
                .map(move |&guidance| Variant { seed, guidance })
        };
        self.variants = seeds.iter().flat_map(of_seed).collect();
        self
    }
}

/// A request for pictures of prompts that are called so.
fn prompts(names: &[&str]) -> Request {
    let prompt = |name: &&str| {
        Source::Prompt(Prompt {
            name: format!("list:{name}"),
            relative: name.into(),
            text: "a cat".into(),
        })
    };
    Request {
        inputs: names.iter().map(prompt).collect(),
        reads: Reads::Prompts,
        listed: true,
        ..Request::default()
    }
}

#[test]
fn each_value_has_an_output_of_its_own() {
    let f = folder(&["a.png"]);
    let r = request(&f, &["a.png"]);
    let lines = |request: &Request| lines(&f, &plan(request).unwrap());
    let beside = r.clone().by(&[3, 12], &[1.0]);
    assert_eq!(
        lines(&beside),
        ["a.png -> a-2x-3.png", "a.png -> a-2x-12.png"]
    );
    let both = r.clone().by(&[3], &[1.0, 7.5]).to(&f, "out/");
    assert_eq!(
        lines(&both),
        ["a.png -> out/a-g1.png", "a.png -> out/a-g7.5.png"]
    );
    let file = r.clone().by(&[3, 4], &[0.0, 2.0]).to(&f, "big.webp");
    assert_eq!(
        lines(&file),
        [
            "a.png -> big-3-g0.webp",
            "a.png -> big-3-g2.webp",
            "a.png -> big-4-g0.webp",
            "a.png -> big-4-g2.webp"
        ]
    );
    let named = r.clone().by(&[3, 4], &[2.0]).to(&f, "out/");
    assert_eq!(
        lines(&named.name("{guidance}/{seed}.{ext}")),
        ["a.png -> out/2/3.png", "a.png -> out/2/4.png"]
    );
    let one_name = r.clone().by(&[3, 4], &[2.0]).to(&f, "out/");
    let error = one_name.name("{stem}.{ext}").usage_error();
    assert!(
        error.contains("every seed and guidance") && error.contains("put {seed}"),
        "{error}"
    );
    let error = r.by(&[3, 4], &[2.0]).into_stdout().usage_error();
    assert!(error.contains("one seed"), "{error}");
}

#[test]
fn what_runs_with_other_values_wrote_is_no_input() {
    let made = [
        "a-2x.png",
        "a-2x-3.png",
        "a-2x-g1.5.png",
        "a-2x-12-g0.png",
        "l-2x-low-res.png",
        "a-2x-compare.png",
        "l-2x-3-low-res.safetensors",
    ];
    let mut files = vec!["a.png", "l.safetensors", "own-low-res.png"];
    files.extend(made);
    let f = folder(&files);
    for request in [
        request(&f, &[""]),
        request(&f, &[""]).by(&[1, 2], &[1.0]),
        request(&f, &[""]).by(&[1], &[0.0, 1.0]),
    ] {
        let plan = plan(&request).unwrap();
        let inputs: BTreeSet<String> = plan.tasks.iter().map(|t| t.source.to_string()).collect();
        assert_eq!(inputs.len(), 3, "{inputs:?}");
        assert_eq!(plan.passed_over.len(), made.len());
        assert_eq!(plan.inputs, 3);
    }
}

#[test]
fn prompts_are_named_like_files_of_a_folder() {
    let f = folder(&[]);
    let lines = |request: &Request| lines(&f, &plan(request).unwrap());
    let list = prompts(&["0001", "v1.5 of it", "sub/b.webp"]).to(&f, "out");
    assert_eq!(
        lines(&list),
        [
            "list:0001 -> out/0001.png",
            "list:v1.5 of it -> out/v1.5 of it.png",
            "list:sub/b.webp -> out/sub/b.webp"
        ]
    );
    // One of a list goes into a folder all the same, or to a file that is named as such.
    let one = prompts(&["0001"]);
    assert_eq!(
        lines(&one.clone().to(&f, "out")),
        ["list:0001 -> out/0001.png"]
    );
    assert_eq!(lines(&one.clone().to(&f, "a.jpg")), ["list:0001 -> a.jpg"]);
    let error = one.usage_error();
    assert!(error.contains("-o FILE"), "{error}");
    let twice = prompts(&["a", "a.png"]).to(&f, "out/").usage_error();
    assert!(twice.contains("both be written"), "{twice}");
    let shares: Vec<usize> = ["0/2", "1/2"]
        .iter()
        .map(|shard| {
            let names: Vec<String> = (1..=40).map(|n| format!("{n:04}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut request = prompts(&names).to(&f, "out/").by(&[1, 2], &[1.0]);
            request.shard = Some(shard.parse().unwrap());
            plan(&request).unwrap().tasks.len()
        })
        .collect();
    // A prompt's seeds stay together.
    assert_eq!(shares[0] + shares[1], 80);
    assert!(shares.iter().all(|share| share % 2 == 0 && *share > 0));
}

#[test]
fn folders_of_prompts_are_walked_as_those_of_pictures() {
    let f = folder(&["in/b.txt", "in/a.TXT", "in/c.png", "in/sub/d.txt"]);
    let r = Request {
        reads: Reads::Prompts,
        ..request(&f, &["in"])
    };
    let lines = |request: &Request| lines(&f, &plan(request).unwrap());
    assert_eq!(
        lines(&r.clone().to(&f, "out")),
        ["in/a.TXT -> out/a.png", "in/b.txt -> out/b.png"]
    );
    assert_eq!(
        lines(&r.recursive().to(&f, "out"))[2],
        "in/sub/d.txt -> out/sub/d.png"
    );
}

#[test]
fn places_are_those_of_inputs_whatever_can_be_read_of_them() {
    let f = folder(&["a.png", "b.png"]);
    let r = request(&f, &["b.png", "missing.png", "a.png"]).by(&[1, 2], &[1.0]);
    let plan = plan(&r).unwrap();
    let places: Vec<usize> = plan.tasks.iter().map(|task| task.place).collect();
    assert_eq!((places, plan.inputs), (vec![0, 0, 2, 2], 3));
}

//! What is asked of the Hub, and how it lies in the cache.

use super::setup::*;

#[test]
fn the_first_run_fetches_just_the_files_needed_and_the_second_asks_for_nothing() {
    let setup = Setup::new();
    let dir = setup.run().unwrap();
    assert_complete(&dir);
    let asked = setup.asked();
    let mut needed: Vec<_> = pipeline()[..12]
        .iter()
        .map(|(file, _)| file.to_string())
        .collect();
    needed.sort();
    assert_eq!(asked, needed);

    assert_eq!(setup.run().unwrap(), dir);
    assert_eq!(setup.server.seen(), []);
    assert_eq!(setup.hub().cached(REPO, COMMIT, &Part::PIPELINE), Some(dir));
}

#[cfg(unix)]
#[test]
fn the_cache_has_the_layout_of_huggingface_hub() {
    let setup = Setup::new();
    let dir = setup.run().unwrap();
    assert_eq!(dir, setup.repo().join("snapshots").join(COMMIT));
    for file in [UNET, "model_index.json"] {
        let up = if file.contains('/') {
            "../../../"
        } else {
            "../../"
        };
        let target = format!("{up}blobs/{}", etag(file, &content(file)));
        assert_eq!(fs::read_link(dir.join(file)).unwrap(), Path::new(&target));
    }
    let blobs = fs::read_dir(setup.repo().join("blobs")).unwrap();
    assert_eq!(blobs.count(), 12, "nothing but the blobs is left");
    assert!(!setup.repo().join("refs").exists(), "a commit needs no ref");
}

#[test]
fn a_branch_is_resolved_once_and_its_commit_noted() {
    let setup = Setup::new();
    for revision in ["main", "refs/pr/1"] {
        assert_eq!(setup.hub().cached(REPO, revision, &Part::PIPELINE), None);
        let dir = setup
            .hub()
            .snapshot(REPO, revision, &Part::PIPELINE)
            .unwrap();
        assert_complete(&dir);
        assert_eq!(
            fs::read_to_string(setup.repo().join("refs").join(revision)).unwrap(),
            COMMIT
        );
        setup.server.seen();
        setup
            .hub()
            .snapshot(REPO, revision, &Part::PIPELINE)
            .unwrap();
        assert_eq!(setup.server.seen(), []);
    }
}

#[test]
fn files_that_the_repository_may_lack_are_asked_for_once() {
    let files = pipeline()
        .into_iter()
        .filter(|(name, _)| !name.contains("tokenizer_config"));
    let setup = Setup::serving(files.collect());
    let dir = setup.run().unwrap();
    assert!(!dir.join("tokenizer/tokenizer_config.json").exists());
    let mark = setup
        .repo()
        .join(".no_exist")
        .join(COMMIT)
        .join("tokenizer/tokenizer_config.json");
    assert!(mark.is_file());
    setup.server.seen();
    setup.run().unwrap();
    assert_eq!(setup.server.seen(), []);

    // A cache filled by another program has no such mark; then the network is asked, but not needed.
    fs::remove_file(&mark).unwrap();
    setup.server.fail("*", Fault::Status(503, None), 100);
    assert_eq!(setup.run().unwrap(), dir);
    assert!(!setup.server.seen().is_empty());
}

#[test]
fn offline_a_warm_cache_works_and_a_cold_one_says_what_is_missing() {
    let setup = Setup::new();
    let mut settings = setup.settings();
    settings.offline = true;
    let offline = Hub::new(settings);
    for revision in [COMMIT, "main"] {
        let error = offline
            .snapshot(REPO, revision, &Part::PIPELINE)
            .unwrap_err()
            .to_string();
        let looked_in = match revision {
            COMMIT => setup.repo().join("snapshots").join(COMMIT),
            _ => setup.repo(),
        };
        assert_says(
            &error,
            &[
                "HF_HUB_OFFLINE",
                "scheduler/scheduler_config.json",
                REPO,
                revision,
                looked_in.to_str().unwrap(),
                "--model DIR",
            ],
        );
    }
    let dir = setup.hub().snapshot(REPO, "main", &Part::PIPELINE).unwrap();
    setup.server.seen();
    for revision in [COMMIT, "main"] {
        assert_eq!(
            offline.snapshot(REPO, revision, &Part::PIPELINE).unwrap(),
            dir
        );
    }
    fs::remove_file(dir.join(VAE)).unwrap();
    assert_says(
        &offline
            .snapshot(REPO, "main", &Part::PIPELINE)
            .unwrap_err()
            .to_string(),
        &[VAE],
    );
    assert_eq!(setup.server.seen(), []);
}

#[test]
fn sharded_weights_are_fetched_by_their_index() {
    let index = |shard: &str| {
        format!(r#"{{"weight_map":{{"a":"s-1.safetensors","b":"{shard}"}}}}"#).into_bytes()
    };
    let index_name = "unet/diffusion_pytorch_model.safetensors.index.json";
    let files = |shard: &str| {
        let mut files: Vec<_> = pipeline()
            .into_iter()
            .filter(|(name, _)| *name != UNET)
            .collect();
        files.push((index_name, index(shard)));
        files.push(("unet/s-1.safetensors", bytes(91, 5000)));
        files.push(("unet/s-2.safetensors", bytes(92, 5000)));
        files
    };
    let setup = Setup::serving(files("s-2.safetensors"));
    let dir = setup.run().unwrap();
    assert_eq!(
        fs::read(dir.join("unet/s-2.safetensors")).unwrap(),
        bytes(92, 5000)
    );
    setup.server.seen();
    setup.run().unwrap();
    assert_eq!(setup.server.seen(), []);
    fs::remove_file(dir.join("unet/s-1.safetensors")).unwrap();
    assert_eq!(setup.hub().cached(REPO, COMMIT, &Part::PIPELINE), None);
    setup.run().unwrap();
    assert!(
        setup.transfers("unet/s-1.safetensors").is_empty(),
        "its blob is still there"
    );

    let setup = Setup::serving(files("../../../evil.safetensors"));
    assert_says(&setup.error(), &[index_name, "evil", "beside it"]);
    let setup = Setup::serving(files("s-3.safetensors"));
    assert_says(&setup.error(), &["unet/s-3.safetensors", "404"]);
}

#[test]
fn a_vae_is_found_at_the_top_of_its_repository_or_in_a_pipeline() {
    let setup = Setup::serving(vec![
        ("config.json", bytes(1, 300)),
        ("diffusion_pytorch_model.safetensors", bytes(2, 5000)),
    ]);
    let bare = setup.hub().vae(REPO, "main").unwrap();
    assert_eq!(fs::read(bare.join("config.json")).unwrap(), bytes(1, 300));

    let pipeline = Setup::new();
    let dir = pipeline.hub().vae(REPO, "main").unwrap();
    assert_eq!(
        fs::read(dir.join("diffusion_pytorch_model.safetensors")).unwrap(),
        content(VAE)
    );
    let fetched = pipeline
        .server
        .seen()
        .into_iter()
        .filter(|seen| seen.method == "GET" && seen.cdn);
    assert_eq!(fetched.map(|seen| seen.file).collect::<Vec<_>>(), [VAE]);

    for setup in [setup, pipeline] {
        setup.server.seen();
        setup.hub().vae(REPO, "main").unwrap();
        assert_eq!(setup.server.seen(), []);
    }
}

#[cfg(unix)]
#[test]
fn a_dangling_link_in_the_cache_is_mended() {
    let setup = Setup::new();
    let dir = setup.run().unwrap();
    for (file, target) in [(UNET, setup.blob(UNET)), (VAE, "/nowhere/else".into())] {
        fs::remove_file(setup.blob(file)).unwrap();
        fs::remove_file(dir.join(file)).unwrap();
        std::os::unix::fs::symlink(target, dir.join(file)).unwrap();
    }
    assert_complete(&setup.run().unwrap());
    setup.server.seen();
    setup.run().unwrap();
    assert_eq!(setup.server.seen(), []);
}

#[test]
fn one_request_lists_the_files_and_one_fetches_each() {
    let setup = Setup::new();
    setup.run().unwrap();
    let seen = setup.server.seen();
    assert!(seen.iter().all(|seen| seen.method == "GET"), "{seen:?}");
    let count = |file: &str| seen.iter().filter(|seen| seen.file == file).count();
    assert_eq!(count(LIST), 1);
    for (file, _) in &pipeline()[..12] {
        // The Hub sends each on to another address.
        assert_eq!(count(file), 2, "{file}");
    }
    assert_eq!(seen.len(), 1 + 2 * 12);
}

#[test]
fn a_repository_without_optional_files_is_whole_and_asked_for_once() {
    let optional = ["model_index", "special_tokens_map", "tokenizer_config"];
    let mut files = pipeline();
    files.retain(|(name, _)| !optional.iter().any(|part| name.contains(part)));
    let setup = Setup::serving(files);
    setup.run().unwrap();
    assert_eq!(setup.server.seen().len(), 1 + 2 * 9);
    setup.run().unwrap();
    assert_eq!(setup.server.seen(), []);
}

#[test]
fn a_list_of_names_alone_is_enough() {
    let setup = Setup::new();
    setup.server.list_names_alone();
    setup.server.fail(UNET, Fault::CutAfter(40_000), 2);
    assert_complete(&setup.run().unwrap());
    assert_eq!(setup.transfers(UNET), [0, 40_000, 80_000]);
    setup.run().unwrap();
    assert_eq!(setup.server.seen(), []);
}

/// The pipeline with weights in float16 alone: whole ones, but the UNet's in shards with this index.
fn fp16_pipeline(index: &'static str) -> Vec<(&'static str, Vec<u8>)> {
    let shards = [
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    ];
    let map = format!(
        r#"{{"weight_map":{{"a":"{}","b":"{}"}}}}"#,
        shards[0], shards[1]
    );
    let mut files: Vec<_> = pipeline()
        .into_iter()
        .filter(|(name, _)| !name.ends_with(".safetensors"))
        .collect();
    files.push(("text_encoder/model.fp16.safetensors", bytes(81, 5000)));
    files.push((
        "vae/diffusion_pytorch_model.fp16.safetensors",
        bytes(82, 5000),
    ));
    files.push((index, map.into_bytes()));
    files.push((
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        bytes(83, 5000),
    ));
    files.push((
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        bytes(84, 5000),
    ));
    files
}

#[test]
fn weights_in_float16_are_fetched_where_there_are_no_others() {
    for index in [
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.safetensors.fp16.index.json",
    ] {
        let files = fp16_pipeline(index);
        let setup = Setup::serving(files.clone());
        let dir = setup.run().unwrap();
        let needless = ["README.md", "unet/diffusion_pytorch_model.bin"];
        for (file, bytes) in files {
            let found = fs::read(dir.join(file)).ok();
            assert_eq!(
                found,
                (!needless.contains(&file)).then_some(bytes),
                "{file}"
            );
        }
        setup.server.seen();
        setup.run().unwrap();
        assert_eq!(setup.server.seen(), []);
    }
}

#[test]
fn weights_in_float16_that_another_program_cached_do_not_hide_better_ones() {
    let variant = "vae/diffusion_pytorch_model.fp16.safetensors";
    let setup = Setup::new();
    let dir = setup.run().unwrap();
    fs::remove_file(dir.join(VAE)).unwrap();
    fs::write(dir.join(variant), "").unwrap();
    setup.server.seen();
    setup.server.fail("*", Fault::Status(503, None), 100);
    assert_says(&setup.error(), &[VAE, "503"]);
    setup.server.heal();
    assert_complete(&setup.run().unwrap());
    assert!(setup.transfers(VAE).is_empty(), "its blob is still there");

    // Offline, what is here has to do.
    fs::remove_file(dir.join(VAE)).unwrap();
    let mut settings = setup.settings();
    settings.offline = true;
    let offline = Hub::new(settings);
    assert_eq!(
        offline.snapshot(REPO, COMMIT, &Part::PIPELINE).unwrap(),
        dir
    );
}

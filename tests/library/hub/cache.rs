//! What is asked of the Hub, and how it lies in the cache.

use super::setup::*;

#[test]
fn the_first_run_fetches_just_the_files_needed_and_the_second_asks_for_nothing() {
    let setup = Setup::new();
    let dir = setup.run().unwrap();
    assert_complete(&dir);
    let mut asked: Vec<_> = setup
        .server
        .seen()
        .into_iter()
        .map(|seen| seen.file)
        .collect();
    asked.sort();
    asked.dedup();
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
fn a_server_without_head_serves_all_the_same() {
    let setup = Setup::new();
    setup.server.fail("*", Fault::NoHead, 100);
    assert_complete(&setup.run().unwrap());
}

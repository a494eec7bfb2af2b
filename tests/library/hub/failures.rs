//! What the user is told when a download cannot succeed; and that nothing wrong stays in the cache.

use super::setup::*;

#[test]
fn a_corrupted_file_is_removed_and_reported() {
    let setup = Setup::new();
    setup.server.fail(UNET, Fault::WrongByte, 1);
    let error = setup.error();
    assert_says(
        &error,
        &[
            UNET,
            REPO,
            "corrupted",
            "SHA-256",
            "removed",
            "Run the same command again",
        ],
    );
    assert!(!setup.blob(UNET).exists() && !setup.part(UNET).exists());
    assert_complete(&setup.run().unwrap());
}

#[test]
fn a_file_longer_than_announced_is_removed_and_reported() {
    let setup = Setup::new();
    setup.server.fail(UNET, Fault::Longer, 1);
    assert_says(
        &setup.error(),
        &[UNET, "corrupted", "more than 100000 bytes"],
    );
    assert!(!setup.blob(UNET).exists() && !setup.part(UNET).exists());
}

#[test]
fn a_file_that_is_always_short_ends_in_a_message() {
    for file in [UNET, "unet/config.json"] {
        let setup = Setup::new();
        setup.server.fail(file, Fault::Short(200), 100);
        let error = setup.error();
        assert_says(
            &error,
            &[
                file,
                REPO,
                "ended after 200 of",
                "same command",
                "server's file is at fault",
            ],
        );
        assert!(!setup.blob(file).exists());
        assert_eq!(setup.hub().cached(REPO, COMMIT, &Part::PIPELINE), None);
    }
}

#[test]
fn a_server_in_trouble_is_asked_again_but_not_forever() {
    let setup = Setup::new();
    setup
        .server
        .fail("vae/config.json", Fault::Status(500, None), 2);
    setup.server.fail(VAE, Fault::Status(503, None), 3);
    assert_complete(&setup.run().unwrap());

    let setup = Setup::new();
    setup.server.fail(LIST, Fault::Status(500, None), 2);
    assert_complete(&setup.run().unwrap());

    let setup = Setup::new();
    setup
        .server
        .fail("vae/config.json", Fault::Status(502, None), 100);
    assert_says(
        &setup.error(),
        &[
            "vae/config.json",
            "502",
            "later",
            "--model DIR",
            "HF_HUB_OFFLINE=1",
        ],
    );
    let asked = setup
        .server
        .seen()
        .into_iter()
        .filter(|seen| seen.file == "vae/config.json");
    assert_eq!(asked.count(), 4, "once, and after each of the three pauses");
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    let setup = Setup::new();
    setup.server.fail("*", Fault::Silence, 100);
    let start = Instant::now();
    assert_says(
        &setup.error(),
        &["does not answer", "model_index.json", "--model DIR"],
    );
    assert!(start.elapsed() < BOUND);
}

#[test]
fn not_found_says_which_of_repository_revision_and_file_it_is() {
    let setup = Setup::new();
    let hub = setup.hub();
    let error = |repo: &str, revision: &str| {
        hub.snapshot(repo, revision, &Part::PIPELINE)
            .unwrap_err()
            .to_string()
    };
    assert_says(
        &error("org/other", "main"),
        &["org/other", "404", "no such repository", "--model"],
    );
    assert_says(
        &error(REPO, "v9"),
        &[REPO, "v9", "404", "no such revision", "--revision"],
    );
    let other = "f".repeat(40);
    assert_says(&error(REPO, &other), &[&other, "404", "no such revision"]);

    let setup = Setup::serving(
        pipeline()
            .into_iter()
            .filter(|(name, _)| *name != UNET)
            .collect(),
    );
    assert_says(
        &setup.error(),
        &[
            UNET,
            REPO,
            COMMIT,
            "404",
            "--model",
            "--revision",
            "safetensors",
        ],
    );
    let fetched = setup
        .server
        .seen()
        .into_iter()
        .filter(|seen| seen.method == "GET" && seen.file != LIST)
        .count();
    assert_eq!(
        fetched, 0,
        "nothing is downloaded of a model that cannot be completed"
    );
}

#[test]
fn a_gated_repository_asks_for_a_token_and_opens_with_it() {
    let setup = Setup::new();
    setup.server.require_token("hf_right");
    let error = setup.error();
    assert_says(
        &error,
        &[
            "401",
            "HF_TOKEN",
            "no access token is set",
            "licence",
            &format!("/{REPO}"),
        ],
    );

    let mut settings = setup.settings();
    settings.token = Some("hf_wrong".into());
    let error = Hub::new(settings)
        .snapshot(REPO, COMMIT, &Part::PIPELINE)
        .unwrap_err()
        .to_string();
    assert_says(&error, &["the access token in use does not open it"]);
    assert!(
        !error.contains("hf_wrong"),
        "a token must not end up in a bug report"
    );

    setup.server.seen();
    let mut settings = setup.settings();
    settings.token = Some("hf_right".into());
    assert_complete(
        &Hub::new(settings)
            .snapshot(REPO, COMMIT, &Part::PIPELINE)
            .unwrap(),
    );
    for seen in setup.server.seen() {
        assert_eq!(
            seen.token.is_some(),
            !seen.cdn,
            "the token is for the Hub alone: {seen:?}"
        );
    }

    let setup = Setup::new();
    setup
        .server
        .fail("*", Fault::Status(403, Some("GatedRepo")), 1);
    assert_says(&setup.error(), &["403", "GatedRepo", "HF_TOKEN", "licence"]);
}

#[test]
fn without_a_network_the_message_names_the_ways_round_it() {
    let cache = tempfile::tempdir().unwrap();
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let refused = format!("http://127.0.0.1:{port}");
    // RFC 2606 reserves .invalid: no resolver knows an address for it.
    for (endpoint, cause) in [
        (&*refused, "refuses"),
        ("http://hub.invalid", "hub.invalid has no address"),
    ] {
        let start = Instant::now();
        let hub = Hub::new(settings(endpoint, cache.path()));
        let error = hub
            .snapshot(REPO, COMMIT, &Part::PIPELINE)
            .unwrap_err()
            .to_string();
        let cache = cache.path().to_str().unwrap();
        assert_says(
            &error,
            &[
                "model_index.json",
                REPO,
                COMMIT,
                endpoint,
                cause,
                "--model DIR",
                "HF_HUB_OFFLINE=1",
                cache,
                "--model tiny",
            ],
        );
        assert!(start.elapsed() < BOUND);
        let error = hub.vae(REPO, "main").unwrap_err().to_string();
        assert_says(&error, &["--vae DIR"]);
        assert!(!error.contains("tiny"), "there is no built-in VAE: {error}");
    }
}

#[test]
fn a_lock_that_nobody_lets_go_of_ends_in_a_message() {
    let setup = Setup::new();
    let locks = setup.cache.path().join(".locks/models--org--model");
    fs::create_dir_all(&locks).unwrap();
    let name = format!("{}.lock", etag(UNET, &content(UNET)));
    let lock = fs::File::create(locks.join(&name)).unwrap();
    lock.lock().unwrap();
    assert_says(
        &setup.error(),
        &[UNET, &name, "another process", "End that process"],
    );
    drop(lock);
    assert_complete(&setup.run().unwrap());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_with_the_folder() {
    let setup = Setup::new();
    fs::create_dir_all(setup.repo().join("blobs")).unwrap();
    // Writing to this device fails as on a full disk.
    std::os::unix::fs::symlink("/dev/full", setup.part(UNET)).unwrap();
    let cache = setup.cache.path().to_str().unwrap();
    assert_says(
        &setup.error(),
        &[
            UNET,
            "No space left",
            "HF_HUB_CACHE",
            "Free some space",
            cache,
        ],
    );
    assert!(!setup.blob(UNET).exists());
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let setup = Setup::new();
    let file = setup.cache.path().join("file");
    fs::write(&file, "").unwrap();
    let hub = Hub::new(settings(&setup.server.url(), &file));
    let error = hub
        .snapshot(REPO, COMMIT, &Part::PIPELINE)
        .unwrap_err()
        .to_string();
    assert_says(&error, &[file.to_str().unwrap(), "HF_HUB_CACHE"]);
}

#[test]
fn a_login_page_in_place_of_the_hub_is_recognised() {
    let setup = Setup::new();
    setup.server.become_a_login_page();
    assert_says(
        &setup.error(),
        &[
            "not a Hub's",
            "JSON",
            "HF_ENDPOINT",
            "login page",
            "--model DIR",
        ],
    );
}

#[test]
fn names_that_lead_out_of_the_cache_are_refused() {
    let setup = Setup::new();
    for (repo, revision) in [
        ("../..", "main"),
        ("a/b/c", "main"),
        ("org/", "main"),
        ("", "main"),
        ("org/na me", "main"),
        (REPO, "../../x"),
        (REPO, ""),
        (REPO, "/etc"),
    ] {
        let error = setup
            .hub()
            .snapshot(repo, revision, &Part::PIPELINE)
            .unwrap_err()
            .to_string();
        assert_says(&error, &["expected"]);
        assert_eq!(setup.hub().cached(repo, revision, &Part::PIPELINE), None);
    }
    assert_eq!(setup.server.seen(), []);
}

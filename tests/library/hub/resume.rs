//! Interrupted, parallel and repeated transfers.

use super::setup::*;

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_stopped() {
    let setup = Setup::new();
    setup.server.fail(UNET, Fault::CutAfter(40_000), 2);
    assert_complete(&setup.run().unwrap());
    assert_eq!(setup.transfers(UNET), [0, 40_000, 80_000]);
}

#[test]
fn a_transfer_that_stands_still_goes_on_where_it_stopped() {
    let setup = Setup::new();
    setup.server.fail(UNET, Fault::StallAfter(30_000), 1);
    let start = Instant::now();
    assert_complete(&setup.run().unwrap());
    assert!(start.elapsed() < BOUND);
    assert_eq!(setup.transfers(UNET), [0, 30_000]);
}

#[test]
fn a_list_of_files_that_breaks_off_or_stands_still_is_asked_for_again() {
    let setup = Setup::new();
    setup.server.fail(LIST, Fault::CutAfter(100), 1);
    setup.server.fail(LIST, Fault::StallAfter(100), 1);
    let start = Instant::now();
    assert_complete(&setup.run().unwrap());
    assert!(start.elapsed() < BOUND);

    let setup = Setup::new();
    setup.server.fail(LIST, Fault::CutAfter(100), 100);
    assert_says(&setup.error(), &["model_index.json", "same command"]);
}

#[test]
fn a_run_that_gave_up_is_resumed_by_the_next() {
    let setup = Setup::new();
    setup.server.fail(UNET, Fault::CutAfter(50_000), 1);
    setup.server.fail(UNET, Fault::CutAfter(0), 100);
    let error = setup.error();
    assert_says(
        &error,
        &[
            UNET,
            "50000 bytes of it are kept",
            "the same command goes on",
        ],
    );
    assert_eq!(fs::metadata(setup.part(UNET)).unwrap().len(), 50_000);
    assert!(!setup.blob(UNET).exists());
    assert_eq!(setup.hub().cached(REPO, COMMIT, &Part::PIPELINE), None);

    setup.server.heal();
    setup.server.seen();
    assert_complete(&setup.run().unwrap());
    assert_eq!(setup.transfers(UNET), [50_000]);
    assert!(!setup.part(UNET).exists());
}

#[test]
fn a_server_that_cannot_resume_is_asked_for_the_whole_file() {
    let setup = Setup::new();
    setup.server.fail(UNET, Fault::CutAfter(40_000), 1);
    setup.server.fail(UNET, Fault::IgnoreRange, 1);
    assert_complete(&setup.run().unwrap());
    assert_eq!(setup.transfers(UNET), [0, 40_000]);
}

#[test]
fn a_process_killed_while_downloading_leaves_only_a_part_to_resume() {
    let setup = Setup::new();
    setup.server.fail(UNET, Fault::StallAfter(60_000), 1);
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "hub::resume::download_for_another_test",
            "--ignored",
        ])
        .env("HUB_TEST_ENDPOINT", setup.server.url())
        .env("HUB_TEST_CACHE", setup.cache.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while fs::metadata(setup.part(UNET)).map_or(0, |part| part.len()) < 60_000 {
        assert!(start.elapsed() < BOUND, "the child downloads nothing");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!setup.blob(UNET).exists());
    setup.server.seen();
    assert_complete(&setup.run().unwrap());
    assert_eq!(setup.transfers(UNET), [60_000]);
}

/// What the test above starts as a process of its own.
#[test]
#[ignore = "a part of another test"]
fn download_for_another_test() {
    let (Ok(endpoint), Ok(cache)) = (
        std::env::var("HUB_TEST_ENDPOINT"),
        std::env::var("HUB_TEST_CACHE"),
    ) else {
        return;
    };
    let mut settings = settings(&endpoint, cache.as_ref());
    settings.read_timeout = Duration::from_secs(30);
    Hub::new(settings)
        .snapshot(REPO, COMMIT, &Part::PIPELINE)
        .unwrap();
}

#[test]
fn a_bad_part_of_an_earlier_run_is_replaced() {
    for (len, transfers) in [
        (10_000, vec![10_000, 0]),
        (100_000, vec![0]),
        (100_001, vec![0]),
    ] {
        let setup = Setup::new();
        fs::create_dir_all(setup.repo().join("blobs")).unwrap();
        fs::write(setup.part(UNET), vec![7; len]).unwrap();
        assert_complete(&setup.run().unwrap());
        assert_eq!(setup.transfers(UNET), transfers, "a part of {len} bytes");
    }
}

#[test]
fn two_downloads_at_once_fetch_each_file_once() {
    let setup = Setup::new();
    setup.server.slow_down(Duration::from_millis(5));
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| setup.run().unwrap()))
            .collect();
        for run in runs {
            assert_complete(&run.join().unwrap());
        }
    });
    assert_eq!(setup.transfers(UNET), [0]);
}

//! Where the direct path cannot be had: what is said, and what works all the same.

use std::time::{Duration, Instant};

use ucm::error::ErrorKind;

use crate::fakes::{ALL, EACH_DRIVER, Steering};
use crate::world::*;

/// What is missing, how it is made to be, and what must be said of it.
type Refusal = (&'static str, fn(&World), &'static [&'static str]);

/// Goal: where something is missing, `required` is an error that names it and the remedy, `auto` uses pinned memory,
/// says so in the statistics and works, and `off` does not even look.
#[test]
fn what_is_missing_is_told() {
    let refusals: [Refusal; 7] = [
        (
            "library",
            |_| set_library("/nonexistent/libcufile.so.0"),
            &["UCM_CUFILE_LIBRARY", "install"],
        ),
        (
            "driver",
            |w| w.cufile.fail_call("cuFileDriverOpen", 1, 5001),
            &["1.14", "nvidia-fs", "modprobe"],
        ),
        ("file system", |w| w.cufile.unsupported(true), &["1.14", "does not work on", "gdscheck"]),
        ("pinning", |w| w.cufile.fail_call("cuFileBufRegister", 1, 5036), &["pinned", "BAR1"]),
        ("transfer", |w| w.cufile.lie(true), &["did not bring back"]),
        ("checksums", |w| w.fake.falsify(1), &["checksum of 241 bytes", "driver"]),
        ("long checksums", |w| w.fake.falsify(10_000), &["checksum of 33000 bytes"]),
    ];
    for (what, refuse, words) in refusals {
        let world = World::new();
        refuse(&world);
        let error = world.open().err().unwrap_or_else(|| panic!("{what}: opened"));
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{what}: {error}");
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "{what}: {word} is not in: {text}");
        }
        if what == "file system" {
            assert!(
                text.contains(world.path().to_str().unwrap()),
                "the directory is not in: {text}"
            );
        }
        assert!(text.contains("gpu_direct is required"), "{text}");
        assert_eq!(world.cufile.live(), [0; 2], "{what}");
        world.fake.assert_no_leak();
        refuse(&world);
        let tensor = (BLOCK / 2).to_string();
        let auto = [("tensor_size", tensor.as_str()), ("gpu_direct", "auto")];
        let store = world.open_with(&auto).unwrap();
        let report = store.stats().unwrap().backends.remove(0);
        assert_ne!(report.engine, "cufile");
        let told =
            report.fallbacks.iter().any(|fallback| fallback.what.contains("gpu_direct: auto"));
        assert!(told, "{what}: {:?}", report.fallbacks);
        save_block(&world, &store, 1).unwrap();
        load_block(&world, &store, 1).unwrap();
        store.close();
        drop(store);
        let calls = world.cufile.calls();
        let off = [("tensor_size", tensor.as_str()), ("gpu_direct", "off")];
        let store = world.open_with(&off).unwrap();
        assert!(store.stats().unwrap().backends[0].fallbacks.is_empty());
        drop(store);
        assert_eq!(world.cufile.calls(), calls, "{what}: off looked for cuFile");
        world.assert_no_leak();
    }
}

fn set_library(path: &str) {
    // SAFETY: the caller holds the fake device, so no other test reads the environment.
    unsafe { std::env::set_var("UCM_CUFILE_LIBRARY", path) };
}

/// Goal: compatibility mode counts as not supported: with a library that cannot be told to forbid it, and where
/// somebody else has opened cuFile with it.
#[test]
fn compatibility_mode_is_refused() {
    let world = World::with(ALL[0], "libcufile-old.so.0");
    let text = world.open().err().unwrap().to_string();
    assert!(
        text.contains("properties.allow_compat_mode") && text.contains("cufile.json"),
        "{text}"
    );
    world.assert_no_leak();
    let world = World::new();
    world.cufile.open_by_others(true);
    let text = world.open().err().unwrap().to_string();
    assert!(text.contains("open in this process"), "{text}");
    assert!(world.cufile.is_open(), "what others opened stays open");
    assert_eq!(world.cufile.live(), [0; 2]);
    world.cufile.open_by_others(false);
    let store = world.open().unwrap();
    drop(store);
    world.assert_no_leak();
}

/// Goal: ways through host memory are forbidden under the numbers that the version's own header has, and no number is
/// used that it lacks; where it has a way but no number to forbid it, cufile.json must.
#[test]
fn settings_were_made_that_the_version_does_not_have() {
    for (version, allowed) in
        [(1140, None), (1160, None), (1170, Some("posix_io_mode")), (1190, None)]
    {
        let world = World::new();
        world.cufile.version(version);
        match (world.open(), allowed) {
            (Ok(store), None) => save_block(&world, &store, 1).unwrap(),
            (Err(error), Some(name)) => assert!(error.to_string().contains(name), "{error}"),
            (other, _) => panic!("{version}: {:?}", other.err()),
        }
        world.assert_no_leak();
    }
}

/// Goal: an open that failed leaves no setting behind that the next one would miss.
#[test]
fn an_open_after_a_failed_one_forbids_compatibility_again() {
    let world = World::new();
    world.cufile.fail_call("cuFileDriverOpen", 1, 5001);
    assert!(world.open().is_err());
    let stores = [world.open().unwrap(), world.open().unwrap()];
    save_block(&world, &stores[0], 1).unwrap();
    drop(stores);
    world.assert_no_leak();
}

/// Goal: the last store once closed cuFile, and took it from other libraries of the process, which had found it open and
/// used it too.
#[test]
fn the_last_store_closed_cufile_under_others() {
    let world = World::new();
    for _ in 0..2 {
        let store = world.open().unwrap();
        save_block(&world, &store, 1).unwrap();
        load_block(&world, &store, 1).unwrap();
        store.close();
        drop(store);
        let begin = Instant::now();
        while world.cufile.live() != [0; 2] && begin.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(world.cufile.is_open());
    }
    world.assert_no_leak();
}

/// Goal: keys that exclude the direct path are named, and are an error of the configuration.
#[test]
fn excluding_keys_are_named() {
    let world = World::new();
    let tensor = (BLOCK / 2).to_string();
    for (key, value, word) in [
        ("store_pipeline", "Cache|Posix", "store_pipeline"),
        ("io_direct", "false", "io_direct"),
        ("io_engine", "psync", "io_engine"),
        ("block_size", "6000", "pages"),
    ] {
        let tensor = if key == "block_size" { "3000" } else { tensor.as_str() };
        let error = world.open_with(&[("tensor_size", tensor), (key, value)]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{key}: {error}");
        assert!(error.to_string().contains(word), "{key}: {error}");
    }
    assert_eq!(world.cufile.calls(), 0, "a mistake in the configuration costs no call");
    world.assert_no_leak();
}

/// Goal: other devices say that they have no such path.
#[test]
fn other_devices_have_none() {
    for kind in EACH_DRIVER.iter().filter(|kind| kind.device != "cuda") {
        let world = World::with(*kind, "libcufile.so.0");
        let error = world.open().err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("ascend"), "{error}");
        world.fake.assert_no_leak();
    }
    let world = World::new();
    let tensor = (BLOCK / 2).to_string();
    let error = world.open_with(&[("tensor_size", &tensor), ("device", "host")]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("host"), "{error}");
}

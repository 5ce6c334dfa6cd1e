//! Manifests that are torn, damaged or newer than the reader.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::world::*;
use crate::block::PAGE;
use crate::posix::format::{Head, RECORD_BYTES};

fn manifest_of(directory: &Path) -> std::fs::File {
    let path = files_with(directory, "/manifests/").remove(0);
    std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Goal: a torn head page costs at most the records of the last commit; the other head stands.
#[test]
fn a_torn_head_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    for number in 0..10 {
        save(&tier, key(number, 0)).unwrap();
    }
    let file = manifest_of(dir.path());
    let mut pages = vec![0; 3 * PAGE];
    file.read_exact_at(&mut pages, 0).unwrap();
    let newest =
        (1..3).max_by_key(|at| Head::decode(&pages[at * PAGE..][..PAGE]).unwrap().commit).unwrap();
    // Half of the page did not make it.
    file.write_all_at(&[0xee; PAGE / 2], (newest * PAGE + PAGE / 2) as u64).unwrap();
    let reader = open(dir.path());
    let found = (0..10).filter(|number| reader.find(&key(*number, 0)).is_some()).count();
    assert_eq!(found, 9);
    // The next commit of the writer goes over the torn page's twin, and all is well again.
    save(&tier, key(10, 0)).unwrap();
    refresh(&reader);
    let found = (0..11).filter(|number| reader.find(&key(*number, 0)).is_some()).count();
    assert_eq!(found, 11);
}

/// Goal: a bad record before good ones is skipped and counted, never taken as the end.
#[test]
fn a_bad_record_is_skipped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let keys: Vec<_> = (0..200).map(|number| key(number, 0)).collect();
    for chunk in keys.chunks(11) {
        save_many(&tier, chunk).into_iter().for_each(|saved| saved.unwrap());
    }
    tier.close(deadline());
    let file = manifest_of(dir.path());
    let offset = 3 * PAGE + 5 * RECORD_BYTES + 20;
    file.write_all_at(&[0x55; 8], offset as u64).unwrap();
    let reader = open(dir.path());
    let stats = reader.stats();
    assert_eq!(stats.bad_records, 1);
    // The bad one may have been a SEAL of a segment.
    assert!((199..=200).contains(&stats.parts), "{} parts", stats.parts);
    assert!(keys.iter().filter_map(|key| reader.find(key)).count() >= 199);
}

/// Goal: a manifest that is cut short serves what is left of it and hurts nobody.
#[test]
fn a_truncated_manifest_hurts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let other = open(dir.path());
    save(&other, key(1000, 0)).unwrap();
    other.close(deadline());
    let tier = open(dir.path());
    let keys: Vec<_> = (0..200).map(|number| key(number, 0)).collect();
    save_many(&tier, &keys).into_iter().for_each(|saved| saved.unwrap());
    tier.close(deadline());
    for path in files_with(dir.path(), "/manifests/") {
        let length = std::fs::metadata(&path).unwrap().len();
        for cut in [4 * PAGE as u64, 2 * PAGE as u64 + 100, 0] {
            if length > 4 * PAGE as u64 {
                std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
                let reader = open(dir.path());
                assert_eq!(load(&reader, &key(1000, 0)).unwrap(), expected(&key(1000, 0)));
                for key in &keys {
                    if reader.find(key).is_some() {
                        assert_eq!(load(&reader, key).unwrap(), expected(key));
                    }
                }
            }
        }
    }
}

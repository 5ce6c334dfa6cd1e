//! With manifests gone, what segments hold is found again.

use std::os::unix::fs::FileExt;

use super::world::*;
use crate::block::PAGE;
use crate::posix::rebuild::{Depth, rebuild};

/// Goal: with all manifests removed, a rebuild brings back every part; damaged payload only where asked.
#[test]
fn manifests_are_rebuilt_from_trailers() {
    let dir = tempfile::tempdir().unwrap();
    let keys: Vec<_> = (0..150).map(|number| key(number, 0)).collect();
    let mut damaged_at = None;
    for half in keys.chunks(75) {
        let tier = open(dir.path());
        save_many(&tier, half).into_iter().for_each(|saved| saved.unwrap());
        damaged_at = tier.find(&half[3]).map(|found| found.location.page);
        tier.close(deadline());
    }
    for manifest in files_with(dir.path(), "/manifests/") {
        std::fs::remove_file(manifest).unwrap();
    }
    let empty = open(dir.path());
    assert!(empty.find(&keys[0]).is_none());
    drop(empty);
    let folder = namespace(1).folder();
    let backend = backend(dir.path());
    let rebuilt = rebuild(&backend, &folder, Depth::Trailers).unwrap();
    assert_eq!((rebuilt.manifests, rebuilt.parts, rebuilt.unreadable), (2, 150, 0));
    assert_eq!(rebuild(&backend, &folder, Depth::Trailers).unwrap().manifests, 0, "done already");
    let tier = open(dir.path());
    for key in &keys {
        assert_eq!(load(&tier, key).unwrap(), expected(key));
    }
    drop(tier);
    for manifest in files_with(dir.path(), "/manifests/") {
        std::fs::remove_file(manifest).unwrap();
    }
    for segment in files_with(dir.path(), ".g0") {
        let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
        let offset = u64::from(damaged_at.unwrap()) * PAGE as u64;
        file.write_all_at(b"damage", offset + 10).unwrap();
    }
    let rebuilt = rebuild(&backend, &folder, Depth::Payload).unwrap();
    assert_eq!(rebuilt.damaged + rebuilt.parts, 150);
    assert!((1..=rebuilt.segments).contains(&rebuilt.damaged), "{rebuilt:?}");
}

//! With manifests gone, what segments hold is found again.

use std::os::unix::fs::FileExt;

use super::world::*;
use crate::block::PAGE;
use crate::config::Checksum;
use crate::io::sim::{SimConfig, SimDisk};
use crate::posix::TierConfig;
use crate::posix::rebuild::{Depth, Unproven, rebuild};

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
    let rebuilt = rebuild(&backend, &folder, Depth::Trailers, Unproven::LeftOut).unwrap();
    assert_eq!((rebuilt.manifests, rebuilt.parts, rebuilt.unreadable), (2, 150, 0));
    assert_eq!(
        rebuild(&backend, &folder, Depth::Trailers, Unproven::LeftOut).unwrap().manifests,
        0,
        "done already"
    );
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
    let rebuilt = rebuild(&backend, &folder, Depth::Payload, Unproven::LeftOut).unwrap();
    assert_eq!(rebuilt.damaged + rebuilt.parts, 150);
    assert!((1..=rebuilt.segments).contains(&rebuilt.damaged), "{rebuilt:?}");
}

/// Goal: parts that were saved without a checksum are listed again only on demand: their trailers do not tell that
/// their payloads were written.
#[test]
fn parts_without_a_checksum_are_not_trusted() {
    let disk = SimDisk::new(SimConfig::default());
    let tier = tier_over(&[&disk], TierConfig { checksum: Checksum::Off, ..config() });
    let keys: Vec<_> = (0..20).map(|number| key(number, 0)).collect();
    save_many(&tier, &keys).into_iter().for_each(|saved| saved.unwrap());
    tier.close(deadline());
    let backend = sim_backend(&disk);
    for path in disk.paths().into_iter().filter(|path| path.to_string_lossy().contains("manifests"))
    {
        backend.files().unlink(&path).unwrap();
    }
    let folder = namespace(1).folder();
    let rebuilt = rebuild(&backend, &folder, Depth::Payload, Unproven::LeftOut).unwrap();
    assert_eq!((rebuilt.parts, rebuilt.unproven, rebuilt.damaged), (0, 20, 0), "{rebuilt:?}");
    let rebuilt = rebuild(&backend, &folder, Depth::Payload, Unproven::Trusted).unwrap();
    assert_eq!((rebuilt.parts, rebuilt.unproven), (20, 0), "{rebuilt:?}");
}

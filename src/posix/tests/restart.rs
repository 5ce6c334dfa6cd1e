//! How long a restart takes: `cargo test --release --lib posix::tests::restart -- --ignored --nocapture`.

use std::time::Instant;

use super::world::*;
use crate::block::BlockId;
use crate::posix::format::{Kind, ManifestHeader, ProcessIdentity, Record};
use crate::posix::host::random_id;
use crate::posix::image;
use crate::posix::names::{Fence, ManifestName};

/// Writes the manifest of a writer that has published `parts` parts.
fn write_manifest(directory: &std::path::Path, parts: u32) {
    let backend = backend(directory);
    let namespace = namespace(1);
    let folder = directory.join(namespace.folder()).join("manifests");
    backend.files().create_dir_all(&folder).unwrap();
    let writer = random_id();
    let fence = Fence::Fenced;
    let name = ManifestName { writer, part_first: 0, part_number: 1, epoch: 0, fence };
    let header = ManifestHeader {
        fingerprint: namespace.fingerprint(),
        writer,
        part_first: 0,
        part_number: 1,
        epoch: 0,
        process: ProcessIdentity::default(),
        lease_ms: 1000,
        part_bytes: PART_BYTES,
        created_ms: 0,
    };
    let records: Vec<Record> = (0..parts)
        .map(|number| {
            let id = blake3::hash(&number.to_le_bytes());
            Record {
                block: BlockId(id.as_bytes()[..16].try_into().unwrap()),
                segment: number / 1000,
                page: 1 + number % 1000 * 5,
                length: PART_BYTES as u32,
                checksum: 1,
                ..Record::of(Kind::Publish, 0)
            }
        })
        .collect();
    let direct = backend.is_direct();
    image::write(&**backend.files(), &folder, name, &header, &records, direct).unwrap();
}

/// Goal: a manifest of more parts than one read brings is read whole.
#[test]
fn large_manifests_are_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    write_manifest(dir.path(), 40_001);
    let tier = open_with(&[dir.path()], namespace(1), 0..0, config());
    assert_eq!(tier.stats().parts, 40_001);
}

/// Measures: opening with a million parts.
#[test]
#[ignore = "a measurement, not a test"]
fn restart_with_a_million_parts() {
    let dir = tempfile::tempdir().unwrap();
    write_manifest(dir.path(), 1_000_000);
    for _ in 0..3 {
        let start = Instant::now();
        let tier = open_with(&[dir.path()], namespace(1), 0..0, config());
        let stats = tier.stats();
        println!("{:?} to open with {} parts", start.elapsed(), stats.parts);
        println!("{} bytes a part", stats.index_bytes / stats.parts);
    }
}

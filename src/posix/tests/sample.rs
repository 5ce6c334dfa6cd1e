//! The committed sample of format version 1: whatever the program becomes, it reads this.

use std::path::{Path, PathBuf};

use super::world::*;
use crate::block::Promise;
use crate::posix::format::{Kind, ProcessIdentity, Record};
use crate::posix::host::wall_ms;
use crate::posix::rebuild::{Depth, Unproven, rebuild};
use crate::posix::{Scope, Tail, Tier};

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/format-v1")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Wrote the sample, once. Kept so that one sees how; the sample itself must never be written again.
#[test]
#[ignore = "the sample of version 1 is written once"]
fn write_the_sample() {
    let directory = sample();
    assert!(!directory.exists(), "the sample is there; a new version gets a new folder");
    std::fs::create_dir_all(&directory).unwrap();
    let stranger = ProcessIdentity { boot: [0xab; 16], pid_namespace: 1, pid: 2, start_time: 3 };
    let open = |parts| {
        let scope = Scope { parts, tail: Tail::Own };
        let backends = vec![backend(&directory)];
        Tier::open_as(stranger, &namespace(2), scope, backends, config(), deadline()).unwrap()
    };
    // A writer that closed: parts of three blocks, one of them dropped, a block abandoned, and so many
    // signs of life that a page of records is full.
    let closed = open(0..2);
    for number in 0..3 {
        for part in 0..2 {
            save(&closed, key(number, part)).unwrap();
        }
    }
    let bad = closed.find(&key(2, 1)).unwrap();
    push(
        &closed,
        Record {
            block: key(2, 1).block,
            part: 1,
            page: bad.location.page,
            ..Record::of(Kind::Drop, wall_ms())
        },
    );
    push(&closed, Record { block: key(9, 0).block, ..Record::of(Kind::Abandoned, wall_ms()) });
    (0..70).for_each(|_| push(&closed, Record::of(Kind::Heartbeat, wall_ms())));
    closed.close(deadline());
    // A writer that was killed: one part in a segment, and another segment that is retired.
    let killed = open(0..1);
    save(&killed, key(3, 0)).unwrap();
    push(&killed, Record { segment: 1, generation: 4, ..Record::of(Kind::Retire, wall_ms()) });
    let end = crate::block::PAGE as u64 + killed.extent_bytes();
    std::mem::forget(killed);
    for segment in files_with(&directory, ".g0") {
        let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
        if file.metadata().unwrap().len() > 1 << 19 {
            file.set_len(end).unwrap();
        }
    }
}

/// Goal: version 1 is read as it was written: parts, drops, abandoned blocks, a closed and a killed writer.
#[test]
fn the_sample_of_version_1_is_read() {
    let dir = tempfile::tempdir().unwrap();
    copy(&sample(), dir.path());
    let tier = open_with(&[dir.path()], namespace(2), 0..0, config());
    for (number, part) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)] {
        let key = key(number, part);
        assert_eq!(load(&tier, &key).unwrap(), expected(&key), "block {number} part {part}");
    }
    assert!(tier.find(&key(2, 1)).is_none(), "it was dropped");
    assert!(tier.contains_block(&key(1, 0).block) && !tier.contains_block(&key(2, 0).block));
    // Its record has no number: it means all promises.
    for promise in [Promise::ANY, Promise(1)] {
        assert!(tier.is_abandoned(&key(9, 0).block, promise));
        assert!(!tier.is_abandoned(&key(0, 0).block, promise));
    }
    let stats = tier.stats();
    assert_eq!((stats.bad_records, stats.misfit_records), (0, 0));
    assert_eq!((stats.writers, stats.live_writers), (2, 1));
}

/// Goal: the trailers of version 1 suffice to rebuild its manifests.
#[test]
fn the_sample_of_version_1_is_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    copy(&sample(), dir.path());
    for manifest in files_with(dir.path(), "/manifests/") {
        std::fs::remove_file(manifest).unwrap();
    }
    let rebuilt =
        rebuild(&backend(dir.path()), &namespace(2).folder(), Depth::Payload, Unproven::LeftOut)
            .unwrap();
    // The dropped part is whole; that it was bad only the manifest knew.
    assert_eq!((rebuilt.manifests, rebuilt.parts, rebuilt.damaged), (2, 7, 0));
    let tier = open_with(&[dir.path()], namespace(2), 0..0, config());
    assert_eq!(load(&tier, &key(3, 0)).unwrap(), expected(&key(3, 0)));
}

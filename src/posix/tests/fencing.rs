//! Who is taken for dead, and what follows: a writer that lives loses nothing that it acknowledged, and
//! nothing is removed on the word of a manifest that cannot be read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::world::*;
use crate::block::PAGE;
use crate::io::sim::{Call, Effect, SimConfig, SimDisk};
use crate::posix::TierConfig;
use crate::posix::format::{Kind, ManifestHeader, Record};
use crate::posix::image;
use crate::posix::names::{Fence, ManifestName};

/// Long enough for heartbeats to come in time on a busy machine.
const LEASE: Duration = Duration::from_secs(2);

fn leased() -> TierConfig {
    TierConfig { lease: LEASE, ..config() }
}

fn manifest_path(disk: &SimDisk) -> std::path::PathBuf {
    let paths = disk.paths();
    paths.into_iter().find(|path| path.to_string_lossy().contains("/manifests/")).unwrap()
}

/// Goal: a reader that could not read a manifest for longer than a lease concludes nothing from that.
#[test]
fn unreadable_is_not_unchanged() {
    let disk = SimDisk::new(SimConfig::default());
    let writer = tier_as(stranger(), &[&disk], leased());
    save(&writer, key(1, 0)).unwrap();
    let heir = tier_over(&[&disk], leased());
    disk.inject(on(Call::Read, "manifests", Effect::Errno(libc::EIO)));
    let until = std::time::Instant::now() + LEASE * 2;
    while std::time::Instant::now() < until {
        let _ = try_refresh(&heir);
        std::thread::sleep(Duration::from_millis(50));
    }
    disk.heal();
    assert_eq!(recover(&heir).fenced, 0, "its writer lives");
}

/// Goal: who was silent when it was last read, but works by now, is not fenced on the old knowledge.
#[test]
fn old_knowledge_fences_nobody() {
    let disk = SimDisk::new(SimConfig::default());
    let writer = tier_as(stranger(), &[&disk], leased());
    save(&writer, key(1, 0)).unwrap();
    let heir = tier_over(&[&disk], leased());
    // Its signs of life hang.
    disk.inject(on(Call::Write, "manifests", Effect::Delay(LEASE * 2)));
    std::thread::sleep(LEASE * 3 / 2);
    refresh(&heir);
    disk.heal();
    wait_until(|| save(&writer, key(2, 0)).is_ok());
    assert_eq!(recover(&heir).fenced, 0, "it works");
    refresh(&heir);
    assert_eq!(load(&heir, &key(2, 0)).unwrap(), expected(&key(2, 0)));
}

/// Goal: a writer under load whose manifest was fenced all the same (by somebody who acted late on what was
/// true once) finds out, goes on as a new writer, and nothing that it acknowledged is lost to anybody.
#[test]
fn a_busy_writer_that_is_fenced_loses_nothing() {
    let disk = SimDisk::new(SimConfig::default());
    let writer = tier_as(stranger(), &[&disk], leased());
    save(&writer, key(0, 0)).unwrap();
    let heir = tier_over(&[&disk], leased());
    let path = manifest_path(&disk);
    let fenced = path.with_file_name(format!("{}.fenced", path.file_name().unwrap().display()));
    sim_backend(&disk).files().rename(&path, &fenced).unwrap();
    let stop = AtomicBool::new(false);
    let acknowledged = std::thread::scope(|scope| {
        let saving = scope.spawn(|| {
            let mut acknowledged = Vec::new();
            for number in 1.. {
                if save(&writer, key(number, 0)).is_ok() {
                    acknowledged.push(number);
                }
                if stop.load(Ordering::Relaxed) {
                    return acknowledged;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            unreachable!()
        });
        let until = std::time::Instant::now() + LEASE * 2;
        while std::time::Instant::now() < until {
            refresh(&heir);
            recover(&heir);
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        saving.join().unwrap()
    });
    refresh(&heir);
    recover(&heir);
    let newcomer = tier_over(&[&disk], leased());
    for number in acknowledged {
        let key = key(number, 0);
        assert_eq!(load(&heir, &key).unwrap(), expected(&key), "part {number}");
        assert_eq!(load(&newcomer, &key).unwrap(), expected(&key), "part {number}");
    }
    let open = disk.paths().iter().filter(|path| path.to_string_lossy().contains(".e0")).count();
    assert!(open >= 2, "it went on as a new writer");
}

/// Goal: a manifest whose header page is damaged says nothing, so nothing of its writer is removed.
#[test]
fn a_damaged_header_costs_no_segment() {
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path());
    let keys: Vec<_> = (0..20).map(|number| key(number, 0)).collect();
    save_many(&writer, &keys).into_iter().for_each(|saved| saved.unwrap());
    std::mem::forget(writer);
    let manifest = files_with(dir.path(), "/manifests/").remove(0);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&manifest).unwrap();
    let before = files_with(dir.path(), ".g0");
    // One flipped bit, then no header at all, then no file to speak of.
    type Damage = fn(&std::fs::File);
    let damages: [Damage; 3] = [
        |file| std::os::unix::fs::FileExt::write_all_at(file, &[0xff], 100).unwrap(),
        |file| std::os::unix::fs::FileExt::write_all_at(file, &[0; PAGE], 0).unwrap(),
        |file| file.set_len(0).unwrap(),
    ];
    let short = TierConfig { lease: Duration::from_millis(20), ..config() };
    for damage in damages {
        damage(&file);
        let heir = open_with(&[dir.path()], namespace(1), 0..1, short.clone());
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(40));
            refresh(&heir);
            recover(&heir);
        }
        heir.close(deadline());
        assert_eq!(files_with(dir.path(), ".g0"), before);
    }
}

/// Goal: of a manifest and its successor (EPOCH), both at their end, the successor keeps the segments.
#[test]
fn a_successor_keeps_what_it_lists() {
    // Which of the two is looked at first is by chance.
    (0..6).for_each(|_| succeed_once());
}

fn succeed_once() {
    let disk = SimDisk::new(SimConfig::default());
    let writer = tier_over(&[&disk], config());
    save(&writer, key(1, 0)).unwrap();
    let segment = writer.savers()[0].writer().unwrap().segments()[0].name;
    let found = writer.find(&key(1, 0)).unwrap();
    writer.close(deadline());
    let files = sim_backend(&disk);
    let folder = manifest_path(&disk).parent().unwrap().to_path_buf();
    files.files().unlink(&manifest_path(&disk)).unwrap();
    let publish = Record {
        block: key(1, 0).block,
        segment: segment.number,
        page: found.location.page,
        length: PART_BYTES as u32,
        checksum: found.checksum,
        ..Record::of(Kind::Publish, 0)
    };
    let goes_on = Record { segment: 1, ..Record::of(Kind::Epoch, 0) };
    let closed = Record { segment: u32::MAX, ..Record::of(Kind::Seal, 0) };
    for (epoch, records) in [(0, vec![goes_on]), (1, vec![publish, closed])] {
        let name = ManifestName {
            writer: segment.writer,
            part_first: 0,
            part_number: 1,
            epoch,
            fence: Fence::Open,
        };
        let header = ManifestHeader {
            fingerprint: namespace(1).fingerprint(),
            writer: segment.writer,
            part_first: 0,
            part_number: 1,
            epoch,
            process: stranger(),
            lease_ms: 1,
            part_bytes: PART_BYTES,
            created_ms: 0,
        };
        image::write(&**files.files(), &folder, name, &header, &records, false).unwrap();
    }
    let heir = tier_over(&[&disk], config());
    recover(&heir);
    recover(&heir);
    let last = tier_over(&[&disk], config());
    assert_eq!(load(&last, &key(1, 0)).unwrap(), expected(&key(1, 0)));
}

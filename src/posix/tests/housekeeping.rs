//! What a tier holds while it runs: descriptors, files of writers it gave up, room that others retired.

use std::time::Duration;

use super::world::*;
use crate::block::PAGE;
use crate::config::GcConfig;
use crate::error::ErrorKind;
use crate::io::sim::{Call, Effect, Occasion, SimConfig, SimDisk};
use crate::posix::TierConfig;
use crate::posix::format::{Kind, Record};
use crate::posix::host::wall_ms;
use crate::posix::names::{Fence, ManifestName, SegmentName};
use crate::posix::open_files::OPEN_MAX;

/// Every segment holds one part.
fn one_part_segments() -> TierConfig {
    TierConfig { segment_bytes: 6 * PAGE as u64, ..config() }
}

fn names(disk: &SimDisk) -> Vec<String> {
    let name = |path: std::path::PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    disk.paths().into_iter().map(name).collect()
}

fn manifests(disk: &SimDisk, fence: Fence) -> usize {
    let parsed = names(disk).into_iter().filter_map(|name| ManifestName::parse(&name));
    parsed.filter(|name| name.fence == fence).count()
}

fn segments(disk: &SimDisk) -> usize {
    names(disk).into_iter().filter_map(|name| SegmentName::parse(&name)).count()
}

/// Goal: a writer that has filled many segments does not keep them all open.
#[test]
fn filled_segments_are_not_held_open() {
    let disk = SimDisk::new(SimConfig::default());
    let tier = tier_over(&[&disk], one_part_segments());
    let count = OPEN_MAX as u64 + 60;
    let keys: Vec<_> = (0..count).map(|number| key(number, 0)).collect();
    for chunk in keys.chunks(20) {
        save_many(&tier, chunk).into_iter().for_each(|saved| saved.unwrap());
    }
    assert!(segments(&disk) as u64 >= count);
    let (_, open) = disk.usage();
    assert!(open <= OPEN_MAX + 8, "{open} open files");
    for key in &keys {
        assert_eq!(load(&tier, key).unwrap(), expected(key));
    }
}

/// Goal: a new store in a namespace that others have filled makes room, though it has never saved.
#[test]
fn a_newcomer_reclaims_what_others_filled() {
    let limit = 4 << 20;
    let off = GcConfig { enabled: false, ..config().gc };
    let full = TierConfig { capacity_bytes: Some(limit), gc: off, ..config() };
    let disk = SimDisk::new(SimConfig::default());
    let old = tier_over(&[&disk], full.clone());
    let mut number = 0;
    while save(&old, key(number, 0)).is_ok() {
        number += 1;
    }
    old.close(deadline());
    let short = Duration::from_millis(200);
    let heir = tier_over(&[&disk], TierConfig { gc: config().gc, timeout: short, ..full });
    wait_until(|| save(&heir, key(1 << 30, 0)).is_ok());
}

/// Goal: where there is room for a manifest and none for a segment, saves fail and leave nothing behind.
#[test]
fn saves_that_find_no_room_leave_no_manifests() {
    let disk = SimDisk::new(SimConfig { space_bytes: 20 * PAGE as u64, ..Default::default() });
    let tier = tier_over(&[&disk], config());
    for number in 0..4 {
        let error = save(&tier, key(number, 0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        // A full home is tried again after half a second.
        std::thread::sleep(Duration::from_millis(600));
    }
    assert!(manifests(&disk, Fence::Open) <= 1, "{:?}", names(&disk));
    tier.close(deadline());
    assert_eq!(manifests(&disk, Fence::Open), 0, "{:?}", names(&disk));
}

/// Goal: a segment that is made while the store closes does not stay.
#[test]
fn closing_while_a_segment_is_made_leaves_nothing() {
    let disk = SimDisk::new(SimConfig::default());
    let tier = tier_over(&[&disk], config());
    disk.inject(on(Call::Allocate, "segments", Effect::Delay(Duration::from_millis(300))));
    let (sender, receiver) = std::sync::mpsc::channel();
    let done =
        Box::new(move |extent: crate::error::Result<_>| sender.send(extent.is_ok()).unwrap());
    tier.reserve(&key(1, 0), None, done);
    wait_until(|| segments(&disk) == 1);
    tier.close(deadline());
    assert!(!receiver.recv().unwrap());
    wait_until(|| segments(&disk) == 0 && manifests(&disk, Fence::Open) == 0);
}

/// Goal: a drive that fails every other second costs no space: what a writer that was given up held beyond
/// what it published is given back while the process lives, and what it published is served.
#[test]
fn writers_that_were_given_up_hold_nothing() {
    let disk = SimDisk::new(SimConfig::default());
    let tier = tier_over(&[&disk], TierConfig { segment_bytes: 1 << 20, ..config() });
    let mut saved = Vec::new();
    for number in 0..6 {
        disk.heal();
        wait_until(|| save(&tier, key(number, 0)).is_ok());
        saved.push(key(number, 0));
        disk.inject(on(Call::Write, "manifests", Effect::Errno(libc::EIO)));
        assert!(save(&tier, key(1000 + number, 0)).is_err());
    }
    disk.heal();
    wait_until(|| save(&tier, key(6, 0)).is_ok());
    wait_until(|| manifests(&disk, Fence::Fenced) == 6 && manifests(&disk, Fence::Open) == 1);
    refresh(&tier);
    recover(&tier);
    let (bytes, _) = disk.usage();
    // Seven manifests of 64 KiB, two parts each at most, and the segments being filled.
    assert!(bytes <= 7 * (64 << 10) + 14 * tier.extent_bytes() + (3 << 20), "{bytes} bytes");
    let other = tier_over(&[&disk], config());
    for key in &saved {
        assert_eq!(load(&tier, key).unwrap(), expected(key));
        assert_eq!(load(&other, key).unwrap(), expected(key));
    }
}

/// Goal: a segment that somebody has retired and not freed yet is not taken from its readers before the
/// grace; if nobody frees it, it goes afterwards.
#[test]
fn what_others_retired_stays_for_the_grace() {
    let disk = SimDisk::new(SimConfig::default());
    let grace = Duration::from_secs(2);
    let config = TierConfig { timeout: grace, ..config() };
    let old = tier_over(&[&disk], config.clone());
    save(&old, key(1, 0)).unwrap();
    let writer = old.savers()[0].writer().unwrap();
    let name = writer.segments()[0].name;
    old.close(deadline());
    let retirer = tier_over(&[&disk], config.clone());
    save(&retirer, key(2, 0)).unwrap();
    push(
        &retirer,
        Record {
            segment: name.number,
            generation: name.generation,
            checksum: name.writer,
            ..Record::of(Kind::Retire, wall_ms())
        },
    );
    let heir = tier_over(&[&disk], config);
    let stands = || names(&disk).contains(&name.to_string());
    recover(&heir);
    assert!(heir.find(&key(1, 0)).is_none());
    assert!(stands(), "removed while others may read it");
    wait_until(|| {
        recover(&heir);
        !stands()
    });
}

/// Goal: a backend that hangs stops neither reclaim nor saves of the others, however often reclaim is asked.
#[test]
fn reclaim_does_not_wait_for_a_hung_backend() {
    let (good, hung) = (SimDisk::new(SimConfig::default()), SimDisk::new(SimConfig::default()));
    let config = TierConfig { timeout: Duration::from_secs(1), ..config() };
    let tier = tier_over(&[&good, &hung], TierConfig { capacity_bytes: Some(1 << 40), ..config });
    let hang = Effect::Delay(Duration::from_secs(60));
    hung.inject(always(Call::List, hang));
    hung.inject(always(Call::Open, hang));
    for _ in 0..8 {
        reclaim(&tier);
    }
    for number in 0..200 {
        save(&tier, key(number, 0)).unwrap();
    }
}

/// Goal: a trailer on a bad sector costs its own part in a rebuild, not the segment.
#[test]
fn a_rebuild_passes_over_bad_sectors() {
    use crate::posix::rebuild::{Depth, Unproven, rebuild};
    let disk = SimDisk::new(SimConfig::default());
    let tier = tier_over(&[&disk], config());
    let keys: Vec<_> = (0..20).map(|number| key(number, 0)).collect();
    save_many(&tier, &keys).into_iter().for_each(|saved| saved.unwrap());
    let bad = tier.find(&keys[3]).unwrap().location.page;
    tier.close(deadline());
    let backend = sim_backend(&disk);
    for path in disk.paths().into_iter().filter(|path| path.to_string_lossy().contains("manifests"))
    {
        backend.files().unlink(&path).unwrap();
    }
    let trailer = u64::from(bad) * PAGE as u64 + tier.extent_bytes() - PAGE as u64;
    disk.inject(crate::io::sim::Fault {
        call: Call::Read,
        occasion: Occasion::Bytes("segments".into(), trailer..trailer + PAGE as u64),
        effect: Effect::Errno(libc::EIO),
    });
    let rebuilt =
        rebuild(&backend, &namespace(1).folder(), Depth::Trailers, Unproven::LeftOut).unwrap();
    assert_eq!((rebuilt.parts, rebuilt.damaged, rebuilt.unreadable), (19, 1, 0), "{rebuilt:?}");
}

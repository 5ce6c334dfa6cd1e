//! Save and load through one tier and through others, and what damage does.

use std::os::unix::fs::FileExt;
use std::sync::mpsc;

use super::world::*;
use crate::block::{PAGE, SliceShape};
use crate::error::ErrorKind;
use crate::io::Class;
use crate::mem::runs::Runs;
use crate::posix::pages::Pages;

/// Goal: what one tier saves, it and another one find and load, byte for byte.
#[test]
fn a_part_saved_by_one_is_loaded_by_another() {
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path());
    let reader = open(dir.path());
    let keys: Vec<_> = (0..300).map(|number| key(number, 0)).collect();
    assert!(writer.find(&keys[0]).is_none());
    save_many(&writer, &keys).into_iter().for_each(|saved| saved.unwrap());
    for key in &keys {
        assert!(reader.find(key).is_none(), "found before a refresh");
        assert_eq!(load(&writer, key).unwrap(), expected(key));
    }
    refresh(&reader);
    for key in &keys {
        assert_eq!(load(&reader, key).unwrap(), expected(key));
    }
    assert!(reader.contains_block(&keys[7].block));
    let mut found = [9; 2];
    reader.contains_blocks(&[keys[7].block, key(1 << 40, 0).block], &mut found);
    assert_eq!(found, [1, 0]);
    assert_eq!(reader.stats().bad_records, 0);
}

/// Goal: after everyone has closed, a new tier finds everything, and no space is held beyond what is used.
#[test]
fn a_restart_finds_everything() {
    let dir = tempfile::tempdir().unwrap();
    let keys: Vec<_> = (0..200).map(|number| key(number, 0)).collect();
    let writer = open(dir.path());
    for chunk in keys.chunks(7) {
        save_many(&writer, chunk).into_iter().for_each(|saved| saved.unwrap());
    }
    writer.close(deadline());
    let bytes: u64 = files_with(dir.path(), ".g0")
        .iter()
        .map(|path| std::fs::metadata(path).unwrap().len())
        .sum();
    let extents = keys.len() as u64 * writer.extent_bytes();
    assert!(bytes <= extents + 16 * PAGE as u64, "{bytes} bytes for {extents}");
    drop(writer);
    let reader = open(dir.path());
    for key in &keys {
        assert_eq!(load(&reader, key).unwrap(), expected(key));
    }
    let stats = reader.stats();
    assert_eq!((stats.parts, stats.live_writers), (200, 0), "a closed manifest is read once");
}

/// Goal: one flipped byte on storage is `Corrupt` once and a miss from then on, never wrong bytes.
#[test]
fn damage_is_found_and_stays_found() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let (good, bad) = (key(1, 0), key(2, 0));
    save_many(&tier, &[good, bad]).into_iter().for_each(|saved| saved.unwrap());
    let segment = files_with(dir.path(), ".g0").remove(0);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(segment).unwrap();
    let offset = u64::from(tier.find(&bad).unwrap().location.page) * PAGE as u64 + 5000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    drop(file);
    assert_eq!(load(&tier, &bad).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(tier.find(&bad).is_none());
    assert_eq!(load(&tier, &good).unwrap(), expected(&good));
    // Saved again, it is found again, by a fresh tier too.
    save(&tier, bad).unwrap();
    assert_eq!(load(&tier, &bad).unwrap(), expected(&bad));
    let other = open(dir.path());
    assert_eq!(load(&other, &bad).unwrap(), expected(&bad));
}

/// Goal: a segment that somebody removed is a miss (`NotFound`), not an error of the drive.
#[test]
fn a_segment_that_is_gone_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path());
    save(&writer, key(1, 0)).unwrap();
    let reader = open(dir.path());
    files_with(dir.path(), ".g0").iter().for_each(|path| std::fs::remove_file(path).unwrap());
    assert_eq!(load(&reader, &key(1, 0)).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(reader.find(&key(1, 0)).is_none());
}

/// Goal: a block counts as present only when all its parts are, whoever saved them.
#[test]
fn a_block_of_several_parts_needs_all() {
    let dir = tempfile::tempdir().unwrap();
    let low = open_with(&[dir.path()], namespace(4), 0..2, config());
    let high = open_with(&[dir.path()], namespace(4), 2..4, config());
    let lookup = open_with(&[dir.path()], namespace(4), 0..0, config());
    for part in 0..2 {
        save(&low, key(1, part)).unwrap();
    }
    save(&high, key(1, 2)).unwrap();
    refresh(&lookup);
    assert!(!lookup.contains_block(&key(1, 0).block));
    save(&high, key(1, 3)).unwrap();
    refresh(&lookup);
    assert!(lookup.contains_block(&key(1, 0).block));
    refresh(&low);
    assert!(!low.contains_block(&key(1, 0).block), "it reads only its own parts' manifests");
    low.widen();
    refresh(&low);
    assert!(low.contains_block(&key(1, 0).block));
    for part in 0..4 {
        assert_eq!(load(&lookup, &key(1, part)).unwrap(), expected(&key(1, part)));
    }
    let refused = save(&low, key(1, 3)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
}

/// Goal: a layer-wise reader verifies any unit of a part by the trailer alone.
#[test]
fn units_verify_by_the_trailer() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let key = key(5, 0);
    save(&tier, key).unwrap();
    let found = tier.find(&key).unwrap();
    let payload = tier.extent_bytes() - PAGE as u64;
    let page = read_range(&tier, &key, &found, payload..tier.extent_bytes()).unwrap();
    let trailer = tier.trailer(&key, &found, page.bytes()).unwrap();
    assert_eq!((tier.unit_bytes(&trailer), trailer.units.len()), (PAGE as u64, 4));
    for unit in 0..4u32 {
        let start = u64::from(unit) * PAGE as u64;
        let pages = read_range(&tier, &key, &found, start..start + PAGE as u64).unwrap();
        let verify = |unit| {
            let slices = [pages.slice(0, 1)];
            // SAFETY: `pages` lives and the read has ended.
            unsafe { tier.verify_unit(&key, &found, &trailer, unit, &slices, &mut Runs::nowhere()) }
        };
        verify(unit).unwrap();
        assert_eq!(verify((unit + 1) % 4).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    let other = super::world::key(6, 0);
    assert!(tier.trailer(&other, &found, page.bytes()).is_err());
}

/// Goal: checksums that were taken before a part had a place are not taken for those of another part: whoever seals
/// with them takes the right ones.
#[test]
fn checksums_taken_beforehand_belong_to_their_part() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path());
    let shape = SliceShape::contiguous(PART_BYTES);
    for (number, gathered_as) in [(1, 1), (2, 3)] {
        let (saved, gathered) = (key(number, 0), key(gathered_as, 0));
        let (sender, receiver) = mpsc::channel();
        let reserved = Box::new(move |extent| drop(sender.send(extent)));
        tier.reserve(&saved, Some(deadline()), reserved);
        let extent = receiver.recv_timeout(PATIENCE).unwrap().unwrap();
        let pages = tier.extent_bytes() as usize / PAGE;
        let (mut caller, memory) = (Pages::new(pages), Pages::new(pages));
        fill(&saved, &mut caller.bytes_mut()[..PART_BYTES as usize]);
        let mut runs = Runs::nowhere();
        runs.push_slice(caller.slice(0, pages).pointer, &shape);
        let (payload, trailer) = (memory.slice(0, pages - 1), memory.slice(pages - 1, 1));
        // SAFETY: both are ours, of the length of an extent, and live until the write has ended.
        unsafe {
            let taken = tier.gather(&gathered, &mut runs, payload.pointer);
            assert_eq!(taken.as_ref().unwrap().are_of(&extent), number == gathered_as);
            tier.seal(&extent, &[payload], PART_BYTES, taken, trailer.pointer);
        }
        let (sender, receiver) = mpsc::channel();
        let done = Box::new(move |result| drop(sender.send(result)));
        tier.write(extent, vec![memory.slice(0, pages)], Class::Save, None, done);
        receiver.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(load(&tier, &saved).unwrap(), expected(&saved));
    }
}

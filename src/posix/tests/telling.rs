//! What a store says that is about no part of its own: blocks that will not come, and extents that are bad.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::world::*;
use crate::block::{BlockId, PAGE, Promise};
use crate::error::ErrorKind;
use crate::io::sim::{Call, Effect, SimConfig, SimDisk};
use crate::posix::{Tier, TierConfig};

fn abandon(tier: &Arc<Tier>, block: BlockId, promise: Promise) -> crate::error::Result<()> {
    let (sender, receiver) = mpsc::channel();
    tier.abandon(&[block], promise, Box::new(move |result| drop(sender.send(result))));
    receiver.recv_timeout(Duration::from_secs(20)).unwrap()
}

/// Goal: a store that has never saved tells others that a block will not come; they hear it with their next
/// refresh, even where it closed at once and others clean up meanwhile.
#[test]
fn a_store_that_never_saved_can_abandon() {
    let dir = tempfile::tempdir().unwrap();
    let (prefill, decode) = (open(dir.path()), open(dir.path()));
    let block = key(1, 0).block;
    abandon(&prefill, block, Promise::ANY).unwrap();
    let is_abandoned = |tier: &Tier| tier.is_abandoned(&block, Promise::ANY);
    assert!(is_abandoned(&prefill) && !is_abandoned(&decode));
    prefill.close(deadline());
    let third = open(dir.path());
    recover(&third);
    refresh(&decode);
    assert!(is_abandoned(&decode));
    // Once everybody had time to read it, it need not stay.
    let impatient = TierConfig { timeout: Duration::from_millis(50), ..config() };
    let last = open_with(&[dir.path()], namespace(1), 0..1, impatient);
    wait_until(|| {
        recover(&last);
        files_with(dir.path(), "/manifests/").is_empty()
    });
    // A block that comes after all is not abandoned any more.
    save(&third, key(1, 0)).unwrap();
    refresh(&decode);
    assert!(!is_abandoned(&decode));
}

/// Goal: a block that was given up and is promised again is waited for, whoever gave it up: a writer that goes on,
/// one that closed and started again, and one of several. Each promise ends by its own number.
#[test]
fn an_old_broken_promise_ended_the_wait_for_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two, decode) = (open(dir.path()), open(dir.path()), open(dir.path()));
    let block = key(1, 0).block;
    let (first, second, third) = (Promise(u64::MAX), Promise(1), Promise(2));
    abandon(&one, block, first).unwrap();
    one.close(deadline());
    let restarted = open(dir.path());
    refresh(&decode);
    assert!(decode.is_abandoned(&block, first) && !decode.is_abandoned(&block, second));
    abandon(&two, block, second).unwrap();
    refresh(&decode);
    assert!(decode.is_abandoned(&block, first) && decode.is_abandoned(&block, second));
    assert!(!decode.is_abandoned(&block, third), "it is under way");
    abandon(&restarted, block, third).unwrap();
    refresh(&decode);
    assert!(decode.is_abandoned(&block, third));
    // A reader that comes late hears of all of them.
    let late = open(dir.path());
    for promise in [first, second, third, Promise::ANY] {
        assert!(late.is_abandoned(&block, promise));
    }
    assert!(!late.is_abandoned(&block, Promise(4)));
}

/// Goal: of a block that one rank saved and another gave up before, the wait ends.
#[test]
fn another_ranks_part_hid_that_a_block_was_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let rank = |part| open_with(&[dir.path()], namespace(2), part..part + 1, config());
    let ranks = [rank(0), rank(1)];
    let decode = open_with(&[dir.path()], namespace(2), 0..0, config());
    abandon(&ranks[1], key(1, 0).block, Promise(5)).unwrap();
    refresh(&decode);
    save(&ranks[0], key(1, 0)).unwrap();
    refresh(&decode);
    assert!(decode.is_abandoned(&key(1, 0).block, Promise(5)));
    save(&ranks[1], key(1, 1)).unwrap();
    refresh(&decode);
    assert!(!decode.is_abandoned(&key(1, 0).block, Promise(5)), "it came after all");
}

/// Goal: where one backend fails or hangs, abandoned blocks are announced in another.
#[test]
fn abandoning_does_not_depend_on_one_backend() {
    for effect in [Effect::Errno(libc::EIO), Effect::Delay(Duration::from_secs(60))] {
        let (bad, good) = (SimDisk::new(SimConfig::default()), SimDisk::new(SimConfig::default()));
        let short = TierConfig { timeout: Duration::from_secs(2), ..config() };
        let tier = tier_over(&[&bad, &good], short.clone());
        let waiter = tier_over(&[&good], short);
        bad.inject(always(Call::Open, effect));
        abandon(&tier, key(1, 0).block, Promise(3)).unwrap();
        refresh(&waiter);
        assert!(waiter.is_abandoned(&key(1, 0).block, Promise(3)));
    }
}

fn damage(directory: &Path, page: u32) {
    let segment = files_with(directory, ".g0").remove(0);
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    file.write_all_at(b"damage", u64::from(page) * PAGE as u64 + 10).unwrap();
}

/// Goal: a bad extent is not found again, by whomever, once any store that may save has met it, though it
/// has never saved; and for as long as the extent stands.
#[test]
fn a_bad_extent_is_dropped_for_everybody() {
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path());
    save(&writer, key(1, 0)).unwrap();
    save(&writer, key(2, 0)).unwrap();
    damage(dir.path(), writer.find(&key(1, 0)).unwrap().location.page);
    let reader = open(dir.path());
    assert_eq!(load(&reader, &key(1, 0)).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(reader.find(&key(1, 0)).is_none());
    wait_until(|| {
        open_with(&[dir.path()], namespace(1), 0..0, config()).find(&key(1, 0)).is_none()
    });
    refresh(&writer);
    assert!(writer.find(&key(1, 0)).is_none(), "its own writer honours it, too");
    reader.close(deadline());
    let impatient = TierConfig { timeout: Duration::from_millis(100), ..config() };
    let third = open_with(&[dir.path()], namespace(1), 0..1, impatient);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(60));
        let _ = try_refresh(&third);
        recover(&third);
    }
    let last = open(dir.path());
    assert!(last.find(&key(1, 0)).is_none() && last.find(&key(2, 0)).is_some());
    assert_eq!(load(&last, &key(2, 0)).unwrap(), expected(&key(2, 0)));
}

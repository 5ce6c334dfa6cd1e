//! A namespace with a bound on its bytes.

use std::sync::Arc;
use std::time::Duration;

use super::world::*;
use crate::error::ErrorKind;
use crate::posix::{Tier, TierConfig};

const LIMIT: u64 = 40 << 20;
/// Long enough that filling up ends before the first segment is freed, on a busy machine too.
const GRACE: Duration = Duration::from_secs(5);

fn bounded() -> TierConfig {
    TierConfig { capacity_bytes: Some(LIMIT), segment_bytes: 8 << 20, timeout: GRACE, ..config() }
}

fn save_until_full(tier: &Arc<Tier>, from: u64) -> u64 {
    for first in (from..).step_by(50) {
        let keys: Vec<_> = (first..first + 50).map(|number| key(number, 0)).collect();
        for (number, saved) in (first..).zip(save_many(tier, &keys)) {
            if let Err(error) = saved {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                return number;
            }
        }
    }
    unreachable!("the bound holds")
}

/// Goal: the bound holds; reclaim frees the oldest segments that nobody read; another reader has misses, not
/// errors; saves go on.
#[test]
fn the_bound_holds_and_the_oldest_goes() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open_with(&[dir.path()], namespace(1), 0..1, bounded());
    let reader = open_with(&[dir.path()], namespace(1), 0..1, bounded());
    save(&tier, key(0, 0)).unwrap();
    // The very first part is read: its segment gets a second chance.
    assert_eq!(load(&tier, &key(0, 0)).unwrap(), expected(&key(0, 0)));
    let end = save_until_full(&tier, 1);
    refresh(&reader);
    let held = || -> u64 {
        files_with(dir.path(), "/segments/")
            .iter()
            .filter_map(|path| Some(path.metadata().ok()?.len()))
            .sum()
    };
    assert!(held() <= LIMIT, "{} bytes", held());
    // Being full has rung for reclaim already; another round finds that enough is on its way out.
    reclaim(&tier);
    assert_eq!(reclaim(&tier), 0, "what is on its way out counts as gone");
    wait_until(|| held() <= LIMIT * 9 / 10);
    assert!(held() <= LIMIT * 9 / 10, "{} bytes", held());
    assert!(tier.find(&key(0, 0)).is_some(), "what was read stays");
    let lost = (0..end).filter(|number| tier.find(&key(*number, 0)).is_none()).count();
    assert!(lost > 0);
    // A reader that has not refreshed meets segments that are gone: misses, nothing else.
    let mut misses = 0;
    for number in 0..end {
        match load(&reader, &key(number, 0)) {
            Ok(bytes) => assert!(bytes == expected(&key(number, 0))),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                misses += 1;
            }
        }
    }
    assert_eq!(misses, lost);
    wait_until(|| save(&tier, key(1 << 30, 0)).is_ok());
    // A restart sees the same.
    let other = open_with(&[dir.path()], namespace(1), 0..0, bounded());
    assert!(other.find(&key(0, 0)).is_some());
    assert_eq!((0..end).filter(|n| other.find(&key(*n, 0)).is_none()).count(), lost);
}

/// Goal: what writers left that are gone is reclaimed by those who live, and before their own.
#[test]
fn segments_of_closed_writers_go_first() {
    let dir = tempfile::tempdir().unwrap();
    let old = open_with(&[dir.path()], namespace(1), 0..1, bounded());
    for chunk in (0..900).collect::<Vec<u64>>().chunks(100) {
        let keys: Vec<_> = chunk.iter().map(|number| key(*number, 0)).collect();
        save_many(&old, &keys).into_iter().for_each(|saved| saved.unwrap());
    }
    old.close(deadline());
    let tier = open_with(&[dir.path()], namespace(1), 0..1, bounded());
    // Its own count of bytes comes from the round that opening began.
    reclaim(&tier);
    let end = save_until_full(&tier, 10_000);
    reclaim(&tier);
    wait_until(|| (0..900).any(|number| tier.find(&key(number, 0)).is_none()));
    assert!((10_000..end).all(|number| tier.find(&key(number, 0)).is_some()), "its own went first");
    assert!((0..900).any(|number| tier.find(&key(number, 0)).is_none()));
    let reader = open_with(&[dir.path()], namespace(1), 0..0, bounded());
    for number in 0..900 {
        assert_eq!(reader.find(&key(number, 0)).is_some(), tier.find(&key(number, 0)).is_some());
    }
}

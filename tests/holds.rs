//! Holds: blocks that are brought into the Cache tier and stay there until somebody lets go.

mod common;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use tempfile::TempDir;
use ucm::error::ErrorKind;
use ucm::io::backend::BackendConfig;
use ucm::io::sim::{Call, Effect, Fault, Occasion, SimConfig, SimDisk};
use ucm::store::{Platform, Store};
use ucm::task::{Progress, Stage, Task};

const BLOCK: usize = 64 << 10;
/// The arena of a store of [`store_in`], and its slots: one has the block and a page.
const ARENA_GB: &str = "0.0019";
const SLOTS: u64 = 30;

fn pairs(directory: &Path, extra: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut pairs = vec![
        ("storage_backends".to_owned(), directory.display().to_string()),
        ("cache_buffer_capacity_gb".to_owned(), ARENA_GB.to_owned()),
        ("block_size".to_owned(), BLOCK.to_string()),
        ("segment_size_mb".to_owned(), "8".to_owned()),
    ];
    pairs.retain(|(key, _)| !extra.iter().any(|(other, _)| key == other));
    pairs.extend(extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    pairs
}

fn store_in(directory: &Path, extra: &[(&str, &str)]) -> Arc<Store> {
    let pairs = pairs(directory, extra);
    let pairs: Vec<_> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    open(&pairs)
}

fn hold(store: &Store, numbers: impl IntoIterator<Item = u64>) -> Arc<Task> {
    let ids: Vec<_> = numbers.into_iter().map(id).collect();
    store.hold(&ids, 0).unwrap()
}

fn kinds(task: &Task) -> Vec<Option<ErrorKind>> {
    let _ = task.wait(Stage::Loaded, WAIT);
    done(task, Stage::Released);
    task.statuses().unwrap().into_iter().map(|status| status.err().map(|it| it.kind())).collect()
}

fn metric(store: &Store, name: &str) -> u64 {
    let text = store.metrics().unwrap();
    let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Saves blocks and gives a store that has none of them in DRAM.
fn stored(directory: &Path, numbers: Range<u64>) -> Arc<Store> {
    let writer = store_in(directory, &[]);
    save_blocks(&writer, &numbers.collect::<Vec<_>>(), BLOCK);
    writer.close();
    store_in(directory, &[])
}

/// Goal: what is held is loaded from memory, whatever else is loaded meanwhile and even with its files empty;
/// what was released goes like everything else.
#[test]
fn held_blocks_survive_other_loads_and_released_ones_do_not() {
    let directory = TempDir::new().unwrap();
    let store = stored(directory.path(), 0..100);
    assert_eq!(store.stats().unwrap().slots, SLOTS);
    let (first, second) = (hold(&store, [1, 2, 3]), hold(&store, [3, 4]));
    for task in [&first, &second] {
        done(task, Stage::Loaded);
    }
    assert_eq!(metric(&store, "ucm_slots_held"), 4);
    let others: Vec<u64> = (5..100).collect();
    assert_eq!(load_blocks(&store, &others, BLOCK), []);
    let read = metric(&store, "ucm_storage_read_bytes_total");
    assert_eq!(load_blocks(&store, &[4, 1, 3, 2], BLOCK), []);
    assert_eq!(metric(&store, "ucm_storage_read_bytes_total"), read, "a held block needs no I/O");
    for segment in files(directory.path(), "segments") {
        std::fs::OpenOptions::new().write(true).open(segment).unwrap().set_len(0).unwrap();
    }
    assert_eq!(load_blocks(&store, &[1, 2, 3, 4], BLOCK), []);
    first.release_handle();
    assert_eq!(metric(&store, "ucm_slots_held"), 2, "3 is held by the second too");
    second.release_handle();
    assert_eq!(metric(&store, "ucm_slots_held"), 0);
    save_blocks(&store, &(200..300).collect::<Vec<_>>(), BLOCK);
    assert_eq!(load_blocks(&store, &[1, 2, 3, 4], BLOCK).len(), 4, "they made room");
}

/// Goal: each entry has a status of its own: what is damaged or missing does not keep the others from being held.
#[test]
fn a_damaged_block_is_not_held_and_keeps_no_other_from_it() {
    let directory = TempDir::new().unwrap();
    let store = stored(directory.path(), 1..4);
    damage(directory.path(), 2);
    let task = hold(&store, [1, 2, 99, 3]);
    let expected = [None, Some(ErrorKind::Corrupt), Some(ErrorKind::NotFound), None];
    assert_eq!(kinds(&task), expected);
    assert_eq!(metric(&store, "ucm_slots_held"), 2);
    let text = store.metrics().unwrap();
    for (status, count) in [("ok", 2), ("corrupt", 1), ("not_found", 1)] {
        let line = format!("ucm_hold_entries_total{{status=\"{status}\"}} {count}\n");
        assert!(text.contains(&line), "{line} is not in {text}");
    }
}

/// Goal: half of the slots can be held; what does not fit is BUSY at once and by name; saves and loads go on.
#[test]
fn more_than_half_of_the_slots_cannot_be_held() {
    let directory = TempDir::new().unwrap();
    let store = stored(directory.path(), 0..60);
    let task = hold(&store, 0..20);
    let kinds = kinds(&task);
    let half = SLOTS as usize / 2;
    assert!(kinds[..half].iter().all(Option::is_none), "{kinds:?}");
    assert!(kinds[half..].iter().all(|kind| *kind == Some(ErrorKind::Busy)), "{kinds:?}");
    let message = task.error().unwrap().to_string();
    assert!(message.contains("cache_buffer_capacity_gb"), "{message}");
    assert_eq!(load_blocks(&store, &(0..60).collect::<Vec<_>>(), BLOCK), []);
    save_blocks(&store, &(60..120).collect::<Vec<_>>(), BLOCK);
    task.release_handle();
    let again = hold(&store, 30..45);
    done(&again, Stage::Loaded);
}

/// Goal: without a Cache tier, or in a store that only looks up, a hold is refused by name; no blocks are an error.
#[test]
fn a_hold_needs_a_cache_tier() {
    let directory = TempDir::new().unwrap();
    let refused = |extra: &[(&str, &str)], blocks: &[ucm::block::BlockId]| {
        store_in(directory.path(), extra).hold(blocks, 0).err().expect("refused")
    };
    let error = refused(&[("store_pipeline", "Posix")], &[id(1)]);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("store_pipeline"), "{error}");
    assert_eq!(refused(&[("device_id", "-1")], &[id(1)]).kind(), ErrorKind::Unsupported);
    assert_eq!(refused(&[], &[]).kind(), ErrorKind::InvalidArgument);
}

/// Goal: in a DRAM-only pipeline a hold keeps what was saved from eviction, and misses what was not.
#[test]
fn a_hold_keeps_blocks_of_a_dram_only_pipeline() {
    let pairs = [
        ("store_pipeline", "Cache|Empty"),
        ("cache_buffer_capacity_gb", ARENA_GB),
        ("block_size", "65536"),
    ];
    let store = open(&pairs);
    save_blocks(&store, &[1, 2], BLOCK);
    let task = hold(&store, [1, 9, 2]);
    assert_eq!(kinds(&task), [None, Some(ErrorKind::NotFound), None]);
    (10..100).for_each(|number| save_blocks(&store, &[number], BLOCK));
    assert_eq!(load_blocks(&store, &[1, 2, 10], BLOCK), [(10, ErrorKind::NotFound)]);
}

/// Goal: a store that transfers by layers and owns two parts holds all shards of both.
#[test]
fn all_shards_of_all_owned_parts_are_held() {
    const PART: usize = 16 << 10;
    const SHARD: usize = 4 << 10;
    let directory = TempDir::new().unwrap();
    let extra = [("part_count", "2"), ("parts_owned", "2"), ("block_size", "32768")];
    let with = |shard| store_in(directory.path(), &[&extra[..], &[("shard_size", shard)]].concat());
    let numbers: Vec<u64> = (1..100).collect();
    let writer = with("32768");
    save_blocks(&writer, &numbers, 2 * PART);
    let store = with("4096");
    let task = hold(&store, [1, 2]);
    done(&task, Stage::Loaded);
    assert_eq!(metric(&store, "ucm_slots_held"), 4);
    let load_shards = |number: u64| {
        let shards: Vec<u32> = (0..(2 * PART / SHARD) as u32).collect();
        let mut pages = Pages::new(shards.len(), SHARD);
        let addresses: Vec<_> = (0..shards.len()).map(|shard| pages.address(shard, 0)).collect();
        let task =
            load(&store, &vec![id(number); shards.len()], Some(&shards), &addresses).unwrap();
        done(&task, Stage::Loaded);
        assert!((0..shards.len()).all(|shard| pages.wrong(shard, number, shard * SHARD).is_none()));
    };
    (3..100).for_each(load_shards);
    let read = metric(&store, "ucm_storage_read_bytes_total");
    [2, 1].into_iter().for_each(load_shards);
    assert_eq!(metric(&store, "ucm_storage_read_bytes_total"), read);
}

/// A store on a simulated disk with blocks 0 to 19, whose reads take `delay`.
fn store_on_a_slow_disk(delay: Duration, extra: &[(&str, &str)]) -> (Arc<SimDisk>, Arc<Store>) {
    let disk = SimDisk::new(SimConfig::default());
    let open = |extra: &[(&str, &str)]| {
        let pairs = pairs(Path::new("/sim"), extra);
        let pairs: Vec<_> = pairs.iter().map(|(key, value)| (&**key, &**value)).collect();
        let backend = disk.backend(Path::new("/sim"), &BackendConfig::default());
        let platform = Platform { backends: Some(vec![backend]), ..Platform::default() };
        Store::open_on(options(&pairs).build().unwrap(), platform).unwrap()
    };
    let writer = open(&[]);
    save_blocks(&writer, &(0..20).collect::<Vec<_>>(), BLOCK);
    writer.close();
    let store = open(extra);
    disk.inject(Fault {
        call: Call::Read,
        occasion: Occasion::Always,
        effect: Effect::Delay(delay),
    });
    (disk, store)
}

/// Goal: a hold that is let go while its blocks are read, or whose deadline passes, gives the slots back when the
/// reads are done, and those who load the same blocks get them.
#[test]
fn a_hold_that_is_freed_while_it_reads_gives_its_slots_back() {
    let (disk, store) = store_on_a_slow_disk(Duration::from_millis(200), &[]);
    let (freed, late) = (hold(&store, [1, 2, 3]), store.hold(&[id(4), id(5)], 50).unwrap());
    assert!(matches!(freed.poll(Stage::Loaded), Progress::Pending));
    let mut pages = Pages::new(1, BLOCK);
    let addresses = [pages.address(0, 0)];
    let load = load(&store, &[id(2)], None, &addresses).unwrap();
    freed.release_handle();
    assert_eq!(failure(&freed, Stage::Loaded), ErrorKind::Cancelled);
    assert_eq!(failure(&late, Stage::Loaded), ErrorKind::Timeout);
    done(&load, Stage::Loaded);
    assert_eq!(pages.wrong(0, 2, 0), None);
    let until = Instant::now() + Duration::from_secs(30);
    while metric(&store, "ucm_slots_held") + metric(&store, "ucm_slots_busy") > 0 {
        assert!(Instant::now() < until, "the slots of ended holds never came back");
        std::thread::sleep(Duration::from_millis(5));
    }
    disk.heal();
    let all = hold(&store, 10..16);
    done(&all, Stage::Loaded);
    assert_eq!(load_blocks(&store, &(0..20).collect::<Vec<_>>(), BLOCK), []);
}

/// Goal: a store closes with holds that are granted and holds that still read; both answer CLOSED afterwards.
#[test]
fn a_store_closes_with_holds_outstanding() {
    let (disk, store) = store_on_a_slow_disk(Duration::ZERO, &[]);
    let granted = hold(&store, [1, 2]);
    done(&granted, Stage::Loaded);
    let effect = Effect::Delay(Duration::from_millis(200));
    disk.inject(Fault { call: Call::Read, occasion: Occasion::Always, effect });
    let reading = hold(&store, [3, 4]);
    store.close();
    for task in [granted, reading] {
        assert_eq!(failure(&task, Stage::Loaded), ErrorKind::Closed);
        task.release_handle();
    }
    assert_eq!(store.hold(&[id(1)], 0).err().map(|error| error.kind()), Some(ErrorKind::Closed));
}

//! The Posix tier through the store's door: what is saved by one store is loaded by another, byte for byte.

mod common;

use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use tempfile::TempDir;
use ucm::block::Promise;
use ucm::device::host::Host;
use ucm::device::{CapturedEvent, CopyStream, Device, Marker, Wake};
use ucm::error::{ErrorKind, Result};
use ucm::store::{Platform, Store};
use ucm::task::Stage;

const BLOCK: usize = 64 << 10;

/// Every pipeline and engine that the promises hold for.
const VARIANTS: [(&str, &str); 4] = [
    ("Cache|Posix", "io_uring"),
    ("Cache|Posix", "psync"),
    ("Posix", "io_uring"),
    ("Posix", "psync"),
];

/// Goal: for every pipeline and engine, a store opened later and one that was open before both load what
/// was saved, and miss what was not.
#[test]
fn other_stores_load_what_was_saved() {
    for (pipeline, engine) in VARIANTS {
        let directory = TempDir::new().unwrap();
        let extra = [("store_pipeline", pipeline), ("io_engine", engine)];
        let before = store_in(directory.path(), &extra);
        let writer = store_in(directory.path(), &extra);
        let numbers: Vec<u64> = (0..40).collect();
        save_blocks(&writer, &numbers, BLOCK);
        before.refresh(None).unwrap();
        assert_eq!(
            before.lookup_prefix(&numbers.iter().map(|n| id(*n)).collect::<Vec<_>>()).unwrap(),
            40
        );
        assert_eq!(
            load_blocks(&before, &[39, 0, 99, 7], BLOCK),
            [(99, ErrorKind::NotFound)],
            "{pipeline} {engine}"
        );
        writer.close();
        let after = store_in(directory.path(), &extra);
        assert_eq!(load_blocks(&after, &numbers, BLOCK), [], "{pipeline} {engine}");
    }
}

/// Goal: without a refresh a reader sees a published block within `lookup_refresh_ms`, idle before or not.
#[test]
fn readers_see_published_blocks_within_the_refresh_time() {
    let directory = TempDir::new().unwrap();
    let (writer, reader) =
        (store_in(directory.path(), &[]), store_in(directory.path(), &[("device_id", "-1")]));
    assert!(!is_present(&reader, 1));
    save_blocks(&writer, &[1], BLOCK);
    std::thread::sleep(Duration::from_millis(25));
    assert!(is_present(&reader, 1));
}

/// Goal: a load of an id that nobody knows yet refreshes once before it says NOT_FOUND.
#[test]
fn a_load_of_an_unknown_block_refreshes_first() {
    let directory = TempDir::new().unwrap();
    let slow = [("lookup_refresh_ms", "3600000")];
    let (reader, writer) = (store_in(directory.path(), &slow), store_in(directory.path(), &[]));
    save_blocks(&writer, &[1], BLOCK);
    assert_eq!(load_blocks(&reader, &[1, 2], BLOCK), [(2, ErrorKind::NotFound)]);
}

fn save_layerwise(
    store: &Store,
    number: u64,
    shard_bytes: usize,
    order: impl Iterator<Item = usize>,
) {
    for shard in order {
        let mut pages = Pages::new(1, shard_bytes);
        pages.fill(0, number, shard * shard_bytes);
        let address = [pages.address(0, 0)];
        let task = save(store, &[id(number)], Some(&[shard as u32]), &address).unwrap();
        done(&task, Stage::Copied);
        if shard == 0 {
            // The last of these orders: everything is in.
            done(&task, Stage::Persisted);
        }
    }
}

fn load_layerwise(store: &Store, number: u64, shard_bytes: usize, shards: usize) {
    for shard in 0..shards {
        let mut pages = Pages::new(1, shard_bytes);
        let address = [pages.address(0, 0)];
        let task = load(store, &[id(number)], Some(&[shard as u32]), &address).unwrap();
        done(&task, Stage::Loaded);
        assert_eq!(pages.wrong(0, number, shard * shard_bytes), None, "shard {shard}");
    }
}

/// Goal: layer-wise and whole-part stores share, in both directions and with different shard sizes.
#[test]
fn layerwise_and_whole_part_stores_share() {
    for (pipeline, engine) in VARIANTS {
        let directory = TempDir::new().unwrap();
        let extra = [("store_pipeline", pipeline), ("io_engine", engine)];
        let with = |shard| {
            let mut extra = extra.to_vec();
            extra.push(("shard_size", shard));
            store_in(directory.path(), &extra)
        };
        let (whole, eights, fours) = (with("65536"), with("8192"), with("16384"));
        save_layerwise(&eights, 1, 8192, (0..8).rev());
        save_blocks(&whole, &[2], BLOCK);
        assert_eq!(load_blocks(&whole, &[1], BLOCK), []);
        load_layerwise(&fours, 1, 16384, 4);
        load_layerwise(&eights, 2, 8192, 8);
        load_layerwise(&fours, 2, 16384, 4);
        for store in [&whole, &eights, &fours] {
            assert!(is_present(store, 1) && is_present(store, 2));
        }
    }
}

/// Goal: a block is present when all its parts are; TP 8 saves, TP 4, TP 2 and a lookup-only store read.
#[test]
fn tensor_parallel_sizes_share_a_namespace() {
    let directory = TempDir::new().unwrap();
    let rank = |index: usize, owned: usize| {
        let (index, size, owned) =
            (index.to_string(), (8192 * owned).to_string(), owned.to_string());
        let extra = [
            ("part_count", "8"),
            ("part_index", &index),
            ("parts_owned", &owned),
            ("block_size", &size),
            ("shard_size", "8192"),
        ];
        store_in(directory.path(), &extra)
    };
    let lookup = [("part_count", "8"), ("block_size", "8192"), ("device_id", "-1")];
    let scheduler = store_in(directory.path(), &lookup);
    for part in 0..8 {
        assert!(!is_present(&scheduler, 5), "present with {part} of 8 parts");
        let store = rank(part, 1);
        let mut pages = Pages::new(1, 8192);
        pages.fill(0, 5, part * 8192);
        let address = [pages.address(0, 0)];
        let task = save(&store, &[id(5)], None, &address).unwrap();
        done(&task, Stage::Persisted);
        scheduler.refresh(None).unwrap();
    }
    assert!(is_present(&scheduler, 5));
    assert!(is_present(&rank(3, 1), 5), "a store that transfers can look up whole blocks too");
    for owned in [2, 4] {
        for first in (0..8).step_by(owned) {
            let store = rank(first, owned);
            let mut pages = Pages::new(owned, 8192);
            let addresses: Vec<_> = (0..owned).map(|shard| pages.address(shard, 0)).collect();
            let shards: Vec<u32> = (0..owned as u32).collect();
            let task = load(&store, &vec![id(5); owned], Some(&shards), &addresses).unwrap();
            done(&task, Stage::Loaded);
            for shard in 0..owned {
                assert_eq!(pages.wrong(shard, 5, (first + shard) * 8192), None);
            }
        }
    }
    // A shard may also cover all the parts that a store owns.
    let wide = [
        ("part_count", "8"),
        ("part_index", "4"),
        ("parts_owned", "2"),
        ("block_size", "16384"),
        ("shard_size", "16384"),
    ];
    let store = store_in(directory.path(), &wide);
    let mut pages = Pages::new(1, 16384);
    let address = [pages.address(0, 0)];
    let task = load(&store, &[id(5)], None, &address).unwrap();
    done(&task, Stage::Loaded);
    assert_eq!(pages.wrong(0, 5, 4 * 8192), None);
}

/// Goal: saving what is present costs no I/O, in this process or another.
#[test]
fn saving_what_is_present_costs_no_io() {
    let directory = TempDir::new().unwrap();
    let store = store_in(directory.path(), &[]);
    save_blocks(&store, &[1, 2], BLOCK);
    let other = store_in(directory.path(), &[]);
    for store in [&store, &other] {
        let before = files(directory.path(), "segments").len();
        save_blocks(store, &[1, 2], BLOCK);
        assert_eq!(files(directory.path(), "segments").len(), before);
        assert!(
            store.metrics().unwrap().contains("ucm_save_skipped_total 2"),
            "{}",
            store.metrics().unwrap()
        );
    }
}

/// Goal: a damaged block is CORRUPT, its neighbours load, lookup stops promising it, and it can be saved anew.
#[test]
fn a_damaged_block_is_corrupt_and_can_be_saved_again() {
    for (pipeline, engine) in VARIANTS {
        let directory = TempDir::new().unwrap();
        let extra = [("store_pipeline", pipeline), ("io_engine", engine)];
        let writer = store_in(directory.path(), &extra);
        save_blocks(&writer, &[1, 2, 3], BLOCK);
        writer.close();
        damage(directory.path(), 2);
        let reader = store_in(directory.path(), &extra);
        assert!(is_present(&reader, 2));
        assert_eq!(
            load_blocks(&reader, &[1, 2, 3], BLOCK),
            [(2, ErrorKind::Corrupt)],
            "{pipeline} {engine}"
        );
        assert!(
            !is_present(&reader, 2),
            "{pipeline} {engine}: a failed load leaves a lookup that says no"
        );
        save_blocks(&reader, &[2], BLOCK);
        assert_eq!(load_blocks(&reader, &[1, 2, 3], BLOCK), []);
        let fresh = store_in(directory.path(), &extra);
        assert_eq!(load_blocks(&fresh, &[1, 2, 3], BLOCK), [], "{pipeline} {engine}");
    }
}

/// Goal: segments that were truncated or removed are misses, never bytes.
#[test]
fn truncated_and_missing_segments_are_misses() {
    let directory = TempDir::new().unwrap();
    let writer = store_in(directory.path(), &[]);
    save_blocks(&writer, &(0..10).collect::<Vec<_>>(), BLOCK);
    writer.close();
    for segment in files(directory.path(), "segments") {
        std::fs::OpenOptions::new().write(true).open(segment).unwrap().set_len(5 * 65536).unwrap();
    }
    let reader = store_in(directory.path(), &[]);
    let failed = load_blocks(&reader, &(0..10).collect::<Vec<_>>(), BLOCK);
    assert!(failed.len() >= 5 && failed.len() < 10, "{failed:?}");
    for segment in files(directory.path(), "segments") {
        std::fs::remove_file(segment).unwrap();
    }
    let reader = store_in(directory.path(), &[]);
    assert_eq!(load_blocks(&reader, &(0..10).collect::<Vec<_>>(), BLOCK).len(), 10);
}

/// Goal: of several directories each takes a share, and one that is gone takes only its own blocks with it.
#[test]
fn a_failing_directory_takes_only_its_own_blocks() {
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let both = format!("{}:{}", one.path().display(), two.path().display());
    let extra = [("storage_backends", both.as_str()), ("segment_size_mb", "1")];
    let numbers: Vec<u64> = (0..100).collect();
    let writer = store_in(one.path(), &extra);
    save_blocks(&writer, &numbers, BLOCK);
    writer.close();
    for segment in files(two.path(), "segments") {
        std::fs::remove_file(segment).unwrap();
    }
    let reader = store_in(one.path(), &extra);
    let failed = load_blocks(&reader, &numbers, BLOCK).len();
    assert!((20..=80).contains(&failed), "{failed} of 100 lost with one of two directories");
}

/// Goal: registered memory is read and written without a bounce, byte for byte, and cannot be
/// unregistered while it is used.
#[test]
fn registered_memory_is_a_direct_target() {
    if common::on_a_device() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let store = store_in(directory.path(), &[]);
    let mut pages = Pages::new(8, BLOCK);
    let (base, length) = (pages.base(), pages.length());
    // SAFETY: the pages outlive the store's use of them.
    unsafe { store.register_memory(base.cast(), length) }.unwrap();
    let ids: Vec<_> = (0..8).map(id).collect();
    let addresses: Vec<_> = (0..8).map(|index| pages.address(index, 0)).collect();
    (0..8).for_each(|index| pages.fill(index, index as u64, 0));
    let task = save(&store, &ids, None, &addresses).unwrap();
    done(&task, Stage::Persisted);
    done(&task, Stage::Released);
    pages.clear();
    let task = load(&store, &ids, None, &addresses).unwrap();
    done(&task, Stage::Loaded);
    assert!((0..8).all(|index| pages.wrong(index, index as u64, 0).is_none()));
    assert_eq!(store.stats().unwrap().slots_used, 0, "nothing went through the arena");
    store.unregister_memory(base.cast()).unwrap();
    assert_eq!(
        store.unregister_memory(base.cast()).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    let other = store_in(directory.path(), &[]);
    assert_eq!(load_blocks(&other, &(0..8).collect::<Vec<_>>(), BLOCK), []);
}

/// Goal: prefetch brings blocks into DRAM; a load of them then does no I/O.
#[test]
fn prefetched_blocks_are_loaded_from_dram() {
    let directory = TempDir::new().unwrap();
    let writer = store_in(directory.path(), &[]);
    save_blocks(&writer, &[1, 2, 3], BLOCK);
    let reader = store_in(directory.path(), &[]);
    reader.prefetch(&[id(1), id(2), id(3), id(4)]).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while reader.stats().unwrap().slots_used < 3
        || !reader.metrics().unwrap().contains("\nucm_slots_busy 0\n")
    {
        assert!(Instant::now() < until, "prefetch never came");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(load_blocks(&reader, &[1, 2, 3], BLOCK), []);
    let stats = reader.stats().unwrap();
    assert_eq!((stats.cache_hits, stats.cache_misses), (3, 0));
}

/// Goal: many more blocks than slots, in one batch, both ways.
#[test]
fn batches_larger_than_the_arena_flow_through_it() {
    for (pipeline, engine) in VARIANTS {
        let directory = TempDir::new().unwrap();
        let extra = [
            ("store_pipeline", pipeline),
            ("io_engine", engine),
            ("cache_buffer_capacity_gb", "0.0006"),
        ];
        let store = store_in(directory.path(), &extra);
        assert!(store.stats().unwrap().slots < 40);
        let numbers: Vec<u64> = (0..200).collect();
        save_blocks(&store, &numbers, BLOCK);
        assert_eq!(load_blocks(&store, &numbers, BLOCK), [], "{pipeline} {engine}");
    }
}

/// Goal: parts of odd sizes (not a multiple of the page, smaller than a page) keep their bytes.
#[test]
fn parts_of_odd_sizes_keep_their_bytes() {
    for bytes in [1usize, 100, 4095, 4097, 70_000] {
        let directory = TempDir::new().unwrap();
        let size = bytes.to_string();
        let store = store_in(directory.path(), &[("block_size", &size)]);
        save_blocks(&store, &[1, 2, 3], bytes);
        let other = store_in(directory.path(), &[("block_size", &size)]);
        assert_eq!(load_blocks(&other, &[3, 1, 2], bytes), [], "{bytes}");
    }
}

/// Goal: stores of different namespaces in one directory do not see each other.
#[test]
fn namespaces_are_apart() {
    let directory = TempDir::new().unwrap();
    let base = store_in(directory.path(), &[]);
    save_blocks(&base, &[1], BLOCK);
    for (key, value) in [
        ("model_id", "other"),
        ("dtype", "fp8"),
        ("block_tokens", "64"),
        ("namespace_extra", "x"),
        ("order", "other"),
        ("part_count", "2"),
    ] {
        let other = store_in(directory.path(), &[(key, value)]);
        assert!(!is_present(&other, 1), "{key}");
    }
}

/// Goal: everything on storage is for its owner alone.
#[test]
fn files_are_for_their_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let parent = TempDir::new().unwrap();
    let directory = parent.path().join("new");
    let store = store_in(&directory, &[]);
    save_blocks(&store, &[1], BLOCK);
    assert_eq!(std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
    for file in files(&directory, "") {
        assert_eq!(
            std::fs::metadata(&file).unwrap().permissions().mode() & 0o077,
            0,
            "{}",
            file.display()
        );
    }
}

/// Goal: a save does not take the word of an old index: what others have reclaimed since is stored again
/// before it is acknowledged.
#[test]
fn what_was_reclaimed_meanwhile_is_saved_again() {
    let directory = TempDir::new().unwrap();
    // Other stores of this host have blocks of the same names in DRAM.
    let alone = ("namespace_extra", "reclaimed");
    let hasty = [("timeout_ms", "3000"), ("store_pipeline", "Posix"), alone];
    let first = store_in(directory.path(), &[alone]);
    save_blocks(&first, &[1], BLOCK);
    first.close();
    let old = store_in(directory.path(), &hasty);
    assert!(is_present(&old, 1));
    let mut bounded = hasty.to_vec();
    bounded.extend([("posix_capacity_gb", "0.02"), ("posix_gc_check_interval_sec", "1")]);
    let filler = store_in(directory.path(), &bounded);
    let until = Instant::now() + Duration::from_secs(60);
    let mut numbers = 1000..;
    while is_present(&filler, 1) {
        assert!(Instant::now() < until, "nothing was reclaimed");
        let mut pages = Pages::new(1, BLOCK);
        let number = numbers.next().unwrap();
        pages.fill(0, number, 0);
        let address = [pages.address(0, 0)];
        // Over the bound a save is refused until something was freed.
        let task = save(&filler, &[id(number)], None, &address).unwrap();
        let _ = task.wait(Stage::Persisted, WAIT);
        done(&task, Stage::Released);
    }
    // The grace, and its file is gone.
    std::thread::sleep(Duration::from_millis(4000));
    save_blocks(&old, &[1], BLOCK);
    let reader = store_in(directory.path(), &[alone]);
    assert_eq!(load_blocks(&reader, &[1], BLOCK), [], "it was acknowledged and is not there");
}

/// Goal: a block of which some layers never come takes no room on storage, is given up at its deadline, and
/// can be saved again.
#[test]
fn layers_that_never_come_leave_nothing() {
    const LAYER: usize = BLOCK / 8;
    let directory = TempDir::new().unwrap();
    let extra = [("shard_size", "8192"), ("timeout_ms", "1500")];
    let store = store_in(directory.path(), &extra);
    let slots = store.stats().unwrap().slots;
    // More of them than there are slots for parts that are not whole, one after the other.
    for number in 0..slots {
        let mut pages = Pages::new(1, LAYER);
        pages.fill(0, number, 0);
        let address = [pages.address(0, 0)];
        let Ok(task) = save(&store, &[id(number)], Some(&[0]), &address) else { continue };
        done(&task, Stage::Released);
    }
    let until = Instant::now() + Duration::from_secs(60);
    while store.stats().unwrap().slots_used > 0 {
        assert!(Instant::now() < until, "slots are held by parts that will never be whole");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(files(directory.path(), "segments"), Vec::<std::path::PathBuf>::new());
    assert!(!is_present(&store, 0));
    save_blocks(&store_in(directory.path(), &[]), &[0], BLOCK);
    assert!(is_present(&store_in(directory.path(), &extra), 0));
}

/// Goal: a block that a store abandons, which has never saved, is known to be abandoned to others within a
/// refresh, under the promise that is broken alone; it is not present, and what is present stays so.
#[test]
fn what_one_store_abandons_others_need_not_wait_for() {
    let directory = TempDir::new().unwrap();
    // Other stores of this host have blocks of the same names in DRAM.
    let alone = ("namespace_extra", "abandoned");
    let (prefill, decode) =
        (store_in(directory.path(), &[alone]), store_in(directory.path(), &[alone]));
    let scheduler = store_in(directory.path(), &[alone, ("device_id", "-1")]);
    save_blocks(&decode, &[2], BLOCK);
    prefill.abandon(&[id(1), id(2)], Promise(6)).unwrap();
    for store in [&prefill, &decode, &scheduler] {
        let until = Instant::now() + Duration::from_secs(60);
        let mut found = [9; 2];
        while found[0] != 1 {
            assert!(Instant::now() < until, "it was never told");
            store.lookup_abandoned(&[id(1), id(3)], Promise(6), &mut found).unwrap();
        }
        assert_eq!(found, [1, 0]);
        store.lookup_abandoned(&[id(1), id(3)], Promise(7), &mut found).unwrap();
        assert_eq!(found, [0, 0], "another promise");
        assert!(!is_present(store, 1));
        store.refresh(None).unwrap();
        assert!(is_present(store, 2));
    }
}

/// The host device, but that pinning memory takes as long as it does for an arena of hundreds of gigabytes.
struct SlowToPin(Duration);

impl Device for SlowToPin {
    fn name(&self) -> &'static str {
        "slow to pin"
    }
    unsafe fn capture_event(&self, _event: *mut c_void) -> Result<CapturedEvent> {
        Ok(Arc::new(()))
    }
    unsafe fn pin(&self, _base: *mut u8, _length: usize) -> Result<()> {
        std::thread::sleep(self.0);
        Ok(())
    }
    fn unpin(&self, _base: *mut u8) {}
    fn open_stream(&self, wake: Wake) -> Result<Box<dyn CopyStream>> {
        Host.open_stream(wake)
    }
    unsafe fn stream_wait(&self, _stream: *mut c_void, _markers: &[Marker]) -> Result<()> {
        Ok(())
    }
}

/// Goal: the deadline of an open is for directories that do not answer. An arena that takes longer than that to
/// touch, register or pin is no reason to fail, nor to blame a directory.
#[test]
fn a_large_arena_does_not_use_up_the_deadline_of_the_directories() {
    let directory = TempDir::new().unwrap();
    let pairs = [
        ("storage_backends", directory.path().to_str().unwrap()),
        ("cache_buffer_capacity_gb", "0.01"),
        ("block_size", "65536"),
        ("timeout_ms", "5000"),
        ("namespace_extra", "slow to pin"),
    ];
    let config = options(&pairs).build().unwrap();
    let device = Arc::new(SlowToPin(Duration::from_millis(5500)));
    let platform = Platform { device: Some(device), ..Platform::default() };
    let store = Store::open_on(config, platform).unwrap();
    save_blocks(&store, &[1], BLOCK);
}

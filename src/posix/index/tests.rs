//! The index beside a map, beside itself in other threads, and counted.

use super::*;
use proptest::prelude::*;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

fn key(id: u64, part: u16) -> PartKey {
    let mut block = [0; 16];
    block[..8].copy_from_slice(&id.to_le_bytes());
    PartKey { block: BlockId(block), part }
}

fn value(segment: u32, page: u32) -> Found {
    Found { location: Location { segment, page }, checksum: u64::from(page) * 3 }
}

/// Ids of one shard, as many as are asked for, whose place in it lies in the first of so many parts.
fn crowd(count: usize, share: u64) -> Vec<u64> {
    let in_the_corner = |id: &u64| {
        let hash = Folded::of(&key(*id, 0).block, 0).hash;
        hash >> 56 == 0 && hash << 8 <= u64::MAX / share
    };
    (0..).filter(in_the_corner).take(count).collect()
}

static EVERYWHERE: LazyLock<Vec<u64>> = LazyLock::new(|| (0..300).collect());
static ONE_SHARD: LazyLock<Vec<u64>> = LazyLock::new(|| crowd(300, 1));
static ONE_CORNER: LazyLock<Vec<u64>> = LazyLock::new(|| crowd(300, 4));

#[derive(Clone, Debug)]
enum Step {
    Insert(u64, u16, u32, u32),
    Remove(u64, u16, u32, u32),
    Retire(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..300u64, 0..3u16, 1..6u32, 0..4u32).prop_map(|(i, p, s, g)| Step::Insert(i, p, s, g)),
        3 => (0..300u64, 0..3u16, 1..6u32, 0..4u32).prop_map(|(i, p, s, g)| Step::Remove(i, p, s, g)),
        1 => (1..6u32).prop_map(Step::Retire),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is inserted, moved, removed and retired, the index answers as a map does: with ids all over
    /// it, and with ids of one shard, whose groups overflow.
    #[test]
    fn index_is_a_map(
        steps in prop::collection::vec(step(), 1..2000),
        ids in prop::sample::select(vec![&*EVERYWHERE, &*ONE_SHARD, &*ONE_CORNER]),
    ) {
        let key = |id: u64, part| key(ids[id as usize], part);
        let index = Index::new();
        let mut model: HashMap<PartKey, Found> = HashMap::new();
        for step in steps {
            match step {
                Step::Insert(id, part, segment, page) => {
                    let (key, value) = (key(id, part), value(segment, page));
                    prop_assert_eq!(index.insert(&key, value), model.insert(key, value));
                }
                Step::Remove(id, part, segment, page) => {
                    let key = key(id, part);
                    let location = Location { segment, page };
                    let there = model.get(&key).is_some_and(|v| v.location == location);
                    prop_assert_eq!(index.remove_at(&key, location), there);
                    if there { model.remove(&key); }
                }
                Step::Retire(segment) => {
                    let before = model.len();
                    model.retain(|_, v| v.location.segment != segment);
                    let removed = index.remove_segments(&HashSet::from([segment]));
                    prop_assert_eq!(removed, before - model.len());
                }
            }
        }
        prop_assert_eq!(index.len(), model.len());
        for id in 0..300 {
            for part in 0..3 {
                let key = key(id, part);
                prop_assert_eq!(index.find(&key), model.get(&key).copied());
            }
        }
    }
}

/// Many keys at once give what single lookups give.
#[test]
fn batches_agree_with_single_lookups() {
    let index = Index::new();
    (0..5000).step_by(2).for_each(|i| {
        index.insert(&key(i, 1), value(1, i as u32));
    });
    let keys: Vec<PartKey> = (0..1001).map(|i| key(i, 1)).collect();
    let mut seen = 0;
    index.find_many(keys.iter().map(|key| (&key.block, key.part)), |at, found| {
        assert_eq!(found, index.find(&keys[at]));
        assert_eq!(found.is_some(), at % 2 == 0);
        seen += 1;
    });
    assert_eq!(seen, 1001);
}

/// Memory stays under 64 bytes a part at every size, counting ids as patterned as they can be.
#[test]
fn memory_is_bounded_at_every_size() {
    let index = Index::new();
    for id in 0..300_000u64 {
        index.insert(&key(id, 0), value(1, 1));
        if id > 100_000 && id % 4999 == 0 {
            let bytes = index.bytes();
            assert!(bytes <= 64 * id as usize, "{bytes} bytes for {id} parts");
        }
    }
}

/// Making room loses nothing, costs no more than growing, and few tables grow after it.
#[test]
fn reserved_room_is_enough() {
    let index = Index::new();
    (0..1000).for_each(|id| assert_eq!(index.insert(&key(id, 0), value(1, id as u32)), None));
    index.reserve(99_000);
    let reserved = index.bytes();
    assert!(reserved <= 64 * 100_000, "{reserved} bytes");
    (1000..100_000).for_each(|id| assert_eq!(index.insert(&key(id, 0), value(1, id as u32)), None));
    assert!(index.bytes() <= reserved + reserved / 8, "{} after {reserved}", index.bytes());
    (0..100_000).for_each(|id| assert_eq!(index.find(&key(id, 0)), Some(value(1, id as u32))));
    index.reserve(0);
    assert_eq!(index.len(), 100_000);
}

/// Lookups by one thread while another inserts: nothing inserted before is ever missed.
#[test]
fn readers_never_miss_while_tables_grow() {
    let index = Index::new();
    let published = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for id in 0..60_000 {
                index.insert(&key(id as u64, 0), value(1, id as u32));
                published.store(id + 1, Ordering::Release);
            }
        });
        loop {
            let count = published.load(Ordering::Acquire);
            for id in (0..count).step_by(count / 100 + 1) {
                assert!(index.find(&key(id as u64, 0)).is_some(), "{id} of {count}");
            }
            if count == 60_000 {
                break;
            }
        }
    });
}

/// More keys of one home than a group counts: nothing is lost, whatever goes first.
#[test]
fn a_group_that_hundreds_have_passed_loses_nothing() {
    // At most 32 groups at this size, so all of them belong into the first.
    let ids = crowd(330, 32);
    let index = Index::new();
    for (number, id) in ids.iter().enumerate() {
        index.insert(&key(*id, 0), value(1, number as u32));
    }
    let order: Vec<usize> = (0..ids.len()).map(|n| n * 7 % ids.len()).collect();
    for (gone, number) in order.iter().enumerate() {
        for later in &order[gone..] {
            assert_eq!(index.find(&key(ids[*later], 0)), Some(value(1, *later as u32)));
        }
        let location = value(1, *number as u32).location;
        assert!(index.remove_at(&key(ids[*number], 0), location));
        assert_eq!(index.find(&key(ids[*number], 0)), None);
    }
    assert!(index.is_empty());
}

/// Readers stop also where the writer's assertions fail.
struct StopAtTheEnd<'a>(&'a AtomicBool);

impl Drop for StopAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What readers see while entries are inserted, moved, removed and retired and tables grow is what was
/// inserted under that key, whole; and what nobody touches is always there.
#[test]
fn readers_see_no_torn_entry() {
    const STAYING: u64 = 500;
    const COMING: u64 = 20_000;
    let sum = |id: u64, location: Location| mix([id, u64::from(location.page) << 32 | 1]);
    let of = |id: u64, segment, page| {
        let location = Location { segment, page };
        Found { location, checksum: sum(id, location) }
    };
    let index = Index::new();
    for id in 0..STAYING {
        index.insert(&key(id, 0), of(id, 1, 1));
    }
    let stop = AtomicBool::new(false);
    let check = |id: u64, found: Option<Found>| match found {
        Some(found) => assert_eq!(found.checksum, sum(id, found.location), "{id}"),
        None => assert!(id >= STAYING, "{id} was missed"),
    };
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (index, stop) = (&index, &stop);
            scope.spawn(move || {
                let mut next = reader;
                while !stop.load(Ordering::Relaxed) {
                    let ids: Vec<u64> = (0..64).map(|n| (next + n * 331) % COMING).collect();
                    let keys: Vec<PartKey> = ids.iter().map(|id| key(*id, 0)).collect();
                    index.find_many(keys.iter().map(|key| (&key.block, key.part)), |at, found| {
                        check(ids[at], found);
                    });
                    check(next % STAYING, index.find(&key(next % STAYING, 0)));
                    next += 1;
                }
            });
        }
        let _stop = StopAtTheEnd(&stop);
        // Growth of all shards, moves of all entries, and both ways to be removed.
        for round in 0..6_u32 {
            for id in STAYING..COMING {
                index.insert(&key(id, 0), of(id, 2 + round % 2, round << 16 | id as u32));
            }
            for id in 0..STAYING {
                index.insert(&key(id, 0), of(id, 1, round));
            }
            for id in (STAYING..COMING).step_by(3) {
                let location = of(id, 2 + round % 2, round << 16 | id as u32).location;
                assert!(index.remove_at(&key(id, 0), location));
            }
            index.remove_segments(&HashSet::from([2, 3]));
            assert_eq!(index.len() as u64, STAYING);
        }
    });
}

/// Measures nanoseconds a key: `cargo test --release index_speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
fn index_speed() {
    let random = |i: u64| {
        let mut block = [0; 16];
        block[..8].copy_from_slice(&mix([i, 1]).to_le_bytes());
        block[8..].copy_from_slice(&mix([i, 2]).to_le_bytes());
        PartKey { block: BlockId(block), part: 0 }
    };
    // Time of this thread on a CPU: what else runs on the machine does not count.
    let cpu = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec for the call to fill.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        std::time::Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let index = Index::new();
    let start = cpu();
    (0..1_000_000).for_each(|i| {
        index.insert(&random(i), value(1, i as u32));
    });
    println!("insert {:?} a key", (cpu() - start) / 1_000_000);
    println!("{} bytes a part", index.bytes() / index.len());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut id = 1_000_000;
            while !stop.load(Ordering::Relaxed) {
                index.insert(&random(id), value(1, 1));
                id += 1;
            }
        });
        for name in ["hits", "misses"] {
            let offset = if name == "hits" { 0 } else { 1 << 40 };
            let keys: Vec<PartKey> =
                (0..1_000_000).map(|i| random(offset + i * 7919 % 1_000_000)).collect();
            let start = cpu();
            let mut hits = 0;
            for batch in keys.chunks(256) {
                index.find_many(batch.iter().map(|key| (&key.block, key.part)), |_, found| {
                    hits += usize::from(found.is_some());
                });
            }
            println!("{name}: {:?} a key, {hits} hits", (cpu() - start) / 1_000_000);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

//! The index: which parts can be found, and where. 32 bytes an entry, a fixed number of small hash tables.
//!
//! Readers take a shard's read lock for some nanoseconds; growth copies a shard while readers go on, and
//! only the swap excludes them. Knows no file: a location is two numbers to it.
//!
//! Tables use Robin Hood probing, so that a miss ends early at high load, and grow by a quarter, so that
//! memory is 40 to 50 bytes a part; only one of 256 shards holds its old and new table at a time.

use crossbeam_utils::CachePadded;
use parking_lot::{RwLock, RwLockUpgradableReadGuard};
use std::collections::HashSet;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::block::{BlockId, PartKey};

/// Where a part lies: a handle of the segment table and a page of that segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// Handle of the segment, never 0.
    pub segment: u32,
    /// First page of the extent.
    pub page: u32,
}

/// What a lookup returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where the part lies.
    pub location: Location,
    /// Its checksum; [`crate::posix::format::NO_CHECKSUM`] if none was taken.
    pub checksum: u64,
}

const SHARDS: usize = 256;
/// Entries of a shard's first table: 4 cache lines.
const FIRST_TABLE: usize = 8;
/// Tables grow when more than this share of them, in percent, is used.
const LOAD_PERCENT_MAX: usize = 80;
/// Entries of a cache line.
const ENTRIES_A_LINE: usize = 64 / size_of::<Entry>();
/// Keys whose cache lines are fetched together.
pub const PREFETCH: usize = 16;

/// An unused entry has segment 0.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Entry {
    key: [u64; 2],
    checksum: u64,
    segment: u32,
    page: u32,
}

const EMPTY: Entry = Entry { key: [0; 2], checksum: 0, segment: 0, page: 0 };

/// Key and hash of a part.
#[derive(Clone, Copy)]
struct Folded {
    key: [u64; 2],
    hash: u64,
}

impl Folded {
    /// The part goes into the key by way of a product, so that neighbouring ids of neighbouring parts stay
    /// apart. Ids may be anything (tests count), so the place comes from a full mix.
    fn of(block: &BlockId, part: u16) -> Self {
        let [low, high] = halves(block);
        let salt = u128::from(part).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        let key = [low ^ salt as u64, high ^ (salt >> 64) as u64];
        Self { key, hash: mix(key) }
    }

    fn shard(&self) -> usize {
        (self.hash >> 56) as usize
    }
}

fn halves(block: &BlockId) -> [u64; 2] {
    let (low, high) = block.0.split_at(8);
    [low, high].map(|half| u64::from_le_bytes(half.try_into().unwrap_or_default()))
}

fn mix(key: [u64; 2]) -> u64 {
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    };
    let inner = fold(key[0] ^ 0xa076_1d64_78bd_642f, key[1] ^ 0xe703_7ed1_a0b4_28db);
    fold(inner ^ 0x8ebc_6af0_9c88_c6e3, 0x5899_65cc_7537_4cc3 ^ key[0])
}

/// The home of a hash in a table of `length` entries: its bits below the shard's, scaled.
fn home(hash: u64, length: usize) -> usize {
    ((u128::from(hash << 8) * length as u128) >> 64) as usize
}

#[derive(Default)]
struct Table {
    entries: Box<[Entry]>,
    used: usize,
}

enum Place {
    At(usize),
    Absent,
}

impl Table {
    fn with_length(length: usize) -> Self {
        Self { entries: vec![EMPTY; length].into_boxed_slice(), used: 0 }
    }

    fn distance(&self, position: usize, entry: &Entry) -> usize {
        let length = self.entries.len();
        let home = home(mix(entry.key), length);
        if position >= home { position - home } else { position + length - home }
    }

    fn next(&self, position: usize) -> usize {
        if position + 1 == self.entries.len() { 0 } else { position + 1 }
    }

    fn place(&self, folded: &Folded) -> Place {
        if self.entries.is_empty() {
            return Place::Absent;
        }
        let mut position = home(folded.hash, self.entries.len());
        let mut distance = 0;
        loop {
            let entry = &self.entries[position];
            if entry.segment == 0 {
                return Place::Absent;
            }
            if entry.key == folded.key {
                return Place::At(position);
            }
            // Robin Hood order: behind an entry nearer to its home than we would be, we are not.
            if distance > 1 && self.distance(position, entry) < distance {
                return Place::Absent;
            }
            position = self.next(position);
            distance += 1;
        }
    }

    fn has_room(&self) -> bool {
        (self.used + 1) * 100 <= self.entries.len() * LOAD_PERCENT_MAX
    }

    /// Adds an entry that is not there; the table has room.
    fn add(&mut self, mut entry: Entry) {
        let mut position = home(mix(entry.key), self.entries.len());
        let mut distance = 0;
        while self.entries[position].segment != 0 {
            let resident = self.distance(position, &self.entries[position]);
            if resident < distance {
                std::mem::swap(&mut self.entries[position], &mut entry);
                distance = resident;
            }
            position = self.next(position);
            distance += 1;
        }
        self.entries[position] = entry;
        self.used += 1;
    }

    /// Removes by shifting the entries behind it back, so that no tombstones slow lookups.
    fn remove(&mut self, mut position: usize) {
        loop {
            let next = self.next(position);
            let entry = self.entries[next];
            if entry.segment == 0 || self.distance(next, &entry) == 0 {
                break;
            }
            self.entries[position] = entry;
            position = next;
        }
        self.entries[position] = EMPTY;
        self.used -= 1;
    }

    /// A copy with room for a quarter more.
    fn grown(&self) -> Self {
        let length = (self.entries.len() + self.entries.len() / 4).max(FIRST_TABLE);
        let mut table = Self::with_length(length);
        self.entries.iter().filter(|entry| entry.segment != 0).for_each(|entry| table.add(*entry));
        table
    }
}

#[derive(Default)]
struct Shard {
    table: RwLock<Table>,
    /// Where the table lay when it was last swapped: for prefetching only, never read through.
    hint: AtomicPtr<Entry>,
    hint_length: AtomicUsize,
}

impl Shard {
    fn prefetch(&self, folded: &Folded) {
        let length = self.hint_length.load(Ordering::Relaxed);
        let position = home(folded.hash, length.max(1));
        let address = self.hint.load(Ordering::Relaxed).wrapping_add(position);
        // A probe that begins here ends in this cache line or the next, most of the time.
        prefetch(address);
        prefetch(address.wrapping_add(ENTRIES_A_LINE));
    }

    fn find(&self, folded: &Folded) -> Option<Found> {
        let table = self.table.read();
        match table.place(folded) {
            Place::At(position) => Some(found(&table.entries[position])),
            Place::Absent => None,
        }
    }

    fn publish_hint(&self, table: &Table) {
        self.hint.store(table.entries.as_ptr().cast_mut(), Ordering::Relaxed);
        self.hint_length.store(table.entries.len(), Ordering::Relaxed);
    }
}

fn found(entry: &Entry) -> Found {
    Found {
        location: Location { segment: entry.segment, page: entry.page },
        checksum: entry.checksum,
    }
}

/// Fetches the cache line at `address`, which need not be valid.
fn prefetch(address: *const Entry) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint: any address is allowed and nothing is read.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch is a hint: any address is allowed and nothing is read.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) address, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// All parts that can be found.
pub struct Index {
    shards: Box<[CachePadded<Shard>]>,
}

impl Default for Index {
    fn default() -> Self {
        Self::new()
    }
}

impl Index {
    /// An empty index.
    pub fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| CachePadded::new(Shard::default())).collect() }
    }

    /// Where a part is.
    pub fn find(&self, key: &PartKey) -> Option<Found> {
        let folded = Folded::of(&key.block, key.part);
        self.shards[folded.shard()].find(&folded)
    }

    /// Fetches the cache line of a part that will be asked for or inserted soon.
    pub fn prefetch(&self, key: &PartKey) {
        let folded = Folded::of(&key.block, key.part);
        self.shards[folded.shard()].prefetch(&folded);
    }

    /// Looks many parts up, fetching their cache lines together; `visit` gets position and finding.
    pub fn find_many<'a>(
        &self,
        keys: impl Iterator<Item = (&'a BlockId, u16)>,
        mut visit: impl FnMut(usize, Option<Found>),
    ) {
        let mut group = [Folded { key: [0; 2], hash: 0 }; PREFETCH];
        let mut filled = 0;
        let mut base = 0;
        let mut flush = |group: &[Folded], base: usize| {
            for (offset, folded) in group.iter().enumerate() {
                visit(base + offset, self.shards[folded.shard()].find(folded));
            }
        };
        for (block, part) in keys {
            let folded = Folded::of(block, part);
            self.shards[folded.shard()].prefetch(&folded);
            group[filled] = folded;
            filled += 1;
            if filled == PREFETCH {
                flush(&group, base);
                base += PREFETCH;
                filled = 0;
            }
        }
        flush(&group[..filled], base);
    }

    /// Adds a part or moves it: the last one seen wins. Returns where it was.
    pub fn insert(&self, key: &PartKey, value: Found) -> Option<Found> {
        debug_assert_ne!(value.location.segment, 0);
        let folded = Folded::of(&key.block, key.part);
        let entry = Entry {
            key: folded.key,
            checksum: value.checksum,
            segment: value.location.segment,
            page: value.location.page,
        };
        let shard = &self.shards[folded.shard()];
        loop {
            let mut table = shard.table.write();
            if let Place::At(position) = table.place(&folded) {
                return Some(found(&std::mem::replace(&mut table.entries[position], entry)));
            }
            if table.has_room() {
                table.add(entry);
                return None;
            }
            drop(table);
            self.grow(shard);
        }
    }

    /// Copies under a lock that readers share; the old table is freed after the swap.
    fn grow(&self, shard: &Shard) {
        let table = shard.table.upgradable_read();
        if table.has_room() {
            return;
        }
        let grown = table.grown();
        let mut table = RwLockUpgradableReadGuard::upgrade(table);
        shard.publish_hint(&grown);
        let old = std::mem::replace(&mut *table, grown);
        drop(table);
        drop(old);
    }

    /// Removes a part if it still is at `location`.
    pub fn remove_at(&self, key: &PartKey, location: Location) -> bool {
        let folded = Folded::of(&key.block, key.part);
        let mut table = self.shards[folded.shard()].table.write();
        match table.place(&folded) {
            Place::At(position) if found(&table.entries[position]).location == location => {
                table.remove(position);
                true
            }
            _ => false,
        }
    }

    /// Removes every part that lies in one of `segments`; returns how many. Reads the whole index, once for
    /// all of them, and excludes readers only from shards where there is something to remove.
    pub fn remove_segments(&self, segments: &HashSet<u32>) -> usize {
        let gone = |entry: &Entry| entry.segment != 0 && segments.contains(&entry.segment);
        let mut removed = 0;
        for shard in &self.shards {
            let table = shard.table.upgradable_read();
            if !table.entries.iter().any(gone) {
                continue;
            }
            let mut kept = Table::with_length(table.entries.len());
            table
                .entries
                .iter()
                .filter(|entry| entry.segment != 0 && !gone(entry))
                .for_each(|entry| kept.add(*entry));
            removed += table.used - kept.used;
            let mut table = RwLockUpgradableReadGuard::upgrade(table);
            shard.publish_hint(&kept);
            let old = std::mem::replace(&mut *table, kept);
            drop(table);
            drop(old);
        }
        removed
    }

    /// Calls `visit` with how many parts each segment holds.
    pub fn count_by_segment(&self) -> std::collections::HashMap<u32, usize> {
        let mut counts = std::collections::HashMap::new();
        for shard in &self.shards {
            let table = shard.table.read();
            for entry in table.entries.iter().filter(|entry| entry.segment != 0) {
                *counts.entry(entry.segment).or_default() += 1;
            }
        }
        counts
    }

    /// How many parts can be found.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.table.read().used).sum()
    }

    /// Whether nothing can be found.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory the tables take.
    pub fn bytes(&self) -> usize {
        let tables: usize = self.shards.iter().map(|shard| shard.table.read().entries.len()).sum();
        tables * size_of::<Entry>() + SHARDS * size_of::<CachePadded<Shard>>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn key(id: u64, part: u16) -> PartKey {
        let mut block = [0; 16];
        block[..8].copy_from_slice(&id.to_le_bytes());
        PartKey { block: BlockId(block), part }
    }

    fn value(segment: u32, page: u32) -> Found {
        Found { location: Location { segment, page }, checksum: u64::from(page) * 3 }
    }

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
        /// Whatever is inserted, moved, removed and retired, the index answers as a map does.
        #[test]
        fn index_is_a_map(steps in prop::collection::vec(step(), 1..2000)) {
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
        let stop = std::sync::atomic::AtomicBool::new(false);
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
}

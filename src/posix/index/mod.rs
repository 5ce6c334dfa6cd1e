//! The index: which parts can be found, and where. 33 bytes an entry, a fixed number of small hash tables.
//!
//! Readers take no lock and write nothing; writers of a shard take turns. Growth copies a shard while readers
//! go on. Knows no file: a location is two numbers to it.
//!
//! Tables grow by a quarter, so that memory is 40 to 55 bytes a part; only one of 256 shards holds its old and
//! new table at a time.

mod memory;
mod shard;
mod table;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};

use parking_lot::Mutex;

use crate::block::{BlockId, PartKey};

use memory::Memory;
use shard::{Inserted, Shard};
use table::{Absent, Table, TableSize};

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
/// Keys whose cache lines are fetched together.
pub const PREFETCH: usize = 16;

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

/// Fetches the cache line at `address`, which need not be valid.
fn prefetch<T>(address: *const T) {
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
    shards: Box<[Shard]>,
    memory: Mutex<Memory>,
    /// Shards in the order in which their tables were laid, with the size of each; some have grown since.
    laid: Mutex<VecDeque<(usize, TableSize)>>,
}

impl Default for Index {
    fn default() -> Self {
        Self::new()
    }
}

impl Index {
    /// An empty index.
    pub fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            memory: Mutex::default(),
            laid: Mutex::default(),
        }
    }

    fn shard(&self, folded: &Folded) -> &Shard {
        &self.shards[folded.shard()]
    }

    /// Where a part is.
    pub fn find(&self, key: &PartKey) -> Option<Found> {
        let folded = Folded::of(&key.block, key.part);
        self.shard(&folded).find(&folded)
    }

    /// Looks many parts up, fetching their cache lines together; `visit` gets position and finding.
    pub fn find_many<'a>(
        &self,
        keys: impl Iterator<Item = (&'a BlockId, u16)>,
        mut visit: impl FnMut(usize, Option<Found>),
    ) {
        let mut group = [(Folded { key: [0; 2], hash: 0 }, Table::NONE); PREFETCH];
        let mut filled = 0;
        let mut base = 0;
        let mut flush = |group: &[(Folded, Table)], base: usize| {
            for (folded, table) in group {
                table.prefetch_entry(folded.hash, Absent::Stays);
            }
            for (offset, (folded, _)) in group.iter().enumerate() {
                visit(base + offset, self.shard(folded).find(folded));
            }
        };
        for (block, part) in keys {
            let folded = Folded::of(block, part);
            group[filled] = (folded, self.prefetch_control(&folded));
            filled += 1;
            if filled == PREFETCH {
                flush(&group, base);
                base += PREFETCH;
                filled = 0;
            }
        }
        flush(&group[..filled], base);
    }

    /// Begins to fetch what a search reads first. Returns the table it is in: a guess, by the time it is used.
    fn prefetch_control(&self, folded: &Folded) -> Table {
        let table = self.shard(folded).view().map_or(Table::NONE, |(table, _)| table);
        table.prefetch_control(folded.hash);
        table
    }

    /// Fetches the cache lines of parts that will be inserted soon, together.
    pub fn prefetch<'a>(&self, keys: impl Iterator<Item = &'a PartKey> + Clone) {
        let folded = keys.map(|key| Folded::of(&key.block, key.part));
        for folded in folded.clone() {
            self.prefetch_control(&folded);
        }
        for folded in folded {
            if let Some((table, _)) = self.shard(&folded).view() {
                table.prefetch_entry(folded.hash, Absent::Comes);
            }
        }
    }

    /// Adds a part or moves it: the last one seen wins. Returns where it was.
    pub fn insert(&self, key: &PartKey, value: Found) -> Option<Found> {
        debug_assert_ne!(value.location.segment, 0);
        let folded = Folded::of(&key.block, key.part);
        let Inserted { before, grown_to } =
            self.shard(&folded).insert(&folded, value, &self.memory);
        if let Some(size) = grown_to {
            self.grow_oldest(folded.shard(), size);
        }
        before
    }

    /// Shard `number` has grown to `size`: the one whose table has lain longest follows, though it is not full
    /// yet. So tables are given up in the order in which they were laid, and their memory with them; else
    /// those that grow early and late would keep blocks of memory from going back.
    fn grow_oldest(&self, number: usize, size: TableSize) {
        self.laid.lock().push_back((number, size));
        loop {
            let mut laid = self.laid.lock();
            let Some((oldest, before)) = laid.pop_front_if(|(_, before)| *before < size) else {
                return;
            };
            drop(laid);
            if let Some(size) = self.shards[oldest].grow_from(before, &self.memory) {
                self.laid.lock().push_back((oldest, size));
                return;
            }
        }
    }

    /// Makes room for so many parts more, as far as that can be told shard by shard.
    pub fn reserve(&self, additional: usize) {
        let mean = (self.len() + additional) / SHARDS;
        // Shards differ by the square root of what they hold; twice that, and few have to grow again.
        let size = TableSize::of(mean + 2 * mean.isqrt());
        for (number, shard) in self.shards.iter().enumerate() {
            if shard.grow_to(size, &self.memory) {
                self.laid.lock().push_back((number, size));
            }
        }
    }

    /// Removes a part if it still is at `location`.
    pub fn remove_at(&self, key: &PartKey, location: Location) -> bool {
        let folded = Folded::of(&key.block, key.part);
        self.shard(&folded).remove_at(&folded, location)
    }

    /// Removes every part that lies in one of `segments`; returns how many. Reads the whole index, once for
    /// all of them.
    pub fn remove_segments(&self, segments: &HashSet<u32>) -> usize {
        self.shards.iter().map(|shard| shard.remove_segments(segments)).sum()
    }

    /// How many parts each segment holds.
    pub fn count_by_segment(&self) -> HashMap<u32, usize> {
        let mut counts = HashMap::new();
        for shard in &self.shards {
            shard.each_segment(|segment| *counts.entry(segment).or_default() += 1);
        }
        counts
    }

    /// How many parts can be found.
    pub fn len(&self) -> usize {
        self.shards.iter().map(Shard::len).sum()
    }

    /// Whether nothing can be found.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory the index takes.
    pub fn bytes(&self) -> usize {
        self.mapped_bytes() + size_of_val(&*self.shards)
    }

    /// Bytes that the tables hold, with what lies between them. No allocator counts them.
    pub fn mapped_bytes(&self) -> usize {
        self.memory.lock().held()
    }

    /// The most they ever held, while they grew.
    pub fn mapped_bytes_max(&self) -> usize {
        self.memory.lock().held_max()
    }
}

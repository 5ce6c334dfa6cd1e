//! One of the index's shards: a table, its writers one at a time, and readers that hold up nobody.
//!
//! A reader takes the version, looks, and takes the version again: while it is odd, or where it has changed,
//! somebody wrote, and what was seen counts for nothing. Readers write nothing, so any number of them share
//! the cache lines, and the processor looks for several keys at a time. (A sequence lock; which fences it
//! takes: H.-J. Boehm, Can Seqlocks Get Along With Programming Language Memory Models?, MSPC 2012.)
//!
//! Tables are replaced as a whole when they grow: readers go on in the old one meanwhile.

use std::collections::HashSet;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

use parking_lot::Mutex;

use super::memory::Memory;
use super::table::{Entry, Table, TableSize};
use super::{Folded, Found, Location};

/// How often a reader looks again before it waits for the writer, who may have been stopped by the scheduler
/// in the middle of a change.
const LOOKS_MAX: u32 = 64;

/// What an insertion did.
pub(super) struct Inserted {
    /// Where the part was.
    pub(super) before: Option<Found>,
    /// What the table grew to, if it did.
    pub(super) grown_to: Option<TableSize>,
}

/// A cache line of its own. `words` and `groups` are the table's.
#[repr(align(64))]
pub(super) struct Shard {
    version: AtomicU64,
    words: AtomicPtr<AtomicU64>,
    groups: AtomicUsize,
    /// Entries in the table. Whoever holds it is the one writer.
    used: Mutex<usize>,
}

impl Default for Shard {
    fn default() -> Self {
        let (words, groups) = Table::NONE.into_raw();
        Self {
            version: AtomicU64::new(0),
            words: AtomicPtr::new(words.as_ptr()),
            groups: AtomicUsize::new(groups),
            used: Mutex::new(0),
        }
    }
}

impl Shard {
    /// The table and the version it was read at, unless somebody is writing.
    pub(super) fn view(&self) -> Option<(Table, u64)> {
        let version = self.version.load(Ordering::Acquire);
        let words = self.words.load(Ordering::Relaxed);
        let groups = self.groups.load(Ordering::Relaxed);
        if version % 2 == 1 || !self.is_still(version) {
            return None;
        }
        // SAFETY: the version was even and is the same still, so both are of one `change`. The memory of
        // all tables stays mapped as long as the index, which is borrowed for this call, and callers drop
        // the table before that borrow ends.
        let table = unsafe { Table::from_raw(NonNull::new(words)?, groups) };
        Some((table, version))
    }

    /// Whether nobody has written since the version was taken: what was read in between is then true.
    fn is_still(&self, version: u64) -> bool {
        fence(Ordering::Acquire);
        self.version.load(Ordering::Relaxed) == version
    }

    /// Where a part is.
    pub(super) fn find(&self, folded: &Folded) -> Option<Found> {
        let look = |table: Table| table.find(folded).map(|place| table.entry(place).found());
        for _ in 0..LOOKS_MAX {
            if let Some((table, version)) = self.view() {
                let found = look(table);
                if self.is_still(version) {
                    return found;
                }
            }
            std::hint::spin_loop();
        }
        let _used = self.used.lock();
        look(self.table())
    }

    /// The table. For whoever holds `used`.
    fn table(&self) -> Table {
        let words = NonNull::new(self.words.load(Ordering::Relaxed)).unwrap_or(NonNull::dangling());
        // SAFETY: only a writer changes the two, and that is the caller; the memory stays mapped as long as
        // the index.
        unsafe { Table::from_raw(words, self.groups.load(Ordering::Relaxed)) }
    }

    /// Carries a change out so that no reader believes what it sees of it. For whoever holds `used`.
    fn change<T>(&self, change: impl FnOnce() -> T) -> T {
        let odd = self.version.load(Ordering::Relaxed) | 1;
        self.version.store(odd, Ordering::Relaxed);
        fence(Ordering::Release);
        let answer = change();
        self.version.store(odd + 1, Ordering::Release);
        answer
    }

    /// Adds a part or moves it.
    pub(super) fn insert(&self, folded: &Folded, found: Found, memory: &Mutex<Memory>) -> Inserted {
        let entry = Entry::new(folded, found);
        let mut used = self.used.lock();
        let mut table = self.table();
        if let Some(place) = table.find(folded) {
            let before = table.entry(place).found();
            self.change(|| table.set_entry(place, &entry));
            return Inserted { before: Some(before), grown_to: None };
        }
        let grows = !table.has_room(*used);
        if grows {
            table = self.grow(table, table.next_size(), memory);
        }
        self.change(|| table.add(folded.hash, &entry));
        *used += 1;
        Inserted { before: None, grown_to: grows.then(|| table.size()) }
    }

    /// Grows ahead of need if the table still has this size; to which one.
    pub(super) fn grow_from(&self, size: TableSize, memory: &Mutex<Memory>) -> Option<TableSize> {
        let _used = self.used.lock();
        let table = self.table();
        (table.size() == size).then(|| self.grow(table, table.next_size(), memory).size())
    }

    /// Grows to `size`, if that is more; whether it was.
    pub(super) fn grow_to(&self, size: TableSize, memory: &Mutex<Memory>) -> bool {
        let _used = self.used.lock();
        let table = self.table();
        let grows = table.size() < size;
        if grows {
            self.grow(table, size, memory);
        }
        grows
    }

    /// Puts a larger copy into the table's place. For whoever holds `used`.
    fn grow(&self, table: Table, size: TableSize, memory: &Mutex<Memory>) -> Table {
        // The lock is held while entries are copied: shards that grow at the same time do so one by one, and
        // what is laid together is of one age.
        let mut memory = memory.lock();
        let grown = table.resized(size, &mut memory);
        let (words, groups) = grown.into_raw();
        self.change(|| {
            self.words.store(words.as_ptr(), Ordering::Relaxed);
            self.groups.store(groups, Ordering::Relaxed);
        });
        table.give_back(&mut memory);
        grown
    }

    /// Removes a part if it still is at `location`.
    pub(super) fn remove_at(&self, folded: &Folded, location: Location) -> bool {
        let mut used = self.used.lock();
        let table = self.table();
        match table.find(folded) {
            Some(place) if table.entry(place).found().location == location => {
                self.change(|| table.remove(place));
                *used -= 1;
                true
            }
            _ => false,
        }
    }

    /// Removes every part that lies in one of `segments`; returns how many.
    pub(super) fn remove_segments(&self, segments: &HashSet<u32>) -> usize {
        let mut used = self.used.lock();
        let table = self.table();
        let mut removed = 0;
        for place in table.places() {
            if segments.contains(&table.entry(place).found().location.segment) {
                self.change(|| table.remove(place));
                removed += 1;
            }
        }
        *used -= removed;
        removed
    }

    /// Calls `visit` with the segment of each part.
    pub(super) fn each_segment(&self, mut visit: impl FnMut(u32)) {
        let _used = self.used.lock();
        let table = self.table();
        table.places().for_each(|place| visit(table.entry(place).found().location.segment));
    }

    /// How many parts there are.
    pub(super) fn len(&self) -> usize {
        *self.used.lock()
    }
}

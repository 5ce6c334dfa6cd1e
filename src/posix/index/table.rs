//! One hash table: control words, then entries of 32 bytes, in memory that others may read at any time.
//!
//! Fifteen entries make a group. Its control word of 16 bytes has a byte of hash for each entry, 0 where there
//! is none, and counts the keys that found the group full and lie behind. So a search reads control words,
//! which the processor's caches hold at a million parts, and of the entries only the one it is after; a miss
//! reads none. Entries never move, so a removal leaves nothing behind.
//!
//! Every word is an atomic, because readers do not exclude writers: what they see may be torn, also across
//! entries, and counts only if the shard says so (see `shard`). No search leaves the table or lasts for ever.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::Memory;
use super::{Folded, Found, Location, prefetch};

/// Entries of a group: with the count they fill 16 bytes.
const WAYS: usize = 15;
/// Words of a control word and of an entry.
const CONTROL_WORDS: usize = 2;
const ENTRY_WORDS: usize = 4;
/// Tables grow when more than this share of them, in percent, is used.
const LOAD_PERCENT_MAX: usize = 85;
/// Tables grow by one part in so many.
const GROWTH_SHARE: usize = 4;
/// Byte of the control word that counts, and the count that stays, because nobody knows any more.
const PASSED_SHIFT: u32 = 56;
const PASSED_MAX: u64 = 255;

const LOW_BITS: u64 = 0x0101_0101_0101_0101;
const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// Where in a table an entry is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    group: usize,
    way: usize,
}

/// Control word of a group.
#[derive(Clone, Copy)]
struct Control([u64; 2]);

impl Control {
    /// The ways whose tag is `tag`.
    fn matches(self, tag: u8) -> Ways {
        let zeros = |word: u64| {
            // The high bit of each byte that is zero, exactly: no carry leaves a byte.
            let word = word ^ (LOW_BITS * u64::from(tag));
            !(((word & !HIGH_BITS) + !HIGH_BITS) | word) & HIGH_BITS
        };
        Ways([zeros(self.0[0]), zeros(self.0[1]) & !(0xff << PASSED_SHIFT)])
    }

    fn tag(self, way: usize) -> u8 {
        (self.0[way / 8] >> (way % 8 * 8)) as u8
    }

    fn with_tag(mut self, way: usize, tag: u8) -> Self {
        let shift = way % 8 * 8;
        let word = &mut self.0[way / 8];
        *word = *word & !(0xff << shift) | u64::from(tag) << shift;
        self
    }

    fn passed(self) -> u64 {
        self.0[1] >> PASSED_SHIFT
    }

    /// One key more that lies behind.
    fn passed_by(mut self) -> Self {
        if self.passed() < PASSED_MAX {
            self.0[1] += 1 << PASSED_SHIFT;
        }
        self
    }

    /// One less.
    fn returned_to(mut self) -> Self {
        if self.passed() < PASSED_MAX {
            self.0[1] -= 1 << PASSED_SHIFT;
        }
        self
    }
}

/// Some of the entries of a group: the high bit of a byte for each.
struct Ways([u64; 2]);

impl Iterator for Ways {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let word = usize::from(self.0[0] == 0);
        let bits = &mut self.0[word];
        let first = bits.trailing_zeros();
        *bits &= bits.wrapping_sub(1);
        (first < u64::BITS).then_some(word * 8 + first as usize / 8)
    }
}

/// A part as its entry has it.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    key: [u64; 2],
    found: Found,
}

impl Entry {
    pub(super) fn new(folded: &Folded, found: Found) -> Self {
        Self { key: folded.key, found }
    }

    pub(super) fn found(&self) -> Found {
        self.found
    }
}

/// How large a table is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TableSize(usize);

impl TableSize {
    /// The smallest table for so many entries.
    pub(super) fn of(entries: usize) -> Self {
        Self((entries * 100).div_ceil(WAYS * LOAD_PERCENT_MAX))
    }
}

/// A table's memory and size. A copy is as good as the original; who owns the memory is the shard's matter.
#[derive(Clone, Copy)]
pub(super) struct Table {
    words: NonNull<AtomicU64>,
    groups: usize,
}

impl Table {
    /// The table of an empty shard.
    pub(super) const NONE: Self = Self { words: NonNull::dangling(), groups: 0 };

    /// A table that another one was told apart into.
    ///
    /// # Safety
    /// Both come from one and the same table, whose memory stays mapped as long as this one is used.
    pub(super) unsafe fn from_raw(words: NonNull<AtomicU64>, groups: usize) -> Self {
        Self { words, groups }
    }

    pub(super) fn into_raw(self) -> (NonNull<AtomicU64>, usize) {
        (self.words, self.groups)
    }

    pub(super) fn size(&self) -> TableSize {
        TableSize(self.groups)
    }

    fn with_groups(memory: &mut Memory, groups: usize) -> Self {
        Self { words: memory.take(bytes_of(groups)), groups }
    }

    /// Gives the memory back. Readers that do not know yet read on, and will know.
    pub(super) fn give_back(self, memory: &mut Memory) {
        if self.groups > 0 {
            memory.give(self.words, bytes_of(self.groups));
        }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        debug_assert!(index < self.groups * (CONTROL_WORDS + WAYS * ENTRY_WORDS));
        // SAFETY: callers compute the index from a group below `groups` and a way below WAYS, and the memory,
        // which `with_groups` took for that many, stays mapped while the table is used and holds atomics only.
        unsafe { self.words.add(index).as_ref() }
    }

    fn entry_word(&self, place: Place) -> usize {
        assert!(place.group < self.groups && place.way < WAYS);
        self.groups * CONTROL_WORDS + (place.group * WAYS + place.way) * ENTRY_WORDS
    }

    fn control(&self, group: usize) -> Control {
        assert!(group < self.groups);
        let word = |n| self.word(group * CONTROL_WORDS + n).load(Ordering::Relaxed);
        Control([word(0), word(1)])
    }

    fn set_control(&self, group: usize, control: Control) {
        assert!(group < self.groups);
        for (n, word) in control.0.into_iter().enumerate() {
            self.word(group * CONTROL_WORDS + n).store(word, Ordering::Relaxed);
        }
    }

    fn key(&self, place: Place) -> [u64; 2] {
        let first = self.entry_word(place);
        [first, first + 1].map(|index| self.word(index).load(Ordering::Relaxed))
    }

    pub(super) fn entry(&self, place: Place) -> Entry {
        let first = self.entry_word(place);
        let word = |n| self.word(first + n).load(Ordering::Relaxed);
        let at = word(3);
        let location = Location { segment: (at >> 32) as u32, page: at as u32 };
        Entry { key: [word(0), word(1)], found: Found { location, checksum: word(2) } }
    }

    /// Overwrites an entry with one of the same key. Writers only.
    pub(super) fn set_entry(&self, place: Place, entry: &Entry) {
        let first = self.entry_word(place);
        let Found { location, checksum } = entry.found;
        let at = u64::from(location.segment) << 32 | u64::from(location.page);
        for (n, word) in [entry.key[0], entry.key[1], checksum, at].into_iter().enumerate() {
            self.word(first + n).store(word, Ordering::Relaxed);
        }
    }

    /// The home of a hash: its bits below the shard's, scaled.
    fn home(&self, hash: u64) -> usize {
        ((u128::from(hash << 8) * self.groups as u128) >> 64) as usize
    }

    fn next(&self, group: usize) -> usize {
        if group + 1 == self.groups { 0 } else { group + 1 }
    }

    /// Where a part is.
    pub(super) fn find(&self, folded: &Folded) -> Option<Place> {
        if self.groups == 0 {
            return None;
        }
        let tag = tag(folded.hash);
        let mut group = self.home(folded.hash);
        // At most once around: a torn view may have no end.
        for _ in 0..self.groups {
            let control = self.control(group);
            let places = control.matches(tag).map(|way| Place { group, way });
            if let Some(place) = { places }.find(|place| self.key(*place) == folded.key) {
                return Some(place);
            }
            if control.passed() == 0 {
                return None;
            }
            group = self.next(group);
        }
        None
    }

    /// Fetches the control word where a search for this hash begins.
    pub(super) fn prefetch_control(&self, hash: u64) {
        prefetch(self.words.as_ptr().wrapping_add(self.home(hash) * CONTROL_WORDS));
    }

    /// Fetches the entry that a search for this hash most likely ends at, if it is there, or else goes to.
    pub(super) fn prefetch_entry(&self, hash: u64, absent: Absent) {
        if self.groups == 0 {
            return;
        }
        let group = self.home(hash);
        let control = self.control(group);
        let way = control.matches(tag(hash)).next();
        let way = way.or_else(|| match absent {
            Absent::Stays => None,
            Absent::Comes => control.matches(0).next(),
        });
        if let Some(way) = way {
            let index = self.entry_word(Place { group, way });
            prefetch(self.words.as_ptr().wrapping_add(index));
        }
    }

    /// Whether one more entry has room beside `used` others.
    pub(super) fn has_room(&self, used: usize) -> bool {
        (used + 1) * 100 <= self.groups * WAYS * LOAD_PERCENT_MAX
    }

    /// Adds an entry that is not there; the table has room. Writers only.
    pub(super) fn add(&self, hash: u64, entry: &Entry) {
        let mut group = self.home(hash);
        loop {
            let control = self.control(group);
            if let Some(way) = control.matches(0).next() {
                self.set_entry(Place { group, way }, entry);
                self.set_control(group, control.with_tag(way, tag(hash)));
                return;
            }
            self.set_control(group, control.passed_by());
            group = self.next(group);
        }
    }

    /// Removes an entry. Writers only.
    pub(super) fn remove(&self, place: Place) {
        let mut group = self.home(self.entry(place).hash());
        while group != place.group {
            self.set_control(group, self.control(group).returned_to());
            group = self.next(group);
        }
        self.set_control(group, self.control(group).with_tag(place.way, 0));
    }

    /// All entries. Writers only.
    pub(super) fn places(&self) -> impl Iterator<Item = Place> + '_ {
        (0..self.groups).flat_map(|group| {
            let control = self.control(group);
            let places = (0..WAYS).filter(move |way| control.tag(*way) != 0);
            places.map(move |way| Place { group, way })
        })
    }

    /// The size that follows.
    pub(super) fn next_size(&self) -> TableSize {
        TableSize(self.groups + (self.groups / GROWTH_SHARE).max(1))
    }

    /// A copy of another size, that has room for all.
    pub(super) fn resized(&self, size: TableSize, memory: &mut Memory) -> Self {
        let resized = Self::with_groups(memory, size.0);
        for place in self.places() {
            let entry = self.entry(place);
            resized.add(entry.hash(), &entry);
        }
        resized
    }
}

impl Entry {
    fn hash(&self) -> u64 {
        super::mix(self.key)
    }
}

/// What becomes of a part that is not found.
#[derive(Clone, Copy)]
pub(super) enum Absent {
    /// It is asked for.
    Stays,
    /// It is inserted.
    Comes,
}

/// A byte of the hash that neither shard nor home use; 0 means that there is no entry.
fn tag(hash: u64) -> u8 {
    (hash as u8).max(1)
}

fn bytes_of(groups: usize) -> usize {
    groups * (CONTROL_WORDS + WAYS * ENTRY_WORDS) * size_of::<AtomicU64>()
}

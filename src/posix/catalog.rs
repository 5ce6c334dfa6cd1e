//! The catalog: what all manifests together say, as one index and one table of segments.
//!
//! Owns the index, the names behind segment handles, and what must not be found again (retired segments,
//! quarantined extents). Knows no file: it is told records and asked questions.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::block::{BlockId, PAGE, PartKey, Promise};
use crate::posix::abandoned::Abandoned;
use crate::posix::format::{Kind, Record};
use crate::posix::host::boot_time;
use crate::posix::index::{Found, Index, Location, PREFETCH};
use crate::posix::names::SegmentName;
use crate::posix::tail::Taker;

/// Quarantined extents that are remembered; beyond it the oldest knowledge is dropped wholesale, and a bad
/// extent costs one failed read more.
const QUARANTINE_MAX: usize = 1 << 16;

/// A segment that the index points into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRef {
    /// Which backend.
    pub home: u16,
    /// Its name there.
    pub name: SegmentName,
    /// When a RETIRE record was first seen, on this host's clock.
    pub retired_at: Option<Duration>,
    /// End of the last extent that was published in it, in pages; 0 where none was.
    pub end_page: u32,
}

impl SegmentRef {
    /// Whether a RETIRE record was seen.
    pub fn is_retired(&self) -> bool {
        self.retired_at.is_some()
    }

    /// Whether it was seen so long ago that nobody reads there any more.
    pub fn is_retired_for(&self, grace: Duration) -> bool {
        self.retired_at.is_some_and(|since| boot_time().saturating_sub(since) >= grace)
    }
}

#[derive(Default)]
struct SegmentTable {
    /// Handle `n` stands at `n - 1`.
    segments: Vec<SegmentRef>,
    handles: HashMap<(u16, SegmentName), u32>,
}

/// Events that only count.
#[derive(Default)]
pub struct CatalogCounters {
    /// Records that failed their checksum or stood in the wrong place.
    pub bad_records: AtomicU64,
    /// Extents that failed verification.
    pub quarantined: AtomicU64,
    /// Records of a part length that is not the namespace's.
    pub misfits: AtomicU64,
}

/// What all manifests say.
pub struct Catalog {
    /// Where parts are.
    pub index: Index,
    /// What was odd.
    pub counters: CatalogCounters,
    part_bytes: u64,
    part_count: u16,
    segments: RwLock<SegmentTable>,
    quarantine: Mutex<HashSet<Location>>,
    quarantine_size: AtomicUsize,
    abandoned: Abandoned,
}

/// Records of one manifest on their way into the catalog.
pub struct Intake<'a> {
    catalog: &'a Catalog,
    home: u16,
    writer: u64,
    last: Option<LastSegment>,
    retired: HashSet<u32>,
    /// Parts whose cache lines are being fetched: reading a large manifest waits for little else.
    published: Vec<(PartKey, Found)>,
}

/// The segment of the record before, because neighbours mostly name the same one.
struct LastSegment {
    name: SegmentName,
    handle: u32,
    retired: bool,
    end_page: u32,
}

impl Catalog {
    /// An empty catalog of a namespace.
    pub fn new(part_bytes: u64, part_count: u16) -> Self {
        Self {
            index: Index::new(),
            counters: CatalogCounters::default(),
            part_bytes,
            part_count,
            segments: RwLock::default(),
            quarantine: Mutex::default(),
            quarantine_size: AtomicUsize::new(0),
            abandoned: Abandoned::default(),
        }
    }

    /// The segment behind a handle.
    pub fn segment(&self, handle: u32) -> Option<SegmentRef> {
        let table = self.segments.read();
        table.segments.get((handle as usize).checked_sub(1)?).copied()
    }

    /// The handle of a segment, a new one if it was never named before.
    pub fn intern(&self, home: u16, name: SegmentName) -> u32 {
        if let Some(handle) = self.segments.read().handles.get(&(home, name)) {
            return *handle;
        }
        let mut table = self.segments.write();
        let table = &mut *table;
        *table.handles.entry((home, name)).or_insert_with(|| {
            table.segments.push(SegmentRef { home, name, retired_at: None, end_page: 0 });
            table.segments.len() as u32
        })
    }

    /// Handles of a writer's segments that were not retired.
    pub fn segments_of(&self, home: u16, writer: u64) -> Vec<(u32, SegmentName)> {
        let table = self.segments.read();
        let numbered = (1..).zip(&table.segments);
        numbered
            .filter(|(_, s)| s.home == home && s.name.writer == writer && !s.is_retired())
            .map(|(handle, segment)| (handle, segment.name))
            .collect()
    }

    /// How many segments are not retired.
    pub fn segment_count(&self) -> usize {
        self.segments.read().segments.iter().filter(|segment| !segment.is_retired()).count()
    }

    /// Takes the records of one manifest of `writer`; retired segments leave the index when it is dropped.
    pub fn intake(&self, home: u16, writer: u64) -> Intake<'_> {
        Intake {
            catalog: self,
            home,
            writer,
            last: None,
            retired: HashSet::new(),
            published: Vec::new(),
        }
    }

    /// Puts a part where it can be found. Last one wins.
    pub fn publish(&self, key: &PartKey, found: Found) {
        if self.is_quarantined(found.location) {
            return;
        }
        self.index.insert(key, found);
        // One rank's part says nothing about the part that another rank has given up.
        if !self.abandoned.is_empty() && self.contains_block(&key.block) {
            self.abandoned.forget(key.block);
        }
    }

    /// Marks segments as gone for good and removes their parts from the index.
    pub fn retire(&self, handles: &HashSet<u32>) -> usize {
        if handles.is_empty() {
            return 0;
        }
        let mut table = self.segments.write();
        for handle in handles {
            if let Some(segment) = table.segments.get_mut(*handle as usize - 1) {
                segment.retired_at.get_or_insert_with(boot_time);
            }
        }
        drop(table);
        self.index.remove_segments(handles)
    }

    /// Removes the parts of segments whose manifest is gone; if it comes back they are found again.
    pub fn forget(&self, handles: &HashSet<u32>) -> usize {
        if handles.is_empty() { 0 } else { self.index.remove_segments(handles) }
    }

    /// Never returns this extent again, whatever manifests say.
    pub fn quarantine(&self, key: &PartKey, location: Location) {
        let mut quarantine = self.quarantine.lock();
        if quarantine.len() >= QUARANTINE_MAX {
            quarantine.clear();
        }
        quarantine.insert(location);
        self.quarantine_size.store(quarantine.len(), Ordering::Relaxed);
        drop(quarantine);
        self.index.remove_at(key, location);
    }

    /// Whether an extent was found bad.
    pub fn is_quarantined(&self, location: Location) -> bool {
        self.quarantine_size.load(Ordering::Relaxed) > 0
            && self.quarantine.lock().contains(&location)
    }

    /// Remembers that a promised block will not come.
    pub fn abandon(&self, block: BlockId, promise: Promise) {
        self.abandoned.insert(block, promise);
    }

    /// Whether a promised block will not come.
    pub fn is_abandoned(&self, block: &BlockId, promise: Promise) -> bool {
        self.abandoned.contains(*block, promise)
    }

    /// Whether all parts of a block can be found.
    pub fn contains_block(&self, block: &BlockId) -> bool {
        (0..self.part_count).all(|part| self.index.find(&PartKey { block: *block, part }).is_some())
    }

    /// For each block whether all its parts can be found; cache lines are fetched together.
    pub fn contains_blocks(&self, blocks: &[BlockId], found: &mut [u8]) {
        found[..blocks.len()].fill(1);
        let parts = usize::from(self.part_count);
        let keys = blocks.iter().flat_map(|block| (0..self.part_count).map(move |p| (block, p)));
        self.index.find_many(keys, |at, part| {
            if part.is_none() {
                found[at / parts] = 0;
            }
        });
    }
}

impl Taker for Intake<'_> {
    /// Makes room at once: growing step by step copies each part five times.
    fn expect(&mut self, records: usize) {
        self.catalog.index.reserve(records);
    }

    fn take(&mut self, record: &Record) {
        match record.kind {
            Kind::Publish => self.publish(record),
            Kind::Retire => {
                let handle = self.handle_of(record);
                self.retired.insert(handle);
            }
            Kind::Drop => {
                self.publish_fetched();
                let segment = self.handle_of(record);
                let key = PartKey { block: record.block, part: record.part };
                self.catalog.quarantine(&key, Location { segment, page: record.page });
            }
            Kind::Abandoned => {
                self.publish_fetched();
                self.catalog.abandon(record.block, Promise(record.checksum));
            }
            Kind::Seal | Kind::Epoch | Kind::Heartbeat => {}
        }
    }
}

impl Intake<'_> {
    fn publish(&mut self, record: &Record) {
        let catalog = self.catalog;
        if u64::from(record.length) != catalog.part_bytes || record.part >= catalog.part_count {
            catalog.counters.misfits.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let (segment, retired) = self.own_handle(record);
        if retired || self.retired.contains(&segment) || record.page == 0 {
            return;
        }
        let key = PartKey { block: record.block, part: record.part };
        let location = Location { segment, page: record.page };
        self.published.push((key, Found { location, checksum: record.checksum }));
        if self.published.len() == PREFETCH {
            self.publish_fetched();
        }
    }

    fn publish_fetched(&mut self) {
        self.catalog.index.prefetch(self.published.iter().map(|(key, _)| key));
        for (key, found) in self.published.drain(..) {
            self.catalog.publish(&key, found);
        }
    }

    /// Handle of a segment of this manifest's writer, and whether it was retired.
    fn own_handle(&mut self, record: &Record) -> (u32, bool) {
        let name = SegmentName {
            writer: self.writer,
            number: record.segment,
            generation: record.generation,
        };
        let end = record.page.saturating_add(extent_pages(self.catalog.part_bytes));
        if let Some(last) = self.last.as_mut().filter(|last| last.name == name) {
            last.end_page = last.end_page.max(end);
            return (last.handle, last.retired);
        }
        self.note_end();
        let handle = self.catalog.intern(self.home, name);
        let retired = self.catalog.segment(handle).is_some_and(|segment| segment.is_retired());
        self.last = Some(LastSegment { name, handle, retired, end_page: end });
        (handle, retired)
    }

    /// Tells the table how far the last segment is published.
    fn note_end(&mut self) {
        if let Some(last) = self.last.take() {
            let mut table = self.catalog.segments.write();
            if let Some(segment) = table.segments.get_mut(last.handle as usize - 1) {
                segment.end_page = segment.end_page.max(last.end_page);
            }
        }
    }

    /// Handle of the segment that a RETIRE or DROP means, which may be another writer's.
    fn handle_of(&mut self, record: &Record) -> u32 {
        let writer = if record.checksum == 0 { self.writer } else { record.checksum };
        let name = SegmentName { writer, number: record.segment, generation: record.generation };
        self.catalog.intern(self.home, name)
    }
}

impl Drop for Intake<'_> {
    fn drop(&mut self) {
        self.note_end();
        self.publish_fetched();
        self.catalog.retire(&self.retired);
    }
}

/// Pages of an extent: the part, padded, and its trailer.
pub fn extent_pages(part_bytes: u64) -> u32 {
    (part_bytes.div_ceil(PAGE as u64) + 1) as u32
}

//! The two tables of a ring: which open file and which memory is registered in which slot. Plain
//! bookkeeping; the system calls are `uring`'s.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::{DmaSlice, FileId};

/// Largest registered buffer (io_uring_register(2)).
pub(super) const CHUNK_BYTES: usize = 1 << 30;

/// Which file is registered in which slot.
pub(super) struct FileTable {
    slots: Vec<FileSlot>,
    of_file: HashMap<FileId, u32>,
    free: Vec<u32>,
    /// Operations pushed so far: the clock of "least recently used".
    clock: u64,
}

#[derive(Clone, Default)]
struct FileSlot {
    file: Option<FileId>,
    /// Operations pushed with this slot that have not ended: while there are any it is not given away.
    uses: u32,
    last_use: u64,
}

/// How to name a file in an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileChoice {
    /// By the slot it is registered in.
    Registered(u32),
    /// By this slot, once it has been registered there.
    Register(u32),
    /// By its descriptor: every slot is in use, or was recently.
    Plain,
}

/// A registered file is put out for another only if that many operations went by without it, so that
/// more hot files than slots do not cost a system call for each operation.
const COLD_AFTER_OPERATIONS: u64 = 4096;

impl FileTable {
    pub(super) fn new(slots: u32) -> Self {
        Self {
            slots: vec![FileSlot::default(); slots as usize],
            of_file: HashMap::new(),
            free: (0..slots).rev().collect(),
            clock: 0,
        }
    }

    /// Chooses how to name `file`, and counts the use if it is by slot.
    pub(super) fn choose(&mut self, file: FileId) -> FileChoice {
        self.clock += 1;
        if let Some(&slot) = self.of_file.get(&file) {
            self.touch(slot);
            return FileChoice::Registered(slot);
        }
        let Some(slot) = self.free.pop().or_else(|| self.evict()) else {
            return FileChoice::Plain;
        };
        self.slots[slot as usize].file = Some(file);
        self.of_file.insert(file, slot);
        self.touch(slot);
        FileChoice::Register(slot)
    }

    fn touch(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        entry.uses += 1;
        entry.last_use = self.clock;
    }

    fn evict(&mut self) -> Option<u32> {
        let coldest = self.clock.checked_sub(COLD_AFTER_OPERATIONS)?;
        let unused = self.slots.iter().enumerate().filter(|(_, entry)| entry.uses == 0);
        let (slot, entry) = unused.min_by_key(|(_, entry)| entry.last_use)?;
        if entry.last_use > coldest {
            return None;
        }
        if let Some(file) = entry.file {
            self.of_file.remove(&file);
        }
        Some(slot as u32)
    }

    /// An operation that used the slot has ended.
    pub(super) fn release(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        debug_assert!(entry.uses > 0, "a slot was released more often than used");
        entry.uses -= 1;
    }

    /// The file is closed, or was not registered after all: its slot to clear, if it has one.
    pub(super) fn remove(&mut self, file: FileId) -> Option<u32> {
        let slot = self.of_file.remove(&file)?;
        self.slots[slot as usize] = FileSlot::default();
        self.free.push(slot);
        Some(slot)
    }
}

/// Which memory is registered in which slots, a slot for each chunk of [`CHUNK_BYTES`].
pub(super) struct BufferTable {
    /// Sorted by base.
    regions: Vec<Region>,
    free: Vec<u16>,
}

struct Region {
    base: usize,
    length: usize,
    slots: Vec<u16>,
}

impl BufferTable {
    pub(super) fn new(slots: u16) -> Self {
        Self { regions: Vec::new(), free: (0..slots).rev().collect() }
    }

    /// The chunks of `memory` with the slot for each, or `None` where too few slots are free.
    pub(super) fn reserve(&mut self, memory: DmaSlice) -> Option<Vec<(u16, DmaSlice)>> {
        let count = memory.length.div_ceil(CHUNK_BYTES);
        let rest = self.free.len().checked_sub(count)?;
        let slots = self.free.split_off(rest);
        let chunk = |(index, slot): (usize, u16)| {
            let start = index * CHUNK_BYTES;
            let length = (memory.length - start).min(CHUNK_BYTES);
            (slot, DmaSlice { pointer: memory.pointer.wrapping_add(start), length })
        };
        Some(slots.into_iter().enumerate().map(chunk).collect())
    }

    /// Gives reserved slots back.
    pub(super) fn give_back(&mut self, slots: impl IntoIterator<Item = u16>) {
        self.free.extend(slots);
    }

    /// The memory is registered, chunk by chunk, in `slots`.
    pub(super) fn insert(&mut self, memory: DmaSlice, slots: Vec<u16>) {
        let base = memory.pointer as usize;
        let at = self.regions.partition_point(|region| region.base < base);
        self.regions.insert(at, Region { base, length: memory.length, slots });
    }

    /// The slots of a region that is no longer registered.
    pub(super) fn remove(&mut self, base: *mut u8) -> Option<Vec<u16>> {
        let at = self.regions.binary_search_by_key(&(base as usize), |region| region.base).ok()?;
        Some(self.regions.remove(at).slots)
    }

    /// The slot of the chunk that holds all of `memory`, if one does.
    pub(super) fn find(&self, memory: DmaSlice) -> Option<u16> {
        let start = memory.pointer as usize;
        let after = self.regions.partition_point(|region| region.base <= start);
        let region = &self.regions[after.checked_sub(1)?];
        let offset = start - region.base;
        let last = offset.checked_add(memory.length)?.checked_sub(1)?;
        if last >= region.length || offset / CHUNK_BYTES != last / CHUNK_BYTES {
            return None;
        }
        Some(region.slots[offset / CHUNK_BYTES])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(base: usize, length: usize) -> DmaSlice {
        DmaSlice { pointer: base as *mut u8, length }
    }

    /// Goal: memory inside one chunk is found in that chunk's slot; across chunks, or outside, it is not.
    #[test]
    fn buffers_are_found_by_chunk() {
        let mut table = BufferTable::new(4);
        let memory = slice(0x10_0000, 2 * CHUNK_BYTES + 4096);
        let chunks = table.reserve(memory).unwrap();
        assert_eq!(chunks.iter().map(|(_, chunk)| chunk.length).sum::<usize>(), memory.length);
        let slots: Vec<u16> = chunks.iter().map(|(slot, _)| *slot).collect();
        table.insert(memory, slots.clone());
        assert_eq!(table.find(slice(0x10_0000, 4096)), Some(slots[0]));
        assert_eq!(table.find(slice(0x10_0000, CHUNK_BYTES)), Some(slots[0]));
        assert_eq!(table.find(slice(0x10_0000 + CHUNK_BYTES, 4096)), Some(slots[1]));
        assert_eq!(table.find(slice(0x10_0000 + 2 * CHUNK_BYTES, 4096)), Some(slots[2]));
        assert_eq!(table.find(slice(0x10_0000 + CHUNK_BYTES - 4096, 8192)), None);
        assert_eq!(table.find(slice(0x10_0000 + 2 * CHUNK_BYTES, 8192)), None);
        assert_eq!(table.find(slice(0x8000, 4096)), None);
        assert_eq!(table.find(slice(usize::MAX - 10, 4096)), None);
        assert!(table.reserve(slice(0x1000, 2 * CHUNK_BYTES)).is_none(), "one slot is left");
        assert_eq!(table.remove(0x10_0000 as *mut u8), Some(slots));
        assert_eq!(table.find(slice(0x10_0000, 4096)), None);
    }

    /// Goal: a slot is never given to another file while an operation uses it, nor while it is warm.
    #[test]
    fn a_file_slot_in_use_is_not_given_away() {
        let mut table = FileTable::new(2);
        let file = FileId;
        assert_eq!(table.choose(file(1)), FileChoice::Register(0));
        assert_eq!(table.choose(file(2)), FileChoice::Register(1));
        assert_eq!(table.choose(file(1)), FileChoice::Registered(0));
        assert_eq!(table.choose(file(3)), FileChoice::Plain, "both are in use");
        table.release(1);
        assert_eq!(table.choose(file(3)), FileChoice::Plain, "the idle one is warm");
        for _ in 0..COLD_AFTER_OPERATIONS {
            table.choose(file(1));
        }
        assert_eq!(table.choose(file(3)), FileChoice::Register(1));
        assert_eq!(table.choose(file(2)), FileChoice::Plain, "it was put out");
        assert_eq!(table.remove(file(3)), Some(1));
        assert_eq!(table.remove(file(3)), None);
        assert_eq!(table.choose(file(2)), FileChoice::Register(1));
    }
}

//! Where the tables lie: memory that stays mapped as long as the index lives.
//!
//! Owns the mappings. Readers take no lock and leave no trace, so nobody can know that none of them still
//! looks at a table that was given up; what they may then see is zeros or another table, never a hole, and
//! the shard's version tells them to look again (see `shard`).
//!
//! Large tables lie in huge pages, because probes go anywhere and with small pages nearly each of them waits
//! for the page table as well. They are laid one behind the other, many to a block. All tables of an index
//! grow at about the same time, so those that were laid together are given up together, and a block goes back
//! to the system with the last of them.

use std::alloc::{Layout, handle_alloc_error};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::mem::huge::HUGE_PAGE;

/// Tables from this size on lie in huge pages: some 400,000 parts, of which one huge page more or less is a
/// twelfth.
const HUGE_FROM: usize = 64 << 10;
/// What goes back to the system as a whole, of smaller tables: no less than the largest base page of a kernel.
const SMALL_BLOCK: usize = 64 << 10;
/// Address space that is mapped at a time, for huge pages and for small ones: enough that mappings are few.
const HUGE_REGION: usize = 16 << 20;
const SMALL_REGION: usize = 1 << 20;
/// Tables begin at cache lines.
const ALIGN: usize = 64;

#[derive(Clone, Copy, Default)]
struct Block {
    /// Tables that lie in it, wholly or in part.
    tables: u32,
    /// Whether it may hold memory of the system's.
    touched: bool,
}

/// One mapping.
struct Region {
    map: NonNull<u8>,
    mapped: usize,
    /// Offset of the first block in the mapping.
    start: usize,
    block: usize,
    blocks: Box<[Block]>,
    /// Bytes from the first block on that tables were laid in.
    head: usize,
}

// SAFETY: a region is a mapping and numbers; whoever is given memory of it shares it as atomics only.
unsafe impl Send for Region {}

impl Region {
    fn map(bytes: usize, block: usize) -> Self {
        let bytes = bytes.next_multiple_of(block);
        let mapped = bytes + block;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let map = match NonNull::new(map.cast::<u8>()) {
            Some(pointer) if map != libc::MAP_FAILED => pointer,
            _ => handle_alloc_error(Layout::new::<[u8; HUGE_REGION]>()),
        };
        let start = map.as_ptr().align_offset(block);
        if block == HUGE_PAGE {
            // SAFETY: `start` is less than a block, by which the mapping is longer than `bytes`. A refusal
            // means small pages.
            unsafe { libc::madvise(map.as_ptr().add(start).cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        let blocks = vec![Block::default(); bytes / block].into_boxed_slice();
        Self { map, mapped, start, block, blocks, head: 0 }
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset <= self.mapped - self.start);
        // SAFETY: the assertion keeps it inside the mapping or at its end.
        unsafe { self.map.add(self.start + offset) }
    }

    fn offset_of(&self, address: NonNull<AtomicU64>) -> Option<usize> {
        let offset = address.addr().get().checked_sub(self.at(0).addr().get())?;
        (offset < self.blocks.len() * self.block).then_some(offset)
    }

    fn blocks_of(&mut self, offset: usize, bytes: usize) -> &mut [Block] {
        &mut self.blocks[offset / self.block..(offset + bytes).div_ceil(self.block)]
    }

    /// The next `bytes`, if there are so many; how many blocks were touched for it.
    fn take(&mut self, bytes: usize) -> Option<(NonNull<u8>, usize)> {
        let offset = self.head;
        if offset + bytes > self.blocks.len() * self.block {
            return None;
        }
        self.head += bytes;
        let mut touched = 0;
        for block in self.blocks_of(offset, bytes) {
            block.tables += 1;
            touched += usize::from(!std::mem::replace(&mut block.touched, true));
        }
        Some((self.at(offset), touched))
    }

    /// Takes back what `take` gave; how many blocks went back to the system.
    fn give(&mut self, offset: usize, bytes: usize) -> usize {
        self.blocks_of(offset, bytes).iter_mut().for_each(|block| block.tables -= 1);
        if self.blocks.iter().all(|block| block.tables == 0) {
            // Everything is zero again after this.
            self.head = 0;
        }
        let past = if self.head == 0 { self.blocks.len() } else { self.head / self.block };
        let mut released = 0;
        for number in 0..past {
            let block = &mut self.blocks[number];
            if block.tables == 0 && std::mem::take(&mut block.touched) {
                self.release(number);
                released += 1;
            }
        }
        released
    }

    /// Makes a block zeros that take no memory.
    fn release(&self, number: usize) {
        let base = self.at(number * self.block);
        // SAFETY: the block lies in this mapping, and no table lies in it. Readers that still look there see
        // zeros from now on; the mapping stays.
        let advised =
            unsafe { libc::madvise(base.as_ptr().cast(), self.block, libc::MADV_DONTNEED) };
        if advised != 0 {
            // The program has locked its memory.
            for word in 0..self.block / size_of::<AtomicU64>() {
                // SAFETY: the word lies in the block, which is mapped and aligned; it is only used as an
                // atomic.
                let word = unsafe { base.cast::<AtomicU64>().add(word).as_ref() };
                word.store(0, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: unmaps what `map` mapped, once; the index that lends it out is gone with its readers.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.mapped) };
    }
}

/// The memory of one index.
#[derive(Default)]
pub(super) struct Memory {
    regions: Vec<Region>,
    held: usize,
    held_max: usize,
}

impl Memory {
    /// Zeros for a table, at a cache line. They stay mapped until this `Memory` is dropped.
    pub(super) fn take(&mut self, bytes: usize) -> NonNull<AtomicU64> {
        let bytes = bytes.next_multiple_of(ALIGN);
        let (region, block) =
            if bytes >= HUGE_FROM { (HUGE_REGION, HUGE_PAGE) } else { (SMALL_REGION, SMALL_BLOCK) };
        let fits = |region: &mut Region| {
            let taken = if region.block == block { region.take(bytes) } else { None };
            taken.map(|(address, touched)| (address, touched * block))
        };
        let (address, touched) = match self.regions.iter_mut().find_map(fits) {
            Some(taken) => taken,
            None => {
                let mut new = Region::map(region.max(bytes), block);
                let taken = fits(&mut new).expect("a region is at least as long as what it is for");
                self.regions.push(new);
                taken
            }
        };
        self.held += touched;
        self.held_max = self.held_max.max(self.held);
        // Whoever sees what is written here from now on also sees that the table before it was given up.
        fence(Ordering::Release);
        address.cast()
    }

    /// Takes back what `take` gave for as many bytes; no shard leads to it any more.
    pub(super) fn give(&mut self, address: NonNull<AtomicU64>, bytes: usize) {
        let bytes = bytes.next_multiple_of(ALIGN);
        // Nobody sees zeros who does not see that the shard has another table.
        fence(Ordering::SeqCst);
        for region in &mut self.regions {
            if let Some(offset) = region.offset_of(address) {
                self.held -= region.give(offset, bytes) * region.block;
                return;
            }
        }
        unreachable!("memory that is given back was taken here");
    }

    /// Bytes that the tables hold, with what lies between them.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// The most they ever held.
    pub(super) fn held_max(&self) -> usize {
        self.held_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(address: NonNull<AtomicU64>) -> &'static AtomicU64 {
        // SAFETY: the tests look only while the memory lives.
        unsafe { address.as_ref() }
    }

    /// Goal: what is taken is zero, apart from all else, and back with the system when its neighbours are.
    #[test]
    fn blocks_go_back_with_their_last_table() {
        for (bytes, block) in [(SMALL_BLOCK / 4, SMALL_BLOCK), (HUGE_PAGE / 4, HUGE_PAGE)] {
            let mut memory = Memory::default();
            let taken: Vec<_> = (0..9).map(|_| memory.take(bytes)).collect();
            for (number, address) in taken.iter().enumerate() {
                assert_eq!(word(*address).swap(number as u64 + 1, Ordering::Relaxed), 0);
            }
            assert_eq!(memory.held(), 3 * block);
            taken[..3].iter().for_each(|address| memory.give(*address, bytes));
            assert_eq!(memory.held(), 3 * block, "its fourth table lives");
            memory.give(taken[3], bytes);
            assert_eq!(memory.held(), 2 * block);
            assert_eq!(word(taken[3]).load(Ordering::Relaxed), 0, "still mapped");
            assert_eq!(word(taken[4]).load(Ordering::Relaxed), 5);
            taken[4..].iter().for_each(|address| memory.give(*address, bytes));
            assert_eq!(memory.held(), 0);
            assert_eq!(memory.take(bytes), taken[0], "an empty region is used again");
            assert_eq!(word(taken[0]).load(Ordering::Relaxed), 0);
            assert_eq!(memory.held_max(), 3 * block);
        }
    }

    /// Goal: a table larger than a region has one of its own; the next ones go on in the old one.
    #[test]
    fn a_table_may_be_larger_than_a_region() {
        let mut memory = Memory::default();
        let first = memory.take(HUGE_PAGE);
        let large = memory.take(HUGE_REGION + 1);
        let next = memory.take(HUGE_PAGE);
        assert_eq!(next.addr().get(), first.addr().get() + HUGE_PAGE);
        memory.give(large, HUGE_REGION + 1);
        assert_eq!(memory.held(), 2 * HUGE_PAGE);
    }
}

//! Page-aligned memory for headers, head pages and manifest reads.
//!
//! Owns its memory; lends it to the kernel as a `DmaSlice` and to the format as a byte slice, never both at
//! once.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use crate::block::PAGE;
use crate::error::Result;
use crate::io::{DmaSlice, File, Files};

/// Zeroed pages, aligned for direct I/O.
pub struct Pages {
    pointer: *mut u8,
    layout: Layout,
}

// SAFETY: the memory is owned and nothing about it belongs to one thread.
unsafe impl Send for Pages {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pages {}

impl Pages {
    /// `count` pages of zeros, at least one.
    pub fn new(count: usize) -> Self {
        let layout = Layout::from_size_align(count.max(1) * PAGE, PAGE)
            .expect("page counts here are far below the address space");
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            handle_alloc_error(layout);
        }
        Self { pointer, layout }
    }

    /// The bytes. The kernel must not be using the memory.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `pointer` is valid for `layout.size()` initialised bytes, owned by `self`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.layout.size()) }
    }

    /// The bytes, for writing. The kernel must not be using the memory.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.layout.size()) }
    }

    /// `count` pages from page `first` on, as memory for a transfer. Whoever uses it keeps `self` alive
    /// until the transfer has ended.
    pub fn slice(&self, first: usize, count: usize) -> DmaSlice {
        assert!((first + count) * PAGE <= self.layout.size(), "pages {first}+{count}");
        // SAFETY: the assertion keeps the pointer inside the allocation.
        DmaSlice { pointer: unsafe { self.pointer.add(first * PAGE) }, length: count * PAGE }
    }

    /// Writes `count` pages from page `first` on to `offset`. Blocks.
    pub fn write_to(
        &self,
        files: &dyn Files,
        file: &File,
        offset: u64,
        first: usize,
        count: usize,
    ) -> Result<()> {
        // SAFETY: the slice lies in memory of `self`, which is borrowed until the call has returned.
        unsafe { files.write_at(file, offset, self.slice(first, count)) }
    }

    /// Fills up to `count` pages from page `first` on from `offset`; returns the bytes read. Blocks.
    pub fn read_from(
        &mut self,
        files: &dyn Files,
        file: &File,
        offset: u64,
        first: usize,
        count: usize,
    ) -> Result<usize> {
        // SAFETY: the slice lies in memory of `self`, which is borrowed exclusively until the call has
        // returned.
        unsafe { files.read_at(file, offset, self.slice(first, count)) }
    }

    /// How many pages there are.
    pub fn count(&self) -> usize {
        self.layout.size() / PAGE
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.pointer, self.layout) }
    }
}

//! The caller's side of a transfer: paged KV memory, as a server keeps it.
//!
//! Each tensor slice of the model has a region of its own, in which block pages lie one after another; a
//! block is one page in every region. Knows no store.

use std::ffi::c_void;
use std::ptr::NonNull;

use crate::device::{Allocate, DeviceMemory};
use crate::model::Shape;
use crate::pattern;

/// Regions begin at multiples of this.
const REGION_ALIGN: u64 = 4096;
/// Size of a huge page: mappings begin at a multiple of it, so that they can use them.
const HUGE: usize = 2 << 20;

/// Host memory in huge pages where the system gives them.
pub struct Mapping {
    map: NonNull<u8>,
    mapped: usize,
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: plain memory, owned; access goes through `&self` pointers whose users synchronise by pages.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps and touches `length` bytes.
    pub fn new(length: usize) -> Result<Self, String> {
        let length = length.max(1).next_multiple_of(HUGE);
        let mapped = length + HUGE;
        // SAFETY: a new anonymous mapping.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(format!(
                "no memory for {length} bytes of blocks in flight: {}; lower iodepth",
                std::io::Error::last_os_error()
            ));
        }
        let start = (map as usize).next_multiple_of(HUGE) - map as usize;
        // SAFETY: `start` is less than HUGE, by which the mapping is longer than `length`.
        let base = unsafe { map.cast::<u8>().add(start) };
        // SAFETY: the range lies inside the mapping; a refusal only means small pages.
        unsafe { libc::madvise(base.cast(), length, libc::MADV_HUGEPAGE) };
        // SAFETY: the range lies inside the new mapping, which nobody else knows.
        unsafe { base.write_bytes(0, length) };
        let not_null =
            |pointer| NonNull::new(pointer).ok_or_else(|| String::from("mmap gave null"));
        Ok(Self { map: not_null(map.cast())?, mapped, base: not_null(base)?, length })
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped, once.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.mapped) };
    }
}

enum Backing {
    Host(Mapping),
    Device(Box<dyn DeviceMemory>),
}

/// Paged memory for some blocks.
pub struct Pages {
    backing: Backing,
    /// Bytes of each slice of the part, all layers.
    slices: Vec<u64>,
    /// Offset of each slice's region.
    regions: Vec<u64>,
    slices_of_layer: usize,
    pages: usize,
}

impl Pages {
    /// Memory for `pages` blocks of this shape, on the host, or on a device.
    pub fn new(shape: &Shape, pages: usize, device: Option<&Allocate>) -> Result<Self, String> {
        let slices: Vec<u64> =
            (0..shape.layers).flat_map(|_| shape.layer_slices.iter().copied()).collect();
        let mut regions = Vec::with_capacity(slices.len());
        let mut end = 0_u64;
        for bytes in &slices {
            regions.push(end);
            end += (bytes * pages as u64).next_multiple_of(REGION_ALIGN);
        }
        let backing = match device {
            Some(allocate) => Backing::Device(allocate(end as usize)?),
            None => Backing::Host(Mapping::new(end as usize)?),
        };
        Ok(Self { backing, slices, regions, slices_of_layer: shape.layer_slices.len(), pages })
    }

    /// The same with blocks in it that are not zeros: some drives and file systems store those in no time.
    /// `thread` tells the blocks of threads apart.
    pub fn filled(
        shape: &Shape,
        pages: usize,
        device: Option<&Allocate>,
        thread: usize,
    ) -> Result<Self, String> {
        let memory = Self::new(shape, pages, device)?;
        for page in 0..pages {
            memory.fill(page, &pattern::block_id(u64::MAX, (thread * pages + page) as u64));
        }
        Ok(memory)
    }

    /// Base and length of all of it, for registration.
    pub fn span(&self) -> (*mut u8, usize) {
        match &self.backing {
            Backing::Host(map) => (map.base(), map.len()),
            Backing::Device(memory) => (memory.base(), memory.len()),
        }
    }

    /// Pushes the addresses of the slices of `layer` of the block at `page`, or of all layers.
    pub fn addresses(&self, page: usize, layer: Option<u32>, out: &mut Vec<*mut c_void>) {
        assert!(page < self.pages);
        let (base, _) = self.span();
        let range = match layer {
            Some(layer) => {
                let first = layer as usize * self.slices_of_layer;
                first..first + self.slices_of_layer
            }
            None => 0..self.slices.len(),
        };
        for slice in range {
            let offset = self.regions[slice] + self.slices[slice] * page as u64;
            out.push(base.wrapping_add(offset as usize).cast());
        }
    }

    /// Writes the pattern of a block into its page.
    pub fn fill(&self, page: usize, id: &[u8; 16]) {
        self.each_slice(page, |offset, memory| pattern::fill(id, offset, memory), true);
    }

    /// Writes zeros into a page, so that a load that does nothing is seen.
    pub fn clear(&self, page: usize) {
        self.each_slice(page, |_, memory| memory.fill(0), true);
    }

    /// Offset in the block of the first wrong byte of a page.
    pub fn check(&self, page: usize, id: &[u8; 16]) -> Option<u64> {
        let mut wrong = None;
        self.each_slice(
            page,
            |offset, memory| wrong = wrong.or_else(|| pattern::check(id, offset, memory)),
            false,
        );
        wrong
    }

    fn each_slice(&self, page: usize, mut visit: impl FnMut(u64, &mut [u8]), write: bool) {
        assert!(page < self.pages);
        let mut offset = 0;
        for (slice, &bytes) in self.slices.iter().enumerate() {
            let at = (self.regions[slice] + bytes * page as u64) as usize;
            match &self.backing {
                Backing::Host(map) => {
                    // SAFETY: region and page lie inside the mapping (`new` sized it); a page is used by
                    // one task at a time, and this is called only while no task uses it.
                    let memory = unsafe {
                        std::slice::from_raw_parts_mut(map.base().add(at), bytes as usize)
                    };
                    visit(offset, memory);
                }
                Backing::Device(memory) => {
                    let mut copy = vec![0; bytes as usize];
                    if !write {
                        memory.read(at, &mut copy);
                    }
                    visit(offset, &mut copy);
                    if write {
                        memory.write(at, &copy);
                    }
                }
            }
            offset += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: pages of all slices lie apart; filling one leaves the others; what is filled checks.
    #[test]
    fn pages_do_not_overlap() {
        let shape = Shape { layers: 3, layer_slices: vec![4096, 1024] };
        let pages = Pages::new(&shape, 5, None).unwrap();
        let ids: Vec<_> = (0..5).map(|n| pattern::block_id(9, n)).collect();
        for (page, id) in ids.iter().enumerate() {
            pages.fill(page, id);
        }
        for (page, id) in ids.iter().enumerate() {
            assert_eq!(pages.check(page, id), None, "page {page}");
        }
        pages.clear(2);
        assert_eq!(pages.check(2, &ids[2]), Some(0));
        assert_eq!(pages.check(3, &ids[3]), None);
        let mut addresses = Vec::new();
        pages.addresses(4, Some(1), &mut addresses);
        assert_eq!(addresses.len(), 2);
        pages.addresses(4, None, &mut addresses);
        assert_eq!(addresses[2 + 2], addresses[0]);
    }
}

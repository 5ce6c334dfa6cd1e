//! Memory of the index at every step of its growth: what the allocator counts, and the mappings beside it.
//!
//! `cargo bench --bench index_memory` goes to 20 million parts; under `cargo test` to a quarter of a million.
//! Fails where a part costs more than the promise: 64 bytes steady, 80 at the peak of growth.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use ucm::block::{BlockId, PartKey};
use ucm::posix::index::{Found, Index, Location};

static NOW: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; only numbers are kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NOW.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        NOW.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes a part may cost when nothing grows.
const STEADY_MAX: f64 = 64.0;
/// Bytes a part may cost at the peak of growth.
const PEAK_MAX: f64 = 80.0;
/// The promise holds from this size on; below, empty shards weigh more than parts.
const FIRST: u64 = 500_000;

fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

fn main() {
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let (first, last) = if measuring { (FIRST, 20_000_000) } else { (100_000, 250_000) };
    let before = NOW.load(Ordering::Relaxed);
    let index = Index::new();
    let (mut steady, mut peak) = (0.0_f64, 0.0_f64);
    let mut slowest = std::time::Duration::ZERO;
    for number in 1..=last {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&mix(number).to_le_bytes());
        id[8..].copy_from_slice(&mix(!number).to_le_bytes());
        let location = Location { segment: 1, page: number as u32 };
        let start = std::time::Instant::now();
        index
            .insert(&PartKey { block: BlockId(id), part: 0 }, Found { location, checksum: number });
        slowest = slowest.max(start.elapsed());
        if number >= first {
            let counted = NOW.load(Ordering::Relaxed) - before;
            let per_part = |mapped: usize| (counted + mapped) as f64 / number as f64;
            steady = steady.max(per_part(index.mapped_bytes()));
            peak = peak.max(per_part(index.mapped_bytes_max()));
        }
    }
    println!(
        "index of {last} parts: at most {steady:.1} bytes a part steady, {peak:.1} at the peak; slowest insert {slowest:?}"
    );
    assert!(steady <= STEADY_MAX && peak <= PEAK_MAX, "more than {STEADY_MAX} / {PEAK_MAX} bytes");
}

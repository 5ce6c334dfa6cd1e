//! Growth of the index: its memory at every step, what the allocator counts and the mappings beside it; and what
//! lookups of another thread feel of it.
//!
//! `cargo bench --bench index_memory` goes to 20 million parts, with lookups to 4 million; under `cargo test` to a
//! quarter of a million. Fails where a part costs more than the promise, 64 bytes steady and 80 at the peak of growth,
//! and where a part that is there is not found. Times are printed; they are for a machine that does nothing else.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

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

/// Parts that are inserted while another thread looks parts up.
const BESIDE: u64 = 4_000_000;

/// Part `number`, and what is kept of it.
fn part(number: u64) -> (PartKey, Found) {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&mix(number).to_le_bytes());
    id[8..].copy_from_slice(&mix(!number).to_le_bytes());
    let location = Location { segment: 1, page: number as u32 };
    (PartKey { block: BlockId(id), part: 0 }, Found { location, checksum: number })
}

fn main() {
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let (first, last) = if measuring { (FIRST, 20_000_000) } else { (100_000, 250_000) };
    memory(first, last);
    lookups(if measuring { BESIDE } else { 100_000 });
}

/// What a part costs at every step from `first` to `last` parts.
fn memory(first: u64, last: u64) {
    let before = NOW.load(Ordering::Relaxed);
    let index = Index::new();
    let (mut steady, mut peak) = (0.0_f64, 0.0_f64);
    let mut slowest = Duration::ZERO;
    for number in 1..=last {
        let (key, found) = part(number);
        let start = Instant::now();
        index.insert(&key, found);
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

/// How long lookups of another thread take while the index grows to `last` parts, and while the same parts are
/// inserted once more, which moves them and grows nothing.
fn lookups(last: u64) {
    let index = Index::new();
    // One is there, so that there is something to find.
    let (key, found) = part(1);
    index.insert(&key, found);
    let inserted = AtomicU64::new(1);
    for what in ["while it grows", "without growth"] {
        let over = AtomicBool::new(false);
        let (seen, seconds) = std::thread::scope(|scope| {
            let thread = scope.spawn(|| look_up(&index, &inserted, &over));
            let begin = Instant::now();
            for number in 1..=last {
                let (key, found) = part(number);
                index.insert(&key, found);
                inserted.fetch_max(number, Ordering::Release);
            }
            let seconds = begin.elapsed().as_secs_f64();
            over.store(true, Ordering::Relaxed);
            (thread.join().expect("every part that was inserted is found"), seconds)
        });
        println!("{last} parts inserted in {seconds:.2} s, {what}; {seen}");
    }
}

/// Looks up parts that are there, one by one, until it is over.
fn look_up(index: &Index, inserted: &AtomicU64, over: &AtomicBool) -> Latencies {
    let mut seen =
        Latencies { counts: vec![0; EXACT_NS], longer: Vec::new(), worked: Duration::ZERO };
    let mut turn = 0;
    while !over.load(Ordering::Relaxed) {
        turn += 1;
        let number = 1 + mix(turn) % inserted.load(Ordering::Acquire);
        let (key, found) = part(number);
        let (worked, start) = (on_processor(), Instant::now());
        let answer = index.find(&key);
        let took = start.elapsed().as_nanos() as u64;
        seen.worked = seen.worked.max(on_processor() - worked);
        assert_eq!(answer, Some(found), "part {number}");
        match seen.counts.get_mut(took as usize) {
            Some(count) => *count += 1,
            None => seen.longer.push(took),
        }
    }
    seen.longer.sort_unstable();
    seen
}

/// How long this thread has been on a processor, in user mode and in the kernel.
fn on_processor() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the out pointer is a local.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(status, 0, "clock_gettime of the thread's own clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Latencies up to here are counted by the nanosecond.
const EXACT_NS: usize = 100_000;

/// Latencies of lookups, in nanoseconds; the clock that takes them included.
struct Latencies {
    counts: Vec<u64>,
    longer: Vec<u64>,
    /// The longest, without the time that others had the processor.
    worked: Duration,
}

impl Latencies {
    fn count(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.longer.len() as u64
    }

    /// What this share of the lookups did not exceed.
    fn at(&self, share: f64) -> Duration {
        let rank = (self.count() as f64 * share).ceil() as u64;
        let mut passed = 0;
        let short = self.counts.iter().position(|count| {
            passed += count;
            passed >= rank
        });
        let longer = || self.longer.get(rank.saturating_sub(passed + 1) as usize).copied();
        Duration::from_nanos(short.map_or_else(|| longer().unwrap_or(0), |ns| ns as u64))
    }

    fn longest(&self) -> Duration {
        let short = self.counts.iter().rposition(|count| *count > 0).unwrap_or(0) as u64;
        Duration::from_nanos(self.longer.last().copied().unwrap_or(short))
    }
}

impl std::fmt::Display for Latencies {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [half, most] = [0.5, 0.999].map(|share| self.at(share));
        let (count, longest, worked) = (self.count(), self.longest(), self.worked);
        write!(
            out,
            "{count} lookups beside: median {half:?}, 99.9 % {most:?}, longest {longest:?}, on the processor {worked:?}"
        )
    }
}

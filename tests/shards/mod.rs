//! Shards of every form, jobs that copy them, a naive model of what a copy does to them, and a copy worker in
//! miniature.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ucm::block::SliceShape;
use ucm::device::{CapturedEvent, CopyJob, CopyStream, Device, Direction, Finished, Marker, Wake};
use ucm::error::Result;

/// Longer than anything here takes on a busy machine; a test that waits so long has hung.
const PATIENCE: Duration = Duration::from_secs(20);

/// A copy worker in miniature: parks until it is woken.
pub struct Worker {
    stream: Option<Box<dyn CopyStream>>,
    woken: Arc<(Mutex<bool>, Condvar)>,
    pub wakes: Arc<AtomicUsize>,
}

impl Worker {
    pub fn new(device: &dyn Device) -> Result<Self> {
        let woken = Arc::new((Mutex::new(false), Condvar::new()));
        let wakes = Arc::new(AtomicUsize::new(0));
        let (signal, count) = (woken.clone(), wakes.clone());
        let wake: Wake = Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
            *signal.0.lock().unwrap() = true;
            signal.1.notify_one();
        });
        Ok(Self { stream: Some(device.open_stream(wake)?), woken, wakes })
    }

    pub fn enqueue(&mut self, jobs: &[CopyJob<'_>]) -> Option<Marker> {
        // SAFETY: tests keep memory and staging until `finish` has reported the jobs.
        unsafe { self.stream.as_mut().unwrap().enqueue(jobs) }
    }

    /// Tickets of the last `enqueue` that will end with an error.
    pub fn failed(&self) -> Vec<u64> {
        self.stream.as_ref().unwrap().failed().to_vec()
    }

    /// Enqueues one job and waits for its end.
    pub fn run(&mut self, job: CopyJob<'_>) -> Result<()> {
        self.enqueue(&[job]);
        self.finish(1).remove(0).result
    }

    /// Closes the stream, as a store that closes does.
    pub fn close(&mut self) {
        self.stream = None;
    }

    pub fn poll(&mut self) -> Vec<Finished> {
        let mut finished = Vec::new();
        self.stream.as_mut().unwrap().poll(&mut finished);
        finished
    }

    /// Parks until `count` jobs are reported.
    pub fn finish(&mut self, count: usize) -> Vec<Finished> {
        let (begin, mut finished) = (Instant::now(), self.poll());
        while finished.len() < count {
            assert!(begin.elapsed() < PATIENCE, "{} of {count} jobs reported", finished.len());
            let (lock, signal) = &*self.woken;
            let mut woken = lock.lock().unwrap();
            while !*woken {
                let (guard, timeout) = signal.wait_timeout(woken, PATIENCE).unwrap();
                woken = guard;
                assert!(!timeout.timed_out(), "nobody wakes the worker");
            }
            *woken = false;
            drop(woken);
            finished.append(&mut self.poll());
        }
        assert_eq!(finished.len(), count, "jobs reported twice");
        finished
    }
}

/// The tensor slices of one shard in caller memory.
pub struct Slices {
    pub addresses: Vec<*mut c_void>,
    pub shapes: Vec<SliceShape>,
}

impl Slices {
    /// One run of bytes.
    pub fn one(base: *mut u8, bytes: usize) -> Self {
        Self { addresses: vec![base.cast()], shapes: vec![SliceShape::contiguous(bytes as u64)] }
    }

    /// These shapes, each at its offset from `base`.
    pub fn at(base: *mut u8, offsets: &[usize], shapes: &[SliceShape]) -> Self {
        let addresses = offsets.iter().map(|offset| base.wrapping_add(*offset).cast()).collect();
        Self { addresses, shapes: shapes.to_vec() }
    }

    /// A save of the shard into staging memory.
    pub fn gather(&self, ticket: u64, staging: *mut u8) -> CopyJob<'_> {
        self.job(Direction::Gather, ticket, staging)
    }

    /// A load of the shard out of staging memory.
    pub fn scatter(&self, ticket: u64, staging: *mut u8) -> CopyJob<'_> {
        self.job(Direction::Scatter, ticket, staging)
    }

    pub fn job(&self, direction: Direction, ticket: u64, staging: *mut u8) -> CopyJob<'_> {
        let (addresses, slices) = (&self.addresses[..], &self.shapes[..]);
        CopyJob { ticket, direction, staging, addresses, slices, wait: None }
    }
}

/// The job, behind an event.
pub fn behind<'a>(event: &'a CapturedEvent, job: CopyJob<'a>) -> CopyJob<'a> {
    CopyJob { wait: Some(event), ..job }
}

/// Bytes that differ by place and by round.
pub fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i * 31 + seed * 77) ^ (i >> 8)) as u8).collect()
}

fn strided(run_bytes: u64, dimensions: &[(u64, u64)]) -> SliceShape {
    SliceShape { run_bytes, dimensions: dimensions.to_vec() }
}

/// One of each form of slice, and few rows of each, so that each form takes few calls.
pub fn few_shapes() -> Vec<SliceShape> {
    vec![
        SliceShape::contiguous(8 << 10),
        SliceShape::contiguous(8 << 10),
        SliceShape::contiguous(2001),
        strided(256, &[(6, 512)]),
        strided(2, &[(2, 40_000), (2, 2), (2, 300), (2, 17)]),
        SliceShape::contiguous(1),
    ]
}

/// Slices of every form: contiguous neighbours, strangers, rows, permuted dimensions, odd lengths.
pub fn shapes() -> Vec<SliceShape> {
    vec![
        SliceShape::contiguous(64 << 10),
        SliceShape::contiguous(64 << 10),
        SliceShape::contiguous(20_001),
        strided(256, &[(96, 512)]),
        strided(16, &[(4, 64), (8, 4096)]),
        strided(2, &[(3, 40_000), (5, 2), (7, 300), (2, 17)]),
        strided(1, &[(2, 50_000), (2, 9000), (2, 3000), (2, 700), (3, 5)]),
        SliceShape::contiguous(1),
    ]
}

/// Offsets at which the slices lie apart, the first two next to each other.
pub fn layout(shapes: &[SliceShape]) -> (Vec<usize>, usize) {
    let (mut at, mut offsets) = (0usize, Vec::new());
    for (i, shape) in shapes.iter().enumerate() {
        offsets.push(at);
        at += shape.span() as usize;
        if i > 0 {
            at = at.next_multiple_of(256) + 512;
        }
    }
    (offsets, at)
}

/// The bytes of a shard by the definition of `SliceShape`.
pub fn gathered(memory: &[u8], offsets: &[usize], shapes: &[SliceShape]) -> Vec<u8> {
    let mut out = Vec::new();
    for (base, shape) in offsets.iter().zip(shapes) {
        each_run(shape, |offset| {
            let at = base + offset as usize;
            out.extend_from_slice(&memory[at..at + shape.run_bytes as usize]);
        });
    }
    out
}

pub fn scattered(memory: &mut [u8], bytes: &[u8], offsets: &[usize], shapes: &[SliceShape]) {
    let mut from = 0;
    for (base, shape) in offsets.iter().zip(shapes) {
        let run = shape.run_bytes as usize;
        each_run(shape, |offset| {
            let at = base + offset as usize;
            memory[at..at + run].copy_from_slice(&bytes[from..from + run]);
            from += run;
        });
    }
}

fn each_run(shape: &SliceShape, mut run: impl FnMut(u64)) {
    let runs: u64 = shape.dimensions.iter().map(|(count, _)| count).product();
    for index in 0..runs {
        let (mut rest, mut offset) = (index, 0);
        for (count, stride) in shape.dimensions.iter().rev() {
            offset += rest % count * stride;
            rest /= count;
        }
        run(offset);
    }
}

pub fn shard_bytes(shapes: &[SliceShape]) -> usize {
    shapes.iter().map(|shape| shape.bytes() as usize).sum()
}

/// Page-aligned host memory, as the arena is.
pub struct Pages {
    pub base: *mut u8,
    pub bytes: usize,
}

// SAFETY: plain memory; tests order their own accesses.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    pub fn new(bytes: usize) -> Self {
        // SAFETY: the size is not zero, the alignment a power of two; checked for null.
        let base = unsafe { std::alloc::alloc_zeroed(Self::layout(bytes)) };
        assert!(!base.is_null());
        Self { base, bytes }
    }

    fn layout(bytes: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(bytes.next_multiple_of(4096), 4096).unwrap()
    }

    /// The bytes now. Nothing may be copying into them.
    pub fn read(&self) -> Vec<u8> {
        // SAFETY: the memory is ours and initialised; the caller says that nobody writes it.
        unsafe { std::slice::from_raw_parts(self.base, self.bytes) }.to_vec()
    }

    pub fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes);
        // SAFETY: the memory is ours and long enough.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base, bytes.len()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.base, Self::layout(self.bytes)) }
    }
}

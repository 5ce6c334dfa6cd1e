//! What copies reach, as a share of one large plain copy.

use std::ffi::c_void;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use ucm::block::SliceShape;
use ucm::device::{CopyJob, Device, Direction};

use crate::gpu::Gpu;
use crate::shards::{Pages, Worker, pattern};
use crate::{open_with, pin};

/// Bytes of one measurement.
const BENCH_BYTES: usize = 448 << 20;

/// Blocks of one measurement.
const BENCH_BLOCKS: usize = 64;

/// Goal: prints what copies reach, as a share of one large plain copy in the same run, for the table in
/// `docs/performance.md`; fails only where a copy is wrong.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn throughput() {
    let gpu = Gpu::new();
    let arena = Pages::new(BENCH_BYTES);
    arena.write(&pattern(BENCH_BYTES, 5));
    let memory = gpu.alloc(2 * BENCH_BYTES);
    let device = open_with("");
    pin(&*device, &arena);
    let report = device.report();
    println!("{}", report.description);
    report.copies.iter().chain(&report.fallbacks).for_each(|line| println!("{line}"));
    drop(device_unpinned(device, &arena));
    for strategy in ["", "plain", "batch", "bounce", "kernel"] {
        let device = open_with(strategy);
        pin(&*device, &arena);
        let bench = Bench { gpu: &gpu, device: &*device, arena: &arena, memory };
        for slice in [2 << 20, 256 << 10, 144 << 10, 128 << 10, 32 << 10, 8 << 10] {
            for streams in [1, 2, 4] {
                let line = bench.ratios(&SliceShape::contiguous(slice as u64), streams);
                let name = if strategy.is_empty() { "calibrated" } else { strategy };
                println!("{name:>10} {:>5} KiB {streams} streams: {line}", slice >> 10);
            }
        }
        let rows = SliceShape { run_bytes: 256, dimensions: vec![(512, 512)] };
        let line = bench.ratios(&rows, 2);
        println!("{strategy:>10} 128 KiB in rows of 256 B, 2 streams: {line}");
        drop(device_unpinned(device, &arena));
    }
    gpu.free(memory);
}

fn device_unpinned(device: Arc<dyn Device>, arena: &Pages) -> Arc<dyn Device> {
    device.unpin(arena.base);
    device
}

/// What a measurement copies between, and with what.
struct Bench<'a> {
    gpu: &'a Gpu,
    device: &'a dyn Device,
    arena: &'a Pages,
    /// Device address of twice [`BENCH_BYTES`].
    memory: u64,
}

impl Bench<'_> {
    /// Save and load of [`BENCH_BLOCKS`] blocks of such slices next to the plain copy, interleaved; medians.
    fn ratios(&self, shape: &SliceShape, streams: usize) -> String {
        const REPEATS: usize = 7;
        let slice = shape.bytes() as usize;
        let mut line = String::new();
        for direction in [Direction::Gather, Direction::Scatter] {
            let (mut ours, mut plain, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..REPEATS {
                plain.push(self.plain_copy(direction));
                let (took, enqueued) = self.engine_copy(direction, shape, streams);
                ours.push(took);
                cpu.push(enqueued);
            }
            let median = |times: &mut Vec<Duration>| {
                times.sort();
                times[times.len() / 2].as_secs_f64()
            };
            let (ours, plain, cpu) = (median(&mut ours), median(&mut plain), median(&mut cpu));
            let bytes = (BENCH_BYTES / slice / BENCH_BLOCKS * slice * BENCH_BLOCKS) as f64;
            let (ours, plain) = (bytes / ours / 1e9, BENCH_BYTES as f64 / plain / 1e9);
            let name = if direction == Direction::Gather { "save" } else { "load" };
            line += &format!(
                "{name} {ours:5.1} GB/s = {:.3} of {plain:5.1} (enqueue {:.0} us)  ",
                ours / plain,
                cpu * 1e6
            );
        }
        line
    }

    fn plain_copy(&self, direction: Direction) -> Duration {
        let (host, begin) = (self.arena.base as u64, Instant::now());
        let (to, from) = match direction {
            Direction::Gather => (host, self.memory),
            Direction::Scatter => (self.memory, host),
        };
        self.gpu.copy(to, from, BENCH_BYTES, std::ptr::null_mut());
        self.gpu.sync();
        begin.elapsed()
    }

    /// Addresses of each block's slices. Those of one layer lie together, as in a paged cache, and each block is
    /// somewhere in it.
    fn places(&self, shape: &SliceShape, per_block: usize) -> Vec<Vec<*mut c_void>> {
        let apart = shape.span().next_multiple_of(256) as usize;
        let place = |block: usize| {
            let place = (block * 37) % BENCH_BLOCKS;
            let offsets = (0..per_block).map(move |layer| (layer * BENCH_BLOCKS + place) * apart);
            offsets.map(|offset| (self.memory as usize + offset) as *mut c_void).collect()
        };
        (0..BENCH_BLOCKS).map(place).collect()
    }

    /// How long the copies of all blocks take on so many streams, and how long the slowest of them enqueues.
    fn engine_copy(
        &self,
        direction: Direction,
        shape: &SliceShape,
        streams: usize,
    ) -> (Duration, Duration) {
        let slice = shape.bytes() as usize;
        let per_block = BENCH_BYTES / slice / BENCH_BLOCKS;
        let slices = vec![shape.clone(); per_block];
        let blocks: Vec<_> = self
            .places(shape, per_block)
            .into_iter()
            .enumerate()
            .map(|(block, addresses)| Block {
                ticket: block as u64,
                staging: self.arena.base.wrapping_add(block * per_block * slice),
                addresses,
            })
            .collect();
        let barrier = Barrier::new(streams + 1);
        std::thread::scope(|scope| {
            let workers: Vec<_> = blocks
                .chunks(BENCH_BLOCKS / streams)
                .map(|share| {
                    let (slices, barrier) = (&slices, &barrier);
                    scope.spawn(move || {
                        self.gpu.enter();
                        let mut worker = Worker::new(self.device).unwrap();
                        let jobs: Vec<_> =
                            share.iter().map(|block| block.job(direction, slices)).collect();
                        barrier.wait();
                        let begin = Instant::now();
                        worker.enqueue(&jobs);
                        let enqueued = begin.elapsed();
                        for done in worker.finish(jobs.len()) {
                            done.result.unwrap();
                        }
                        barrier.wait();
                        enqueued
                    })
                })
                .collect();
            barrier.wait();
            let begin = Instant::now();
            barrier.wait();
            let took = begin.elapsed();
            let enqueued = workers.into_iter().map(|worker| worker.join().unwrap()).max().unwrap();
            (took, enqueued)
        })
    }
}

/// One block of a measurement.
struct Block {
    ticket: u64,
    staging: *mut u8,
    addresses: Vec<*mut c_void>,
}

// SAFETY: addresses are handed to the driver, never followed.
unsafe impl Sync for Block {}

impl Block {
    fn job<'a>(&'a self, direction: Direction, slices: &'a [SliceShape]) -> CopyJob<'a> {
        let Self { ticket, staging, addresses } = self;
        CopyJob { ticket: *ticket, direction, staging: *staging, addresses, slices, wait: None }
    }
}

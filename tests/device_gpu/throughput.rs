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
        for slice in [2 << 20, 256 << 10, 144 << 10, 128 << 10, 32 << 10, 8 << 10] {
            for streams in [1, 2, 4] {
                let line = ratios(&gpu, &*device, &arena, memory, slice, streams);
                let name = if strategy.is_empty() { "calibrated" } else { strategy };
                println!("{name:>10} {:>5} KiB {streams} streams: {line}", slice >> 10);
            }
        }
        let rows = SliceShape { run_bytes: 256, dimensions: vec![(512, 512)] };
        let line = ratio_of(&gpu, &*device, &arena, memory, &rows, 128 << 10, 2);
        println!("{strategy:>10} 128 KiB in rows of 256 B, 2 streams: {line}");
        drop(device_unpinned(device, &arena));
    }
    gpu.free(memory);
}

fn device_unpinned(device: Arc<dyn Device>, arena: &Pages) -> Arc<dyn Device> {
    device.unpin(arena.base);
    device
}

fn ratios(
    gpu: &Gpu,
    device: &dyn Device,
    arena: &Pages,
    memory: u64,
    slice: usize,
    streams: usize,
) -> String {
    ratio_of(gpu, device, arena, memory, &SliceShape::contiguous(slice as u64), slice, streams)
}

/// Save and load of [`BENCH_BLOCKS`] blocks next to the plain copy, interleaved; medians.
fn ratio_of(
    gpu: &Gpu,
    device: &dyn Device,
    arena: &Pages,
    memory: u64,
    shape: &SliceShape,
    slice: usize,
    streams: usize,
) -> String {
    const REPEATS: usize = 7;
    let mut line = String::new();
    for direction in [Direction::Gather, Direction::Scatter] {
        let (mut ours, mut plain, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..REPEATS {
            plain.push(plain_copy(gpu, arena, memory, direction));
            let (took, enqueued) =
                engine_copy(gpu, device, arena, memory, shape, slice, streams, direction);
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

fn plain_copy(gpu: &Gpu, arena: &Pages, memory: u64, direction: Direction) -> Duration {
    let (host, begin) = (arena.base as u64, Instant::now());
    let (to, from) = if direction == Direction::Gather { (host, memory) } else { (memory, host) };
    gpu.copy(to, from, BENCH_BYTES, std::ptr::null_mut());
    gpu.sync();
    begin.elapsed()
}

#[allow(clippy::too_many_arguments, reason = "a measurement has many knobs")]
fn engine_copy(
    gpu: &Gpu,
    device: &dyn Device,
    arena: &Pages,
    memory: u64,
    shape: &SliceShape,
    slice: usize,
    streams: usize,
    direction: Direction,
) -> (Duration, Duration) {
    let per_block = BENCH_BYTES / slice / BENCH_BLOCKS;
    let slices = vec![shape.clone(); per_block];
    // Blocks of one layer lie together, as in a paged cache, and each block is somewhere in it.
    let apart = shape.span().next_multiple_of(256) as usize;
    let places: Vec<Vec<*mut c_void>> = (0..BENCH_BLOCKS)
        .map(|block| {
            let place = (block * 37) % BENCH_BLOCKS;
            let offsets: Vec<_> =
                (0..per_block).map(|layer| (layer * BENCH_BLOCKS + place) * apart).collect();
            let address = |offset: usize| (memory as usize + offset) as *mut c_void;
            offsets.into_iter().map(address).collect()
        })
        .collect();
    let jobs: Vec<_> = places
        .iter()
        .enumerate()
        .map(|(block, addresses)| {
            let staging = arena.base as usize + block * per_block * slice;
            (block as u64, staging, addresses)
        })
        .collect();
    let barrier = Barrier::new(streams + 1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = jobs
            .chunks(BENCH_BLOCKS / streams)
            .map(|share| {
                let share: Vec<_> = share
                    .iter()
                    .map(|(ticket, staging, addresses)| {
                        let addresses: Vec<usize> = addresses.iter().map(|a| *a as usize).collect();
                        (*ticket, *staging, addresses)
                    })
                    .collect();
                let (slices, barrier, gpu) = (&slices, &barrier, &gpu);
                scope.spawn(move || {
                    gpu.enter();
                    let mut worker = Worker::new(device).unwrap();
                    let addresses: Vec<Vec<*mut c_void>> = share
                        .iter()
                        .map(|(_, _, addresses)| {
                            addresses.iter().map(|address| *address as *mut c_void).collect()
                        })
                        .collect();
                    let jobs: Vec<_> = share
                        .iter()
                        .zip(&addresses)
                        .map(|((ticket, staging, _), addresses)| CopyJob {
                            ticket: *ticket,
                            direction,
                            staging: *staging as *mut u8,
                            addresses,
                            slices,
                            wait: None,
                        })
                        .collect();
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

//! The CUDA device on a real GPU: bytes, order, captures, failures, and what the copies reach. Run by
//! `cargo xtask gpu-test`; ignored elsewhere.

mod gpu;
mod shards;

use std::ffi::c_void;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use gpu::{Gpu, filled};
use shards::{Pages, Worker, gathered, layout, pattern, scattered, shapes, shard_bytes};
use ucm::block::SliceShape;
use ucm::config::DeviceKind;
use ucm::device::{CopyJob, Device, Direction, Staging, open};
use ucm::error::ErrorKind;

const STRATEGIES: [&str; 5] = ["plain", "batch", "bounce", "kernel", ""];

/// Some tens of milliseconds on any GPU.
const SLOW_CYCLES: u64 = 60_000_000;

/// Opens device 0 with a way of copying; the empty one calibrates. Tests run one at a time.
fn open_with(strategy: &str) -> Arc<dyn Device> {
    // SAFETY: `cargo xtask gpu-test` runs one test at a time, and no other thread reads the environment.
    unsafe {
        match strategy {
            "" => std::env::remove_var("UCM_CUDA_COPY"),
            _ => std::env::set_var("UCM_CUDA_COPY", strategy),
        }
    }
    open(DeviceKind::Cuda, 0).unwrap()
}

fn pinned(device: &dyn Device, arena: &Pages) {
    // SAFETY: every test unpins before the pages go.
    unsafe { device.pin(arena.base, arena.bytes) }.unwrap();
}

fn addresses(base: u64, offsets: &[usize]) -> Vec<*mut c_void> {
    offsets.iter().map(|offset| (base as usize + offset) as *mut c_void).collect()
}

/// Goal: slices of every form come and go byte for byte, in every way of copying.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn slices_are_exact() {
    let gpu = Gpu::new();
    let shapes = shapes();
    let (offsets, span) = layout(&shapes);
    let shard = shard_bytes(&shapes);
    for strategy in STRATEGIES {
        let device = open_with(strategy);
        let arena = Pages::new(shard);
        pinned(&*device, &arena);
        let mut worker = Worker::new(&*device).unwrap();
        let memory = gpu.alloc(span);
        let addresses = addresses(memory, &offsets);
        let job = |direction| CopyJob {
            ticket: 1,
            direction,
            staging: arena.base,
            addresses: &addresses,
            slices: &shapes,
            wait: None,
        };
        let bytes = pattern(span, 1);
        gpu.write(memory, &bytes);
        worker.enqueue(&[job(Direction::Gather)]);
        worker.finish(1).remove(0).result.unwrap();
        assert!(arena.read() == gathered(&bytes, &offsets, &shapes), "{strategy}: save");
        let fresh = pattern(shard, 2);
        arena.write(&fresh);
        worker.enqueue(&[job(Direction::Scatter)]);
        worker.finish(1).remove(0).result.unwrap();
        let mut expected = bytes;
        scattered(&mut expected, &fresh, &offsets, &shapes);
        assert!(gpu.read(memory, span) == expected, "{strategy}: load");
        drop(worker);
        device.unpin(arena.base);
        gpu.free(memory);
    }
}

/// Goal: a save waits for the kernel that writes its source, on a stream of its own and on the default
/// stream; the same save without the event sees the old bytes, so the test would catch a missing wait.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn saves_wait_for_the_kernel() {
    const WORDS: usize = 1 << 20;
    let gpu = Gpu::new();
    let own = gpu.stream();
    for strategy in STRATEGIES {
        let device = open_with(strategy);
        let arena = Pages::new(4 * WORDS);
        pinned(&*device, &arena);
        let mut worker = Worker::new(&*device).unwrap();
        let memory = gpu.alloc(4 * WORDS);
        let slice = 64 << 10;
        let slices = vec![SliceShape::contiguous(slice as u64); 4 * WORDS / slice];
        // Backwards, so that nothing merges.
        let offsets: Vec<_> = (0..slices.len()).rev().map(|i| i * slice).collect();
        let addresses = addresses(memory, &offsets);
        for (round, stream) in
            [own, std::ptr::null_mut(), own, std::ptr::null_mut()].iter().enumerate()
        {
            let seed = round as u32 + 1;
            let is_told = round < 2;
            gpu.write(memory, &vec![0xEE; 4 * WORDS]);
            gpu.slow_fill(*stream, memory, WORDS as u32, seed, SLOW_CYCLES);
            let event = gpu.event();
            gpu.record(event, *stream);
            // SAFETY: the event lives.
            let wait = is_told.then(|| unsafe { device.capture_event(event) }.unwrap());
            gpu.destroy_event(event);
            worker.enqueue(&[CopyJob {
                ticket: 1,
                direction: Direction::Gather,
                staging: arena.base,
                addresses: &addresses,
                slices: &slices,
                wait: wait.as_ref(),
            }]);
            worker.finish(1).remove(0).result.unwrap();
            gpu.sync();
            let written = filled(WORDS, seed);
            let expected: Vec<u8> =
                offsets.iter().flat_map(|at| &written[*at..at + slice]).copied().collect();
            let right = arena.read() == expected;
            assert_eq!(right, is_told, "{strategy}, round {round}: the event decides the bytes");
        }
        drop(worker);
        device.unpin(arena.base);
        gpu.free(memory);
    }
}

/// Goal: a compute stream that was made to wait reads the loaded bytes, layer after layer, though its
/// reads are enqueued before the loads have ended.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn streams_wait_for_loads() {
    const LAYERS: usize = 28;
    const BYTES: usize = 1 << 20;
    let gpu = Gpu::new();
    let stream = gpu.stream();
    for strategy in STRATEGIES {
        let device = open_with(strategy);
        let arena = Pages::new(LAYERS * BYTES);
        pinned(&*device, &arena);
        let bytes = pattern(LAYERS * BYTES, 3);
        arena.write(&bytes);
        let mut worker = Worker::new(&*device).unwrap();
        let (memory, copy) = (gpu.alloc(LAYERS * BYTES), gpu.alloc(LAYERS * BYTES));
        gpu.write(memory, &vec![0xEE; LAYERS * BYTES]);
        let slices = [SliceShape::contiguous(BYTES as u64)];
        for layer in 0..LAYERS {
            let addresses = addresses(memory, &[layer * BYTES]);
            let marker = worker.enqueue(&[CopyJob {
                ticket: layer as u64,
                direction: Direction::Scatter,
                staging: arena.base.wrapping_add(layer * BYTES),
                addresses: &addresses,
                slices: &slices,
                wait: None,
            }]);
            // SAFETY: the stream lives.
            unsafe { device.stream_wait(stream, &[marker.unwrap()]) }.unwrap();
            let at = (layer * BYTES) as u64;
            gpu.copy(copy + at, memory + at, BYTES, stream);
        }
        gpu.sync_stream(stream);
        assert!(gpu.read(copy, LAYERS * BYTES) == bytes, "{strategy}");
        for done in worker.finish(LAYERS) {
            done.result.unwrap();
        }
        drop(worker);
        device.unpin(arena.base);
        gpu.free(memory);
        gpu.free(copy);
    }
}

/// Goal: a graph captured in the strictest mode survives saves with events on other threads, and on the
/// capturing thread itself.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn captures_survive() {
    let gpu = Gpu::new();
    let (stream, other) = (gpu.stream(), gpu.stream());
    for strategy in STRATEGIES {
        let device = open_with(strategy);
        let arena = Pages::new(1 << 20);
        pinned(&*device, &arena);
        let memory = gpu.alloc(2 << 20);
        let event = gpu.event();
        gpu.slow_fill(other, memory, 1000, 1, SLOW_CYCLES);
        gpu.record(event, other);
        gpu.begin_capture(stream);
        gpu.slow_fill(stream, memory + (1 << 20), 1000, 1, 1000);
        // SAFETY: the event lives.
        let wait = unsafe { device.capture_event(event) }.unwrap();
        std::thread::scope(|scope| {
            let (arena, wait) = (&arena, &wait);
            scope.spawn(|| {
                let arena: &Pages = arena;
                let mut worker = Worker::new(&*device).unwrap();
                let addresses = addresses(memory, &[0]);
                let slices = [SliceShape::contiguous(1 << 20)];
                for direction in [Direction::Gather, Direction::Scatter] {
                    worker.enqueue(&[CopyJob {
                        ticket: 1,
                        direction,
                        staging: arena.base,
                        addresses: &addresses,
                        slices: &slices,
                        wait: Some(wait),
                    }]);
                    worker.finish(1).remove(0).result.unwrap();
                }
            });
        });
        // SAFETY: the stream lives.
        let refused = unsafe { device.stream_wait(stream, &[]) };
        assert!(refused.is_ok());
        gpu.end_capture(stream);
        device.unpin(arena.base);
        gpu.free(memory);
    }
}

/// Goal: ten thousand random saves and loads by four workers keep every byte.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn random_copies_are_exact() {
    const WORKERS: usize = 4;
    const ROUNDS: usize = 2500;
    let gpu = Gpu::new();
    let device = open_with("");
    std::thread::scope(|scope| {
        for index in 0..WORKERS {
            let (gpu, device) = (&gpu, &device);
            scope.spawn(move || {
                gpu.enter();
                let mut random = Random(index as u64 * 7919 + 1);
                let mut worker = Worker::new(&**device).unwrap();
                let arena = Pages::new(4 << 20);
                pinned(&**device, &arena);
                let memory = gpu.alloc(8 << 20);
                for round in 0..ROUNDS {
                    random_round(gpu, &mut worker, &arena, memory, &mut random, round);
                }
                drop(worker);
                device.unpin(arena.base);
                gpu.free(memory);
            });
        }
    });
}

/// One save of random slices to one slot, and one load of it to other places.
fn random_round(
    gpu: &Gpu,
    worker: &mut Worker,
    arena: &Pages,
    memory: u64,
    random: &mut Random,
    round: usize,
) {
    let count = 1 + random.below(40);
    let shapes: Vec<_> = (0..count)
        .map(|_| match random.below(3) {
            0 => SliceShape::contiguous(1 + random.below(60_000) as u64),
            1 => SliceShape::contiguous(4096 * (1 + random.below(16)) as u64),
            _ => {
                let (run, rows) =
                    (16 * (1 + random.below(32)) as u64, 1 + random.below(100) as u64);
                SliceShape { run_bytes: run, dimensions: vec![(rows, run + 16)] }
            }
        })
        .collect();
    let (offsets, span) = layout(&shapes);
    let shard = shard_bytes(&shapes);
    let bytes = pattern(span, round);
    gpu.write(memory, &bytes);
    let from = addresses(memory, &offsets);
    let to = addresses(memory + (4 << 20), &offsets);
    let job = |direction, addresses| CopyJob {
        ticket: 1,
        direction,
        staging: arena.base,
        addresses,
        slices: &shapes,
        wait: None,
    };
    worker.enqueue(&[job(Direction::Gather, &from)]);
    worker.finish(1).remove(0).result.unwrap();
    let saved = gathered(&bytes, &offsets, &shapes);
    assert!(arena.read()[..shard] == saved[..], "round {round}: save");
    worker.enqueue(&[job(Direction::Scatter, &to)]);
    worker.finish(1).remove(0).result.unwrap();
    let loaded = gpu.read(memory + (4 << 20), span);
    assert!(gathered(&loaded, &offsets, &shapes) == saved, "round {round}: load");
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Goal: host memory, and addresses behind an allocation, end as copies and errors, not as faults.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn addresses_are_checked() {
    let gpu = Gpu::new();
    for strategy in STRATEGIES {
        let device = open_with(strategy);
        let arena = Pages::new(1 << 20);
        pinned(&*device, &arena);
        let mut worker = Worker::new(&*device).unwrap();
        let memory = gpu.alloc(4 << 20);
        let host = Pages::new(1 << 20);
        host.write(&pattern(1 << 20, 8));
        let slices = [SliceShape::contiguous(1 << 20)];
        for (address, expected) in [
            (host.base as u64, None),
            (memory, None),
            (memory + (7 << 19), Some(ErrorKind::InvalidArgument)),
            (0, Some(ErrorKind::InvalidArgument)),
        ] {
            let addresses = addresses(address, &[0]);
            worker.enqueue(&[CopyJob {
                ticket: 1,
                direction: Direction::Gather,
                staging: arena.base,
                addresses: &addresses,
                slices: &slices,
                wait: None,
            }]);
            let result = worker.finish(1).remove(0).result;
            assert_eq!(result.err().map(|error| error.kind()), expected, "{strategy} {address:#x}");
            if address == host.base as u64 {
                assert!(arena.read() == host.read());
            }
        }
        drop(worker);
        device.unpin(arena.base);
        gpu.free(memory);
    }
}

/// Runs one test of this file in a process of its own: it breaks the process's context.
fn in_a_process(name: &str, part: impl FnOnce()) {
    const VARIABLE: &str = "UCM_TEST_BREAKS_CONTEXT";
    if std::env::var_os(VARIABLE).is_some() {
        return part();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(VARIABLE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}{text}", String::from_utf8_lossy(&output.stdout));
}

/// Goal: when a kernel of the model faults, copies end with DEVICE, their staging is kept, later ones are
/// refused, and everything closes.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn a_broken_context_is_survived() {
    in_a_process("a_broken_context_is_survived", || {
        let gpu = Gpu::new();
        let device = open_with("");
        let arena = Pages::new(64 << 20);
        pinned(&*device, &arena);
        let mut worker = Worker::new(&*device).unwrap();
        let (memory, stream, event) = (gpu.alloc(64 << 20), gpu.stream(), gpu.event());
        gpu.slow_fill(stream, memory, 1000, 1, SLOW_CYCLES);
        gpu.fault(stream);
        gpu.record(event, stream);
        // SAFETY: the event lives.
        let wait = unsafe { device.capture_event(event) }.unwrap();
        let addresses = addresses(memory, &[0]);
        let slices = [SliceShape::contiguous(64 << 20)];
        let job = |ticket| CopyJob {
            ticket,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: Some(&wait),
        };
        worker.enqueue(&[job(1)]);
        let finished = worker.finish(1).remove(0);
        let error = finished.result.unwrap_err();
        println!("a fault: {error}");
        assert_eq!(error.kind(), ErrorKind::Device);
        assert_eq!(finished.staging, Staging::Lost);
        worker.enqueue(&[job(2)]);
        assert_eq!(worker.finish(1)[0].staging, Staging::Free);
        drop(worker);
        device.unpin(arena.base);
        drop(device);
        std::mem::forget(arena);
    });
}

/// Goal: when somebody resets the device, copies end with DEVICE, and everything closes.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn a_reset_device_is_survived() {
    in_a_process("a_reset_device_is_survived", || {
        let gpu = Gpu::new();
        let device = open_with("");
        let arena = Pages::new(64 << 20);
        pinned(&*device, &arena);
        let mut worker = Worker::new(&*device).unwrap();
        let memory = gpu.alloc(64 << 20);
        let addresses = addresses(memory, &[0]);
        let slices = [SliceShape::contiguous(64 << 20)];
        let job = |ticket| CopyJob {
            ticket,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: None,
        };
        worker.enqueue(&[job(1)]);
        gpu.reset_device();
        let finished = worker.finish(1).remove(0);
        println!("a reset: {:?}, {:?}", finished.result, finished.staging);
        worker.enqueue(&[job(2)]);
        let finished = worker.finish(1).remove(0);
        println!("after it: {:?}, {:?}", finished.result, finished.staging);
        assert!(finished.result.is_err());
        drop(worker);
        device.unpin(arena.base);
        drop(device);
        std::mem::forget(arena);
    });
}

/// Goal: prints what capturing an event costs the caller, while the model's stream is busy and another
/// thread enqueues copies.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn captures_are_quick() {
    const ROUNDS: usize = 200;
    let gpu = Gpu::new();
    let device = open_with("");
    let (memory, stream, event) = (gpu.alloc(8192), gpu.stream(), gpu.event());
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        gpu.slow_fill(stream, memory, 1000, 1, 200_000);
        gpu.record(event, stream);
        let begin = Instant::now();
        // SAFETY: the event lives.
        let captured = unsafe { device.capture_event(event) }.unwrap();
        times.push(begin.elapsed());
        drop(captured);
    }
    gpu.sync();
    times.sort();
    println!(
        "capture of a pending event: median {:?}, worst {:?}",
        times[ROUNDS / 2],
        times[ROUNDS - 1]
    );
    assert!(times[ROUNDS / 2] < Duration::from_micros(50));
    gpu.free(memory);
}

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
    pinned(&*device, &arena);
    let report = device.report();
    println!("{}", report.description);
    report.copies.iter().chain(&report.fallbacks).for_each(|line| println!("{line}"));
    drop(device_unpinned(device, &arena));
    for strategy in ["", "plain", "batch", "bounce", "kernel"] {
        let device = open_with(strategy);
        pinned(&*device, &arena);
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
            addresses(memory, &offsets)
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

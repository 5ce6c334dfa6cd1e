//! What waits for what: kernels, loads, graphs that are captured.

use std::time::{Duration, Instant};

use ucm::block::SliceShape;
use ucm::device::{CopyJob, Direction};

use crate::gpu::{Gpu, filled};
use crate::shards::{Slices, Worker, behind, pattern};
use crate::{Rig, SLOW_CYCLES, STRATEGIES, open_with};

/// Goal: a save waits for the kernel that writes its source, on a stream of its own and on the default
/// stream; the same save without the event sees the old bytes, so the test would catch a missing wait.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn saves_wait_for_the_kernel() {
    const WORDS: usize = 1 << 20;
    let gpu = Gpu::new();
    let own = gpu.stream();
    for strategy in STRATEGIES {
        let mut rig = Rig::new(strategy, 4 * WORDS);
        let memory = gpu.alloc(4 * WORDS);
        let slice = 64 << 10;
        let shapes = vec![SliceShape::contiguous(slice as u64); 4 * WORDS / slice];
        // Backwards, so that nothing merges.
        let offsets: Vec<_> = (0..shapes.len()).rev().map(|i| i * slice).collect();
        let slices = Slices::at(memory as *mut u8, &offsets, &shapes);
        for (round, stream) in
            [own, std::ptr::null_mut(), own, std::ptr::null_mut()].iter().enumerate()
        {
            let seed = round as u32 + 1;
            let is_told = round < 2;
            gpu.write(memory, &vec![0xEE; 4 * WORDS]);
            gpu.slow_fill(*stream, memory, WORDS as u32, seed, SLOW_CYCLES);
            let event = gpu.event();
            gpu.record(event, *stream);
            let wait = is_told.then(|| rig.capture(event));
            gpu.destroy_event(event);
            let job = CopyJob { wait: wait.as_ref(), ..slices.gather(1, rig.staging()) };
            rig.worker.run(job).unwrap();
            gpu.sync();
            let written = filled(WORDS, seed);
            let expected: Vec<u8> =
                offsets.iter().flat_map(|at| &written[*at..at + slice]).copied().collect();
            let right = rig.arena.read() == expected;
            assert_eq!(right, is_told, "{strategy}, round {round}: the event decides the bytes");
        }
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
        let mut rig = Rig::new(strategy, LAYERS * BYTES);
        let bytes = pattern(LAYERS * BYTES, 3);
        rig.arena.write(&bytes);
        let (memory, copy) = (gpu.alloc(LAYERS * BYTES), gpu.alloc(LAYERS * BYTES));
        gpu.write(memory, &vec![0xEE; LAYERS * BYTES]);
        for layer in 0..LAYERS {
            let at = (layer * BYTES) as u64;
            let slices = Slices::one((memory + at) as *mut u8, BYTES);
            let staging = rig.staging().wrapping_add(layer * BYTES);
            let marker = rig.worker.enqueue(&[slices.scatter(layer as u64, staging)]);
            // SAFETY: the stream lives.
            unsafe { rig.device.stream_wait(stream, &[marker.unwrap()]) }.unwrap();
            gpu.copy(copy + at, memory + at, BYTES, stream);
        }
        gpu.sync_stream(stream);
        assert!(gpu.read(copy, LAYERS * BYTES) == bytes, "{strategy}");
        for done in rig.worker.finish(LAYERS) {
            done.result.unwrap();
        }
        gpu.free(memory);
        gpu.free(copy);
    }
}

/// Goal: a stream that was made to wait writes over what is being saved, which is copied as it was though the copy
/// waits for a slow kernel of another stream; the same without the wait copies what was written over it.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn streams_wait_for_saves() {
    const BYTES: usize = 4 << 20;
    const SLICE: usize = 64 << 10;
    let gpu = Gpu::new();
    let (slow, model) = (gpu.stream(), gpu.stream());
    let other = gpu.alloc(4096);
    for strategy in STRATEGIES {
        let mut rig = Rig::new(strategy, BYTES);
        let memory = gpu.alloc(BYTES);
        let shapes = vec![SliceShape::contiguous(SLICE as u64); BYTES / SLICE];
        // Backwards, so that nothing merges.
        let offsets: Vec<_> = (0..shapes.len()).rev().map(|i| i * SLICE).collect();
        let slices = Slices::at(memory as *mut u8, &offsets, &shapes);
        for is_told in [true, false] {
            let bytes = pattern(BYTES, usize::from(is_told));
            gpu.write(memory, &bytes);
            gpu.slow_fill(slow, other, 1024, 1, SLOW_CYCLES);
            let event = gpu.event();
            gpu.record(event, slow);
            let wait = rig.capture(event);
            gpu.destroy_event(event);
            let marker = rig.worker.enqueue(&[behind(&wait, slices.gather(1, rig.staging()))]);
            if is_told {
                // SAFETY: the stream lives.
                unsafe { rig.device.stream_wait(model, &[marker.unwrap()]) }.unwrap();
            }
            assert!(rig.worker.poll().is_empty(), "{strategy}: the host waited for the copy");
            gpu.slow_fill(model, memory, (BYTES / 4) as u32, 7, 1000);
            rig.worker.finish(1).remove(0).result.unwrap();
            gpu.sync();
            let copied = if is_told { bytes } else { filled(BYTES / 4, 7) };
            let expected: Vec<u8> =
                offsets.iter().flat_map(|at| &copied[*at..at + SLICE]).copied().collect();
            assert!(rig.arena.read() == expected, "{strategy}: told to wait: {is_told}");
        }
        gpu.free(memory);
    }
    gpu.free(other);
}

/// Goal: a graph captured in the strictest mode survives saves with events on other threads, and on the
/// capturing thread itself.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn captures_survive() {
    let gpu = Gpu::new();
    let (stream, other) = (gpu.stream(), gpu.stream());
    for strategy in STRATEGIES {
        let rig = Rig::new(strategy, 1 << 20);
        let memory = gpu.alloc(2 << 20);
        let event = gpu.event();
        gpu.slow_fill(other, memory, 1000, 1, SLOW_CYCLES);
        gpu.record(event, other);
        gpu.begin_capture(stream);
        gpu.slow_fill(stream, memory + (1 << 20), 1000, 1, 1000);
        let wait = rig.capture(event);
        std::thread::scope(|scope| {
            let (device, arena, wait) = (&rig.device, &*rig.arena, &wait);
            scope.spawn(move || {
                let mut worker = Worker::new(&**device).unwrap();
                let slices = Slices::one(memory as *mut u8, 1 << 20);
                for direction in [Direction::Gather, Direction::Scatter] {
                    worker.run(behind(wait, slices.job(direction, 1, arena.base))).unwrap();
                }
            });
        });
        // SAFETY: the stream lives.
        assert!(unsafe { rig.device.stream_wait(stream, &[]) }.is_ok());
        gpu.end_capture(stream);
        gpu.free(memory);
    }
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

//! Which bytes go where: every form of slice, random ones, and addresses that are none.

use std::sync::Arc;

use ucm::block::SliceShape;
use ucm::error::ErrorKind;

use crate::gpu::Gpu;
use crate::shards::{Pages, Slices, gathered, layout, pattern, scattered, shapes, shard_bytes};
use crate::{Rig, STRATEGIES, open_with};

/// Goal: slices of every form come and go byte for byte, in every way of copying.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn slices_are_exact() {
    let gpu = Gpu::new();
    let shapes = shapes();
    let (offsets, span) = layout(&shapes);
    let shard = shard_bytes(&shapes);
    for strategy in STRATEGIES {
        let mut rig = Rig::new(strategy, shard);
        let memory = gpu.alloc(span);
        let slices = Slices::at(memory as *mut u8, &offsets, &shapes);
        let bytes = pattern(span, 1);
        gpu.write(memory, &bytes);
        let staging = rig.staging();
        rig.worker.run(slices.gather(1, staging)).unwrap();
        assert!(rig.arena.read() == gathered(&bytes, &offsets, &shapes), "{strategy}: save");
        let fresh = pattern(shard, 2);
        rig.arena.write(&fresh);
        rig.worker.run(slices.scatter(1, staging)).unwrap();
        let mut expected = bytes;
        scattered(&mut expected, &fresh, &offsets, &shapes);
        assert!(gpu.read(memory, span) == expected, "{strategy}: load");
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
                let mut rig = Rig::on(Arc::clone(device), 4 << 20);
                let memory = gpu.alloc(8 << 20);
                for round in 0..ROUNDS {
                    random_round(gpu, &mut rig, memory, &mut random, round);
                }
                gpu.free(memory);
            });
        }
    });
}

/// One save of random slices to one slot, and one load of it to other places.
fn random_round(gpu: &Gpu, rig: &mut Rig, memory: u64, random: &mut Random, round: usize) {
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
    let from = Slices::at(memory as *mut u8, &offsets, &shapes);
    let to = Slices::at((memory + (4 << 20)) as *mut u8, &offsets, &shapes);
    let staging = rig.staging();
    rig.worker.run(from.gather(1, staging)).unwrap();
    let saved = gathered(&bytes, &offsets, &shapes);
    assert!(rig.arena.read()[..shard] == saved[..], "round {round}: save");
    rig.worker.run(to.scatter(1, staging)).unwrap();
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
        let mut rig = Rig::new(strategy, 1 << 20);
        let memory = gpu.alloc(4 << 20);
        let (host, staging) = (Pages::new(1 << 20), rig.staging());
        host.write(&pattern(1 << 20, 8));
        for (address, expected) in [
            (host.base as u64, None),
            (memory, None),
            (memory + (7 << 19), Some(ErrorKind::InvalidArgument)),
            (0, Some(ErrorKind::InvalidArgument)),
        ] {
            let slices = Slices::one(address as *mut u8, 1 << 20);
            let result = rig.worker.run(slices.gather(1, staging));
            assert_eq!(result.err().map(|error| error.kind()), expected, "{strategy} {address:#x}");
            if address == host.base as u64 {
                assert!(rig.arena.read() == host.read());
            }
        }
        gpu.free(memory);
    }
}

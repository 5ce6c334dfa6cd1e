//! Checksums that the device computes: how many at once, and what goes on meanwhile.

use std::time::Duration;

use ucm::config::DeviceKind;
use ucm::device::{HASH_BYTES_MIN, HashRun, hash_and_wait, open};
use ucm::task::{Progress, Stage};

use crate::common::{batch, done, id};
use crate::fakes::{ALL, Fake, Steering};
use crate::world::*;

/// Goal: while the device computes a checksum of one block, the only copy worker copies another: nobody sleeps in the
/// driver. Blocks that come meanwhile get theirs afterwards.
#[test]
fn a_copy_worker_slept_until_a_checksum_was_there() {
    const BLOCKS: u64 = 5;
    let world = World::new();
    let keys = [("stream_number", "1"), ("tensor_size", &(BLOCK / 2).to_string())];
    let store = world.open_with(&keys).unwrap();
    let memories: Vec<_> = (0..BLOCKS).map(|_| world.fake.alloc(BLOCK)).collect();
    world.fake.hold_hashes(true);
    let tasks: Vec<_> = (1..=BLOCKS)
        .zip(&memories)
        .map(|(number, memory)| {
            memory.write(&in_halves(number));
            let task = save(&store, &batch(&[id(number)], None, &halves(memory)));
            done(&task, Stage::Copied);
            task
        })
        .collect();
    let early = tasks[0].wait(Stage::Persisted, Some(Duration::from_millis(20)));
    assert!(matches!(early, Progress::Pending), "stored without its checksum: {early:?}");
    world.fake.hold(false);
    tasks.into_iter().for_each(|task| ended(task, Stage::Persisted));
    drop(memories);
    (1..=BLOCKS).for_each(|number| load_block(&world, &store, number).unwrap());
    store.close();
    drop(store);
    world.assert_no_leak();
}

/// Goal: more checksums than a launch has room for are those that each run has by itself.
#[test]
fn many_checksums_at_once_are_those_of_each() {
    const RUNS: usize = 400;
    let fake = Fake::take(ALL[0]);
    let device = open(DeviceKind::Cuda, 0).unwrap();
    let memory = device.staging(1 << 20).unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|at: usize| (at * 31 + (at >> 8)) as u8).collect();
    memory.write(0, &bytes).unwrap();
    let run = |at: usize| HashRun {
        offset: 8 * at,
        bytes: HASH_BYTES_MIN + 10 * at as u64,
        seed: at as u64,
    };
    let runs: Vec<_> = (0..RUNS).map(run).collect();
    let launches = fake.calls_of("cuLaunchKernel");
    let sums = hash_and_wait(&memory, &runs).unwrap();
    assert_eq!(fake.calls_of("cuLaunchKernel") - launches, 3);
    for (run, sum) in runs.iter().zip(&sums).step_by(37) {
        assert_eq!(hash_and_wait(&memory, &[*run]).unwrap(), [*sum], "{run:?}");
    }
    assert_eq!(sums.len(), RUNS);
    device.unpin(memory.base());
    drop((memory, device));
    fake.assert_no_leak();
}

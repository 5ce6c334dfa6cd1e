//! The direct path on a real GPU: the hash kernel against the hash of the host, and stores whose drive is reached by
//! the fake libcufile, which moves bytes with the real driver, so that all but the DMA is real; then by the real
//! libcufile, where it is there. Run by `cargo xtask gpu-test`; ignored elsewhere.

mod common;
mod fakes;
mod gpu;

use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{batch, damage_at, done, expected, id, options};
use fakes::cufile::CuFake;
use gpu::Gpu;
use twox_hash::xxhash3_64::Hasher;
use ucm::config::DeviceKind;
use ucm::device::{DeviceStaging, HASH_BYTES_MIN, HashRun, hash_and_wait, open};
use ucm::error::{Error, ErrorKind};
use ucm::store::Store;
use ucm::task::{Stage, Task};

/// Names the real libcufile; otherwise it is looked for as programs do.
const REAL_LIBRARY: &str = "UCM_TEST_CUFILE";

const LAYERS: usize = 28;
const LAYER: usize = 128 << 10;
const BLOCK: usize = LAYERS * LAYER;

/// A generator of numbers that differ; the same ones every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn bytes_of(numbers: &mut Numbers, count: usize) -> Vec<u8> {
    (0..count / 8).flat_map(|_| numbers.next().to_le_bytes()).collect()
}

fn staging(bytes: usize) -> (Arc<dyn ucm::device::Device>, Arc<dyn DeviceStaging>) {
    // SAFETY: tests run one at a time, and no other thread reads the environment.
    unsafe { std::env::set_var("UCM_CUDA_COPY", "plain") };
    let device = open(DeviceKind::Cuda, 0).unwrap();
    let staging = device.staging(bytes).unwrap();
    (device, staging)
}

/// Goal: whatever the length, the place and the seed, the device's hash is the host's: every length around the edges
/// of stripes, blocks and tiles, and random ones, more of them than one launch takes.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn hashes_are_exact() {
    const BYTES: usize = 16 << 20;
    let mut numbers = Numbers(7);
    let bytes = bytes_of(&mut numbers, BYTES);
    let (device, staging) = staging(BYTES);
    staging.write(0, &bytes).unwrap();
    let edges = [64, 1024, 2048, 32 << 10, 33 << 10, 64 << 10, 1 << 20];
    let mut lengths: Vec<u64> = (HASH_BYTES_MIN..HASH_BYTES_MIN + 1100).collect();
    lengths.extend(edges.iter().flat_map(|edge| (edge - 9)..(edge + 74)));
    lengths.extend((0..400).map(|_| numbers.below(BYTES as u64 / 2)));
    lengths.push(BYTES as u64);
    lengths.retain(|length| *length >= HASH_BYTES_MIN);
    let run = |bytes: u64| {
        let offset = numbers.below((BYTES as u64 - bytes) / 8 + 1) as usize * 8;
        let seed = if bytes.is_multiple_of(7) { 0 } else { numbers.next() };
        HashRun { offset, bytes, seed }
    };
    let runs: Vec<HashRun> = lengths.into_iter().map(run).collect();
    let hashes = hash_and_wait(&staging, &runs).unwrap();
    assert_eq!(hashes.len(), runs.len());
    for (run, hash) in runs.iter().zip(hashes) {
        let there = &bytes[run.offset..][..run.bytes as usize];
        assert_eq!(hash, Hasher::oneshot_with_seed(run.seed, there), "{run:?}");
    }
    // One byte more or less, or another one, is another hash.
    let whole = HashRun { offset: 0, bytes: 4 << 20, seed: 1 };
    let before = hash_and_wait(&staging, &[whole]).unwrap();
    staging.write((4 << 20) - 1, &[bytes[(4 << 20) - 1] ^ 1]).unwrap();
    assert_ne!(hash_and_wait(&staging, &[whole]).unwrap(), before);
    device.unpin(staging.base());
}

/// Goal: says how fast parts are hashed, alone and many at a time; and threads that hash at once do not disturb each
/// other.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn hashes_at_once_are_exact() {
    const PART: u64 = 4 << 20;
    const PARTS: usize = 64;
    const ROUNDS: usize = 20;
    let mut numbers = Numbers(11);
    let bytes = bytes_of(&mut numbers, PARTS * PART as usize);
    let (device, staging) = staging(bytes.len());
    staging.write(0, &bytes).unwrap();
    let run =
        |part: usize| HashRun { offset: part * PART as usize, bytes: PART, seed: part as u64 };
    let right: Vec<u64> = bytes
        .chunks(PART as usize)
        .enumerate()
        .map(|(part, bytes)| Hasher::oneshot_with_seed(part as u64, bytes))
        .collect();
    let best = |runs: &[HashRun]| -> Duration {
        let timed = |_| {
            let begin = Instant::now();
            assert_eq!(hash_and_wait(&staging, runs).unwrap(), right[..runs.len()]);
            begin.elapsed()
        };
        (0..ROUNDS).map(timed).min().unwrap()
    };
    for parts in [1, 2, 8, PARTS] {
        let runs: Vec<_> = (0..parts).map(run).collect();
        let took = best(&runs);
        let rate = (parts as u64 * PART) as f64 / took.as_secs_f64() / 1e9;
        println!("{parts} parts of 4 MiB: {took:?}, {rate:.1} GB/s");
    }
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (staging, right) = (&staging, &right);
            scope.spawn(move || {
                for part in (thread..PARTS).step_by(4) {
                    assert_eq!(hash_and_wait(staging, &[run(part)]).unwrap(), [right[part]]);
                }
            });
        }
    });
    device.unpin(staging.base());
}

fn open_store(directory: &Path, extra: &[(&str, &str)]) -> Result<Arc<Store>, Error> {
    let (block, layer) = (BLOCK.to_string(), LAYER.to_string());
    let mut pairs = vec![
        ("storage_backends", directory.to_str().unwrap()),
        ("store_pipeline", "Posix"),
        ("cache_buffer_capacity_gb", "0.1"),
        ("block_size", block.as_str()),
        ("tensor_size", layer.as_str()),
        ("segment_size_mb", "64"),
        ("lookup_refresh_ms", "20"),
        ("device", "cuda"),
        ("device_id", "0"),
        ("gpu_direct", "required"),
    ];
    pairs.extend(extra);
    Store::open(options(&pairs).build()?)
}

fn block_bytes(number: u64) -> Vec<u8> {
    (0..BLOCK).map(|at| expected(number, at)).collect()
}

/// The layers of a block, backwards in memory.
fn layers(memory: u64) -> Vec<*mut c_void> {
    (0..LAYERS).rev().map(|layer| (memory as usize + layer * LAYER) as *mut c_void).collect()
}

fn backwards(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(LAYER).rev().flatten().copied().collect()
}

fn settled(task: &Task, stage: Stage) -> Result<(), Error> {
    task.wait(stage, common::WAIT);
    done(task, Stage::Released);
    task.statuses().unwrap().remove(0)
}

fn save_block(gpu: &Gpu, store: &Store, number: u64) -> Result<(), Error> {
    let memory = gpu.alloc(BLOCK);
    gpu.write(memory, &backwards(&block_bytes(number)));
    gpu.sync();
    let (blocks, addresses) = ([id(number)], layers(memory));
    // SAFETY: the memory is freed after the task was released.
    let task = unsafe { store.save(&batch(&blocks, None, &addresses)) }.unwrap();
    let result = settled(&task, Stage::Persisted);
    gpu.free(memory);
    result
}

fn load_block(gpu: &Gpu, store: &Store, number: u64) -> Result<(), Error> {
    let memory = gpu.alloc(BLOCK);
    gpu.write(memory, &vec![0xEE; BLOCK]);
    gpu.sync();
    let (blocks, addresses) = ([id(number)], layers(memory));
    // SAFETY: as above.
    let task = unsafe { store.load(&batch(&blocks, None, &addresses)) }.unwrap();
    let result = settled(&task, Stage::Loaded);
    let wanted = if result.is_ok() { block_bytes(number) } else { vec![0xEE; BLOCK] };
    assert!(backwards(&gpu.read(memory, BLOCK)) == wanted, "block {number}: {result:?}");
    gpu.free(memory);
    result
}

/// Saves and loads blocks, damages one on the drive, and reads them with a store that has no direct path.
fn exercise(gpu: &Gpu, directory: &Path) {
    let store = open_store(directory, &[]).unwrap();
    let report = store.stats().unwrap().backends.remove(0);
    assert_eq!(report.engine, "cufile");
    println!("{}", report.features.join(", "));
    (1..17).for_each(|number| save_block(gpu, &store, number).unwrap());
    (1..17).for_each(|number| load_block(gpu, &store, number).unwrap());
    store.close();
    drop(store);
    damage_at(directory, 5, BLOCK / 2);
    let store = open_store(directory, &[]).unwrap();
    assert_eq!(load_block(gpu, &store, 5).unwrap_err().kind(), ErrorKind::Corrupt);
    load_block(gpu, &store, 6).unwrap();
    store.close();
    drop(store);
    let store = open_store(directory, &[("gpu_direct", "off")]).unwrap();
    (6..17).for_each(|number| load_block(gpu, &store, number).unwrap());
    store.close();
}

/// A folder of its own, also where the tests were built elsewhere.
fn directory() -> tempfile::TempDir {
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Goal: with everything real but the DMA, blocks come back byte for byte, damage is CORRUPT and never bytes, and a
/// store on pinned memory reads the same files.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn stores_on_the_fake_library_are_exact() {
    let gpu = Gpu::new();
    let _cufile = CuFake::take("libcufile.so.0");
    let directory = directory();
    exercise(&gpu, directory.path());
}

/// Goal: layer by layer too, each with its own checksum.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn layers_on_the_fake_library_are_exact() {
    let gpu = Gpu::new();
    let _cufile = CuFake::take("libcufile.so.0");
    let directory = directory();
    let layer = LAYER.to_string();
    let memory = gpu.alloc(BLOCK);
    let address = |at: usize| [(memory as usize + at * LAYER) as *mut c_void];
    for round in 0..2 {
        let store = open_store(directory.path(), &[("shard_size", &layer)]).unwrap();
        let bytes = if round == 0 { block_bytes(1) } else { vec![0xEE; BLOCK] };
        gpu.write(memory, &bytes);
        gpu.sync();
        let tasks: Vec<_> = (0..LAYERS)
            .map(|at| {
                let (blocks, shards, addresses) = ([id(1)], [at as u32], address(at));
                let batch = batch(&blocks, Some(&shards), &addresses);
                // SAFETY: the memory outlives the tasks.
                unsafe { if round == 0 { store.save(&batch) } else { store.load(&batch) } }.unwrap()
            })
            .collect();
        let stage = if round == 0 { Stage::Persisted } else { Stage::Loaded };
        tasks.iter().for_each(|task| settled(task, stage).unwrap());
        assert!(gpu.read(memory, BLOCK) == block_bytes(1), "round {round}");
        store.close();
    }
    gpu.free(memory);
}

/// Goal: the real library either works, and then all of the above holds, or is refused with a reason, again and again,
/// and pinned memory serves.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn the_real_library_works_or_is_refused() {
    let gpu = Gpu::new();
    // SAFETY: tests run one at a time, and no other thread reads the environment.
    unsafe {
        match std::env::var_os(REAL_LIBRARY) {
            Some(path) => std::env::set_var("UCM_CUFILE_LIBRARY", path),
            None => std::env::remove_var("UCM_CUFILE_LIBRARY"),
        }
    }
    let directory = directory();
    for attempt in 0..2 {
        match open_store(directory.path(), &[]) {
            Ok(store) => {
                drop(store);
                println!("the real libcufile works here");
                return exercise(&gpu, directory.path());
            }
            Err(error) => {
                println!("attempt {attempt}: {error}");
                assert_eq!(error.kind(), ErrorKind::Unsupported);
            }
        }
    }
    let store = open_store(directory.path(), &[("gpu_direct", "auto")]).unwrap();
    save_block(&gpu, &store, 1).unwrap();
    load_block(&gpu, &store, 1).unwrap();
}

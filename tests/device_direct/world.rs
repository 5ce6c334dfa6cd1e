//! What the tests of the direct path share: both fakes, stores on them, and blocks in device memory.

use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ucm::error::Error;
use ucm::store::{Batch, Store};
use ucm::task::{Stage, Task};

use crate::common::{WAIT, batch, done, expected, id, options};
use crate::fakes::cufile::CuFake;
use crate::fakes::{ALL, Fake, Kind, Memory};

pub const LAYERS: usize = 6;
pub const LAYER: usize = 32 << 10;
pub const BLOCK: usize = LAYERS * LAYER;

/// Longer than anything takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A device and cuFile, both fake, and a directory on a file system that takes direct I/O.
pub struct World {
    pub cufile: CuFake,
    pub fake: Fake,
    pub directory: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        Self::with(ALL[0], "libcufile.so.0")
    }

    pub fn with(kind: Kind, library: &str) -> Self {
        let fake = Fake::take(kind);
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { cufile: CuFake::take(library), fake, directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn open_with(&self, extra: &[(&str, &str)]) -> Result<Arc<Store>, Error> {
        let block = BLOCK.to_string();
        let mut pairs = vec![
            ("storage_backends", self.path().to_str().unwrap()),
            ("store_pipeline", "Posix"),
            ("cache_buffer_capacity_gb", "0.004"),
            ("block_size", block.as_str()),
            ("segment_size_mb", "8"),
            ("lookup_refresh_ms", "20"),
            ("timeout_ms", "20000"),
            ("device", self.fake.kind().device),
            ("device_id", "0"),
            ("gpu_direct", "required"),
        ];
        pairs.retain(|(key, _)| !extra.iter().any(|(other, _)| key == other));
        pairs.extend(extra);
        Store::open(options(&pairs).build()?)
    }

    /// Whole blocks of two tensors.
    pub fn open(&self) -> Result<Arc<Store>, Error> {
        self.open_with(&[("tensor_size", &(BLOCK / 2).to_string())])
    }

    /// Layer by layer.
    pub fn open_layers(&self) -> Arc<Store> {
        let layer = LAYER.to_string();
        self.open_with(&[("shard_size", &layer), ("tensor_size", &layer)]).unwrap()
    }

    /// Nothing that a store made is left. A thread that told of the last failure may be the one that lets go last.
    pub fn assert_no_leak(self) {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE && !(self.cufile.live() == [0; 2] && self.fake.is_clean())
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(self.cufile.live(), [0; 2], "files, buffers of cuFile");
        self.fake.assert_no_leak();
        assert_eq!(self.fake.depth(), 0, "a context was left on the caller's stack");
    }
}

pub fn block_bytes(number: u64) -> Vec<u8> {
    (0..BLOCK).map(|at| expected(number, at)).collect()
}

/// Both halves of a block, swapped in memory so that they cannot be moved in one piece.
pub fn halves(memory: &Memory<'_>) -> [*mut c_void; 2] {
    [memory.base.wrapping_add(BLOCK / 2).cast(), memory.base.cast()]
}

/// What memory addressed by [`halves`] holds when block `number` is in it.
pub fn in_halves(number: u64) -> Vec<u8> {
    let bytes = block_bytes(number);
    [&bytes[BLOCK / 2..], &bytes[..BLOCK / 2]].concat()
}

pub fn save(store: &Store, batch: &Batch<'_>) -> Arc<Task> {
    // SAFETY: the tests keep their memory until the task is released.
    unsafe { store.save(batch) }.unwrap()
}

pub fn load(store: &Store, batch: &Batch<'_>) -> Arc<Task> {
    // SAFETY: as above.
    unsafe { store.load(batch) }.unwrap()
}

/// Waits for a task that ends well, and lets go of it and of the events it holds.
pub fn ended(task: Arc<Task>, stage: Stage) {
    done(&task, stage);
    done(&task, Stage::Released);
}

pub fn save_block(world: &World, store: &Store, number: u64) -> Result<(), Error> {
    let memory = world.fake.alloc(BLOCK);
    memory.write(&in_halves(number));
    let (blocks, addresses) = ([id(number)], halves(&memory));
    let task = save(store, &batch(&blocks, None, &addresses));
    task.wait(Stage::Persisted, WAIT);
    done(&task, Stage::Released);
    task.statuses().unwrap().remove(0)
}

/// Loads a block; its memory is untouched where that fails.
pub fn load_block(world: &World, store: &Store, number: u64) -> Result<(), Error> {
    let memory = world.fake.alloc(BLOCK);
    memory.write(&vec![0xEE; BLOCK]);
    let (blocks, addresses) = ([id(number)], halves(&memory));
    let task = load(store, &batch(&blocks, None, &addresses));
    task.wait(Stage::Loaded, WAIT);
    done(&task, Stage::Released);
    let result = task.statuses().unwrap().remove(0);
    let wanted = if result.is_ok() { in_halves(number) } else { vec![0xEE; BLOCK] };
    assert!(memory.read() == wanted, "wrong bytes of block {number}: {result:?}");
    result
}

/// What the store's directory runs on.
pub fn engine(store: &Store) -> String {
    store.stats().unwrap().backends[0].engine.clone()
}

//! What the store's tests share: paged caller memory with a pattern, and stores opened from options.

#![allow(dead_code, missing_docs)]

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ucm::block::BlockId;
use ucm::config::Options;
use ucm::error::{ErrorKind, Result};
use ucm::store::{Batch, Store};
use ucm::task::{Notify, Progress, Stage, Task};

pub const WAIT: Option<Duration> = Some(Duration::from_secs(30));

/// Options from pairs.
pub fn options(pairs: &[(&str, &str)]) -> Options {
    let mut options = Options::new();
    for (key, value) in pairs {
        options.set(key, value).unwrap_or_else(|error| panic!("{key}={value}: {error}"));
    }
    options
}

/// A store from pairs.
pub fn open(pairs: &[(&str, &str)]) -> Arc<Store> {
    Store::open(options(pairs).build().unwrap()).unwrap()
}

/// A store that keeps blocks of 64 KiB in `directory`; what `extra` says replaces the defaults.
pub fn store_in(directory: &Path, extra: &[(&str, &str)]) -> Arc<Store> {
    open(&pairs_in(directory.to_str().unwrap(), extra))
}

/// The options of [`store_in`].
pub fn pairs_in<'a>(directory: &'a str, extra: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut pairs = vec![
        ("storage_backends", directory),
        ("cache_buffer_capacity_gb", "0.01"),
        ("block_size", "65536"),
        ("segment_size_mb", "8"),
        ("lookup_refresh_ms", "20"),
        // What other tests hold in DRAM is nobody's business here.
        ("unique_id", directory),
    ];
    pairs.retain(|(key, _)| !extra.iter().any(|(other, _)| key == other));
    pairs.extend(extra);
    pairs
}

/// What a lookup says of a block now.
pub fn is_present(store: &Store, number: u64) -> bool {
    let mut found = [9];
    store.lookup(&[id(number)], &mut found).unwrap();
    found[0] == 1
}

/// The id of block `number`.
pub fn id(number: u64) -> BlockId {
    let mut bytes = [0x5A; 16];
    bytes[..8].copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    bytes[8..].copy_from_slice(&number.to_le_bytes());
    BlockId(bytes)
}

/// What byte `at` of block `number` must be: every position of every block differs from its neighbours.
pub fn expected(number: u64, at: usize) -> u8 {
    let word = (number << 32 ^ (at as u64 / 8)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (word >> (at % 8 * 8)) as u8
}

/// Names the fake driver whose memory stands in for host memory: `cargo xtask fake-test` sets it, and the
/// same tests then run on the device that the driver pretends to have.
const DEVICE_LIBRARY: &str = "UCM_TEST_DEVICE_LIBRARY";

/// Whether the tests run on a pretended device: what is only promised for host memory is not tested then.
pub fn on_a_device() -> bool {
    std::env::var_os(DEVICE_LIBRARY).is_some()
}

/// Fails where tests that are to run on a pretended device have moved nothing through it.
fn assert_device_is_used() {
    let Some(path) = std::env::var_os(DEVICE_LIBRARY) else { return };
    // SAFETY: the fake driver has no constructors, and exports the symbol with this signature.
    let copies = unsafe {
        let library = libloading::Library::new(path).unwrap();
        let calls_of = library
            .get::<unsafe extern "C" fn(*const std::ffi::c_char) -> std::ffi::c_long>(
                b"ucm_stub_calls_of",
            )
            .unwrap();
        calls_of(c"cuMemcpyBatchAsync".as_ptr()) + calls_of(c"aclrtMemcpyBatchAsync".as_ptr())
    };
    assert!(copies > 0, "a save did not go through the pretended device");
}

/// Bytes of the caller: host memory, or memory of a pretended device that the CPU can see.
enum Bytes {
    Host(Vec<u8>),
    Device { base: *mut u8, length: usize, library: libloading::Library },
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Bytes {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Bytes {}

impl Bytes {
    fn new(length: usize) -> Self {
        let Some(path) = std::env::var_os(DEVICE_LIBRARY) else {
            return Self::Host(vec![0xEE; length]);
        };
        // SAFETY: the fake driver has no constructors, and exports the symbol with this signature.
        let (library, base) = unsafe {
            let library = libloading::Library::new(path).unwrap();
            let base = library
                .get::<unsafe extern "C" fn(usize) -> *mut u8>(b"ucm_stub_device_alloc")
                .unwrap()(length);
            (library, base)
        };
        let mut bytes = Self::Device { base, length, library };
        bytes.fill(0xEE);
        bytes
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Host(bytes) => bytes,
            // SAFETY: the allocation has `length` bytes until drop.
            Self::Device { base, length, .. } => unsafe {
                std::slice::from_raw_parts(*base, *length)
            },
        }
    }
}

impl std::ops::DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Host(bytes) => bytes,
            // SAFETY: as above.
            Self::Device { base, length, .. } => unsafe {
                std::slice::from_raw_parts_mut(*base, *length)
            },
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        let Self::Device { base, library, .. } = self else { return };
        // SAFETY: allocated by `new`; the fake aborts if a copy of it is still under way.
        unsafe {
            library.get::<unsafe extern "C" fn(*mut u8)>(b"ucm_stub_device_free").unwrap()(*base);
        }
    }
}

/// Caller memory: whole blocks, page aligned.
pub struct Pages {
    memory: Bytes,
    start: usize,
    pub block: usize,
}

impl Pages {
    pub fn new(blocks: usize, block: usize) -> Self {
        let memory = Bytes::new(blocks * block + 4096);
        let start = memory.as_ptr().align_offset(4096);
        Self { memory, start, block }
    }

    pub fn base(&mut self) -> *mut u8 {
        self.memory[self.start..].as_mut_ptr()
    }

    pub fn length(&self) -> usize {
        self.memory.len() - 4096
    }

    pub fn page(&mut self, index: usize) -> &mut [u8] {
        let from = self.start + index * self.block;
        &mut self.memory[from..from + self.block]
    }

    pub fn address(&mut self, index: usize, offset: usize) -> *mut c_void {
        self.page(index)[offset..].as_mut_ptr().cast()
    }

    /// Fills page `index` with the bytes `from..` of block `number`.
    pub fn fill(&mut self, index: usize, number: u64, from: usize) {
        for (at, byte) in self.page(index).iter_mut().enumerate() {
            *byte = expected(number, from + at);
        }
    }

    pub fn clear(&mut self) {
        self.memory.fill(0xEE);
    }

    /// The first position of page `index` that is not block `number`'s from byte `from`.
    pub fn wrong(&mut self, index: usize, number: u64, from: usize) -> Option<usize> {
        self.page(index)
            .iter()
            .enumerate()
            .position(|(at, byte)| *byte != expected(number, from + at))
    }
}

pub fn batch<'a>(
    blocks: &'a [BlockId],
    shards: Option<&'a [u32]>,
    addresses: &'a [*mut c_void],
) -> Batch<'a> {
    Batch {
        blocks,
        shards,
        addresses,
        wait_event: std::ptr::null_mut(),
        notify: Notify::default(),
        user_data: 0,
        tag: 0,
        timeout_ms: 0,
    }
}

pub fn save(
    store: &Store,
    blocks: &[BlockId],
    shards: Option<&[u32]>,
    addresses: &[*mut c_void],
) -> Result<Arc<Task>> {
    // SAFETY: the tests keep their memory until the task is released.
    unsafe { store.save(&batch(blocks, shards, addresses)) }
}

pub fn load(
    store: &Store,
    blocks: &[BlockId],
    shards: Option<&[u32]>,
    addresses: &[*mut c_void],
) -> Result<Arc<Task>> {
    // SAFETY: as above.
    unsafe { store.load(&batch(blocks, shards, addresses)) }
}

/// Waits until the stage is reached and checks that it was reached well.
pub fn done(task: &Task, stage: Stage) {
    match task.wait(stage, WAIT) {
        Progress::Done => {}
        other => panic!("{stage:?}: {other:?}"),
    }
}

/// Waits until the stage is reached or failed, and returns the kind of the failure.
pub fn failure(task: &Task, stage: Stage) -> ErrorKind {
    match task.wait(stage, WAIT) {
        Progress::Failed(error) => error.kind(),
        other => panic!("{stage:?}: {other:?}"),
    }
}

/// Saves whole blocks one after another from a fresh memory, and waits for PERSISTED.
pub fn save_blocks(store: &Store, numbers: &[u64], block: usize) {
    save_blocks_anywhere(store, numbers, block);
    assert_device_is_used();
}

/// The same, through a device that the test brings itself.
pub fn save_blocks_anywhere(store: &Store, numbers: &[u64], block: usize) {
    let mut pages = Pages::new(numbers.len(), block);
    let ids: Vec<_> = numbers.iter().map(|number| id(*number)).collect();
    let addresses: Vec<_> = (0..numbers.len()).map(|index| pages.address(index, 0)).collect();
    for (index, number) in numbers.iter().enumerate() {
        pages.fill(index, *number, 0);
    }
    let task = save(store, &ids, None, &addresses).unwrap();
    done(&task, Stage::Persisted);
    done(&task, Stage::Released);
}

/// Loads whole blocks and checks every byte; returns the failures by number.
pub fn load_blocks(store: &Store, numbers: &[u64], block: usize) -> Vec<(u64, ErrorKind)> {
    let mut pages = Pages::new(numbers.len(), block);
    let ids: Vec<_> = numbers.iter().map(|number| id(*number)).collect();
    let addresses: Vec<_> = (0..numbers.len()).map(|index| pages.address(index, 0)).collect();
    let task = load(store, &ids, None, &addresses).unwrap();
    let _ = task.wait(Stage::Loaded, WAIT);
    done(&task, Stage::Released);
    let mut failed = Vec::new();
    for (index, status) in task.statuses().unwrap().into_iter().enumerate() {
        match status {
            Ok(()) => {
                assert_eq!(pages.wrong(index, numbers[index], 0), None, "block {}", numbers[index])
            }
            Err(error) => failed.push((numbers[index], error.kind())),
        }
    }
    failed
}

/// Files below `directory` whose path has `part` in it.
pub fn files(directory: &Path, part: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, part));
        } else if path.to_str().unwrap().contains(part) {
            found.push(path);
        }
    }
    found
}

/// Flips a bit of block `number` on storage, at its beginning.
pub fn damage(directory: &Path, number: u64) {
    damage_at(directory, number, 0);
}

/// Flips a bit of block `number` on storage, behind its byte `from`.
pub fn damage_at(directory: &Path, number: u64, from: usize) {
    let needle: Vec<u8> = (from..from + 64).map(|at| expected(number, at)).collect();
    let mut hits = 0;
    for path in files(directory, "segments") {
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(64).position(|window| window == needle) {
            bytes[at + 5] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            hits += 1;
        }
    }
    assert_eq!(hits, 1, "block {number} is on storage once");
}

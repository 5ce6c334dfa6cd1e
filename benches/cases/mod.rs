//! What is measured: the paths that every block takes, each as a closure over data that was made before.
//!
//! Shared by `paths` (time, criterion) and `instructions` (counts, callgrind), so that both measure the same.

// Neither of the two uses all of it: only times are taken at full scale, and only they have units.
#![allow(dead_code)]

#[path = "../../tests/fakes/mod.rs"]
mod fakes;
mod submit;

use std::ffi::{CString, c_void};
use std::hint::black_box;

use ucm::block::{BlockId, PartKey};
use ucm::cache::policy::S3Fifo;
use ucm::cache::slots::Slots;
use ucm::capi::batch::{ucm_batch_t, ucm_load, ucm_save};
use ucm::capi::lookup::{ucm_block_id_t, ucm_lookup};
use ucm::capi::options::{ucm_options_free, ucm_options_new, ucm_options_set};
use ucm::capi::store::{ucm_store_close, ucm_store_open, ucm_store_t};
use ucm::capi::task::{ucm_task_free, ucm_task_t, ucm_task_wait};
use ucm::io::DmaSlice;
use ucm::posix::checksum::Identity;
use ucm::posix::format::{Decoded, Kind, RECORD_BYTES, Record, record_seal};
use ucm::posix::index::{Found, Index, Location};

/// How large the data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// For tests: everything runs once, in no time.
    Small,
    /// For measuring.
    Full,
}

/// One path.
pub struct Case {
    /// Its name, `room/what`.
    pub name: &'static str,
    /// Items (keys, blocks, bytes ..) that one run handles.
    pub items: u64,
    /// What they are called.
    pub unit: &'static str,
    /// One run.
    pub run: Box<dyn FnMut()>,
}

/// Keys of one lookup.
const KEYS: usize = 256;
/// Tokens of a block.
const TOKENS: usize = 128;
/// Blocks of a hashed prompt, and of a task.
const BLOCKS: usize = 32;
/// Bytes of a part whose checksum is taken.
const PART: usize = 1 << 20;
/// Bytes of a block in the store of the submit path: small, so that the path is seen and not the copy.
const SMALL_BLOCK: usize = 4096;

/// All cases.
pub fn all(scale: Scale) -> Vec<Case> {
    let mut cases = vec![hash(), checksum(), record(), slots(scale), policy(scale)];
    cases.extend(index(scale));
    cases.extend(store());
    cases.extend(submit::cases());
    cases
}

fn spread(number: u64) -> u64 {
    number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

fn block(number: u64) -> BlockId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&spread(number).to_le_bytes());
    id[8..].copy_from_slice(&spread(!number).to_le_bytes());
    BlockId(id)
}

fn hash() -> Case {
    let tokens: Vec<u32> = (0..(TOKENS * BLOCKS) as u64).map(|n| spread(n) as u32).collect();
    let mut ids = vec![BlockId::default(); BLOCKS];
    let run = Box::new(move || {
        let tokens = black_box(&tokens);
        black_box(ucm::hash::hash_tokens(&[7; 16], tokens, TOKENS, None, &[], &mut ids));
    });
    Case { name: "hash/32 blocks of 128 tokens", items: BLOCKS as u64, unit: "block", run }
}

fn checksum() -> Case {
    let mut bytes: Vec<u8> = (0..PART as u64).map(|n| spread(n) as u8).collect();
    let key = PartKey { block: block(1), part: 0 };
    let identity = Identity { fingerprint: [3; 16], key, generation: 0 };
    let run = Box::new(move || {
        let piece = DmaSlice { pointer: bytes.as_mut_ptr(), length: bytes.len() };
        // SAFETY: the piece is the vector, which nobody else touches.
        black_box(unsafe { identity.part(&[piece], PART as u64) });
    });
    Case { name: "checksum/part of 1 MiB", items: PART as u64, unit: "byte", run }
}

fn record() -> Case {
    let seal = record_seal(1, 2);
    let mut bytes = [0; RECORD_BYTES];
    let record = Record { block: block(5), ..Record::of(Kind::Publish, 1) };
    let run = Box::new(move || {
        black_box(&record).encode(&seal, &mut bytes);
        assert!(matches!(Record::decode(&seal, black_box(&bytes)), Decoded::Record(_)));
    });
    Case { name: "manifest/record written and read", items: 1, unit: "record", run }
}

fn slots(scale: Scale) -> Case {
    let count = if scale == Scale::Small { 256 } else { 16_384 };
    let mut slots = Slots::new(count);
    let mut taken = Vec::new();
    let run = Box::new(move || {
        taken.extend((0..BLOCKS).map_while(|_| slots.take()));
        assert_eq!(taken.len(), BLOCKS);
        taken.drain(..).for_each(|slot| slots.put(slot));
    });
    Case { name: "slots/32 taken and put back", items: BLOCKS as u64, unit: "slot", run }
}

fn policy(scale: Scale) -> Case {
    let count: u32 = if scale == Scale::Small { 256 } else { 16_384 };
    let mut policy = S3Fifo::new(count);
    (0..count).for_each(|slot| policy.insert(slot, spread(slot.into())));
    let mut next = u64::from(count);
    let run = Box::new(move || {
        for _ in 0..BLOCKS {
            policy.touch((spread(next) % u64::from(count)) as u32);
            if let Some(slot) = policy.evict(|_| true) {
                policy.insert(slot, spread(next));
            }
            next += 1;
        }
    });
    Case { name: "eviction/32 touched, evicted, inserted", items: BLOCKS as u64, unit: "slot", run }
}

fn index(scale: Scale) -> Vec<Case> {
    let count: u64 = if scale == Scale::Small { 10_000 } else { 1_000_000 };
    let found = |n: u64| Found {
        location: Location { segment: 1 + (n >> 12) as u32, page: (n & 0xfff) as u32 },
        checksum: spread(n),
    };
    let key = |n: u64| PartKey { block: block(n), part: 0 };
    let index: &'static Index = Box::leak(Box::new(Index::new()));
    for n in 0..count {
        index.insert(&key(n), found(n));
    }
    // Batches all over the index, so that full-scale lookups miss the processor's caches as real ones do.
    let batches = |first: u64| -> Vec<Vec<BlockId>> {
        let at = |n: u64| first + spread(n) % count;
        (0..64)
            .map(|batch| (0..KEYS as u64).map(|n| block(at(batch * 997 + n))).collect())
            .collect()
    };
    let look = |name: &'static str, keys: Vec<Vec<BlockId>>, expected: usize| {
        let mut turn = 0;
        let run = Box::new(move || {
            turn = (turn + 1) % keys.len();
            let mut hits = 0;
            index.find_many(keys[turn].iter().map(|block| (block, 0)), |_, part| {
                hits += usize::from(part.is_some());
            });
            assert_eq!(hits, expected);
        });
        Case { name, items: KEYS as u64, unit: "key", run: run as Box<dyn FnMut()> }
    };
    let mut next = count;
    let insert = Box::new(move || {
        for _ in 0..BLOCKS {
            index.insert(&key(next), found(next));
            next += 1;
        }
    });
    vec![
        look("index/256 hits", batches(0), KEYS),
        look("index/256 misses", batches(1 << 40), 0),
        Case { name: "index/32 inserted", items: BLOCKS as u64, unit: "key", run: insert },
    ]
}

/// Opens a store as C does.
fn open_store(settings: &[(&str, &str)]) -> *mut ucm_store_t {
    let (mut options, mut handle) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: out pointers are locals, the strings end with NUL, the options are freed once.
    unsafe {
        assert_eq!(ucm_options_new(&mut options), 0);
        for (key, value) in settings {
            let text = |text: &str| CString::new(text).expect("no NUL inside");
            let (key, value) = (text(key), text(value));
            assert_eq!(ucm_options_set(options, key.as_ptr(), value.as_ptr()), 0);
        }
        assert_eq!(ucm_store_open(options, &mut handle), 0);
        ucm_options_free(options);
    }
    handle
}

/// A store in memory, as C sees it.
struct Store {
    handle: *mut ucm_store_t,
    ids: Vec<ucm_block_id_t>,
    memory: Vec<u64>,
}

impl Store {
    fn open() -> Self {
        let handle = open_store(&[
            ("store_pipeline", "Cache|Empty"),
            ("cache_buffer_capacity_gb", "0.03"),
            ("device", "host"),
            ("block_size", "4096"),
        ]);
        let ids = (0..KEYS as u64).map(|n| ucm_block_id_t { bytes: block(n).0 }).collect();
        Self { handle, ids, memory: vec![1; BLOCKS * SMALL_BLOCK / 8] }
    }

    fn transfer(
        &mut self,
        submit: unsafe extern "C" fn(
            *mut ucm_store_t,
            *const ucm_batch_t,
            *mut *mut ucm_task_t,
        ) -> i32,
        stage: u32,
    ) {
        let base = self.memory.as_mut_ptr().cast::<u8>();
        let addresses: Vec<*mut c_void> =
            (0..BLOCKS).map(|n| base.wrapping_add(n * SMALL_BLOCK).cast()).collect();
        let batch = ucm_batch_t {
            struct_size: size_of::<ucm_batch_t>(),
            blocks: self.ids.as_ptr(),
            shards: std::ptr::null(),
            addresses: addresses.as_ptr(),
            count: BLOCKS,
            wait_event: std::ptr::null_mut(),
            flags: 0,
            user_data: 0,
            timeout_ms: 0,
        };
        let mut task = std::ptr::null_mut();
        // SAFETY: arrays have `count` elements; the memory belongs to `self` and the task is waited for.
        unsafe {
            assert_eq!(submit(self.handle, &batch, &mut task), 0);
            assert_eq!(ucm_task_wait(task, stage, 10_000), 0);
            ucm_task_free(task);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, closed once.
        unsafe { ucm_store_close(self.handle) };
    }
}

/// `UCM_STAGE_COPIED` and `UCM_STAGE_LOADED`.
const COPIED: u32 = 1;
const LOADED: u32 = 3;

fn store() -> Vec<Case> {
    let mut loads = Store::open();
    loads.transfer(ucm_save, COPIED);
    let look = Store::open();
    let mut found = vec![0_u8; KEYS];
    let lookup = Box::new(move || {
        // SAFETY: both arrays have KEYS elements.
        let status =
            unsafe { ucm_lookup(look.handle, look.ids.as_ptr(), KEYS, found.as_mut_ptr()) };
        assert_eq!(status, 0);
    });
    vec![
        Case {
            name: "store/load of 32 blocks from memory",
            items: BLOCKS as u64,
            unit: "block",
            run: Box::new(move || loads.transfer(ucm_load, LOADED)),
        },
        Case {
            name: "store/lookup of 256 absent keys",
            items: KEYS as u64,
            unit: "key",
            run: lookup,
        },
    ]
}

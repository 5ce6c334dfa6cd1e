//! What the tests share: backends on temporary directories, tiers on them, and parts with known bytes.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::block::{BlockId, Namespace, PAGE, PartKey};
use crate::config::{Checksum, DirectIo, Durability, GcConfig, IoEngine};
use crate::error::{Error, Result};
use crate::io::backend::{Backend, BackendConfig};
use crate::io::{Class, DmaSlice};
use crate::posix::pages::Pages;
use crate::posix::{Found, Scope, Tail, Tier, TierConfig};

pub const PART_BYTES: u64 = 3 * PAGE as u64 + 100;
const PATIENCE: Duration = Duration::from_secs(20);

pub fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

pub fn namespace(part_count: u32) -> Namespace {
    Namespace {
        model_id: "test".into(),
        dtype: "bf16".into(),
        block_tokens: 16,
        extra: String::new(),
        part_count,
        part_bytes: PART_BYTES,
        order: "raw".into(),
    }
}

pub fn config() -> TierConfig {
    TierConfig {
        segment_bytes: 1 << 20,
        durability: Durability::None,
        checksum: Checksum::Full,
        lookup_refresh: Duration::from_millis(10),
        timeout: Duration::from_secs(5),
        lease: Duration::from_secs(30),
        capacity_bytes: None,
        gc: GcConfig {
            enabled: true,
            high_watermark: 0.9,
            low_watermark: 0.7,
            interval: Duration::from_secs(60),
        },
    }
}

pub fn backend(directory: &Path) -> Arc<Backend> {
    backend_with(directory, DirectIo::Auto)
}

pub fn backend_with(directory: &Path, direct: DirectIo) -> Arc<Backend> {
    let config = BackendConfig {
        engine: IoEngine::Psync,
        direct,
        threads: 1,
        depth: 8,
        io_bytes: 1 << 20,
        affinity: Vec::new(),
        queue_depth: 4096,
    };
    Backend::open(directory, &config, deadline()).unwrap()
}

pub fn open(directory: &Path) -> Arc<Tier> {
    open_with(&[directory], namespace(1), 0..1, config())
}

pub fn open_with(
    directories: &[&Path],
    namespace: Namespace,
    parts: std::ops::Range<u16>,
    config: TierConfig,
) -> Arc<Tier> {
    let backends = directories.iter().map(|directory| backend(directory)).collect();
    let scope = Scope { parts, tail: Tail::Own };
    Tier::open(&namespace, scope, backends, config, deadline()).unwrap()
}

pub fn key(number: u64, part: u16) -> PartKey {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    PartKey { block: BlockId(id), part }
}

/// The bytes of a part follow from its key.
pub fn fill(key: &PartKey, bytes: &mut [u8]) {
    let seed = u64::from_be_bytes(key.block.0[..8].try_into().unwrap()) * 31 + u64::from(key.part);
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = (seed.wrapping_mul(index as u64 / 8 + 1).wrapping_add(index as u64 * 7) >> 3) as u8;
    }
}

pub fn expected(key: &PartKey) -> Vec<u8> {
    let mut bytes = vec![0; PART_BYTES as usize];
    fill(key, &mut bytes);
    bytes
}

/// Saves a part and waits for it.
pub fn save(tier: &Arc<Tier>, key: PartKey) -> Result<()> {
    save_many(tier, &[key]).pop().unwrap()
}

/// Saves parts, all in flight at once, in shards of a page.
pub fn save_many(tier: &Arc<Tier>, keys: &[PartKey]) -> Vec<Result<()>> {
    let (sender, receiver) = mpsc::channel();
    for (index, key) in keys.iter().enumerate() {
        let (tier2, sender, key) = (Arc::clone(tier), sender.clone(), *key);
        let done = move |extent: Result<crate::posix::Extent>| {
            let extent = match extent {
                Ok(extent) => extent,
                Err(error) => return sender.send((index, Err(error))).unwrap(),
            };
            let pages = tier2.extent_bytes() as usize / PAGE;
            let mut memory = Pages::new(pages);
            fill(&key, &mut memory.bytes_mut()[..PART_BYTES as usize]);
            let payload = memory.slice(0, pages - 1);
            let trailer = memory.slice(pages - 1, 1);
            // SAFETY: `memory` outlives the call and is used by nobody else.
            unsafe { tier2.seal(&extent, &[payload], PAGE as u64, trailer.pointer) };
            let pieces = vec![memory.slice(0, pages)];
            let done = Box::new(move |result| {
                drop(memory);
                let _ = sender.send((index, result));
            });
            tier2.write(extent, pieces, Class::Save, None, done);
        };
        tier.reserve(&key, Some(deadline()), Box::new(done));
    }
    drop(sender);
    let mut results: Vec<(usize, Result<()>)> =
        (0..keys.len()).map(|_| receiver.recv_timeout(PATIENCE).unwrap()).collect();
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

pub fn read_range(
    tier: &Arc<Tier>,
    key: &PartKey,
    found: &Found,
    range: std::ops::Range<u64>,
) -> Result<Pages> {
    let pages = Pages::new((range.end - range.start) as usize / PAGE);
    let slice = pages.slice(0, pages.count());
    let (sender, receiver) = mpsc::channel();
    tier.read(
        key,
        found,
        range,
        vec![slice],
        Class::Load,
        None,
        Box::new(move |result| drop(sender.send(result.map(|()| pages)))),
    );
    receiver.recv_timeout(PATIENCE).unwrap()
}

/// Loads a part as a store does: find, read, verify, and ask what went wrong.
pub fn load(tier: &Arc<Tier>, key: &PartKey) -> Result<Vec<u8>> {
    let missing = || Error::new(crate::error::ErrorKind::NotFound, "not in the index");
    let found = tier.find(key).ok_or_else(missing)?;
    let payload = tier.extent_bytes() - PAGE as u64;
    let outcome = read_range(tier, key, &found, 0..payload).and_then(|pages| {
        let slices: [DmaSlice; 1] = [pages.slice(0, pages.count())];
        // SAFETY: `pages` lives and the read has ended.
        unsafe { tier.verify(key, &found, &slices) }?;
        Ok(pages.bytes()[..PART_BYTES as usize].to_vec())
    });
    outcome.map_err(|error| {
        let (sender, receiver) = mpsc::channel();
        let done = Box::new(move |error| drop(sender.send(error)));
        tier.read_failed(key, &found, error, done);
        receiver.recv_timeout(PATIENCE).unwrap()
    })
}

pub fn refresh(tier: &Tier) {
    try_refresh(tier).unwrap();
}

pub fn try_refresh(tier: &Tier) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    tier.refresh(Box::new(move |result| drop(sender.send(result))));
    receiver.recv_timeout(PATIENCE).unwrap()
}

/// Files below a directory whose name contains `part`, sorted.
pub fn files_with(directory: &Path, part: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, part));
        } else if path.to_string_lossy().contains(part) {
            found.push(path);
        }
    }
    found.sort();
    found
}

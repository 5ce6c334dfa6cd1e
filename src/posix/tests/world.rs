//! What the tests share: backends on temporary directories, tiers on them, and parts with known bytes.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::block::{BlockId, Namespace, PAGE, PartKey};
use crate::config::{Checksum, DirectIo, Durability, GcConfig, IoEngine};
use crate::error::{Error, Result};
use crate::io::backend::{Backend, BackendConfig};
use crate::io::sim::{Call, Effect, Fault, Occasion, SimDisk};
use crate::io::{Class, DmaSlice};
use crate::posix::format::{ProcessIdentity, Record};
use crate::posix::host::this_process;
use crate::posix::manifest::{Item, Urgency};
use crate::posix::pages::Pages;
use crate::posix::reply::Reply;
use crate::posix::{Found, Recovered, Scope, Tail, Tier, TierConfig};

pub const PART_BYTES: u64 = 3 * PAGE as u64 + 100;
pub const PATIENCE: Duration = Duration::from_secs(20);

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
        queue_depth: 4096,
        ..BackendConfig::default()
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

/// A backend on a simulated disk.
pub fn sim_backend(disk: &SimDisk) -> Arc<Backend> {
    disk.backend(
        Path::new("/store"),
        &BackendConfig {
            engine: IoEngine::Psync,
            direct: DirectIo::Auto,
            threads: 1,
            depth: 8,
            io_bytes: 1 << 20,
            queue_depth: 1024,
            ..BackendConfig::default()
        },
    )
}

/// A tier over simulated disks.
pub fn tier_over(disks: &[&SimDisk], config: TierConfig) -> Arc<Tier> {
    tier_as(this_process(), disks, config)
}

pub fn always(call: Call, effect: Effect) -> Fault {
    Fault { call, occasion: Occasion::Always, effect }
}

/// Injects EIO or a delay into what touches the first pages of files whose path contains `text`.
pub fn on(call: Call, text: &str, effect: Effect) -> Fault {
    Fault { call, occasion: Occasion::Bytes(text.into(), 0..u64::MAX), effect }
}

/// As [`tier_over`], in the name of another process.
pub fn tier_as(process: ProcessIdentity, disks: &[&SimDisk], config: TierConfig) -> Arc<Tier> {
    let backends = disks.iter().map(|disk| sim_backend(disk)).collect();
    let scope = Scope { parts: 0..1, tail: Tail::Own };
    Tier::open_as(process, &namespace(1), scope, backends, config, deadline()).unwrap()
}

/// A process of another host: only its lease tells whether it lives.
pub fn stranger() -> ProcessIdentity {
    ProcessIdentity { boot: [0xab; 16], pid_namespace: 1, pid: 2, start_time: 3 }
}

/// A process of this host that has ended.
pub fn dead_process() -> ProcessIdentity {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    ProcessIdentity { pid, start_time: 1, ..this_process() }
}

/// Cleans up after dead writers and waits for it.
pub fn recover(tier: &Tier) -> Recovered {
    let (sender, receiver) = mpsc::channel();
    tier.recover(Box::new(move |result| sender.send(result).unwrap()));
    receiver.recv_timeout(PATIENCE).unwrap().unwrap()
}

/// One round of reclaim.
pub fn reclaim(tier: &Tier) -> u64 {
    let (sender, receiver) = mpsc::channel();
    tier.reclaim(Box::new(move |freed| sender.send(freed).unwrap()));
    receiver.recv_timeout(PATIENCE).unwrap().unwrap()
}

/// Appends a record to the manifest of the tier's writer in its first home and waits for it.
pub fn push(tier: &Tier, record: Record) {
    let (sender, receiver) = mpsc::channel();
    let reply = Reply::new(move |result| sender.send(result).unwrap());
    let writer = tier.savers()[0].writer().unwrap();
    writer.manifest.push(Item { record, data: None, reply }, Urgency::Now);
    receiver.recv_timeout(PATIENCE).unwrap().unwrap();
}

/// Waits for something that other threads bring about.
pub fn wait_until(mut done: impl FnMut() -> bool) {
    let end = deadline();
    while !done() {
        assert!(Instant::now() < end, "it did not happen in time");
        std::thread::sleep(Duration::from_millis(20));
    }
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
    let receiver = begin_saves(tier, keys);
    let mut results: Vec<(usize, Result<()>)> =
        (0..keys.len()).map(|_| receiver.recv_timeout(PATIENCE).unwrap()).collect();
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// As [`save_many`], without waiting: the receiver gets the place of each key and what became of it.
pub fn begin_saves(tier: &Arc<Tier>, keys: &[PartKey]) -> mpsc::Receiver<(usize, Result<()>)> {
    let (sender, receiver) = mpsc::channel();
    for (index, key) in keys.iter().enumerate() {
        let (tier2, sender, key) = (Arc::clone(tier), sender.clone(), *key);
        let done = move |extent: Result<crate::posix::Extent>| {
            let extent = match extent {
                Ok(extent) => extent,
                Err(error) => return drop(sender.send((index, Err(error)))),
            };
            let pages = tier2.extent_bytes() as usize / PAGE;
            let mut memory = Pages::new(pages);
            fill(&key, &mut memory.bytes_mut()[..PART_BYTES as usize]);
            let payload = memory.slice(0, pages - 1);
            let trailer = memory.slice(pages - 1, 1);
            // SAFETY: `memory` outlives the call and is used by nobody else.
            unsafe { tier2.seal(&extent, &[payload], PAGE as u64, None, trailer.pointer) };
            let pieces = vec![memory.slice(0, pages)];
            let done = Box::new(move |result| {
                drop(memory);
                let _ = sender.send((index, result));
            });
            tier2.write(extent, pieces, Class::Save, None, done);
        };
        tier.reserve(&key, Some(deadline()), Box::new(done));
    }
    receiver
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

//! Open: backends are probed, the arena mapped and registered, the tier's index read, threads started.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::engine::Engine;
use super::fresh::Fresh;
use super::gpu_direct::{self, Answer};
use super::regions::Regions;
use super::slots::Slots;
use crate::block::PartKey;
use crate::cache::shared::{SharedReaders, SharedScope, SharedTable, View};
use crate::clock::Clock;
use crate::completion::CompletionQueue;
use crate::config::{Config, DirectIo, Facility, NumaPolicy, Storage};
use crate::copy::{CopyPool, Owner};
use crate::device::{self, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::hash::BlockHasher;
use crate::io::backend::{Backend, BackendConfig};
use crate::io::carrier::Carrier;
use crate::io::thread;
use crate::layout::Layout;
use crate::log::{self, Level};
use crate::mem::arena::{Arena, ArenaRequest};
use crate::mem::numa;
use crate::metrics::Metrics;
use crate::parts::{Keep, Parts, Rules, Sink};
use crate::posix::{Scope, Tail, Tier, TierConfig};

/// Bounds of a reactor's queue of one class: as many requests as there are slots may wait in it.
const QUEUE_MIN: usize = 4096;
const QUEUE_MAX: usize = 65_536;

/// Bytes of a part that are read at once where only some of its shards are waited for: a drive needs no more
/// in one request, and a layer that is wanted next waits for no more.
const PIECE_BYTES: u64 = 1 << 20;

/// What a store may be given instead of what its configuration names.
#[derive(Default)]
pub struct Platform {
    /// One backend for each of `storage_backends`, opened already.
    pub backends: Option<Vec<Arc<Backend>>>,
    /// The device.
    pub device: Option<Arc<dyn Device>>,
}

/// The host's shared view of DRAM tiers: each store that transfers writes its own table; who needs to know
/// of parts that are not its own reads those of the others.
#[derive(Default)]
pub(super) struct Shared {
    table: Option<Mutex<SharedTable>>,
    readers: Option<SharedReaders>,
}

impl Shared {
    pub(super) fn insert(&self, key: &PartKey) {
        if let Some(table) = &self.table {
            table.lock().insert(key);
        }
    }

    pub(super) fn remove(&self, key: &PartKey) {
        if let Some(table) = &self.table {
            table.lock().remove(key);
        }
    }

    /// The DRAM tier is gone: readers see nothing in it any more.
    pub(super) fn close(&self) {
        if let Some(table) = &self.table {
            table.lock().close();
        }
    }

    /// Looks for tables of stores that were opened since the last look.
    pub(super) fn refresh(&self) {
        if let Some(readers) = &self.readers {
            readers.scan();
        }
    }

    /// What the host's living stores have in DRAM.
    pub(super) fn view(&self) -> Option<View> {
        self.readers.as_ref().map(SharedReaders::view)
    }
}

pub(super) fn open(config: Config, platform: Platform) -> Result<Arc<Engine>> {
    for warning in &config.warnings {
        log::once(Level::Warning, warning, format_args!("{warning}"));
    }
    let layout = Arc::new(Layout::new(&config.geometry)?);
    let device = match platform.device {
        Some(device) => device,
        None => device::open(config.device, config.device_id)?,
    };
    tell_of(&*device);
    let ground = match gpu_direct::open(&config, &device, platform.backends.is_some())? {
        Answer::Direct(ground) => ground,
        Answer::Pinned => open_pinned(&config, &device, platform.backends)?,
        Answer::Refused(fallback) => {
            let ground = open_pinned(&config, &device, platform.backends)?;
            ground.backends.iter().for_each(|backend| backend.note(fallback.clone()));
            ground
        }
    };
    let Ground { slots, backends, pinned, left } = ground;
    let tier = match config.pipeline.storage {
        Storage::Posix => Some(open_tier(&config, &backends, Instant::now() + left)?),
        Storage::Empty => None,
    };
    let completions = Arc::new(CompletionQueue::new()?);
    let engine = Arc::new_cyclic(|itself| Engine {
        layout,
        hasher: BlockHasher::new(&config.namespace.logical_fingerprint()),
        tier,
        backends,
        parts: Mutex::new(Parts::new(rules(&config))),
        pool: CopyPool::new(),
        hashes: Arc::default(),
        clock: Clock::default(),
        completions,
        tasks: Mutex::default(),
        next_task: AtomicU64::new(1),
        live_units: AtomicU64::new(0),
        fresh: Fresh::default(),
        regions: Regions::default(),
        shared: open_shared(&config),
        metrics: Metrics::default(),
        closing: AtomicBool::new(false),
        closed: Arc::new(AtomicBool::new(false)),
        drained: Condvar::new(),
        drain_lock: Mutex::new(()),
        poison: OnceLock::new(),
        arena_lost: AtomicBool::new(false),
        itself: itself.clone(),
        slots,
        device,
        config,
    });
    // From here on closing the store unpins it.
    if let Some(pinned) = pinned {
        pinned.keep();
    }
    if !engine.config.is_lookup_only() {
        let owner: Arc<dyn Owner> = Arc::clone(&engine) as Arc<dyn Owner>;
        let started = engine.pool.start(&*engine.device, engine.config.streams, &owner);
        if let Err(error) = started {
            // Workers that did start hold the engine.
            super::close::close(&engine);
            return Err(error);
        }
    }
    Ok(engine)
}

/// Says what the device lacks, once in this process, and how it copies, which each open may measure otherwise.
fn tell_of(device: &dyn Device) {
    let report = device.report();
    for fallback in &report.fallbacks {
        log::once(Level::Warning, fallback, format_args!("{}: {fallback}", report.kind));
    }
    for copies in &report.copies {
        log::info(format_args!("{}, {copies}", report.description));
    }
}

/// What a store stands on: staging memory, and directories that transfer from and to it.
pub(super) struct Ground {
    pub(super) slots: Option<Slots>,
    pub(super) backends: Vec<Arc<Backend>>,
    pub(super) pinned: Option<Pinned>,
    /// Of the time for the directories.
    pub(super) left: Duration,
}

/// Staging memory that the device knows, while the store is being opened: an open that fails later has the
/// device forget it before it is unmapped.
pub(super) struct Pinned {
    device: Arc<dyn Device>,
    base: Option<*mut u8>,
}

impl Pinned {
    pub(super) fn new(device: Arc<dyn Device>, base: *mut u8) -> Self {
        Self { device, base: Some(base) }
    }

    fn keep(mut self) {
        self.base = None;
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(base) = self.base {
            self.device.unpin(base);
        }
    }
}

fn rules(config: &Config) -> Rules {
    let slots = if config.is_lookup_only() { 0 } else { slot_count(config) };
    Rules {
        slots: slots as u32,
        shards_per_part: config.geometry.shards_per_part(),
        shards_per_piece: (PIECE_BYTES / config.geometry.shard_bytes).max(1) as u32,
        keep: if config.pipeline.cache { Keep::Cached } else { Keep::Staged },
        sink: if config.pipeline.storage == Storage::Posix { Sink::Storage } else { Sink::Nothing },
        queue_max: config.waiting_queue_depth,
        partial_timeout: config.timeout,
    }
}

pub(super) fn slot_count(config: &Config) -> u64 {
    (config.cache_bytes / config.geometry.extent_bytes()).min(u64::from(u32::MAX))
}

/// Staging in host memory: the arena, registered with what the directories run on and with the device.
fn open_pinned(
    config: &Config,
    device: &Arc<dyn Device>,
    given: Option<Vec<Arc<Backend>>>,
) -> Result<Ground> {
    let arena = map_arena(config, &**device)?;
    // The deadline is the directories' alone: to touch and register a large arena takes longer, which is no
    // sign of a mount that hangs.
    let probing = Instant::now();
    let backends = match given {
        Some(backends) => backends,
        None => open_backends(config, probing + config.timeout, None)?,
    };
    let left = config.timeout.saturating_sub(probing.elapsed());
    let pinned = match &arena {
        Some(arena) => Some(register_arena(arena, &backends, device, config.register_memory)?),
        None => None,
    };
    let slots = arena.map(|arena| Slots::in_host(&config.geometry, arena));
    Ok(Ground { slots, backends, pinned, left })
}

fn map_arena(config: &Config, device: &dyn Device) -> Result<Option<Arena>> {
    if config.is_lookup_only() {
        return Ok(None);
    }
    if config.share_buffer && config.local_ranks > 1 {
        let text = format_args!(
            "share_buffer_enable: cache_buffer_capacity_gb is divided: each of {} ranks maps {:.3} GiB of its own",
            config.local_ranks,
            config.cache_bytes as f64 / (1u64 << 30) as f64
        );
        log::once(Level::Info, "share_buffer_enable", text);
    }
    check_slots(config)?;
    let numa_node = match config.numa {
        NumaPolicy::Off => None,
        NumaPolicy::Node(node) => Some(node),
        NumaPolicy::Auto => device.numa_node().or_else(|| numa::node_of_cpus(&config.cpu_affinity)),
    };
    let bytes = (slot_count(config) * config.geometry.extent_bytes()) as usize;
    let request =
        ArenaRequest { bytes, numa_node, huge_pages: config.huge_pages, ranks: config.local_ranks };
    let arena = Arena::open(&request)?;
    for note in arena.notes() {
        log::once(Level::Warning, note, format_args!("{note}"));
    }
    Ok(Some(arena))
}

/// Whether there is room for one part that loads and one that saves.
pub(super) fn check_slots(config: &Config) -> Result<()> {
    let (slots, slot_bytes) = (slot_count(config), config.geometry.extent_bytes());
    if slots >= 2 {
        return Ok(());
    }
    let text = format!(
        "cache_buffer_capacity_gb: {:.3} GiB hold {slots} parts of {} bytes; two at least are needed, {:.3} GiB",
        config.cache_bytes as f64 / (1u64 << 30) as f64,
        config.geometry.part_bytes,
        (2 * slot_bytes) as f64 / (1u64 << 30) as f64,
    );
    Err(Error::new(ErrorKind::InvalidConfig, text))
}

pub(super) fn open_backends(
    config: &Config,
    deadline: Instant,
    carrier: Option<Arc<dyn Carrier>>,
) -> Result<Vec<Arc<Backend>>> {
    let io = BackendConfig {
        engine: config.io_engine,
        // Only files past the page cache are carried to where the CPU does not reach.
        direct: if carrier.is_some() { DirectIo::Required } else { config.io_direct },
        threads: config.io_threads,
        depth: config.io_depth,
        io_bytes: config.io_bytes,
        affinity: config.cpu_affinity.clone(),
        queue_depth: (rules(config).slots as usize).clamp(QUEUE_MIN, QUEUE_MAX),
        carrier,
    };
    // Of several directories one may hang: the others still need time, to read what is in them.
    let now = Instant::now();
    let probed = match config.storage_backends.len() {
        0 | 1 => deadline,
        _ => now + deadline.saturating_duration_since(now) / 2,
    };
    let opened: Vec<Result<Arc<Backend>>> = std::thread::scope(|scope| {
        let directories = config.storage_backends.iter();
        let threads: Vec<_> = directories
            .map(|directory| {
                thread::quietly(|| scope.spawn(|| Backend::open(directory, &io, probed)))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("opening a backend does not panic"))
            .collect()
    });
    let all = opened.len();
    let mut backends = Vec::new();
    let mut failed = Vec::new();
    for result in opened {
        match result {
            Ok(backend) => backends.push(backend),
            Err(error) => failed.push(error),
        }
    }
    // Of several directories one may be gone: it takes only its own blocks with it. A mistake in the
    // configuration is said at once.
    let gone = |error: &Error| {
        matches!(error.kind(), ErrorKind::Io | ErrorKind::Timeout | ErrorKind::NoSpace)
    };
    if let Some(error) = failed.iter().find(|error| !gone(error) || failed.len() == all) {
        for backend in &backends {
            let _ = backend.stop(deadline);
        }
        return Err(error.clone());
    }
    failed
        .iter()
        .for_each(|error| log::warning(format_args!("a storage backend is left out: {error}")));
    Ok(backends)
}

/// The same pages for the drive and for the device. If one registration is refused the other still works.
fn register_arena(
    arena: &Arena,
    backends: &[Arc<Backend>],
    device: &Arc<dyn Device>,
    need: Facility,
) -> Result<Pinned> {
    for backend in backends.iter().filter(|_| need != Facility::Off) {
        match backend.register_memory(arena.base(), arena.len()) {
            Err(error) if need == Facility::Required => return Err(error),
            Err(error) => {
                let text = format_args!(
                    "the arena is not registered with io_uring, I/O costs more CPU: {error}"
                );
                log::once(Level::Warning, "arena io_uring", text);
            }
            Ok(()) => {}
        }
    }
    // SAFETY: the arena stays mapped until close has unpinned it.
    if let Err(error) = unsafe { device.pin(arena.base(), arena.len()) } {
        let text =
            format_args!("the arena is not pinned for the device, copies are slower: {error}");
        log::once(Level::Warning, "arena pin", text);
    }
    Ok(Pinned::new(Arc::clone(device), arena.base()))
}

fn open_tier(config: &Config, backends: &[Arc<Backend>], deadline: Instant) -> Result<Arc<Tier>> {
    let geometry = &config.geometry;
    let (parts, tail) = if config.is_lookup_only() {
        (0..0, Tail::All)
    } else {
        let first = geometry.part_index as u16;
        let all = geometry.parts_owned == geometry.part_count;
        (first..first + geometry.parts_owned as u16, if all { Tail::All } else { Tail::Own })
    };
    let tier = TierConfig {
        segment_bytes: config.segment_bytes,
        durability: config.durability,
        checksum: config.checksum,
        lookup_refresh: config.lookup_refresh,
        timeout: config.timeout,
        lease: config.lease,
        capacity_bytes: config.capacity_bytes,
        gc: config.gc,
    };
    let backends = backends.to_vec();
    Tier::open(
        &config.namespace,
        Scope { parts, tail },
        backends,
        tier,
        deadline.max(Instant::now() + Duration::from_millis(1)),
    )
}

fn open_shared(config: &Config) -> Shared {
    if !config.pipeline.cache {
        return Shared::default();
    }
    let scope = SharedScope::new(&config.namespace, &config.instance);
    let owns_all = config.geometry.parts_owned == config.geometry.part_count;
    let readers = (config.is_lookup_only() || !owns_all).then(|| SharedReaders::new(&scope));
    if config.is_lookup_only() {
        return Shared { table: None, readers };
    }
    let table = SharedTable::create(&scope, slot_count(config) as u32).map(Mutex::new);
    if let Err(error) = &table {
        let text = format_args!("schedulers of this host do not see DRAM hits: {error}");
        log::once(Level::Warning, "shared table", text);
    }
    Shared { table: table.ok(), readers }
}

//! What a store is told at open: [`Options`], the keys as they were written, and [`Config`], the same
//! checked and typed. Knows every key of `docs/configuration.md`; opens no file but the YAML it is given,
//! touches no device, prints nothing: warnings are a list in [`Config`].

#![forbid(unsafe_code)]

mod build;
mod geometry;
mod keys;
mod options;
mod upstream;
mod value;
mod yaml;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use crate::block::{Geometry, Namespace};

pub use keys::{KEYS, Key, Kind, Scope};
pub use options::Options;
pub use upstream::{UPSTREAM_KEYS, UPSTREAM_PREFIXES};

/// The last tier of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Files in `storage_backends`.
    Posix,
    /// Nothing: what leaves the arena is gone.
    Empty,
}

/// The tiers in order (`store_pipeline`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pipeline {
    /// Whether the arena is kept as a DRAM cache; otherwise it only stages.
    pub cache: bool,
    /// What stands behind it.
    pub storage: Storage,
}

impl Pipeline {
    /// The name as it is written in `store_pipeline`.
    pub fn name(self) -> &'static str {
        match (self.cache, self.storage) {
            (true, Storage::Posix) => "Cache|Posix",
            (false, Storage::Posix) => "Posix",
            (true, Storage::Empty) => "Cache|Empty",
            (false, Storage::Empty) => "Empty",
        }
    }
}

/// How files are read and written (`io_engine`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEngine {
    /// `io_uring` where a probe at open finds it works, else [`IoEngine::Psync`].
    Auto,
    /// `io_uring`; an error at open where the kernel refuses it.
    IoUring,
    /// A bounded pool of threads that call `pread` and `pwrite`.
    Psync,
}

/// Whether files bypass the page cache (`io_direct`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectIo {
    /// `O_DIRECT` where a probe at open finds it works, else buffered.
    Auto,
    /// `O_DIRECT`; an error at open where the file system refuses it.
    Required,
    /// Through the page cache.
    Off,
}

/// A part of the platform that the engine can do without, at a cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Facility {
    /// Used where the platform offers it; the fallback is told once.
    Auto,
    /// An error at open where the platform does not offer it.
    Required,
    /// Not used.
    Off,
}

/// What PERSISTED promises after a power cut (`durability`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Survives the death of the process; a power cut may lose it, never falsify it.
    None,
    /// Data is flushed before the record that publishes it.
    Ordered,
    /// Data and record are flushed before PERSISTED.
    Durable,
}

/// Whether loads are verified (`checksum`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Every load from storage is verified.
    Full,
    /// Nothing is computed or compared; segments are never recycled in place.
    Off,
}

/// Whose memory the addresses of a batch name (`device`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The first of CUDA and Ascend whose driver is there, else host memory.
    Auto,
    /// Host memory.
    Host,
    /// NVIDIA, through `libcuda.so.1`.
    Cuda,
    /// Huawei Ascend, through `libascendcl.so`.
    Ascend,
}

/// On which NUMA node the arena lies (`numa_node`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumaPolicy {
    /// The node of the device, or of `cpu_affinity_cores`, where known.
    Auto,
    /// Wherever the kernel puts it.
    Off,
    /// This node.
    Node(u32),
}

/// When and how far a namespace's bytes are brought back below `posix_capacity_gb` (`posix_gc_*`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GcConfig {
    /// Whether this store reclaims; the bound itself holds for its own saves either way.
    pub enabled: bool,
    /// Share of the capacity at which reclaim begins.
    pub high_watermark: f64,
    /// Share of the capacity at which it ends.
    pub low_watermark: f64,
    /// Time between two looks at the bytes in use.
    pub interval: Duration,
}

/// A checked configuration of one store.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The tiers.
    pub pipeline: Pipeline,
    /// Directories that hold segments and manifests; empty only without the Posix tier.
    pub storage_backends: Vec<PathBuf>,
    /// Bytes of the arena.
    pub cache_bytes: u64,
    /// Ranks of this host that map an arena each: the memory ceiling is shared among them.
    pub local_ranks: u32,
    /// Whether the arena must have huge pages.
    pub huge_pages: Facility,
    /// Whether the arena must be registered with `io_uring`.
    pub register_memory: Facility,
    /// Where the arena lies.
    pub numa: NumaPolicy,
    /// Kind of the callers' memory.
    pub device: DeviceKind,
    /// Ordinal of the device; -1: lookup only.
    pub device_id: i32,
    /// How blocks are cut. A lookup-only store has one slice of a whole part.
    pub geometry: Geometry,
    /// Who shares.
    pub namespace: Namespace,
    /// Name of the engine instance, for DRAM hits of lookup-only stores (`unique_id`).
    pub instance: String,
    /// I/O engine.
    pub io_engine: IoEngine,
    /// Page-cache bypass.
    pub io_direct: DirectIo,
    /// Reactors (or, with psync, groups of I/O threads) a backend.
    pub io_threads: usize,
    /// Operations in flight in each ring.
    pub io_depth: u32,
    /// Largest single I/O in bytes, a multiple of the page.
    pub io_bytes: usize,
    /// CPUs that reactors are pinned to; empty: not pinned.
    pub cpu_affinity: Vec<usize>,
    /// Bytes of a segment file, a multiple of the page.
    pub segment_bytes: u64,
    /// Durability of PERSISTED.
    pub durability: Durability,
    /// Verification.
    pub checksum: Checksum,
    /// Bound on the bytes of the namespace in all backends.
    pub capacity_bytes: Option<u64>,
    /// Reclaim.
    pub gc: GcConfig,
    /// How stale the index may be when a lookup is answered.
    pub lookup_refresh: Duration,
    /// Deadline of a task.
    pub timeout: Duration,
    /// After how long without a heartbeat others may take a writer for dead.
    pub lease: Duration,
    /// Tasks that wait; one more gets BUSY.
    pub waiting_queue_depth: usize,
    /// Entries of tasks in work at a time.
    pub running_queue_depth: usize,
    /// Copy streams.
    pub streams: usize,
    /// The capacity was meant for all ranks of a host: `cache_bytes` is this one's share.
    pub share_buffer: bool,
    /// The direct path between drive and device memory.
    pub gpu_direct: Facility,
    /// What the owner of the file should know: keys without effect, values replaced.
    pub warnings: Vec<String>,
}

impl Config {
    /// Whether the store answers lookups and transfers nothing.
    pub fn is_lookup_only(&self) -> bool {
        self.device_id < 0
    }
}

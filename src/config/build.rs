//! From [`Options`] to [`Config`]: the checks that need more than one key.

use std::path::PathBuf;
use std::time::Duration;

use crate::block::{Geometry, Namespace, PAGE};
use crate::error::{Error, ErrorKind, Result};

use super::geometry;
use super::options::Options;
use super::{
    Checksum, Config, DeviceKind, DirectIo, Durability, Facility, GcConfig, IoEngine, NumaPolicy,
    Pipeline, Storage,
};

const GIB: f64 = (1_u64 << 30) as f64;
const MIB: u64 = 1 << 20;
/// The arena comes in whole huge pages.
const ARENA_UNIT: u64 = 2 * MIB;
/// A transferring store needs room for one part that loads and one that saves.
const SLOTS_MIN: u64 = 2;
/// A segment holds at least so many extents, or its own pages would weigh too much.
const SEGMENT_EXTENTS_MIN: u64 = 4;
/// A bounded namespace has room for at least so many segments, so that whole ones can be reclaimed.
const SEGMENTS_MIN: u64 = 8;

pub(super) fn build(options: &Options) -> Result<Config> {
    let mut warnings = options.warnings().to_vec();
    let device_id = options.integer("device_id") as i32;
    let lookup_only = device_id < 0;
    let pipeline = pipeline(options.word("store_pipeline"));
    let geometry = geometry::build(options, lookup_only)?;
    let capacity_bytes = match gigabytes(options, "posix_capacity_gb") {
        0 => None,
        bytes => Some(bytes),
    };
    Ok(Config {
        pipeline,
        storage_backends: storage_backends(options, pipeline)?,
        cache_bytes: cache_bytes(options, &geometry, lookup_only, &mut warnings)?,
        local_ranks: options.integer("local_rank_size") as u32,
        huge_pages: facility(options.word("huge_pages")),
        register_memory: facility(options.word("register_memory")),
        numa: numa(options),
        device: device(options.word("device")),
        device_id,
        namespace: namespace(options, &geometry, &mut warnings),
        instance: options.text("unique_id"),
        io_engine: match options.word("io_engine") {
            "io_uring" | "required" => IoEngine::IoUring,
            "psync" => IoEngine::Psync,
            _ => IoEngine::Auto,
        },
        io_direct: match options.word("io_direct") {
            "true" | "required" => DirectIo::Required,
            "false" => DirectIo::Off,
            _ => DirectIo::Auto,
        },
        io_threads: options.integer("io_threads") as usize,
        io_depth: options.integer("io_depth") as u32,
        io_bytes: io_bytes(options)?,
        cpu_affinity: cpu_affinity(options),
        segment_bytes: segment_bytes(options, &geometry, capacity_bytes, &mut warnings)?,
        durability: match options.word("durability") {
            "ordered" => Durability::Ordered,
            "durable" => Durability::Durable,
            _ => Durability::None,
        },
        checksum: match options.word("checksum") {
            "off" => Checksum::Off,
            _ => Checksum::Full,
        },
        capacity_bytes,
        gc: gc(options)?,
        lookup_refresh: milliseconds(options, "lookup_refresh_ms"),
        timeout: milliseconds(options, "timeout_ms"),
        lease: milliseconds(options, "lease_ms"),
        waiting_queue_depth: options.integer("waiting_queue_depth") as usize,
        running_queue_depth: options.integer("running_queue_depth") as usize,
        streams: options.integer("stream_number") as usize,
        share_buffer: options.boolean("share_buffer_enable"),
        gpu_direct: facility(options.word("gpu_direct")),
        geometry,
        warnings,
    })
}

fn bad(message: String) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

fn pipeline(name: &str) -> Pipeline {
    let cache = name.starts_with("Cache");
    let storage = if name.ends_with("Posix") { Storage::Posix } else { Storage::Empty };
    Pipeline { cache, storage }
}

fn facility(word: &str) -> Facility {
    match word {
        "required" => Facility::Required,
        "off" => Facility::Off,
        _ => Facility::Auto,
    }
}

fn device(word: &str) -> DeviceKind {
    match word {
        "host" => DeviceKind::Host,
        "cuda" => DeviceKind::Cuda,
        "ascend" => DeviceKind::Ascend,
        _ => DeviceKind::Auto,
    }
}

fn numa(options: &Options) -> NumaPolicy {
    match (options.given_integer("numa_node"), options.word("numa_node")) {
        (Some(node), _) => NumaPolicy::Node(node as u32),
        (None, "off") => NumaPolicy::Off,
        (None, _) => NumaPolicy::Auto,
    }
}

fn milliseconds(options: &Options, name: &str) -> Duration {
    Duration::from_millis(options.integer(name) as u64)
}

fn gigabytes(options: &Options, name: &str) -> u64 {
    (options.number(name) * GIB) as u64
}

fn storage_backends(options: &Options, pipeline: Pipeline) -> Result<Vec<PathBuf>> {
    let mut backends: Vec<PathBuf> = Vec::new();
    for name in options.texts("storage_backends") {
        let path = PathBuf::from(&name);
        if backends.contains(&path) {
            return Err(bad(format!("storage_backends: \"{name}\" is listed twice")));
        }
        backends.push(path);
    }
    if pipeline.storage == Storage::Posix && backends.is_empty() {
        return Err(bad(format!(
            "storage_backends: missing; store_pipeline {} needs at least one directory",
            pipeline.name()
        )));
    }
    Ok(backends)
}

/// Bytes of this rank's arena.
fn cache_bytes(
    options: &Options,
    geometry: &Geometry,
    lookup_only: bool,
    warnings: &mut Vec<String>,
) -> Result<u64> {
    let ranks = match options.boolean("share_buffer_enable") {
        true => options.integer("local_rank_size") as u64,
        false => 1,
    };
    if options.boolean("share_buffer_enable") && ranks == 1 && !lookup_only {
        let text = "share_buffer_enable: without effect, because local_rank_size is 1: each rank maps the whole of \
                    cache_buffer_capacity_gb; set local_rank_size to the ranks of this host";
        warnings.push(text.to_owned());
    }
    let bytes =
        (gigabytes(options, "cache_buffer_capacity_gb") / ranks).next_multiple_of(ARENA_UNIT);
    let least = SLOTS_MIN * geometry.extent_bytes();
    if !lookup_only && bytes < least {
        return Err(bad(format!(
            "cache_buffer_capacity_gb: {} holds fewer than {SLOTS_MIN} parts of {} bytes for each of {ranks} ranks; set at least {:.3}",
            options.number("cache_buffer_capacity_gb"),
            geometry.part_bytes,
            ((least.next_multiple_of(ARENA_UNIT) * ranks) as f64 / GIB * 1000.0).ceil() / 1000.0
        )));
    }
    Ok(bytes)
}

fn io_bytes(options: &Options) -> Result<usize> {
    let bytes = options.integer("io_size_kb") as usize * 1024;
    match bytes.is_multiple_of(PAGE) {
        true => Ok(bytes),
        false => {
            Err(bad(format!("io_size_kb: {} is not a multiple of {}", bytes / 1024, PAGE / 1024)))
        }
    }
}

fn cpu_affinity(options: &Options) -> Vec<usize> {
    let cores = options.integers("cpu_affinity_cores").unwrap_or_default();
    cores.iter().map(|core| *core as usize).collect()
}

fn segment_bytes(
    options: &Options,
    geometry: &Geometry,
    capacity: Option<u64>,
    warnings: &mut Vec<String>,
) -> Result<u64> {
    let asked = options.integer("segment_size_mb") as u64 * MIB;
    let least = (SEGMENT_EXTENTS_MIN * geometry.extent_bytes()).next_multiple_of(MIB);
    let mut bytes = asked.max(least);
    if let Some(capacity) = capacity {
        bytes = bytes.min((capacity / SEGMENTS_MIN / MIB * MIB).max(least));
        if capacity < 2 * bytes {
            return Err(bad(format!(
                "posix_capacity_gb: {} holds fewer than two segments of {bytes} bytes; set at least {:.3}",
                options.number("posix_capacity_gb"),
                (2.0 * bytes as f64 / GIB * 1000.0).ceil() / 1000.0
            )));
        }
    }
    if options.is_given("segment_size_mb") && bytes != asked {
        warnings.push(format!(
            "segment_size_mb: {} is taken as {}, for parts of {} bytes{}",
            asked / MIB,
            bytes / MIB,
            geometry.part_bytes,
            if capacity.is_some() { " and this posix_capacity_gb" } else { "" }
        ));
    }
    Ok(bytes)
}

fn gc(options: &Options) -> Result<GcConfig> {
    let high = options.number("posix_gc_trigger_threshold_ratio");
    let freed = options.number("posix_gc_recycle_percent");
    if freed >= high {
        return Err(bad(format!(
            "posix_gc_recycle_percent: {freed} is not below posix_gc_trigger_threshold_ratio {high}"
        )));
    }
    Ok(GcConfig {
        enabled: options.boolean("posix_gc_enable"),
        high_watermark: high,
        low_watermark: high - freed,
        interval: Duration::from_secs(options.integer("posix_gc_check_interval_sec") as u64),
    })
}

fn namespace(options: &Options, geometry: &Geometry, warnings: &mut Vec<String>) -> Namespace {
    let model_id = options.text("model_id");
    if model_id.is_empty() {
        warnings.push(
            "model_id: not given; every model with the same sizes shares this namespace".into(),
        );
    }
    Namespace {
        model_id,
        dtype: options.text("dtype"),
        block_tokens: options.integer("block_tokens") as u32,
        extra: options.text("namespace_extra"),
        part_count: geometry.part_count,
        part_bytes: geometry.part_bytes,
        order: options.text("order"),
    }
}

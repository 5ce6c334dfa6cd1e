//! The direct path between drive and device memory: whether a store can have it, and opening it.
//!
//! The slots are then device memory that cuFile reads and writes, and the device computes the checksums. There is
//! no Cache tier on it: DRAM that holds parts would be the GPU's.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use twox_hash::xxhash3_64::Hasher;

use super::open::{Ground, Pinned, check_slots, open_backends, slot_count};
use super::slots::Slots;
use crate::block::PAGE;
use crate::config::{Config, DirectIo, Facility, IoEngine, Storage};
use crate::cufile::{self, CuFile};
use crate::device::{Device, DeviceStaging, HASH_BYTES_MIN, HashRun, hash_and_wait};
use crate::error::{Error, ErrorKind, Result};
use crate::io::report::Fallback;
use crate::mem::arena::{Arena, ArenaRequest};
use crate::mem::numa;

/// Lengths of which checksums are tried: the least that devices compute; a little more than a block of XXH3, of 1024
/// bytes; whole blocks; and many of them with a rest.
const HASHES_TRIED: [usize; 4] = [HASH_BYTES_MIN as usize, 1025, 4096, 33_000];

/// Multiplied for the seeds, of which the first is 0: bits in both halves.
const SEED_TRIED: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a store that asks for the direct path gets.
pub(super) enum Answer {
    /// It.
    Direct(Ground),
    /// Pinned host memory, because that was asked for.
    Pinned,
    /// Pinned host memory, for this reason.
    Refused(Fallback),
}

/// Opens slots and directories for the direct path.
///
/// # Errors
/// Where it is required: `InvalidConfig` if another key excludes it, `Unsupported` if the machine does not have
/// it, `Device` if the device has no room.
pub(super) fn open(config: &Config, device: &Arc<dyn Device>, given: bool) -> Result<Answer> {
    if config.gpu_direct == Facility::Off || config.is_lookup_only() {
        return Ok(Answer::Pinned);
    }
    match exclusion(config, given).map_or_else(|| ground(config, device), Err) {
        Ok(ground) => Ok(Answer::Direct(ground)),
        Err(error) if config.gpu_direct == Facility::Required => Err(Error::new(
            error.kind(),
            format!(
                "gpu_direct is required, but {error}. Or set gpu_direct: auto or off, and transfers go through \
                 pinned host memory"
            ),
        )),
        Err(error) => Ok(Answer::Refused(Fallback {
            what: format!("gpu_direct: auto uses pinned host memory, because {error}"),
            cost: "every byte stops in host memory, and the CPU computes the checksums".into(),
            remedy:
                "see GPUDirect Storage in docs/devices.md; gpu_direct: off asks for pinned memory"
                    .into(),
        })),
    }
}

/// The key that excludes the direct path, if one does.
fn exclusion(config: &Config, given: bool) -> Option<Error> {
    let text = if config.pipeline.cache {
        "store_pipeline has a Cache tier, which would lie in device memory; set it to `Posix`"
    } else if config.pipeline.storage == Storage::Empty {
        "store_pipeline has no storage; set it to `Posix`"
    } else if config.io_direct == DirectIo::Off {
        "io_direct is off, and the drive reaches device memory past the page cache alone; set it to auto"
    } else if config.io_engine != IoEngine::Auto {
        "io_engine names another engine; set it to auto"
    } else if !config.geometry.part_bytes.is_multiple_of(PAGE as u64) {
        "a part is not a whole number of pages of 4096 bytes; see block_size and part_count"
    } else if given {
        "the caller has opened the storage backends by itself"
    } else {
        return None;
    };
    Some(Error::new(ErrorKind::InvalidConfig, text))
}

fn ground(config: &Config, device: &Arc<dyn Device>) -> Result<Ground> {
    check_slots(config)?;
    let slots = slot_count(config) as usize;
    let payloads = slots * config.geometry.payload_bytes() as usize;
    let directories = config.storage_backends.len();
    // The memory for trials lies behind the slots, so that no transfer reaches from a slot into what follows.
    let memory = device.staging(payloads + cufile::trial_bytes(directories))?;
    let pinned = Pinned::new(Arc::clone(device), memory.base());
    try_hashes(&memory)?;
    let trailers = Arena::open(&ArenaRequest {
        // A page more, so that neither ends where device memory begins: such neighbours would be taken for one.
        bytes: (slots + 1) * PAGE,
        numa_node: device.numa_node().or_else(|| numa::node_of_cpus(&config.cpu_affinity)),
        huge_pages: config.huge_pages,
        ranks: config.local_ranks,
    })?;
    let files = CuFile::open(Arc::clone(&memory), payloads).map_err(unsupported)?;
    let probing = Instant::now();
    let backends = open_backends(config, probing + config.timeout, Some(files))?;
    Ok(Ground {
        slots: Some(Slots::on_device(&config.geometry, memory, trailers)),
        backends,
        pinned: Some(pinned),
        left: config.timeout.saturating_sub(probing.elapsed()),
    })
}

/// Has the device compute checksums of a pattern, where the slots will be, and compares them with the CPU's. A driver
/// that translates the kernel wrongly would call good parts corrupt, and each would be taken out of the index.
fn try_hashes(memory: &Arc<dyn DeviceStaging>) -> Result<()> {
    let room = |bytes: &usize| bytes + 8 * HASHES_TRIED.len() <= memory.bytes();
    let tried: Vec<usize> = HASHES_TRIED.into_iter().filter(room).collect();
    let runs: Vec<HashRun> = tried
        .iter()
        .enumerate()
        .map(|(index, &bytes)| HashRun {
            offset: 8 * index,
            bytes: bytes as u64,
            seed: SEED_TRIED.wrapping_mul(index as u64),
        })
        .collect();
    let longest = tried.iter().max().map_or(0, |bytes| bytes + 8 * tried.len());
    let pattern: Vec<u8> = (0..longest).map(|at| (at % 251 + at / 251) as u8).collect();
    memory.write(0, &pattern)?;
    let sums = hash_and_wait(memory, &runs)?;
    for (run, sum) in runs.iter().zip(sums) {
        let bytes = &pattern[run.offset..][..run.bytes as usize];
        if sum != Hasher::oneshot_with_seed(run.seed, bytes) {
            let text = format!(
                "the device computes a wrong checksum of {} bytes: its driver translates the kernel wrongly, or \
                 the device is broken; use another driver version, and run the vendor's memory test",
                run.bytes
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
    }
    Ok(())
}

/// What keeps cuFile from working is no failure of the device.
fn unsupported(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Internal => error,
        _ => Error::new(ErrorKind::Unsupported, error.to_string()),
    }
}

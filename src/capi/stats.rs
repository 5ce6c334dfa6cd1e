//! Numbers about a store: a struct for programs, Prometheus text for monitoring.

use std::ffi::c_char;

use super::boundary::{copy_text, enter};
use super::pointers::{STRUCT_SIZE_MAX, check, invalid, put};
use super::status::ucm_status_t;
use super::store::{store_of, ucm_store_t};
use crate::store::Stats;

/// Counters and gauges of a store. Counters begin at 0 when the store is opened.
///
/// Set struct_size to sizeof(ucm_stats_t). Fields are only ever appended; the library fills what lies
/// inside struct_size and sets what it does not know to 0.
///
/// @since 0.1
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct ucm_stats {
    /// sizeof(ucm_stats_t).
    pub struct_size: usize,
    /// Blocks asked of ucm_lookup and ucm_lookup_prefix.
    pub lookups: u64,
    /// Of those, present.
    pub lookup_hits: u64,
    /// Entries loaded.
    pub loads_ok: u64,
    /// Entries whose load failed, missing blocks among them.
    pub loads_failed: u64,
    /// Entries saved, or found to be present.
    pub saves_ok: u64,
    /// Entries whose save failed.
    pub saves_failed: u64,
    /// Bytes brought to callers.
    pub load_bytes: u64,
    /// Bytes taken from callers.
    pub save_bytes: u64,
    /// Loads answered from DRAM.
    pub cache_hits: u64,
    /// Loads that went to storage.
    pub cache_misses: u64,
    /// Slots taken from parts that were still good.
    pub cache_evictions: u64,
    /// Parts whose save was given up: dropped for want of room, or because some of their shards never came.
    pub save_dropped: u64,
    /// Reads whose bytes did not match their checksum: each was a miss, never wrong bytes.
    pub verify_failures: u64,
    /// Submits refused for want of room.
    pub busy: u64,
    /// Entries whose deadline passed.
    pub timeouts: u64,
    /// Slots of the arena in use now.
    pub slots_used: u64,
    /// Slots of the arena.
    pub slots: u64,
    /// Parts that wait for a slot now.
    pub queued: u64,
    /// Transfers of live tasks now.
    pub running: u64,
    /// Live tasks now.
    pub tasks: u64,
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// Storage directories.
    pub backends: u64,
    /// Of those, how many had to do without something (the log said what, and the remedy).
    pub backends_degraded: u64,
    /// Parts on storage that can be found.
    pub parts: u64,
    /// Memory of the index, in bytes.
    pub index_bytes: u64,
    /// Segment files that are known and not retired.
    pub segments: u64,
    /// Bytes of the namespace's segments on storage, as last counted.
    pub segment_bytes: u64,
    /// Other writers that are known.
    pub writers: u64,
    /// Records of manifests that were skipped because they failed their checksum.
    pub bad_records: u64,
    /// Parts on storage that failed verification and are not served any more.
    pub quarantined: u64,
    /// Refreshes of the index.
    pub refreshes: u64,
}

/// @since 0.1
pub type ucm_stats_t = ucm_stats;

/// The numbers as the struct has them.
fn numbers(struct_size: usize, stats: &Stats) -> ucm_stats {
    let degraded =
        stats.backends.iter().filter(|it| !it.fallbacks.is_empty() || it.broken.is_some()).count();
    let tier = stats.tier.as_ref();
    ucm_stats {
        struct_size,
        lookups: stats.lookups,
        lookup_hits: stats.lookup_hits,
        loads_ok: stats.loads_ok,
        loads_failed: stats.loads_failed,
        saves_ok: stats.saves_ok,
        saves_failed: stats.saves_failed,
        load_bytes: stats.load_bytes,
        save_bytes: stats.save_bytes,
        cache_hits: stats.cache_hits,
        cache_misses: stats.cache_misses,
        cache_evictions: stats.cache_evictions,
        save_dropped: stats.save_dropped,
        verify_failures: stats.verify_failures,
        busy: stats.busy,
        timeouts: stats.timeouts,
        slots_used: stats.slots_used,
        slots: stats.slots,
        queued: stats.queued,
        running: stats.running,
        tasks: stats.tasks,
        arena_bytes: stats.arena_bytes,
        backends: stats.backends.len() as u64,
        backends_degraded: degraded as u64,
        parts: tier.map_or(0, |tier| tier.parts),
        index_bytes: tier.map_or(0, |tier| tier.index_bytes),
        segments: tier.map_or(0, |tier| tier.segments),
        segment_bytes: tier.map_or(0, |tier| tier.segment_bytes),
        writers: tier.map_or(0, |tier| tier.writers),
        bad_records: tier.map_or(0, |tier| tier.bad_records),
        quarantined: tier.map_or(0, |tier| tier.quarantined),
        refreshes: tier.map_or(0, |tier| tier.refreshes),
    }
}

/// Fills a struct with the store's counters and gauges.
///
/// Does not block. The numbers are read one after the other, not as of one instant.
///
/// @param store handle
/// @param stats receives the numbers; struct_size is set by the caller and kept
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, misaligned, struct_size, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_store_stats(
    store: *mut ucm_store_t,
    stats: *mut ucm_stats_t,
) -> ucm_status_t {
    enter(|| {
        check("stats", stats)?;
        // SAFETY: checked; the caller vouches for at least this field.
        let size = unsafe { (&raw const (*stats).struct_size).read() };
        if !(size_of::<usize>()..=STRUCT_SIZE_MAX).contains(&size) {
            return Err(invalid(format!(
                "stats->struct_size is {size}; set it to sizeof(ucm_stats_t), which is {} here",
                size_of::<ucm_stats>()
            )));
        }
        let numbers = numbers(size, &store_of(store)?.stats()?);
        let known = size.min(size_of::<ucm_stats>());
        // SAFETY: the caller vouches for `size` bytes, of which the first `known` are copied from a local
        // struct of at least that size, and the rest are zeroed.
        unsafe {
            let bytes = stats.cast::<u8>();
            std::ptr::copy_nonoverlapping((&raw const numbers).cast::<u8>(), bytes, known);
            std::ptr::write_bytes(bytes.add(known), 0, size - known);
        }
        Ok(())
    })
}

/// Writes the store's metrics in the text format of Prometheus.
///
/// Does not block.
///
/// @param store handle
/// @param buffer receives the text, cut where it does not fit, always NUL-terminated; may be NULL
/// @param capacity bytes of buffer
/// @param length receives the bytes of the whole text without its NUL: if that is not below capacity the
///        text was cut. 0 on failure
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (length is NULL or misaligned, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_store_metrics(
    store: *mut ucm_store_t,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> ucm_status_t {
    enter(|| {
        check("length", length)?;
        // SAFETY: checked; the caller vouches for it, here and below.
        unsafe { put(length, 0) };
        if buffer.is_null() && capacity > 0 {
            return Err(invalid(format!("buffer is NULL, but capacity is {capacity}")));
        }
        let text = store_of(store)?.metrics()?;
        // SAFETY: the caller vouches for the buffer and, as above, for `length`.
        unsafe { put(length, copy_text(&text, buffer, capacity)) };
        Ok(())
    })
}

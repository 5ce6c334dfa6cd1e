//! What the store tells of itself: numbers for programs, Prometheus text for operators.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::engine::Engine;
use crate::error::ErrorKind;
use crate::io::report::Report;
use crate::task::Kind;

/// Counters since open, and gauges of now.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Blocks asked of lookup.
    pub lookups: u64,
    /// Of those, present.
    pub lookup_hits: u64,
    /// Entries of batches loaded.
    pub loads_ok: u64,
    /// Entries whose load failed.
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
    /// Parts given up before they reached storage.
    pub save_dropped: u64,
    /// Reads whose bytes did not match.
    pub verify_failures: u64,
    /// Submits refused for want of room.
    pub busy: u64,
    /// Entries whose deadline passed.
    pub timeouts: u64,
    /// Slots in use.
    pub slots_used: u64,
    /// Slots in all.
    pub slots: u64,
    /// Parts that wait for a slot.
    pub queued: u64,
    /// Units of live tasks.
    pub running: u64,
    /// Live tasks.
    pub tasks: u64,
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// The storage tier, where there is one.
    pub tier: Option<crate::posix::TierStats>,
    /// What each backend runs on, and what it had to do without.
    pub backends: Vec<Report>,
}

impl Engine {
    pub(super) fn count_lookup(&self, begun: Instant, asked: u64, hits: u64) {
        self.metrics.lookup_blocks.add(asked);
        self.metrics.lookup_hits.add(hits);
        self.metrics.lookup_seconds.observe(begun.elapsed());
    }

    /// Every unit of a task is copied, or has failed.
    pub(super) fn count_copied(&self, kind: Kind, after: Duration) {
        if kind == Kind::Save {
            self.metrics.save_copied_seconds.observe(after);
        }
    }

    /// Every entry of a task has its result.
    pub(super) fn count_settled(
        &self,
        kind: Kind,
        after: Duration,
        failures: &mut dyn Iterator<Item = Option<ErrorKind>>,
    ) {
        let metrics = &self.metrics;
        let entries = match kind {
            Kind::Save => &metrics.save_entries,
            Kind::Load => &metrics.load_entries,
            Kind::Hold => &metrics.hold_entries,
        };
        let mut good = 0;
        for failure in failures {
            match failure {
                None => good += 1,
                Some(failure) => entries.add(Some(failure), 1),
            }
            if kind == Kind::Hold && failure == Some(ErrorKind::Busy) {
                metrics.busy.add(1);
            }
        }
        entries.add(None, good);
        let bytes = good * self.config.geometry.shard_bytes;
        match kind {
            Kind::Save => {
                metrics.save_bytes.add(bytes);
                metrics.save_persisted_seconds.observe(after);
            }
            Kind::Load => {
                metrics.load_bytes.add(bytes);
                metrics.load_seconds.observe(after);
            }
            Kind::Hold => {}
        }
    }

    pub(super) fn stats(&self) -> Stats {
        self.update_metrics();
        let metrics = &self.metrics;
        Stats {
            lookups: metrics.lookup_blocks.get(),
            lookup_hits: metrics.lookup_hits.get(),
            loads_ok: metrics.load_entries.get(None),
            loads_failed: metrics.load_entries.failures(),
            saves_ok: metrics.save_entries.get(None),
            saves_failed: metrics.save_entries.failures(),
            load_bytes: metrics.load_bytes.get(),
            save_bytes: metrics.save_bytes.get(),
            cache_hits: metrics.cache_hits.get(),
            cache_misses: metrics.cache_misses.get(),
            cache_evictions: metrics.cache_evictions.get(),
            save_dropped: metrics.save_dropped.get(),
            verify_failures: metrics.verify_failures.get(),
            busy: metrics.busy.get(),
            timeouts: metrics.load_entries.get(Some(ErrorKind::Timeout))
                + metrics.save_entries.get(Some(ErrorKind::Timeout)),
            slots_used: metrics.slots.get() - metrics.slots_free.get(),
            slots: metrics.slots.get(),
            queued: self.parts.lock().queued() as u64,
            running: self.live_units.load(Ordering::Relaxed),
            tasks: metrics.tasks.get(),
            arena_bytes: metrics.arena_bytes.get(),
            tier: self.tier.as_ref().map(|tier| tier.stats()),
            backends: self.backends.iter().map(|backend| backend.report()).collect(),
        }
    }

    pub(super) fn metrics_text(&self) -> String {
        self.update_metrics();
        self.metrics.render(&[])
    }

    /// Brings in what other rooms count, and the gauges.
    fn update_metrics(&self) {
        let metrics = &self.metrics;
        let (counts, (used, all), busy, held, partial, queued) = {
            let parts = self.parts.lock();
            let (busy, held) = (parts.busy_slots(), parts.held());
            (parts.counts, parts.slots(), busy, held, parts.partial(), parts.queued())
        };
        metrics.cache_hits.raise_to(counts.hits);
        metrics.cache_misses.raise_to(counts.misses);
        metrics.cache_evictions.raise_to(counts.evictions);
        metrics.load_shared.raise_to(counts.shared);
        metrics.save_skipped.raise_to(counts.skipped);
        metrics.save_dropped.raise_to(counts.dropped);
        metrics.slots.set(u64::from(all));
        metrics.slots_free.set(u64::from(all - used));
        metrics.slots_busy.set(u64::from(busy));
        metrics.slots_held.set(u64::from(held));
        metrics.parts_partial.set(u64::from(partial));
        metrics.parts_waiting.set(queued as u64);
        metrics.arena_bytes.set(self.slots.as_ref().map_or(0, |slots| slots.bytes() as u64));
        metrics.tasks.set(self.tasks.lock().len() as u64);
        self.update_storage_metrics();
    }

    /// What the tier and the backends count.
    fn update_storage_metrics(&self) {
        let metrics = &self.metrics;
        metrics.storage_capacity_bytes.set(self.config.capacity_bytes.unwrap_or(0));
        if let Some(tier) = self.tier.as_ref().map(|tier| tier.stats()) {
            metrics.index_parts.set(tier.parts);
            metrics.segments.set(tier.segments);
            metrics.writers.set(tier.writers);
            metrics.storage_bytes.set(tier.segment_bytes);
            metrics.refreshes.raise_to(tier.refreshes);
            metrics.refresh_failures.raise_to(tier.manifests_unreadable);
        }
        let reports: Vec<_> = self.backends.iter().map(|backend| backend.report()).collect();
        metrics.backends.set(reports.len() as u64);
        let degraded = |report: &&Report| report.broken.is_some() || !report.fallbacks.is_empty();
        metrics.backends_degraded.set(reports.iter().filter(degraded).count() as u64);
        let total = |count: fn(&Report) -> u64| reports.iter().map(count).sum();
        metrics.storage_read_bytes.raise_to(total(|report| report.counters.bytes_read));
        metrics.storage_write_bytes.raise_to(total(|report| report.counters.bytes_written));
        metrics.storage_errors.raise_to(total(|report| report.counters.failed));
    }
}

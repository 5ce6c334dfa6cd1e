//! What a store counts, and its Prometheus text. Atomics only: counting never waits, and nobody who counts
//! knows who reads.
//!
//! `docs/metrics.md` lists every metric; a test keeps it complete.

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::error::ErrorKind;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(CachePadded<AtomicU64>);

impl Counter {
    /// One more.
    pub fn increment(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The number is at least this: for totals that somebody else counts.
    pub fn raise_to(&self, total: u64) {
        self.0.fetch_max(total, Ordering::Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(CachePadded<AtomicI64>);

impl Gauge {
    /// The number is this now.
    pub fn set(&self, value: u64) {
        self.0.store(i64::try_from(value).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// So many more.
    pub fn add(&self, count: i64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The number; 0 where it was taken below.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed).max(0) as u64
    }
}

/// How an entry of a batch ended: labels of the counters by status, the names of the C ABI in lower case.
const STATUSES: [&str; 16] = [
    "ok",
    "invalid_argument",
    "invalid_config",
    "not_found",
    "corrupt",
    "io",
    "no_space",
    "out_of_memory",
    "timeout",
    "busy",
    "cancelled",
    "unsupported",
    "device",
    "permission",
    "closed",
    "internal",
];

/// A counter for each status.
#[derive(Debug, Default)]
pub struct StatusCounter([Counter; STATUSES.len()]);

impl StatusCounter {
    /// So many entries ended like this; `None`: well.
    pub fn add(&self, failure: Option<ErrorKind>, count: u64) {
        self.0[status_index(failure)].add(count);
    }

    /// How many entries ended like this.
    pub fn get(&self, failure: Option<ErrorKind>) -> u64 {
        self.0[status_index(failure)].get()
    }

    /// How many entries ended otherwise than well.
    pub fn failures(&self) -> u64 {
        let [_, failed @ ..] = &self.0;
        failed.iter().map(Counter::get).sum()
    }
}

fn status_index(failure: Option<ErrorKind>) -> usize {
    match failure {
        None => 0,
        Some(ErrorKind::InvalidArgument) => 1,
        Some(ErrorKind::InvalidConfig) => 2,
        Some(ErrorKind::NotFound) => 3,
        Some(ErrorKind::Corrupt) => 4,
        Some(ErrorKind::Io) => 5,
        Some(ErrorKind::NoSpace) => 6,
        Some(ErrorKind::OutOfMemory) => 7,
        Some(ErrorKind::Timeout) => 8,
        Some(ErrorKind::Busy) => 9,
        Some(ErrorKind::Cancelled) => 10,
        Some(ErrorKind::Unsupported) => 11,
        Some(ErrorKind::Device) => 12,
        Some(ErrorKind::Permission) => 13,
        Some(ErrorKind::Closed) => 14,
        Some(ErrorKind::Internal) => 15,
    }
}

/// Upper bound of the first bucket, in nanoseconds: 2^10, about a microsecond.
const FIRST_BOUND_LOG2: u32 = 10;
/// Buckets with a bound; each is twice the one before, the last about 34 seconds. One more has none.
const BOUNDS: usize = 26;

/// How long something took: a count for each power of two of nanoseconds.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS + 1],
    sum_ns: CachePadded<AtomicU64>,
}

impl Histogram {
    /// It took this long.
    pub fn observe(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// How often it was observed.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// A time that at least this share of the observations did not exceed, up to a factor of two; zero
    /// where there are none.
    pub fn quantile(&self, share: f64) -> Duration {
        let counts = self.buckets.each_ref().map(|bucket| bucket.load(Ordering::Relaxed));
        let wanted = (counts.iter().sum::<u64>() as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, count) in counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return Duration::from_nanos(bound_ns(index.min(BOUNDS - 1)));
            }
        }
        Duration::ZERO
    }
}

/// The bucket whose bound is the smallest that is not below `ns`.
fn bucket_of(ns: u64) -> usize {
    let log2 = u64::BITS - ns.saturating_sub(1).leading_zeros();
    (log2.saturating_sub(FIRST_BOUND_LOG2) as usize).min(BOUNDS)
}

fn bound_ns(bucket: usize) -> u64 {
    1 << (FIRST_BOUND_LOG2 + bucket as u32)
}

/// One metric of the reference: name, type, meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// Name in the Prometheus text.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What it counts, in which unit.
    pub help: &'static str,
}

/// Labels of every line, ready for the text: `a="b",c="d"`, or nothing.
struct Text {
    out: String,
    labels: String,
}

impl Text {
    fn head(&mut self, metric: &Description) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "# HELP {} {}", metric.name, metric.help);
        let _ = writeln!(self.out, "# TYPE {} {}", metric.name, metric.kind);
    }

    fn line(&mut self, name: &str, suffix: &str, label: &str, value: impl std::fmt::Display) {
        let comma = if label.is_empty() || self.labels.is_empty() { "" } else { "," };
        let labels = format!("{}{comma}{label}", self.labels);
        let _ = match labels.is_empty() {
            true => writeln!(self.out, "{name}{suffix} {value}"),
            false => writeln!(self.out, "{name}{suffix}{{{labels}}} {value}"),
        };
    }
}

trait Render {
    const KIND: &'static str;

    fn render(&self, name: &str, text: &mut Text);
}

impl Render for Counter {
    const KIND: &'static str = "counter";

    fn render(&self, name: &str, text: &mut Text) {
        text.line(name, "", "", self.get());
    }
}

impl Render for Gauge {
    const KIND: &'static str = "gauge";

    fn render(&self, name: &str, text: &mut Text) {
        text.line(name, "", "", self.get());
    }
}

impl Render for StatusCounter {
    const KIND: &'static str = "counter";

    fn render(&self, name: &str, text: &mut Text) {
        for (counter, status) in self.0.iter().zip(STATUSES) {
            // What never happened is left out, but for the good case, so that a rate can be taken from it.
            if counter.get() > 0 || status == STATUSES[0] {
                text.line(name, "", &format!("status=\"{status}\""), counter.get());
            }
        }
    }
}

impl Render for Histogram {
    const KIND: &'static str = "histogram";

    fn render(&self, name: &str, text: &mut Text) {
        const NS: f64 = 1e9;
        let mut total = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            total += bucket.load(Ordering::Relaxed);
            let bound = match index {
                BOUNDS => "+Inf".to_owned(),
                _ => (bound_ns(index) as f64 / NS).to_string(),
            };
            text.line(name, "_bucket", &format!("le=\"{bound}\""), total);
        }
        text.line(name, "_sum", "", self.sum_ns.load(Ordering::Relaxed) as f64 / NS);
        text.line(name, "_count", "", total);
    }
}

macro_rules! metrics {
    ($($field:ident: $kind:ident, $name:literal, $help:literal;)*) => {
        /// Everything a store counts.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $(#[doc = $help] pub $field: $kind,)*
        }

        /// Every metric, in the order of the text.
        pub static METRICS: &[Description] = &[
            $(Description { name: $name, kind: <$kind as Render>::KIND, help: $help },)*
        ];

        impl Metrics {
            /// The Prometheus text (format 0.0.4), with these labels on every line. Values are escaped;
            /// label names must be valid.
            pub fn render(&self, labels: &[(&str, &str)]) -> String {
                let labels: Vec<_> =
                    labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
                let mut text = Text { out: String::new(), labels: labels.join(",") };
                let mut described = METRICS.iter();
                $(
                    if let Some(metric) = described.next() {
                        text.head(metric);
                        self.$field.render(metric.name, &mut text);
                    }
                )*
                text.out
            }
        }
    };
}

metrics! {
    lookup_blocks: Counter, "ucm_lookup_blocks_total", "Blocks that were looked up.";
    lookup_hits: Counter, "ucm_lookup_hits_total", "Blocks that a lookup found.";
    lookup_cache_hits: Counter, "ucm_lookup_cache_hits_total", "Blocks that a lookup found in DRAM.";
    lookup_seconds: Histogram, "ucm_lookup_seconds", "Seconds of a lookup call.";
    refreshes: Counter, "ucm_refreshes_total", "Rounds of bringing the index up to date with all writers.";
    refresh_failures: Counter, "ucm_refresh_failures_total", "Times that a manifest could not be read.";
    prefetch_blocks: Counter, "ucm_prefetch_blocks_total", "Blocks that prefetch was asked for.";
    hold_entries: StatusCounter, "ucm_hold_entries_total", "Blocks that a hold asked for, by status.";
    load_entries: StatusCounter, "ucm_load_entries_total", "Entries of load batches that ended, by status.";
    load_bytes: Counter, "ucm_load_bytes_total", "Bytes that loads brought to callers.";
    load_shared: Counter, "ucm_load_shared_total", "Loads that joined a read of the same part in flight.";
    load_seconds: Histogram, "ucm_load_seconds", "Seconds from submit to LOADED, of a task.";
    save_entries: StatusCounter, "ucm_save_entries_total", "Entries of save batches that ended, by status.";
    save_bytes: Counter, "ucm_save_bytes_total", "Bytes that saves took from callers.";
    save_skipped: Counter, "ucm_save_skipped_total", "Entries whose part was present already and cost no I/O.";
    save_dropped: Counter, "ucm_save_dropped_total", "Parts that were dropped before they reached storage, for want of room or time.";
    save_copied_seconds: Histogram, "ucm_save_copied_seconds", "Seconds from submit to COPIED, of a task.";
    save_persisted_seconds: Histogram, "ucm_save_persisted_seconds", "Seconds from submit to PERSISTED, of a task.";
    cache_hits: Counter, "ucm_cache_hits_total", "Parts that a load found in DRAM.";
    cache_misses: Counter, "ucm_cache_misses_total", "Parts that a load had to read from storage.";
    cache_evictions: Counter, "ucm_cache_evictions_total", "Parts that left DRAM for others.";
    busy: Counter, "ucm_busy_total", "Submits and entries refused because a queue or all slots were full.";
    verify_failures: Counter, "ucm_verify_failures_total", "Parts whose bytes did not match their checksum.";
    storage_read_bytes: Counter, "ucm_storage_read_bytes_total", "Bytes read from storage.";
    storage_write_bytes: Counter, "ucm_storage_write_bytes_total", "Bytes written to storage, trailers included.";
    storage_errors: Counter, "ucm_storage_errors_total", "Reads and writes of storage that failed.";
    arena_bytes: Gauge, "ucm_arena_bytes", "Bytes of the arena.";
    slots: Gauge, "ucm_slots", "Slots of the arena; each holds one part.";
    slots_free: Gauge, "ucm_slots_free", "Slots that hold nothing.";
    slots_busy: Gauge, "ucm_slots_busy", "Slots in use by a transfer.";
    slots_held: Gauge, "ucm_slots_held", "Slots that holds keep from eviction, or wait for.";
    parts_partial: Gauge, "ucm_parts_partial", "Parts of which some shards are saved and others awaited.";
    tasks: Gauge, "ucm_tasks", "Tasks that are not done.";
    parts_waiting: Gauge, "ucm_parts_waiting", "Parts that wait for a slot.";
    index_parts: Gauge, "ucm_index_parts", "Parts in the index.";
    writers: Gauge, "ucm_writers", "Writers whose manifests are read.";
    segments: Gauge, "ucm_segments", "Segments that the index points into.";
    storage_bytes: Gauge, "ucm_storage_bytes", "Bytes of the namespace in all directories, as far as known.";
    storage_capacity_bytes: Gauge, "ucm_storage_capacity_bytes", "The bound set by posix_capacity_gb; 0: none.";
    backends: Gauge, "ucm_backends", "Directories of storage_backends.";
    backends_degraded: Gauge, "ucm_backends_degraded", "Directories that work with a fallback, or not at all.";
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::reference;

    #[test]
    fn buckets_hold_what_their_bounds_say() {
        // Goal: a value on a bound belongs to that bucket, one above it to the next.
        assert_eq!((bucket_of(0), bucket_of(1024), bucket_of(1025)), (0, 0, 1));
        for bucket in 0..BOUNDS {
            assert_eq!(bucket_of(bound_ns(bucket)), bucket);
            assert_eq!(bucket_of(bound_ns(bucket) + 1), bucket + 1);
        }
        assert_eq!(bucket_of(u64::MAX), BOUNDS);
    }

    #[test]
    fn quantiles_are_right_up_to_a_factor_of_two() {
        // Goal: of 1 to 1000 ms the median and the 99th percentile are estimated from above.
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), Duration::ZERO);
        (1..=1000).for_each(|ms| histogram.observe(Duration::from_millis(ms)));
        for (share, exact) in [(0.5, 500), (0.99, 990)] {
            let estimate = histogram.quantile(share).as_millis();
            assert!((exact..=2 * exact).contains(&estimate), "{share}: {estimate}");
        }
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        // Goal: HELP and TYPE once a metric, labels escaped, histograms cumulative and closed by +Inf.
        let metrics = Metrics::default();
        metrics.load_entries.add(None, 5);
        metrics.load_entries.add(Some(ErrorKind::NotFound), 2);
        metrics.load_seconds.observe(Duration::from_micros(3));
        metrics.slots.set(7);
        let text = metrics.render(&[("order", "a\"b")]);
        assert!(
            text.contains("ucm_load_entries_total{order=\"a\\\"b\",status=\"ok\"} 5\n"),
            "{text}"
        );
        assert!(text.contains("ucm_load_entries_total{order=\"a\\\"b\",status=\"not_found\"} 2\n"));
        assert!(!text.contains("status=\"corrupt\""));
        assert!(text.contains("ucm_load_seconds_bucket{order=\"a\\\"b\",le=\"0.000002048\"} 0\n"));
        assert!(text.contains("ucm_load_seconds_bucket{order=\"a\\\"b\",le=\"0.000004096\"} 1\n"));
        assert!(text.contains("ucm_load_seconds_bucket{order=\"a\\\"b\",le=\"+Inf\"} 1\n"));
        assert!(text.contains("ucm_load_seconds_sum{order=\"a\\\"b\"} 0.000003\n"));
        assert!(metrics.render(&[]).contains("\nucm_slots 7\n"));
        for metric in METRICS {
            assert_eq!(
                text.matches(&format!("# TYPE {} {}\n", metric.name, metric.kind)).count(),
                1
            );
        }
    }

    #[test]
    fn counters_by_status_keep_them_apart() {
        // Goal: every kind of failure has a counter of its own.
        let kinds = [
            ErrorKind::InvalidArgument,
            ErrorKind::InvalidConfig,
            ErrorKind::NotFound,
            ErrorKind::Corrupt,
            ErrorKind::Io,
            ErrorKind::NoSpace,
            ErrorKind::OutOfMemory,
            ErrorKind::Timeout,
            ErrorKind::Busy,
            ErrorKind::Cancelled,
            ErrorKind::Unsupported,
            ErrorKind::Device,
            ErrorKind::Permission,
            ErrorKind::Closed,
            ErrorKind::Internal,
        ];
        let indexes: HashSet<_> = kinds.iter().map(|kind| status_index(Some(*kind))).collect();
        assert_eq!(indexes.len(), STATUSES.len() - 1);
        assert!(!indexes.contains(&0));
        assert_eq!(STATUSES[status_index(Some(ErrorKind::NotFound))], "not_found");
    }

    #[test]
    fn the_reference_lists_every_metric() {
        // Goal: docs/metrics.md has each metric, its type and its meaning, and no others.
        let rows = METRICS
            .iter()
            .map(|metric| format!("| `{}` | {} | {} |", metric.name, metric.kind, metric.help));
        let table = format!(
            "| metric | type | meaning |\n|---|---|---|\n{}\n",
            rows.collect::<Vec<_>>().join("\n")
        );
        reference::check("docs/metrics.md", "", &table);
    }
}

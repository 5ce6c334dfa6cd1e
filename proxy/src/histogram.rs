//! A Prometheus histogram of seconds: fixed bounds, atomics only, so that a request costs a few
//! nanoseconds. Knows the text format, not what is measured.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds in seconds. From a proxy's own overhead to a prefill of a very long prompt.
const BOUNDS: [f64; 18] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0, 300.0,
];

/// Counts of durations by bound, their sum and number.
#[derive(Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum_micros: AtomicU64,
}

impl Histogram {
    /// Adds one duration.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_micros.fetch_add(duration.as_micros() as u64, Relaxed);
    }

    /// Whether anything was observed.
    pub fn has_any(&self) -> bool {
        self.buckets.iter().any(|bucket| bucket.load(Relaxed) > 0)
    }

    /// Writes the samples of the histogram `name`; `labels` is empty or like `role="decode"`.
    pub fn write(&self, out: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            total += bucket.load(Relaxed);
            let bound = BOUNDS.get(index).map_or("+Inf".to_owned(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}");
        }
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let sum = self.sum_micros.load(Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum{braces} {sum}\n{name}_count{braces} {total}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_bounds_inclusive() {
        // Goal: a value equal to a bound falls under that bound, as Prometheus defines `le`.
        let histogram = Histogram::default();
        for millis in [1, 2, 1_000_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut out = String::new();
        histogram.write(&mut out, "t", "role=\"decode\"");
        assert!(out.contains("t_bucket{role=\"decode\",le=\"0.001\"} 1\n"), "{out}");
        assert!(out.contains("t_bucket{role=\"decode\",le=\"0.0025\"} 2\n"), "{out}");
        assert!(out.contains("t_bucket{role=\"decode\",le=\"300\"} 2\n"), "{out}");
        assert!(out.contains("t_bucket{role=\"decode\",le=\"+Inf\"} 3\n"), "{out}");
        assert!(out.contains("t_sum{role=\"decode\"} 1000.003\n"), "{out}");
    }
}

//! What was seen: latencies by stage, blocks, bytes, hits, errors. Threads keep one each; they are added up.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest latency that is told apart.
const LONGEST: Duration = Duration::from_secs(3600);
/// Significant digits of a latency.
const DIGITS: u8 = 3;

/// A histogram of nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        // The bounds are constants that hdrhistogram accepts (low >= 1, high >= 2 * low, digits <= 5).
        Self(
            Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, DIGITS)
                .expect("constant bounds"),
        )
    }
}

impl Latencies {
    /// Notes that `count` blocks took this long.
    pub fn record(&mut self, latency: Duration, count: u64) {
        self.0.saturating_record_n((latency.as_nanos() as u64).max(1), count);
    }

    /// Blocks noted.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// Mean, in seconds.
    pub fn mean(&self) -> f64 {
        self.0.mean() * 1e-9
    }

    /// Largest, in seconds.
    pub fn max(&self) -> f64 {
        self.0.max() as f64 * 1e-9
    }

    /// Seconds that `quantile` (0 to 1) of the blocks did not exceed.
    pub fn at(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 * 1e-9
    }

    fn add(&mut self, other: &Self) {
        // Same bounds: cannot fail.
        self.0.add(&other.0).expect("same bounds");
    }
}

/// Errors of one status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorCount {
    /// Entries or calls that ended so.
    pub count: u64,
    /// The first message.
    pub example: String,
}

/// What one thread, or one job, saw.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Latency by stage or call.
    pub stages: BTreeMap<&'static str, Latencies>,
    /// Blocks that ended well (for lookups: keys; for hashes: blocks hashed).
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks or keys that were asked for.
    pub asked: u64,
    /// Of these, present.
    pub present: u64,
    /// Failures by name of the status.
    pub errors: BTreeMap<String, ErrorCount>,
    /// Blocks whose bytes were wrong (`verify`).
    pub wrong: u64,
    /// Blocks that the inserting thread saved (`insert_rate`).
    pub inserted: u64,
    /// Submit calls that the queue refused for now.
    pub busy: u64,
}

impl Tally {
    /// Notes a latency.
    pub fn latency(&mut self, stage: &'static str, latency: Duration, blocks: u64) {
        self.stages.entry(stage).or_default().record(latency, blocks);
    }

    /// Notes failures.
    pub fn error(&mut self, name: String, count: u64, example: impl FnOnce() -> String) {
        let entry = self.errors.entry(name).or_default();
        if entry.count == 0 {
            entry.example = example();
        }
        entry.count += count;
    }

    /// Adds another thread's.
    pub fn add(&mut self, other: &Self) {
        for (stage, latencies) in &other.stages {
            self.stages.entry(stage).or_default().add(latencies);
        }
        for (name, errors) in &other.errors {
            self.error(name.clone(), errors.count, || errors.example.clone());
        }
        self.blocks += other.blocks;
        self.bytes += other.bytes;
        self.asked += other.asked;
        self.present += other.present;
        self.wrong += other.wrong;
        self.inserted += other.inserted;
        self.busy += other.busy;
    }

    /// Failures in all, wrong bytes included.
    pub fn failures(&self) -> u64 {
        self.errors.values().map(|errors| errors.count).sum::<u64>() + self.wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: adding up threads is the same as one thread having seen it all.
    #[test]
    fn adds_up() {
        let (mut a, mut b, mut both) = (Tally::default(), Tally::default(), Tally::default());
        for n in 1..=1000_u64 {
            let half = if n % 2 == 0 { &mut a } else { &mut b };
            half.latency("loaded", Duration::from_micros(n), 1);
            both.latency("loaded", Duration::from_micros(n), 1);
        }
        b.error("IO".into(), 2, || "first".into());
        a.add(&b);
        let (sum, all) = (&a.stages["loaded"], &both.stages["loaded"]);
        assert_eq!(sum.count(), 1000);
        assert!((sum.at(0.5) - all.at(0.5)).abs() < 1e-9 && (sum.at(0.5) - 500e-6).abs() < 1e-6);
        assert_eq!(a.errors["IO"].count, 2);
        assert_eq!(a.failures(), 2);
    }
}

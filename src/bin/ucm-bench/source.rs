//! Which blocks come next: the orders of save, load, randload and mixed, and arrival times of open loops.
//!
//! Knows numbers of blocks only; their ids are `pattern::block_id`.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::time::Duration;

use crate::abi::Direction;
use crate::job::{Job, RateProcess, Workload};
use crate::random::Random;

/// Numbers from here on are never saved: keys that miss.
pub const ABSENT: u64 = 1 << 48;
/// Numbers from here on are saved during lookups by the inserting thread.
pub const INSERTED: u64 = 1 << 44;
/// Numbers from here on are what a mixed job saves, beside the blocks it loads.
const MIXED: u64 = 1 << 40;

/// One task to be: which way, and which blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// Save or load.
    pub direction: Direction,
    /// Numbers of the blocks.
    pub numbers: Vec<u64>,
}

/// The order of one thread's work over its share of the data set.
pub struct Source {
    workload: Workload,
    range: Range<u64>,
    batch: u64,
    again: bool,
    loads: f64,
    random: Random,
    next: u64,
    saved: u64,
    /// Order of a random pass; made at the begin of each.
    order: Vec<u64>,
}

impl Source {
    /// The work of thread `clone` of the job's `numjobs`, on a data set of `blocks`.
    pub fn new(job: &Job, blocks: u64, clone: u32) -> Self {
        let share = |n: u64| blocks * n / u64::from(job.numjobs);
        let range = share(u64::from(clone))..share(u64::from(clone) + 1);
        let mut source = Self {
            workload: job.rw,
            next: range.start,
            saved: range.start,
            range,
            batch: u64::from(job.batch),
            again: job.time_based,
            loads: job.rwmixload,
            random: Random::new(job.randseed ^ (u64::from(clone) << 32)),
            order: Vec::new(),
        };
        source.begin_pass();
        source
    }

    fn begin_pass(&mut self) {
        self.next = self.range.start;
        if self.workload == Workload::RandLoad {
            if self.order.is_empty() {
                self.order = self.range.clone().collect();
            }
            self.random.shuffle(&mut self.order);
        }
    }

    fn take(&mut self) -> Option<Range<u64>> {
        if self.next == self.range.end && self.again && !self.range.is_empty() {
            self.begin_pass();
        }
        let end = self.range.end.min(self.next + self.batch);
        let taken = self.next..end;
        self.next = end;
        (!taken.is_empty()).then_some(taken)
    }

    /// The next task; none when the data set is through.
    pub fn next(&mut self) -> Option<Work> {
        match self.workload {
            Workload::Save => {
                self.again = false;
                let numbers = self.take()?.collect();
                Some(Work { direction: Direction::Save, numbers })
            }
            Workload::RandLoad => {
                let taken = self.take()?;
                let at = |n: u64| (n - self.range.start) as usize;
                let numbers = self.order[at(taken.start)..at(taken.end)].to_vec();
                Some(Work { direction: Direction::Load, numbers })
            }
            Workload::Mixed => {
                let taken = self.take()?;
                if self.random.fraction() < self.loads {
                    let length = self.range.end - self.range.start;
                    let numbers =
                        taken.map(|_| self.range.start + self.random.below(length)).collect();
                    return Some(Work { direction: Direction::Load, numbers });
                }
                let count = taken.end - taken.start;
                let first = MIXED + self.saved;
                // Passes must not save the same blocks again; clones lie a data set apart.
                self.saved += if taken.end == self.range.end { count + (1 << 30) } else { count };
                Some(Work { direction: Direction::Save, numbers: (first..first + count).collect() })
            }
            _ => {
                let numbers = self.take()?.collect();
                Some(Work { direction: Direction::Load, numbers })
            }
        }
    }
}

/// When tasks of an open loop arrive, counted from the begin of the run.
pub struct Arrivals {
    gap: Duration,
    process: RateProcess,
    random: Random,
    due: Duration,
}

impl Arrivals {
    /// Tasks of `batch` blocks at `blocks_per_second`.
    pub fn new(job: &Job, blocks_per_second: f64, batch: u32, clone: u32) -> Self {
        let per_thread = blocks_per_second / f64::from(job.numjobs);
        Self {
            gap: Duration::from_secs_f64((f64::from(batch) / per_thread).min(1e6)),
            process: job.rate_process,
            random: Random::new(!job.randseed ^ (u64::from(clone) << 32)),
            due: Duration::ZERO,
        }
    }

    /// When the next task is due.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// Goes on to the one after it.
    pub fn advance(&mut self) {
        self.due += match self.process {
            RateProcess::Linear => self.gap,
            RateProcess::Poisson => {
                Duration::from_secs_f64(self.random.exponential(self.gap.as_secs_f64()))
            }
        };
    }

    /// How many more are due by `now`, each passed over.
    pub fn passed_by(&mut self, now: Duration) -> u64 {
        let mut passed = 0;
        while self.due < now {
            passed += 1;
            self.advance();
        }
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(job: &Job, blocks: u64, clone: u32) -> Vec<Work> {
        let mut source = Source::new(job, blocks, clone);
        std::iter::from_fn(|| source.next()).collect()
    }

    /// Goal: random loads touch each block once per pass, over all threads together.
    #[test]
    fn randload_is_a_permutation() {
        let job = Job { rw: Workload::RandLoad, batch: 7, numjobs: 3, ..Job::default() };
        let mut seen: Vec<u64> = (0..3)
            .flat_map(|clone| drain(&job, 1000, clone))
            .flat_map(|work| work.numbers)
            .collect();
        assert_ne!(seen[..7], [0, 1, 2, 3, 4, 5, 6]);
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).collect::<Vec<_>>());
    }

    /// Goal: a mixed job loads only what exists, never saves a block twice, in the share asked for.
    #[test]
    fn mixed_shares() {
        let job = Job { rw: Workload::Mixed, batch: 1, rwmixload: 0.7, ..Job::default() };
        let work = drain(&job, 10_000, 0);
        let mut saved = std::collections::HashSet::new();
        let mut loads = 0;
        for work in work {
            match work.direction {
                Direction::Load => {
                    loads += 1;
                    assert!(work.numbers.iter().all(|&n| n < 10_000));
                }
                Direction::Save => assert!(work.numbers.iter().all(|&n| saved.insert(n))),
            }
        }
        assert!((6_700..7_300).contains(&loads), "{loads}");
    }

    /// Goal: an open loop offers the rate it was asked for, whatever the spacing.
    #[test]
    fn arrivals_keep_the_rate() {
        for process in [RateProcess::Linear, RateProcess::Poisson] {
            let job = Job { rate_process: process, ..Job::default() };
            let mut arrivals = Arrivals::new(&job, 1000.0, 4, 0);
            let passed = arrivals.passed_by(Duration::from_secs(40));
            assert!((9_600..10_400).contains(&passed), "{process:?} {passed}");
        }
    }
}

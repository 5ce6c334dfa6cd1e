//! Which way of copying suits which sizes, learned once at open by measuring.

#![forbid(unsafe_code)]

use std::time::Duration;

use super::plan::Piece;
use crate::device::Direction;

/// Bytes of one measurement: 150 microseconds at 50 GB/s.
pub(in crate::device) const PATTERN_BYTES: u64 = 8 << 20;

/// Bytes of a strided piece in a measurement.
const STRIDED_BYTES: u64 = 128 << 10;

/// A way of copying many pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Strategy {
    /// One asynchronous copy a piece (two-dimensional where it is strided).
    Plain,
    /// The driver's batched copy: one call for all contiguous pieces.
    Batch,
    /// A kernel gathers into a buffer on the device, one large copy moves that (loads: the mirror).
    Bounce,
    /// A kernel that reads and writes pinned host memory itself.
    Kernel,
}

impl Strategy {
    /// The name used in reports and in the override variable.
    pub(in crate::device) fn name(self) -> &'static str {
        match self {
            Strategy::Plain => "plain",
            Strategy::Batch => "batch",
            Strategy::Bounce => "bounce",
            Strategy::Kernel => "kernel",
        }
    }

    /// The strategy of that name.
    fn from_name(name: &str) -> Option<Self> {
        [Strategy::Plain, Strategy::Batch, Strategy::Bounce, Strategy::Kernel]
            .into_iter()
            .find(|strategy| strategy.name() == name)
    }

    /// How much faster (in hundredths) it must be than the best before it. The copy engines take no
    /// multiprocessor from the model; a bounce takes few for a short while, a kernel that crosses the
    /// bus takes some for the whole copy. A batch costs the least CPU time of the two without kernels.
    fn handicap(self) -> u32 {
        match self {
            Strategy::Batch => 100,
            Strategy::Plain => 105,
            Strategy::Bounce => 110,
            Strategy::Kernel => 140,
        }
    }
}

/// The strategies that a device offers, in order of preference.
#[derive(Clone, Debug)]
pub(in crate::device) struct StrategySet(pub(in crate::device) Vec<Strategy>);

impl StrategySet {
    /// The strategy that an environment variable names. One that is not in the set is told.
    pub(in crate::device) fn named(
        &self,
        variable: &str,
        fallbacks: &mut Vec<String>,
    ) -> Option<Strategy> {
        let name = std::env::var(variable).ok()?;
        let named = Strategy::from_name(&name).filter(|strategy| self.0.contains(strategy));
        if named.is_none() {
            let text = format!("{variable}={name} is not available here; copies are calibrated");
            fallbacks.push(text);
        }
        named
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Pattern {
    /// Contiguous pieces of so many bytes, apart from each other.
    Runs(u64),
    /// Pieces whose rows of so many bytes lie apart.
    Rows(u64),
}

impl Pattern {
    /// How often the pieces are copied in one measurement, so that enqueueing and copying overlap as
    /// they do in a long run; the smallest pieces take long enough once.
    pub(in crate::device) fn rounds(self) -> u32 {
        if self == Pattern::Runs(RUNS[0]) { 1 } else { ROUNDS }
    }

    /// Pieces of [`PATTERN_BYTES`] together: in `memory`, which has twice that, they lie twice as far
    /// apart as they are long.
    pub(in crate::device) fn pieces(self, memory: usize, staging: usize) -> Vec<Piece> {
        let (bytes, row) = match self {
            Pattern::Runs(bytes) => (bytes, bytes),
            Pattern::Rows(row) => (STRIDED_BYTES, row),
        };
        (0..PATTERN_BYTES / bytes)
            .map(|at| {
                let memory = memory + (2 * at * bytes) as usize;
                let mut piece = Piece::contiguous(memory, staging + (at * bytes) as usize, row);
                piece.counts[2] = bytes / row;
                piece.strides[2] = 2 * row;
                piece
            })
            .collect()
    }
}

/// Sizes that are measured; a piece of another size goes with the nearest.
const RUNS: [u64; 5] = [4 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20];

/// The row that stands for strided pieces: a head of 128 elements of 2 bytes.
const ROW: u64 = 256;

/// Rounds of a measurement.
const ROUNDS: u32 = 4;

/// Each measurement is repeated and the fastest counts: noise only adds.
const REPEATS: usize = 3;

/// What a measurement counts as: the time that it took, and half of the time that the CPU was busy
/// enqueueing, because the driver's lock is held then and other threads of the model wait for it.
pub(in crate::device) fn cost(took: Duration, enqueued: Duration) -> Duration {
    took + enqueued / 2
}

/// The chosen strategies of one direction.
#[derive(Clone, Copy, Debug)]
struct Column {
    runs: [Strategy; RUNS.len()],
    rows: Strategy,
}

/// The chosen strategies.
#[derive(Clone, Debug)]
pub(in crate::device) struct Choices {
    gather: Column,
    scatter: Column,
}

impl Choices {
    /// The same strategy for everything.
    pub(in crate::device) fn uniform(strategy: Strategy) -> Self {
        let column = Column { runs: [strategy; RUNS.len()], rows: strategy };
        Self { gather: column, scatter: column }
    }

    /// Measures each strategy of the set; one that fails is left out. `measure` copies the same bytes
    /// every time and gives the time that it took.
    pub(in crate::device) fn measure(
        set: &StrategySet,
        mut measure: impl FnMut(Strategy, Direction, Pattern) -> Option<Duration>,
    ) -> Self {
        let mut pick = |direction, pattern| {
            let mut best: Option<(Strategy, Duration)> = None;
            for &strategy in &set.0 {
                let took = (0..REPEATS).map_while(|_| measure(strategy, direction, pattern)).min();
                let Some(took) = took else { continue };
                if best.is_none_or(|(_, best)| took * strategy.handicap() < best * 100) {
                    best = Some((strategy, took));
                }
            }
            best.map_or(Strategy::Plain, |(strategy, _)| strategy)
        };
        let mut column = |direction| Column {
            runs: RUNS.map(|bytes| pick(direction, Pattern::Runs(bytes))),
            rows: pick(direction, Pattern::Rows(ROW)),
        };
        Self { gather: column(Direction::Gather), scatter: column(Direction::Scatter) }
    }

    /// The strategy for pieces of this mean size.
    pub(in crate::device) fn pick(
        &self,
        direction: Direction,
        mean_bytes: u64,
        strided: bool,
    ) -> Strategy {
        let column = match direction {
            Direction::Gather => &self.gather,
            Direction::Scatter => &self.scatter,
        };
        if strided {
            return column.rows;
        }
        // The boundary between two sizes is their geometric mean: half of their sum of logarithms.
        let nearest = RUNS
            .windows(2)
            .position(|pair| mean_bytes.saturating_mul(mean_bytes) < pair[0] * pair[1])
            .unwrap_or(RUNS.len() - 1);
        column.runs[nearest]
    }

    /// Whether the strategy is chosen for anything.
    pub(in crate::device) fn uses(&self, strategy: Strategy) -> bool {
        [&self.gather, &self.scatter]
            .iter()
            .any(|column| column.rows == strategy || column.runs.contains(&strategy))
    }

    /// One line a direction, for reports.
    pub(in crate::device) fn lines(&self) -> Vec<String> {
        [("save", &self.gather), ("load", &self.scatter)]
            .into_iter()
            .map(|(name, column)| {
                let sizes: Vec<_> = RUNS
                    .iter()
                    .zip(column.runs)
                    .map(|(bytes, strategy)| format!("{} KiB {}", bytes >> 10, strategy.name()))
                    .collect();
                format!("{name}: {}, rows of {ROW} B {}", sizes.join(", "), column.rows.name())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the fastest wins, but a strategy that takes multiprocessors must win clearly.
    #[test]
    fn handicaps_decide_close_calls() {
        let set = StrategySet(vec![Strategy::Plain, Strategy::Kernel]);
        let choose = |kernel_micros| {
            Choices::measure(&set, |strategy, _, _| {
                Some(Duration::from_micros(match strategy {
                    Strategy::Plain => 100,
                    _ => kernel_micros,
                }))
            })
            .pick(Direction::Gather, 32 << 10, false)
        };
        assert_eq!(choose(90), Strategy::Plain);
        assert_eq!(choose(50), Strategy::Kernel);
    }

    /// Goal: a strategy that fails is never chosen, also when it is the only one.
    #[test]
    fn failing_strategies_are_left_out() {
        let set = StrategySet(vec![Strategy::Plain, Strategy::Batch]);
        let choices = Choices::measure(&set, |strategy, _, _| {
            (strategy == Strategy::Plain).then_some(Duration::from_secs(1))
        });
        assert_eq!(choices.pick(Direction::Scatter, 1, false), Strategy::Plain);
        let none = Choices::measure(&StrategySet(vec![Strategy::Batch]), |_, _, _| None);
        assert_eq!(none.pick(Direction::Scatter, 1, true), Strategy::Plain);
    }

    /// Goal: sizes between two measured ones go with the nearer, the extremes with the ends.
    #[test]
    fn sizes_go_with_the_nearest() {
        let set = StrategySet(vec![Strategy::Plain, Strategy::Bounce]);
        let choices = Choices::measure(&set, |strategy, _, pattern| {
            let small = matches!(pattern, Pattern::Runs(bytes) if bytes <= 32 << 10);
            Some(Duration::from_micros(if (strategy == Strategy::Bounce) == small { 1 } else { 9 }))
        });
        for (bytes, strategy) in [
            (1, Strategy::Bounce),
            (60 << 10, Strategy::Bounce),
            (70 << 10, Strategy::Plain),
            (1 << 30, Strategy::Plain),
        ] {
            assert_eq!(choices.pick(Direction::Gather, bytes, false), strategy, "{bytes}");
        }
    }
}

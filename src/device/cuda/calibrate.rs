//! Measuring the strategies on this machine, once, before `open` returns.

use std::time::{Duration, Instant};

use super::Cuda;
use super::copy::{BOUNCE_BYTES, Lane};
use crate::device::Direction;
use crate::device::engine::{
    Choices, Driver, Fault, PATTERN_BYTES, Pattern, Registration, Strategy, StrategySet, Stream,
    cost,
};
use crate::device::loader::checked;

/// What the measurements copy between.
struct Bench {
    stream: Stream,
    device: u64,
    host: usize,
    offset: usize,
    lane: Lane,
}

impl Cuda {
    /// Measures the set. Takes some tens of milliseconds; everything is given back.
    pub(super) fn calibrate(&self, set: &StrategySet) -> Result<Choices, Fault> {
        let _entered = self.enter()?;
        let stream = self.create_stream()?;
        let choices = self.bench(stream).map(|bench| {
            let choices = Choices::measure(set, |strategy, direction, pattern| {
                self.measure(&bench, strategy, direction, pattern).ok()
            });
            self.end_bench(&bench);
            choices
        });
        self.destroy_stream(stream);
        choices
    }

    fn bench(&self, stream: Stream) -> Result<Bench, Fault> {
        let host = self.host_buffer(PATTERN_BYTES as usize)?;
        let mut bench = Bench {
            stream,
            device: 0,
            host: host as usize,
            offset: 0,
            lane: Lane { bounce: None, ranges: std::cell::RefCell::default() },
        };
        let filled = self.device_buffer(2 * PATTERN_BYTES as usize).and_then(|device| {
            bench.device = device;
            let mut mapped = 0;
            // SAFETY: `host` was allocated with DEVICEMAP just now; the place is valid.
            unsafe { checked!(self.api, cuMemHostGetDevicePointer(&mut mapped, host, 0)) }?;
            bench.offset = (mapped as usize).wrapping_sub(host as usize);
            Ok(())
        });
        if let Err(fault) = filled {
            self.end_bench(&bench);
            return Err(fault);
        }
        if self.kernels.is_some() {
            bench.lane.bounce = self.device_buffer(BOUNCE_BYTES as usize).ok();
        }
        Ok(bench)
    }

    fn end_bench(&self, bench: &Bench) {
        if self.synchronize(bench.stream).is_err() {
            // The device may still be copying: its memory stays.
            return;
        }
        let functions = &self.api.functions;
        // SAFETY: the stream is idle, and nothing else knows these buffers.
        unsafe {
            for address in [bench.device, bench.lane.bounce.unwrap_or(0)] {
                if address != 0 {
                    (functions.cuMemFree)(address);
                }
            }
            (functions.cuMemFreeHost)(bench.host as *mut _);
        }
    }

    fn measure(
        &self,
        bench: &Bench,
        strategy: Strategy,
        direction: Direction,
        pattern: Pattern,
    ) -> Result<Duration, Fault> {
        if strategy == Strategy::Bounce && bench.lane.bounce.is_none() {
            // Not to be chosen: there is no room for it.
            return Ok(Duration::MAX / 1000);
        }
        let pieces = pattern.pieces(bench.device as usize, bench.host);
        let staging = Registration::Pinned { offset: bench.offset };
        let begin = Instant::now();
        let rounds = pattern.rounds();
        for _ in 0..rounds {
            // SAFETY: the bench's buffers cover the pieces and live until `end_bench`.
            unsafe {
                self.copy_with(strategy, bench.stream, &bench.lane, direction, &pieces, staging)?;
            }
        }
        let enqueued = begin.elapsed();
        self.synchronize(bench.stream)?;
        Ok(cost(begin.elapsed(), enqueued) / rounds)
    }
}

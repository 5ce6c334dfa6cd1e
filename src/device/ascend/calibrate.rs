//! Measuring the strategies on this machine, once, before `open` returns.

use std::ffi::c_void;
use std::time::Instant;

use super::copy::Lane;
use super::{Ascend, api};
use crate::device::engine::{Choices, Driver, Fault, PATTERN_BYTES, StrategySet, Stream, cost};
use crate::device::loader::checked;

impl Ascend {
    /// Measures the set; everything is given back.
    pub(super) fn calibrate(&self, set: &StrategySet) -> Result<Choices, Fault> {
        if set.0.len() == 1 {
            return Ok(Choices::uniform(set.0[0]));
        }
        let _entered = self.enter()?;
        let stream = self.create_stream()?;
        let choices = self.calibrate_on(stream, set);
        self.destroy_stream(stream);
        choices
    }

    fn calibrate_on(&self, stream: Stream, set: &StrategySet) -> Result<Choices, Fault> {
        let host = self.host_buffer(PATTERN_BYTES as usize)?;
        let device = self.device_buffer(2 * PATTERN_BYTES as usize);
        let mut lane = Lane::default();
        let choices = device.as_ref().map_err(Clone::clone).map(|&device| {
            Choices::measure(set, |strategy, direction, pattern| {
                let pieces = pattern.pieces(device as usize, host as usize);
                let begin = Instant::now();
                let rounds = pattern.rounds();
                let copied = (0..rounds).try_for_each(|_| {
                    // SAFETY: the buffers cover the pieces and live until the stream is synchronised
                    // below.
                    unsafe { self.copy_with(strategy, stream, &mut lane, direction, &pieces) }
                });
                let enqueued = begin.elapsed();
                copied.and_then(|()| self.synchronize(stream)).ok()?;
                lane.batches.clear();
                Some(cost(begin.elapsed(), enqueued) / rounds)
            })
        });
        if self.synchronize(stream).is_err() {
            // Copies may still be under way: what they use stays.
            std::mem::forget(lane);
        } else {
            // SAFETY: the stream is idle, and nothing else knows these buffers.
            unsafe {
                if let Ok(device) = device {
                    (self.api.functions.aclrtFree)(device);
                }
                (self.api.functions.aclrtFreeHost)(host);
            }
        }
        choices
    }

    fn device_buffer(&self, bytes: usize) -> Result<*mut c_void, Fault> {
        let mut buffer = std::ptr::null_mut();
        // SAFETY: `buffer` is a valid place.
        unsafe { checked!(self.api, aclrtMalloc(&mut buffer, bytes, api::MALLOC_HUGE_FIRST)) }
            .map(|()| buffer)
    }
}

//! The host device: caller memory is plain memory, a copy is a memcpy on the copy worker's thread.

use std::ffi::c_void;
use std::sync::Arc;

use super::{
    CapturedEvent, CopyJob, CopyStream, Device, Direction, Finished, Marker, Staging, Wake,
};
use crate::block::SliceShape;
use crate::error::Result;

/// Plain host memory.
pub struct Host;

impl Device for Host {
    fn name(&self) -> &'static str {
        "host"
    }

    unsafe fn capture_event(&self, _event: *mut c_void) -> Result<CapturedEvent> {
        // Host memory has no streams: whatever was written before the submit call is visible already.
        Ok(Arc::new(()))
    }

    unsafe fn pin(&self, _base: *mut u8, _length: usize) -> Result<()> {
        Ok(())
    }

    fn unpin(&self, _base: *mut u8) {}

    fn open_stream(&self, _wake: Wake) -> Result<Box<dyn CopyStream>> {
        Ok(Box::new(HostStream { finished: Vec::new() }))
    }

    unsafe fn stream_wait(&self, _stream: *mut c_void, _markers: &[Marker]) -> Result<()> {
        Ok(())
    }

    fn is_host(&self) -> bool {
        true
    }
}

struct HostStream {
    finished: Vec<Finished>,
}

impl CopyStream for HostStream {
    unsafe fn enqueue(&mut self, jobs: &[CopyJob<'_>]) -> Option<Marker> {
        for job in jobs {
            let mut staging = job.staging;
            for (address, shape) in job.addresses.iter().zip(job.slices) {
                // SAFETY: the caller of `enqueue` vouches for the spans of the slice and for the sum of
                // the slices' bytes of staging, of which this slice takes `shape.bytes()`.
                unsafe {
                    copy_slice(job.direction, address.cast(), staging, shape);
                    staging = staging.add(shape.bytes() as usize);
                }
            }
            self.finished.push(Finished {
                ticket: job.ticket,
                result: Ok(()),
                staging: Staging::Free,
            });
        }
        None
    }

    fn poll(&mut self, finished: &mut Vec<Finished>) {
        finished.append(&mut self.finished);
    }
}

/// Copies one slice between caller memory and staging.
///
/// # Safety
/// `memory` is valid for the slice's span and `staging` for its bytes, and they do not overlap.
pub unsafe fn copy_slice(
    direction: Direction,
    memory: *mut u8,
    staging: *mut u8,
    shape: &SliceShape,
) {
    let run = shape.run_bytes as usize;
    let mut counters = vec![0u64; shape.dimensions.len()];
    let mut staged = staging;
    loop {
        let offset: u64 =
            counters.iter().zip(&shape.dimensions).map(|(i, (_, stride))| i * stride).sum();
        // SAFETY: `offset + run` is at most the slice's span, and `staged` has advanced by whole runs
        // that are at most the slice's bytes; the caller vouches for both.
        unsafe {
            let at = memory.add(offset as usize);
            match direction {
                Direction::Gather => std::ptr::copy_nonoverlapping(at, staged, run),
                Direction::Scatter => std::ptr::copy_nonoverlapping(staged, at, run),
            }
            staged = staged.add(run);
        }
        if !advance(&mut counters, &shape.dimensions) {
            return;
        }
    }
}

/// Counts like an odometer, the last dimension fastest; false when all combinations are done.
fn advance(counters: &mut [u64], dimensions: &[(u64, u64)]) -> bool {
    for (counter, (count, _)) in counters.iter_mut().zip(dimensions).rev() {
        *counter += 1;
        if *counter < *count {
            return true;
        }
        *counter = 0;
    }
    false
}

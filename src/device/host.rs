//! The host device: caller memory is plain memory, a copy is a memcpy on the copy worker's thread.

use std::ffi::c_void;
use std::sync::Arc;

use super::{
    CapturedEvent, CopyJob, CopyStream, Device, Direction, Finished, Marker, Staging, Wake,
};
use crate::block::SliceShape;
use crate::error::Result;
use crate::mem::runs::Runs;

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
            let mut runs = Runs::nowhere();
            for (address, shape) in job.addresses.iter().zip(job.slices) {
                runs.push_slice(address.cast(), shape);
            }
            // SAFETY: the caller of `enqueue` vouches for the spans of the slices and for the sum of their bytes of
            // staging.
            unsafe { copy(job.direction, runs, job.staging) };
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
    let mut runs = Runs::nowhere();
    runs.push_slice(memory, shape);
    // SAFETY: the caller's promise.
    unsafe { copy(direction, runs, staging) }
}

/// Copies all bytes of `runs` from or to staging.
///
/// # Safety
/// The runs are valid, and `staging` for their bytes; they do not overlap.
unsafe fn copy(direction: Direction, mut runs: Runs<'_>, staging: *mut u8) {
    let bytes = runs.bytes();
    // SAFETY: the caller's promise.
    unsafe {
        match direction {
            Direction::Gather => runs.gather(staging, bytes),
            Direction::Scatter => runs.scatter(staging, bytes),
        }
    }
}

//! Devices: who moves bytes between a caller's memory and the arena.
//!
//! A device knows addresses, streams and events; it knows nothing of files, blocks or tasks. Copy
//! workers (`crate::copy`) each own one [`CopyStream`] and feed it gathers (save: caller memory to a
//! slot) and scatters (load: slot to caller memory).

mod ascend;
mod cuda;
mod engine;
pub mod host;
pub(crate) mod loader;
mod open;
mod staging;

pub use open::open;
pub use staging::{
    DeviceStaging, HASH_BEAT, HASH_BYTES_MIN, HASH_RUNS_TOGETHER, HashRun, Hashing, hash_and_wait,
};

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

use crate::block::SliceShape;
use crate::error::{Error, ErrorKind, Result};

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Caller memory to staging: a save.
    Gather,
    /// Staging to caller memory: a load.
    Scatter,
}

/// The state of a caller's event at the time of the submit call. Cheap to clone; dropped when the last
/// copy that waits for it has been enqueued.
pub type CapturedEvent = Arc<dyn Any + Send + Sync>;

/// A point in a copy stream that a caller's stream can be made to wait for.
pub type Marker = Arc<dyn Any + Send + Sync>;

/// One shard to copy. The addresses and the staging memory stay valid until the job's completion has
/// been polled: whoever builds a job vouches for it (see [`CopyStream::enqueue`]).
pub struct CopyJob<'a> {
    /// Given back by [`CopyStream::poll`].
    pub ticket: u64,
    /// Gather or scatter.
    pub direction: Direction,
    /// First byte of the shard in staging memory.
    pub staging: *mut u8,
    /// Base address of each slice in caller memory.
    pub addresses: &'a [*mut c_void],
    /// Shape of each slice; their bytes lie end to end in staging.
    pub slices: &'a [SliceShape],
    /// What the device must have finished before the copy begins.
    pub wait: Option<&'a CapturedEvent>,
}

/// What is known of a job once it has been enqueued.
pub struct Finished {
    /// The job's ticket.
    pub ticket: u64,
    /// How it ended. On an error the bytes are undefined.
    pub result: Result<()>,
    /// Whether the staging memory may be used again.
    pub staging: Staging,
}

/// What became of a finished job's staging memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staging {
    /// The device no longer touches it.
    Free,
    /// The device failed in a way that proves nothing: the slot must never be used again, and the arena
    /// never be unmapped. The caller's device memory died with its context, so it counts as released.
    Lost,
}

/// What the log tells of a device when a store opens it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// `host`, `cuda`, `ascend`.
    pub kind: &'static str,
    /// Name and driver version, in one line.
    pub description: String,
    /// How copies are made, one line for each choice.
    pub copies: Vec<String>,
    /// What the platform refused: what, its cost, the remedy; a sentence each.
    pub fallbacks: Vec<String>,
}

/// Wakes the copy worker that owns a stream; called from any thread, also from a driver's callback.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// A kind of memory that callers hand addresses of.
pub trait Device: Send + Sync {
    /// `host`, `cuda`, `ascend`.
    fn name(&self) -> &'static str;

    /// Captures what `event` stands for now, without blocking: it may be recorded again or destroyed
    /// when this returns.
    ///
    /// # Safety
    /// `event` is a live event of this device's runtime.
    unsafe fn capture_event(&self, event: *mut c_void) -> Result<CapturedEvent>;

    /// Pins arena memory for the device. Refusal is not fatal: copies are slower and the reason is told once.
    ///
    /// # Safety
    /// `base..base + length` is mapped until `unpin` returns.
    unsafe fn pin(&self, base: *mut u8, length: usize) -> Result<()>;

    /// Undoes `pin`, after all copies of that memory have ended. Where the driver refuses, the pages stay
    /// pinned until the process ends; they may be unmapped all the same.
    fn unpin(&self, base: *mut u8);

    /// Opens one more copy stream, driven by one thread. `wake` is called when a poll would find news.
    fn open_stream(&self, wake: Wake) -> Result<Box<dyn CopyStream>>;

    /// Makes the caller's stream wait, on the device, for the markers of copies already enqueued.
    ///
    /// # Safety
    /// `stream` is a live stream of this device's runtime, or null for the default stream.
    unsafe fn stream_wait(&self, stream: *mut c_void, markers: &[Marker]) -> Result<()>;

    /// Whether caller memory is plain host memory that the drive can be pointed at.
    fn is_host(&self) -> bool {
        false
    }

    /// Memory of the device to stage in, of at least so many bytes, for drives that reach it. Copies of it are
    /// told from those of pinned memory until `unpin` of its base address.
    fn staging(&self, _bytes: usize) -> Result<Arc<dyn DeviceStaging>> {
        let text = format!("device: {} has no memory that a drive could reach", self.name());
        Err(Error::new(ErrorKind::Unsupported, text))
    }

    /// The NUMA node that the device hangs on, where the system tells: the arena belongs there.
    fn numa_node(&self) -> Option<u32> {
        None
    }

    /// What was found and chosen at open, and refused since.
    fn report(&self) -> Report {
        Report { kind: self.name(), ..Report::default() }
    }
}

/// An ordered queue of copies on the device, owned by one thread. Dropping it waits for the copies that
/// are still in flight, or leaks what the device may still touch.
pub trait CopyStream: Send {
    /// Enqueues jobs, in order. The result for each job is reported by `poll`, also when enqueueing it
    /// fails. Returns a marker that stands for all of them but those that `failed` names, where the device
    /// has such a thing; null means that `poll` reports the jobs before anything could wait for them (host
    /// memory).
    ///
    /// # Safety
    /// For every job, the staging memory (the sum of the slices' bytes) and each slice's span from its
    /// address are valid for the copy, and stay so until `poll` has reported the ticket.
    unsafe fn enqueue(&mut self, jobs: &[CopyJob<'_>]) -> Option<Marker>;

    /// Tickets of the last `enqueue` that will end with an error: behind its marker their bytes are not
    /// there.
    fn failed(&self) -> &[u64] {
        &[]
    }

    /// Moves finished jobs into `finished`, without blocking.
    fn poll(&mut self, finished: &mut Vec<Finished>);
}

//! Staging in a device's own memory, which a drive can be pointed at without a stop in host memory.
//!
//! The CPU can neither read nor write it: bytes get in and out by the device's copies and by the drive, and
//! their checksums are computed by the device.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Wake;
use crate::error::Result;

/// Bytes whose checksum is wanted: a run of the staging memory, and the seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashRun {
    /// From the first byte of the staging memory; a multiple of 8.
    pub offset: usize,
    /// At least [`HASH_BYTES_MIN`].
    pub bytes: u64,
    /// Seed of the XXH3-64.
    pub seed: u64,
}

/// XXH3 has another form for shorter inputs, which devices do not compute: parts are whole pages.
pub const HASH_BYTES_MIN: u64 = 241;

/// Checksums that a device computes with one launch.
pub const HASH_RUNS_TOGETHER: usize = 160;

/// One allocation of device memory. Freed when it is dropped.
pub trait DeviceStaging: Send + Sync {
    /// Address of the first byte, for copies of the device and for the drive; no CPU may touch it.
    fn base(&self) -> *mut u8;

    /// Bytes.
    fn bytes(&self) -> usize;

    /// Calls `work` with the device's context current on this thread.
    fn with_context(&self, work: &mut dyn FnMut()) -> Result<()>;

    /// Has the device compute the XXH3-64 of each run, of at least one, which takes it tens of microseconds and a
    /// fraction of a millisecond for parts of 4 MiB. Does not wait for it: `wake` is called, on any thread, when a
    /// poll would find news, but not where the device has failed, so poll every [`HASH_BEAT`] too. What other streams
    /// and the drive wrote before is seen if it was known to have ended.
    fn hash(self: Arc<Self>, runs: &[HashRun], wake: &Wake) -> Result<Box<dyn Hashing>>;

    /// Copies a few bytes in. Blocks.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<()>;

    /// Copies a few bytes out. Blocks.
    fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()>;
}

/// Checksums that a device computes. Dropped before their end, they are leaked, with the memory.
pub trait Hashing: Send {
    /// The checksums, in the order of the runs, or why there are none; `None`: not yet. Not to be polled after that.
    /// Does not wait for the device, unless a call of its driver has failed.
    fn poll(&mut self) -> Option<Result<Vec<u64>>>;
}

/// How long to rely on being woken.
pub const HASH_BEAT: Duration = Duration::from_millis(50);

/// As [`DeviceStaging::hash`], and waits for the answer.
pub fn hash_and_wait(memory: &Arc<dyn DeviceStaging>, runs: &[HashRun]) -> Result<Vec<u64>> {
    let thread = thread::current();
    let wake: Wake = Arc::new(move || thread.unpark());
    let mut hashing = Arc::clone(memory).hash(runs, &wake)?;
    loop {
        if let Some(answer) = hashing.poll() {
            return answer;
        }
        thread::park_timeout(HASH_BEAT);
    }
}

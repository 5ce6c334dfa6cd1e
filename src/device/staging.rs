//! Staging in a device's own memory, which a drive can be pointed at without a stop in host memory.
//!
//! The CPU can neither read nor write it: bytes get in and out by the device's copies and by the drive, and
//! their checksums are computed by the device.

#![forbid(unsafe_code)]

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

/// One allocation of device memory. Freed when it is dropped.
pub trait DeviceStaging: Send + Sync {
    /// Address of the first byte, for copies of the device and for the drive; no CPU may touch it.
    fn base(&self) -> *mut u8;

    /// Bytes.
    fn bytes(&self) -> usize;

    /// Calls `work` with the device's context current on this thread.
    fn with_context(&self, work: &mut dyn FnMut()) -> Result<()>;

    /// XXH3-64 of each run. Blocks, without spinning, until the device has computed them: tens of microseconds and
    /// a fraction of a millisecond for each part of 4 MiB. What other streams and the drive wrote before is seen
    /// if it was known to have ended.
    fn hash(&self, runs: &[HashRun]) -> Result<Vec<u64>>;

    /// Copies a few bytes in. Blocks.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<()>;

    /// Copies a few bytes out. Blocks.
    fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()>;
}

//! Staging in device memory: the allocation, and what can be asked of its bytes.

use std::sync::Arc;

use super::Cuda;
use super::api::Address;
use super::hash::{Hasher, Run, Sums};
use crate::device::engine::{Driver, Fault};
use crate::device::{DeviceStaging, HASH_BYTES_MIN, HashRun, Hashing, Wake};
use crate::error::{Error, ErrorKind, Result};

/// cuFile and the GPU's windows on the bus deal in pages of this size; the driver gives large allocations at
/// multiples of it.
const GPU_PAGE: usize = 64 << 10;
/// The driver gives memory in pieces of this size anyway.
const GRANULE: usize = 2 << 20;

pub(super) struct CudaStaging {
    pub(super) cuda: Arc<Cuda>,
    pub(super) hasher: Hasher,
    base: Address,
    bytes: usize,
}

/// Allocates staging memory of at least `bytes` bytes.
pub(super) fn allocate(cuda: &Arc<Cuda>, bytes: usize) -> Result<Arc<dyn DeviceStaging>> {
    let bytes = bytes.next_multiple_of(GRANULE);
    let _entered = cuda.enter().map_err(told)?;
    let hasher = Hasher::load(cuda).map_err(told)?;
    let base = match cuda.device_buffer(bytes) {
        Ok(base) => base,
        Err(fault) => {
            hasher.unload(cuda);
            return Err(told(fault));
        }
    };
    let staging = CudaStaging { cuda: Arc::clone(cuda), hasher, base, bytes };
    if !(base as usize).is_multiple_of(GPU_PAGE) {
        let text = format!("the driver gave device memory at {base:#x}, inside a page of the GPU");
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(Arc::new(staging))
}

pub(super) fn told(fault: Fault) -> Error {
    fault.error
}

impl CudaStaging {
    fn check(&self, offset: usize, bytes: usize) -> Result<Address> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let text = format!(
                "{bytes} bytes at {offset} are outside the {} bytes of device staging; a defect in UCM",
                self.bytes
            );
            return Err(Error::new(ErrorKind::Internal, text));
        }
        Ok(self.base + offset as u64)
    }

    fn run(&self, run: &HashRun) -> Result<Run> {
        let address = self.check(run.offset, run.bytes as usize)?;
        if run.bytes < HASH_BYTES_MIN || !run.offset.is_multiple_of(8) {
            let text = format!(
                "a device computes no checksum of {} bytes at {}; a defect in UCM",
                run.bytes, run.offset
            );
            return Err(Error::new(ErrorKind::Internal, text));
        }
        Ok(Run { address, bytes: run.bytes, seed: run.seed })
    }
}

impl DeviceStaging for CudaStaging {
    fn base(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(self.base as usize)
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn with_context(&self, work: &mut dyn FnMut()) -> Result<()> {
        let _entered = self.cuda.enter().map_err(told)?;
        work();
        Ok(())
    }

    fn hash(self: Arc<Self>, runs: &[HashRun], wake: &Wake) -> Result<Box<dyn Hashing>> {
        let runs = runs.iter().map(|run| self.run(run)).collect::<Result<Vec<_>>>()?;
        let _entered = self.cuda.enter().map_err(told)?;
        // SAFETY: the runs were checked to lie in our allocation, which the sums keep, and to suit the kernel.
        let sums = unsafe { Sums::begin(Arc::clone(&self), runs, wake) }.map_err(told)?;
        Ok(Box::new(sums))
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let to = self.check(offset, bytes.len())?;
        // SAFETY: the range lies in our allocation, and the bytes are borrowed during the call.
        unsafe { self.copy(to, bytes.as_ptr() as Address, bytes.len()) }
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let from = self.check(offset, bytes.len())?;
        // SAFETY: as above.
        unsafe { self.copy(bytes.as_mut_ptr() as Address, from, bytes.len()) }
    }
}

impl CudaStaging {
    /// A copy that has ended when this returns, also for the drive: what a plain copy of pageable memory leaves
    /// under way is waited for.
    ///
    /// # Safety
    /// Both ranges are valid during the call.
    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        let _entered = self.cuda.enter().map_err(told)?;
        let stream = self.cuda.create_stream().map_err(told)?;
        // SAFETY: as promised by the caller; the driver is done with pageable memory when the call returns.
        let status = unsafe { (self.cuda.api.functions.cuMemcpyAsync)(to, from, bytes, stream.0) };
        let copied = self.cuda.api.check("cuMemcpyAsync", status);
        let ended = copied.and_then(|()| self.cuda.synchronize(stream));
        self.cuda.destroy_stream(stream);
        ended.map_err(told)
    }
}

impl Drop for CudaStaging {
    fn drop(&mut self) {
        // Entering may fail for want of memory; twice in a row is a dead context, whose memory is gone.
        let Ok(_entered) = self.cuda.enter().or_else(|_| self.cuda.enter()) else { return };
        self.hasher.unload(&self.cuda);
        // SAFETY: allocated by `allocate`; whoever could touch it holds the staging.
        let _ = unsafe { (self.cuda.api.functions.cuMemFree)(self.base) };
    }
}

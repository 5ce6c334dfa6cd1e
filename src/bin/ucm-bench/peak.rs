//! The yardstick of `compare device`: large plain copies between pinned memory and a GPU's, through the
//! driver alone. Knows no store.

use std::ffi::{c_int, c_void};
use std::time::Instant;

use libloading::Library;

use crate::abi::Direction;
use crate::device::{library, ok, symbol};

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

type Status = c_int;

/// Memory on both sides of the bus, and a stream to copy on.
pub struct Peak {
    _library: Library,
    set_current: unsafe extern "C" fn(*mut c_void) -> Status,
    copy: unsafe extern "C" fn(u64, u64, usize, *mut c_void) -> Status,
    synchronize: unsafe extern "C" fn(*mut c_void) -> Status,
    free_host: unsafe extern "C" fn(*mut c_void) -> Status,
    free_device: unsafe extern "C" fn(u64) -> Status,
    context: *mut c_void,
    stream: *mut c_void,
    host: *mut c_void,
    device: u64,
    bytes: usize,
}

impl Peak {
    /// Allocates `bytes` on both sides.
    pub fn new(ordinal: u32, bytes: usize) -> Result<Self, String> {
        let library = library(
            "libcuda.so.1",
            "UCM_CUDA_LIBRARY",
            "install the NVIDIA driver; there is nothing to compare with",
        )?;
        let init: unsafe extern "C" fn(u32) -> Status = symbol(&library, c"cuInit")?;
        let get: unsafe extern "C" fn(*mut c_int, c_int) -> Status =
            symbol(&library, c"cuDeviceGet")?;
        let retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> Status =
            symbol(&library, c"cuDevicePrimaryCtxRetain")?;
        let stream: unsafe extern "C" fn(*mut *mut c_void, u32, c_int) -> Status =
            symbol(&library, c"cuStreamCreateWithPriority")?;
        let host: unsafe extern "C" fn(*mut *mut c_void, usize, u32) -> Status =
            symbol(&library, c"cuMemHostAlloc")?;
        let device: unsafe extern "C" fn(*mut u64, usize) -> Status =
            symbol(&library, c"cuMemAlloc_v2")?;
        let mut peak = Self {
            set_current: symbol(&library, c"cuCtxSetCurrent")?,
            copy: symbol(&library, c"cuMemcpyAsync")?,
            synchronize: symbol(&library, c"cuStreamSynchronize")?,
            free_host: symbol(&library, c"cuMemFreeHost")?,
            free_device: symbol(&library, c"cuMemFree_v2")?,
            _library: library,
            context: std::ptr::null_mut(),
            stream: std::ptr::null_mut(),
            host: std::ptr::null_mut(),
            device: 0,
            bytes,
        };
        let mut number = 0;
        // SAFETY: cuInit takes 0; the out pointers are places of `peak` and a local. The context stays
        // retained until the process ends, as that of the bench's blocks does.
        unsafe {
            ok("cuInit", init(0))?;
            ok("cuDeviceGet", get(&mut number, ordinal as c_int))?;
            ok("cuDevicePrimaryCtxRetain", retain(&mut peak.context, number))?;
            ok("cuCtxSetCurrent", (peak.set_current)(peak.context))?;
            ok("cuStreamCreateWithPriority", stream(&mut peak.stream, NON_BLOCKING, 0))?;
            ok("cuMemHostAlloc", host(&mut peak.host, bytes, 0))?;
            ok("cuMemAlloc", device(&mut peak.device, bytes))?;
        }
        Ok(peak)
    }

    /// Copies all of it `times` times, one large copy behind the other: 10^9 bytes a second.
    pub fn gb_per_second(&self, direction: Direction, times: u32) -> Result<f64, String> {
        let (host, device) = (self.host as u64, self.device);
        let (to, from) = match direction {
            Direction::Save => (host, device),
            Direction::Load => (device, host),
        };
        let begin = Instant::now();
        // SAFETY: both allocations have `bytes`, and live until drop; the context and its stream too.
        unsafe {
            ok("cuCtxSetCurrent", (self.set_current)(self.context))?;
            for _ in 0..times {
                ok("cuMemcpyAsync", (self.copy)(to, from, self.bytes, self.stream))?;
            }
            ok("cuStreamSynchronize", (self.synchronize)(self.stream))?;
        }
        Ok(self.bytes as f64 * f64::from(times) / begin.elapsed().as_secs_f64() / 1e9)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        // SAFETY: the stream is idle (every measurement ends with it), and nothing else knows the memory;
        // null is freed without effect.
        unsafe {
            (self.set_current)(self.context);
            if !self.host.is_null() {
                (self.free_host)(self.host);
            }
            if self.device != 0 {
                (self.free_device)(self.device);
            }
        }
    }
}

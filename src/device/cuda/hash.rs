//! The hash kernel: loading it, and having it compute checksums of device memory.
//!
//! `hash.cu` is the source, `hash.ptx` what is embedded, `hash_args.h` the arguments' layout, which the structs
//! here mirror.

use std::ffi::{CString, c_uint, c_void};

use parking_lot::Mutex;

use super::Cuda;
use super::api::{self, Address};
use crate::device::engine::{ContextState, Driver, Event, Fault, Stream};
use crate::error::{Error, ErrorKind};

/// The translation of `hash.cu`.
const PTX: &str = include_str!("hash.ptx");

/// Threads of a thread block, each of which takes one run.
const THREADS: c_uint = 288;
/// Runs of one launch.
const RUNS_MAX: usize = 160;

/// A run of device memory: address, bytes, seed.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) address: Address,
    pub(super) bytes: u64,
    pub(super) seed: u64,
}

#[repr(C)]
struct Args {
    sums: Address,
    runs: u32,
    unused: u32,
    run: [Run; RUNS_MAX],
}

const _: () = assert!(size_of::<Args>() == 3856);

/// What one thread needs to have sums computed.
struct Lane {
    stream: Stream,
    event: Event,
    /// Pinned host memory for [`RUNS_MAX`] sums, and the device's address of it.
    sums: *mut u64,
    mapped: Address,
}

// SAFETY: handles and memory of a lane are used by the one thread that has taken it.
unsafe impl Send for Lane {}

/// The loaded kernel and its idle lanes: as many as there were threads at it at a time.
pub(super) struct Hasher {
    module: *mut c_void,
    function: *mut c_void,
    lanes: Mutex<Vec<Lane>>,
}

// SAFETY: module and function handles may be used from any thread that has the context current.
unsafe impl Send for Hasher {}
// SAFETY: as above; lanes are behind a lock.
unsafe impl Sync for Hasher {}

fn missing(name: &str) -> Fault {
    let text = format!(
        "libcuda has no {name}, which checksums on the device need; install driver R520 or newer"
    );
    let error = Error::new(ErrorKind::Unsupported, text);
    Fault { error, context: ContextState::Unknown }
}

impl Hasher {
    /// Has the driver translate the kernel. The context is current.
    pub(super) fn load(cuda: &Cuda) -> Result<Self, Fault> {
        let functions = &cuda.api.functions;
        let load = functions.cuModuleLoadData.ok_or_else(|| missing("cuModuleLoadData"))?;
        let get = functions.cuModuleGetFunction.ok_or_else(|| missing("cuModuleGetFunction"))?;
        let text = CString::new(PTX).map_err(|_| missing("the hash kernel"))?;
        let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the image is NUL-terminated PTX text and outlives the call.
        let status = unsafe { load(&mut module, text.as_ptr().cast()) };
        cuda.api.check("cuModuleLoadData", status)?;
        // SAFETY: the module is loaded, the name NUL-terminated, `function` a valid place.
        let status = unsafe { get(&mut function, module, c"ucm_hash".as_ptr()) };
        let hasher = Self { module, function, lanes: Mutex::default() };
        match cuda.api.check("cuModuleGetFunction", status) {
            Ok(()) => Ok(hasher),
            Err(fault) => {
                hasher.unload(cuda);
                Err(fault)
            }
        }
    }

    /// Gives everything back. Nobody computes sums any more, and the context is current.
    pub(super) fn unload(&self, cuda: &Cuda) {
        for lane in self.lanes.lock().drain(..) {
            close(cuda, &lane);
        }
        if let Some(unload) = cuda.api.functions.cuModuleUnload {
            // SAFETY: the module was loaded by `load` and is unloaded once; no launch is in flight, since
            // `sums` waits for its own.
            let _ = unsafe { unload(self.module) };
        }
    }

    /// The sums of the runs, in order. Blocks until they are there. The context is current.
    ///
    /// # Safety
    /// The runs are memory of the device that stays allocated during the call, from multiples of 8 on, and long
    /// enough for the kernel.
    pub(super) unsafe fn sums(&self, cuda: &Cuda, runs: &[Run]) -> Result<Vec<u64>, Fault> {
        let idle = self.lanes.lock().pop();
        let lane = match idle {
            Some(lane) => lane,
            None => open(cuda)?,
        };
        let mut sums = Vec::with_capacity(runs.len());
        for chunk in runs.chunks(RUNS_MAX) {
            // SAFETY: passed on from the caller.
            if let Err(fault) = unsafe { self.compute(cuda, &lane, chunk) } {
                // The kernel may still run, and write its sums: unless the stream proves that it does not, the
                // lane is never used again, and stays allocated.
                if cuda.synchronize(lane.stream).is_ok() {
                    self.lanes.lock().push(lane);
                }
                return Err(fault);
            }
            // SAFETY: the lane has room for RUNS_MAX sums, of which the kernel has written these; it has ended,
            // by the event.
            sums.extend((0..chunk.len()).map(|at| unsafe { lane.sums.add(at).read_volatile() }));
        }
        self.lanes.lock().push(lane);
        Ok(sums)
    }

    /// # Safety
    /// As [`Hasher::sums`]; at most `RUNS_MAX` runs.
    unsafe fn compute(&self, cuda: &Cuda, lane: &Lane, runs: &[Run]) -> Result<(), Fault> {
        let functions = &cuda.api.functions;
        let launch = functions.cuLaunchKernel.ok_or_else(|| missing("cuLaunchKernel"))?;
        let wait = functions.cuEventSynchronize.ok_or_else(|| missing("cuEventSynchronize"))?;
        let empty = Run { address: 0, bytes: 0, seed: 0 };
        let mut args =
            Args { sums: lane.mapped, runs: runs.len() as u32, unused: 0, run: [empty; RUNS_MAX] };
        args.run[..runs.len()].copy_from_slice(runs);
        let (mut params, none) = ([(&raw mut args).cast::<c_void>()], std::ptr::null_mut());
        let (blocks, stream) = (runs.len() as c_uint, lane.stream.0);
        // SAFETY: the function lives with the module; `args` is its one argument, which the driver copies before
        // it returns; the device can reach the runs, by the caller's word, and the lane's sums.
        let status = unsafe {
            launch(self.function, blocks, 1, 1, THREADS, 1, 1, 0, stream, params.as_mut_ptr(), none)
        };
        cuda.api.check("cuLaunchKernel", status)?;
        cuda.record(lane.event, lane.stream)?;
        // SAFETY: the event lives as long as the lane.
        cuda.api.check("cuEventSynchronize", unsafe { wait(lane.event.0) })
    }
}

fn open(cuda: &Cuda) -> Result<Lane, Fault> {
    let functions = &cuda.api.functions;
    let sums = cuda.host_buffer(RUNS_MAX * size_of::<u64>())?;
    let none = std::ptr::null_mut();
    let mut lane = Lane { stream: Stream(none), event: Event(none), sums: sums.cast(), mapped: 0 };
    let opened = (|| {
        // SAFETY: `sums` was allocated with DEVICEMAP just now; the place is valid.
        let status = unsafe { (functions.cuMemHostGetDevicePointer)(&mut lane.mapped, sums, 0) };
        cuda.api.check("cuMemHostGetDevicePointer", status)?;
        let flags = api::EVENT_DISABLE_TIMING | api::EVENT_BLOCKING_SYNC;
        // SAFETY: the event is a valid place.
        let status = unsafe { (functions.cuEventCreate)(&mut lane.event.0, flags) };
        cuda.api.check("cuEventCreate", status)?;
        lane.stream = cuda.create_stream()?;
        Ok(())
    })();
    match opened {
        Ok(()) => Ok(lane),
        Err(fault) => {
            close(cuda, &lane);
            Err(fault)
        }
    }
}

/// Nothing of the lane is in flight, and the context is current.
fn close(cuda: &Cuda, lane: &Lane) {
    if !lane.stream.0.is_null() {
        cuda.destroy_stream(lane.stream);
    }
    if !lane.event.0.is_null() {
        cuda.destroy_event(lane.event);
    }
    // SAFETY: allocated by `open`; no kernel that writes it is in flight, by the caller's word.
    let _ = unsafe { (cuda.api.functions.cuMemFreeHost)(lane.sums.cast()) };
}

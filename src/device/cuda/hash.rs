//! The hash kernel: loading it, and having it compute checksums of device memory.
//!
//! `hash.cu` is the source, `hash.ptx` what is embedded, `hash_args.h` the arguments' layout, which the structs
//! here mirror.

use std::ffi::{CString, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

use super::Cuda;
use super::api::Address;
use super::staging::{CudaStaging, told};
use crate::device::engine::{ContextState, Driver, Event, Fault, Progress, Stream};
use crate::device::{HASH_RUNS_TOGETHER, Hashing, Wake};
use crate::error::{Error, ErrorKind};

/// The translation of `hash.cu`.
const PTX: &str = include_str!("hash.ptx");

/// Threads of a thread block, each of which takes one run.
const THREADS: c_uint = 288;
/// Runs of one launch.
const RUNS_MAX: usize = HASH_RUNS_TOGETHER;

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

/// What the device needs to compute sums beside others.
struct Lane {
    stream: Stream,
    event: Event,
    /// Pinned host memory for [`RUNS_MAX`] sums, and the device's address of it.
    sums: *mut u64,
    mapped: Address,
}

// SAFETY: handles and memory of a lane are used by whoever has taken it alone.
unsafe impl Send for Lane {}

/// The loaded kernel and its idle lanes: as many as were in use at a time.
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
            // SAFETY: the module was loaded by `load` and is unloaded once; no launch is in flight, since sums keep
            // the staging, and with it the module, until they have ended.
            let _ = unsafe { unload(self.module) };
        }
    }

    /// Has the runs' sums computed on the lane.
    ///
    /// # Safety
    /// As [`Sums::begin`]; at most `RUNS_MAX` runs; nothing is under way on the lane.
    unsafe fn compute(
        &self,
        cuda: &Cuda,
        lane: &Lane,
        runs: &[Run],
        wake: &Wake,
    ) -> Result<(), Fault> {
        let functions = &cuda.api.functions;
        let launch = functions.cuLaunchKernel.ok_or_else(|| missing("cuLaunchKernel"))?;
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
        let data = Box::into_raw(Box::new(Arc::clone(wake)));
        // SAFETY: `data` is what `called_by_driver` expects, and its own.
        if unsafe { cuda.notify(lane.stream, called_by_driver, data.cast()) }.is_err() {
            // It only costs time: whoever waits polls at a beat as well.
            // SAFETY: made just now; the driver has not taken it.
            drop(unsafe { Box::from_raw(data) });
        }
        Ok(())
    }
}

/// Called when sums are there.
///
/// # Safety
/// `data` is a boxed [`Wake`], which this call takes.
unsafe extern "C" fn called_by_driver(data: *mut c_void) {
    // SAFETY: by the caller's word.
    let wake = unsafe { Box::from_raw(data.cast::<Wake>()) };
    // A panic must not cross the driver's frames.
    let _ = catch_unwind(AssertUnwindSafe(|| (*wake)()));
}

/// Sums that the device computes, on a lane of their own.
pub(super) struct Sums {
    staging: Arc<CudaStaging>,
    /// `None`: they have ended.
    lane: Option<Lane>,
    runs: Vec<Run>,
    /// The sums that are there, of the first runs.
    ready: Vec<u64>,
    /// How many runs the device was given, those of `ready` included.
    launched: usize,
    wake: Wake,
}

impl Sums {
    /// Has the device begin. The context is current.
    ///
    /// # Safety
    /// The runs are memory of the device that stays allocated as long as `staging`, from multiples of 8 on, and long
    /// enough for the kernel.
    pub(super) unsafe fn begin(
        staging: Arc<CudaStaging>,
        runs: Vec<Run>,
        wake: &Wake,
    ) -> Result<Self, Fault> {
        let idle = staging.hasher.lanes.lock().pop();
        let lane = match idle {
            Some(lane) => lane,
            None => open(&staging.cuda)?,
        };
        let mut sums = Self {
            staging,
            lane: Some(lane),
            ready: Vec::with_capacity(runs.len()),
            runs,
            launched: 0,
            wake: Arc::clone(wake),
        };
        match sums.launch() {
            Ok(()) => Ok(sums),
            Err(fault) => Err(sums.give_up(fault)),
        }
    }

    /// Launches the next runs, as many as the lane has room for.
    fn launch(&mut self) -> Result<(), Fault> {
        let Some(lane) = &self.lane else { return Ok(()) };
        let from = self.launched;
        self.launched = self.runs.len().min(from + RUNS_MAX);
        let (cuda, runs) = (&self.staging.cuda, &self.runs[from..self.launched]);
        // SAFETY: by the word of `begin`'s caller; the sums launched before are there.
        unsafe { self.staging.hasher.compute(cuda, lane, runs, &self.wake) }
    }

    /// The lane goes back if the stream proves that no kernel writes its sums any more.
    fn give_up(&mut self, fault: Fault) -> Fault {
        if let Some(lane) = &self.lane
            && self.staging.cuda.synchronize(lane.stream).is_ok()
        {
            self.staging.hasher.lanes.lock().extend(self.lane.take());
        }
        fault
    }

    /// Whether all sums are there. The context is current.
    fn advance(&mut self) -> Result<Progress, Fault> {
        let Some(lane) = &self.lane else { return Ok(Progress::Done) };
        if self.staging.cuda.query_event(lane.event)? == Progress::Pending {
            return Ok(Progress::Pending);
        }
        let count = self.launched - self.ready.len();
        // SAFETY: the lane has room for RUNS_MAX sums, of which the kernel has written these; it has ended, by the
        // event.
        self.ready.extend((0..count).map(|at| unsafe { lane.sums.add(at).read_volatile() }));
        if self.launched < self.runs.len() {
            self.launch()?;
            return Ok(Progress::Pending);
        }
        self.staging.hasher.lanes.lock().extend(self.lane.take());
        Ok(Progress::Done)
    }
}

impl Hashing for Sums {
    fn poll(&mut self) -> Option<crate::error::Result<Vec<u64>>> {
        let cuda = Arc::clone(&self.staging.cuda);
        // Entering may fail for want of memory; twice in a row is a dead context.
        let _entered = match cuda.enter().or_else(|_| cuda.enter()) {
            Ok(entered) => entered,
            Err(fault) => return Some(Err(told(fault))),
        };
        match self.advance() {
            Ok(Progress::Pending) => None,
            Ok(Progress::Done) => Some(Ok(std::mem::take(&mut self.ready))),
            Err(fault) => Some(Err(told(self.give_up(fault)))),
        }
    }
}

impl Drop for Sums {
    fn drop(&mut self) {
        if self.lane.is_some() {
            // The kernel may still read the memory and write its sums: both stay, as does the lane.
            std::mem::forget(Arc::clone(&self.staging));
        }
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
        lane.event = cuda.create_event()?;
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

//! CUDA, through the driver API: contexts, streams, events, pinning. Copies are in [`copy`], kernels in
//! [`kernel`], the functions and their statuses in [`api`].
//!
//! The context is the primary one of the device, which the CUDA runtime and PyTorch use too. Every
//! thread pushes it for as long as it calls the driver, and exchanges its capture mode to relaxed, so
//! that a graph being captured on another thread is not broken by what this one calls.

mod api;
mod calibrate;
mod copy;
mod hash;
mod kernel;
mod staging;

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use api::Api;
use kernel::Kernels;

use self::copy::{BOUNCE_BYTES, Lane};
use super::engine::{
    Accelerator, Choices, Driver, Event, Fault, HostFunction, Piece, Progress, Reach, Registration,
    Strategy, StrategySet, Stream,
};
use super::loader::checked;
use super::{DeviceStaging, Direction, Report};
use crate::error::{Error, ErrorKind, Result};

/// Chooses a strategy by name instead of measuring: `plain`, `batch`, `bounce` or `kernel`.
const STRATEGY_VARIABLE: &str = "UCM_CUDA_COPY";

/// Asks for the highest priority; the driver clamps it. Gather kernels then start between the model's
/// kernels instead of after them.
const STREAM_PRIORITY: c_int = -1000;

/// Lanes keep at most so many device ranges between two enqueues.
const RANGES_MAX: usize = 256;

/// Opens the device with this ordinal.
pub(super) fn open(device_id: i32) -> Result<Accelerator<Cuda>> {
    let (mut cuda, mut report) = Cuda::open(device_id)?;
    let numa_node = cuda.numa_node();
    cuda.choose_strategies(&mut report);
    Accelerator::open(cuda, report, numa_node)
}

/// Whether the driver is there and sees a device.
pub(super) fn is_present() -> Result<bool> {
    let api = Api::load()?;
    Ok(device_count(&api)? > 0)
}

/// A device, its retained primary context, and how it copies.
pub(super) struct Cuda {
    api: Api,
    device: c_int,
    context: *mut c_void,
    /// Tells this context from one made after a reset of the device, where the driver can.
    context_id: Option<u64>,
    kernels: Option<Kernels>,
    choices: Choices,
    uses_bounce: bool,
}

// SAFETY: contexts, modules and functions may be used from any thread.
unsafe impl Send for Cuda {}
// SAFETY: as above; the driver orders concurrent calls.
unsafe impl Sync for Cuda {}

fn device_count(api: &Api) -> Result<c_int> {
    let mut count = 0;
    // SAFETY: `count` is a valid place.
    unsafe { checked!(api, cuDeviceGetCount(&mut count)) }.map_err(|fault| fault.error)?;
    Ok(count)
}

impl Cuda {
    fn open(device_id: i32) -> Result<(Self, Report)> {
        let api = Api::load()?;
        let count = device_count(&api)?;
        if device_id >= count {
            return Err(Error::new(
                ErrorKind::Device,
                format!(
                    "device_id {device_id}: the driver shows {count} devices (CUDA_VISIBLE_DEVICES \
                     counts); use 0 to {}",
                    count - 1
                ),
            ));
        }
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: the ordinal is below the count; the places are valid.
        unsafe { checked!(api, cuDeviceGet(&mut device, device_id)) }
            .map_err(|fault| fault.error)?;
        // SAFETY: as above. Released by drop.
        unsafe { checked!(api, cuDevicePrimaryCtxRetain(&mut context, device)) }
            .map_err(|fault| fault.error)?;
        let mut cuda = Self {
            api,
            device,
            context,
            context_id: None,
            kernels: None,
            choices: Choices::uniform(Strategy::Plain),
            uses_bounce: false,
        };
        cuda.context_id = cuda.read_context_id().map_err(|fault| fault.error)?;
        let description =
            format!("{} (device {device_id}), CUDA {}", cuda.name(), cuda.api.version_text());
        Ok((cuda, Report { kind: Self::KIND, description, ..Report::default() }))
    }

    /// The number of the context, where the driver gives one.
    fn read_context_id(&self) -> std::result::Result<Option<u64>, Fault> {
        let Some(get) = self.api.functions.cuCtxGetId else { return Ok(None) };
        let mut id = 0;
        // SAFETY: the context is retained; the place is valid.
        let status = unsafe { get(self.context, &mut id) };
        self.api.check("cuCtxGetId", status).map(|()| Some(id))
    }

    /// Whether the retained context is still the one of `open`. After a reset by somebody else its
    /// streams and events are gone, and using them may end the process.
    fn check_context(&self) -> std::result::Result<(), Fault> {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: the places are valid.
        unsafe {
            checked!(self.api, cuDevicePrimaryCtxGetState(self.device, &mut flags, &mut active))
        }?;
        // An answer that differs proves that the context is gone; no answer proves nothing.
        if active == 0 || self.read_context_id()? != self.context_id {
            let call = "cuDevicePrimaryCtxGetState";
            return Err(self.api.fault(call, api::ERROR_CONTEXT_IS_DESTROYED));
        }
        Ok(())
    }

    fn name(&self) -> String {
        let mut name = [0i8; 256];
        // SAFETY: the buffer's length is passed; the driver terminates the name.
        let status = unsafe {
            (self.api.functions.cuDeviceGetName)(
                name.as_mut_ptr().cast(),
                name.len() as c_int,
                self.device,
            )
        };
        if status != api::SUCCESS {
            return "unnamed device".to_owned();
        }
        let bytes = name.iter().map(|c| *c as u8).take_while(|byte| *byte != 0).collect::<Vec<_>>();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn attribute(&self, attribute: c_int) -> Option<c_int> {
        let mut value = 0;
        // SAFETY: `value` is a valid place.
        let status = unsafe {
            (self.api.functions.cuDeviceGetAttribute)(&mut value, attribute, self.device)
        };
        (status == api::SUCCESS).then_some(value)
    }

    /// What sysfs says of the device's place on the bus.
    fn numa_node(&self) -> Option<u32> {
        let mut id = [0i8; 64];
        // SAFETY: the buffer's length is passed; the driver terminates the text.
        let status = unsafe {
            (self.api.functions.cuDeviceGetPCIBusId)(
                id.as_mut_ptr().cast(),
                id.len() as c_int,
                self.device,
            )
        };
        if status != api::SUCCESS {
            return None;
        }
        let text: String = id.iter().map(|c| *c as u8 as char).take_while(|c| *c != '\0').collect();
        let path = format!("/sys/bus/pci/devices/{}/numa_node", text.to_lowercase());
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// Loads the kernels and measures; what fails is told and left out.
    fn choose_strategies(&mut self, report: &mut Report) {
        let chosen = self.choose(report);
        if let Err(fault) = chosen {
            report.fallbacks.push(format!("copies were not calibrated: {}", fault.error));
        }
        report.copies = self.choices.lines();
    }

    fn choose(&mut self, report: &mut Report) -> std::result::Result<(), Fault> {
        let multiprocessors = self.attribute(api::ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap_or(1);
        let kernels = {
            let _entered = self.enter()?;
            Kernels::load(&self.api, multiprocessors.max(1) as u32)
        };
        let mut set = StrategySet(Vec::new());
        match kernels {
            Ok(kernels) => self.kernels = kernels,
            Err(fault) => report.fallbacks.push(format!(
                "small slices are copied without kernels, one copy each: {}",
                fault.error
            )),
        }
        if self.api.functions.cuMemcpyBatchAsync.is_some() {
            set.0.push(Strategy::Batch);
        } else {
            report.fallbacks.push(format!(
                "libcuda (CUDA {}) has no cuMemcpyBatchAsync, so small slices cost one call each; \
                 drivers from CUDA 12.8 (R570) on have it",
                self.api.version_text()
            ));
        }
        set.0.push(Strategy::Plain);
        if self.kernels.is_some() {
            set.0.extend([Strategy::Bounce, Strategy::Kernel]);
        }
        self.choices = match set.named(STRATEGY_VARIABLE, &mut report.fallbacks) {
            Some(strategy) => Choices::uniform(strategy),
            None => self.calibrate(&set)?,
        };
        self.uses_bounce = self.choices.uses(Strategy::Bounce);
        Ok(())
    }

    /// The strategy for a group of pieces.
    fn strategy(&self, direction: Direction, pieces: &[Piece], lane: &Lane) -> Strategy {
        let bytes: u64 = pieces.iter().map(Piece::bytes).sum();
        let strided = pieces.iter().any(|piece| !piece.is_contiguous());
        let mean = bytes / (pieces.len() as u64).max(1);
        let strategy = self.choices.pick(direction, mean, strided);
        if strategy != Strategy::Bounce {
            return strategy;
        }
        // A bounce pays where several pieces become one transfer.
        let stretches = 1 + pieces
            .windows(2)
            .filter(|pair| pair[0].staging + pair[0].bytes() as usize != pair[1].staging)
            .count();
        if lane.bounce.is_some() && (strided || stretches * 2 <= pieces.len()) {
            Strategy::Bounce
        } else if self.api.functions.cuMemcpyBatchAsync.is_some() && !strided {
            Strategy::Batch
        } else {
            Strategy::Plain
        }
    }

    /// Whether device memory is this device's: a kernel that touched another's would break the context.
    fn owns(&self, address: usize) -> bool {
        let Some(get) = self.api.functions.cuPointerGetAttribute else { return true };
        let mut ordinal: c_int = -1;
        // SAFETY: the attribute is an int, for which the place is valid; any address may be asked for.
        let status =
            unsafe { get((&raw mut ordinal).cast(), api::POINTER_DEVICE_ORDINAL, address as u64) };
        status == api::SUCCESS && ordinal == self.device
    }

    /// End of the allocation of this device that holds `address`, or `None` for memory elsewhere.
    fn range_end(&self, lane: &Lane, address: usize) -> Option<usize> {
        let mut ranges = lane.ranges.borrow_mut();
        if let Some((_, end)) =
            ranges.iter().rev().find(|(base, end)| (*base..*end).contains(&address))
        {
            return Some(*end);
        }
        let (mut base, mut length) = (0, 0);
        // SAFETY: the places are valid; any address may be asked for.
        let status = unsafe {
            (self.api.functions.cuMemGetAddressRange)(&mut base, &mut length, address as u64)
        };
        if status != api::SUCCESS || !self.owns(address) {
            return None;
        }
        if ranges.len() == RANGES_MAX {
            ranges.clear();
        }
        let end = base as usize + length;
        ranges.push((base as usize, end));
        Some(end)
    }
}

/// The context is current and captures are relaxed on this thread until this drops.
pub(super) struct Entered<'a> {
    cuda: &'a Cuda,
    mode: Option<c_int>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let functions = &self.cuda.api.functions;
        let mut popped = std::ptr::null_mut();
        // SAFETY: restores what `enter` changed on this thread; the guard is not Send (it borrows a
        // thread's state by being created and dropped in one call).
        unsafe {
            if let Some(mut mode) = self.mode {
                (functions.cuThreadExchangeStreamCaptureMode)(&mut mode);
            }
            (functions.cuCtxPopCurrent)(&mut popped);
        }
    }
}

impl Driver for Cuda {
    const KIND: &'static str = "cuda";
    type Lane = Lane;
    // The driver has read its arguments when a call returns.
    type Descriptors = ();
    type Entered<'a> = Entered<'a>;

    fn enter(&self) -> std::result::Result<Entered<'_>, Fault> {
        self.check_context()?;
        // SAFETY: the context is retained until drop.
        unsafe { checked!(self.api, cuCtxPushCurrent(self.context)) }?;
        let mut entered = Entered { cuda: self, mode: None };
        let mut mode = api::CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is a valid place; it receives the thread's mode.
        unsafe { checked!(self.api, cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
        entered.mode = Some(mode);
        Ok(entered)
    }

    fn create_stream(&self) -> std::result::Result<Stream, Fault> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is a valid place.
        unsafe {
            checked!(
                self.api,
                cuStreamCreateWithPriority(&mut stream, api::STREAM_NON_BLOCKING, STREAM_PRIORITY)
            )
        }
        .map(|()| Stream(stream))
    }

    fn destroy_stream(&self, stream: Stream) {
        // SAFETY: the owner destroys it once; work on it goes on.
        let _ = unsafe { (self.api.functions.cuStreamDestroy)(stream.0) };
    }

    fn query_stream(&self, stream: Stream) -> std::result::Result<Progress, Fault> {
        // SAFETY: the stream lives.
        let status = unsafe { (self.api.functions.cuStreamQuery)(stream.0) };
        self.progress("cuStreamQuery", status)
    }

    fn synchronize(&self, stream: Stream) -> std::result::Result<(), Fault> {
        // SAFETY: the stream lives.
        unsafe { checked!(self.api, cuStreamSynchronize(stream.0)) }
    }

    fn create_event(&self) -> std::result::Result<Event, Fault> {
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` is a valid place.
        unsafe { checked!(self.api, cuEventCreate(&mut event, api::EVENT_DISABLE_TIMING)) }
            .map(|()| Event(event))
    }

    fn destroy_event(&self, event: Event) {
        // SAFETY: the owner destroys it once.
        let _ = unsafe { (self.api.functions.cuEventDestroy)(event.0) };
    }

    fn record(&self, event: Event, stream: Stream) -> std::result::Result<(), Fault> {
        // SAFETY: both live.
        unsafe { checked!(self.api, cuEventRecord(event.0, stream.0)) }
    }

    fn wait(&self, stream: Stream, event: Event) -> std::result::Result<(), Fault> {
        // SAFETY: both live; the flags are 0.
        unsafe { checked!(self.api, cuStreamWaitEvent(stream.0, event.0, 0)) }
    }

    fn query_event(&self, event: Event) -> std::result::Result<Progress, Fault> {
        // SAFETY: the event lives.
        let status = unsafe { (self.api.functions.cuEventQuery)(event.0) };
        self.progress("cuEventQuery", status)
    }

    fn check_waitable(&self, stream: Stream) -> std::result::Result<(), Fault> {
        let mut capturing = api::CAPTURE_STATUS_NONE;
        // SAFETY: the caller's stream lives; the place is valid.
        unsafe { checked!(self.api, cuStreamIsCapturing(stream.0, &mut capturing)) }?;
        if capturing == api::CAPTURE_STATUS_NONE {
            return Ok(());
        }
        Err(Fault::capturing())
    }

    fn has_host_functions(&self) -> bool {
        true
    }

    unsafe fn notify(
        &self,
        stream: Stream,
        function: HostFunction,
        data: *mut c_void,
    ) -> std::result::Result<(), Fault> {
        // SAFETY: the stream lives; the caller vouches for `data`.
        unsafe { checked!(self.api, cuLaunchHostFunc(stream.0, function, data)) }
    }

    unsafe fn register(
        &self,
        base: *mut u8,
        length: usize,
    ) -> std::result::Result<Registration, Fault> {
        let functions = &self.api.functions;
        let flags = api::HOST_PORTABLE | api::HOST_DEVICEMAP;
        // SAFETY: the caller keeps the range mapped until `unregister`.
        let status = unsafe { (functions.cuMemHostRegister)(base.cast(), length, flags) };
        if status == api::ERROR_HOST_MEMORY_ALREADY_REGISTERED {
            // Somebody else pinned it and may unpin it: copies take it as they find it.
            return Ok(Registration::Pageable);
        }
        self.api.check("cuMemHostRegister", status)?;
        let mut device = 0;
        // SAFETY: the range was registered with DEVICEMAP just now; the place is valid.
        let status = unsafe { (functions.cuMemHostGetDevicePointer)(&mut device, base.cast(), 0) };
        if let Err(fault) = self.api.check("cuMemHostGetDevicePointer", status) {
            let _ = self.unregister(base);
            return Err(fault);
        }
        Ok(Registration::Pinned { offset: (device as usize).wrapping_sub(base as usize) })
    }

    fn unregister(&self, base: *mut u8) -> std::result::Result<(), Fault> {
        // SAFETY: `base` was registered; no copy of it is in flight, by the contract of `unpin`.
        let status = unsafe { (self.api.functions.cuMemHostUnregister)(base.cast()) };
        if status == api::ERROR_HOST_MEMORY_NOT_REGISTERED {
            return Ok(());
        }
        self.api.check("cuMemHostUnregister", status)
    }

    fn staging(self: &Arc<Self>, bytes: usize) -> Result<Arc<dyn DeviceStaging>> {
        staging::allocate(self, bytes)
    }

    fn open_lane(&self) -> std::result::Result<Lane, Fault> {
        // Without the buffer its pieces are batched: slower, not wrong.
        let bounce =
            self.uses_bounce.then(|| self.device_buffer(BOUNCE_BYTES as usize).ok()).flatten();
        Ok(Lane { bounce, ranges: std::cell::RefCell::default() })
    }

    fn close_lane(&self, lane: Lane) {
        if let Some(bounce) = lane.bounce {
            // SAFETY: the lane's stream has been drained, so nothing uses its buffer.
            let _ = unsafe { (self.api.functions.cuMemFree)(bounce) };
        }
    }

    fn take_descriptors(&self, _lane: &mut Lane) {}

    fn check(&self, lane: &Lane, pieces: &[Piece]) -> Result<Reach> {
        self.reach_of(lane, pieces).inspect_err(|_| {
            // No copy follows that would forget them, and the caller may free them now.
            lane.ranges.borrow_mut().clear();
        })
    }

    unsafe fn copy(
        &self,
        stream: Stream,
        lane: &mut Lane,
        direction: Direction,
        pieces: &[Piece],
        reach: Reach,
        staging: Registration,
    ) -> std::result::Result<(), Fault> {
        lane.ranges.borrow_mut().clear();
        if let (Reach::Device, Registration::OnDevice) = (reach, staging) {
            // SAFETY: the caller vouches for the memory; both sides are memory of this device.
            return unsafe { self.copy_on_device(stream, direction, pieces) };
        }
        let strategy = match (reach, staging) {
            (Reach::Device, Registration::Pinned { .. }) => self.strategy(direction, pieces, lane),
            _ => Strategy::Plain,
        };
        // SAFETY: the caller vouches for the memory; device and pinned memory were told apart above.
        unsafe { self.copy_with(strategy, stream, lane, direction, pieces, staging) }
    }
}

impl Cuda {
    fn progress(&self, call: &str, status: c_int) -> std::result::Result<Progress, Fault> {
        if status == api::ERROR_NOT_READY {
            return Ok(Progress::Pending);
        }
        self.api.check(call, status).map(|()| Progress::Done)
    }

    /// What kind of memory the pieces lie in; an error where a piece is none.
    fn reach_of(&self, lane: &Lane, pieces: &[Piece]) -> Result<Reach> {
        let mut reach = None;
        for piece in pieces {
            let end = piece.memory_end()?;
            let mut at = piece.memory;
            let mut this = Reach::Device;
            while at < end {
                match self.range_end(lane, at) {
                    Some(range_end) => at = range_end,
                    None if at == piece.memory => {
                        this = Reach::Host;
                        break;
                    }
                    None => {
                        return Err(Error::new(
                            ErrorKind::InvalidArgument,
                            format!(
                                "a slice of {} bytes at {:#x} ends {} bytes behind its device \
                                 allocation; check tensor_size_list and the addresses",
                                piece.span(),
                                piece.memory,
                                end - at
                            ),
                        ));
                    }
                }
            }
            // One host address sends the whole job the general way.
            reach = match (reach, this) {
                (Some(Reach::Host), _) | (_, Reach::Host) => Some(Reach::Host),
                _ => Some(Reach::Device),
            };
        }
        Ok(reach.unwrap_or(Reach::Device))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if let Some(kernels) = self.kernels.take()
            && let Ok(_entered) = self.enter()
        {
            kernels.unload(&self.api);
        }
        // SAFETY: pairs with the retain of `open`.
        let _ = unsafe { (self.api.functions.cuDevicePrimaryCtxRelease)(self.device) };
    }
}

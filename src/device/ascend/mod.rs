//! Ascend, through AscendCL: contexts, streams, events, pinning. Copies are in [`copy`], the functions
//! and their statuses in [`api`]. Not yet run on Ascend hardware; proven against a fake library.
//!
//! The context is the default one of the device, which `torch_npu` uses too. A thread sets it for as
//! long as it calls the runtime and then sets its own again.

mod api;
mod calibrate;
mod copy;

use std::ffi::{c_int, c_void};
use std::sync::atomic::AtomicBool;

use api::{Api, PointerAttributes};

use self::copy::{Batch, Lane};
use super::engine::{
    Accelerator, Choices, ContextState, Driver, Event, Fault, HostFunction, Piece, Progress, Reach,
    Registration, Strategy, StrategySet, Stream,
};
use super::loader::checked;
use super::{Direction, Report};
use crate::error::{Error, ErrorKind, Result};

/// Chooses a strategy by name instead of measuring: `plain` or `batch`.
const STRATEGY_VARIABLE: &str = "UCM_ASCEND_COPY";

/// Opens the device with this ordinal.
pub(super) fn open(device_id: i32) -> Result<Accelerator<Ascend>> {
    let (mut ascend, mut report) = Ascend::open(device_id)?;
    if let Err(fault) = ascend.choose(&mut report) {
        report.fallbacks.push(format!("copies were not calibrated: {}", fault.error));
    }
    report.copies = ascend.choices.lines();
    Accelerator::open(ascend, report, None)
}

/// Whether the runtime is there and sees a device.
pub(super) fn is_present() -> Result<bool> {
    let api = Api::load()?;
    Ok(device_count(&api)? > 0)
}

/// A device and its default context.
pub(super) struct Ascend {
    api: Api,
    device_id: i32,
    context: *mut c_void,
    choices: Choices,
    batch_refused: AtomicBool,
}

// SAFETY: contexts may be set on any thread.
unsafe impl Send for Ascend {}
// SAFETY: as above; the runtime orders concurrent calls.
unsafe impl Sync for Ascend {}

fn device_count(api: &Api) -> Result<u32> {
    let mut count = 0;
    // SAFETY: `count` is a valid place.
    unsafe { checked!(api, aclrtGetDeviceCount(&mut count)) }.map_err(|fault| fault.error)?;
    Ok(count)
}

impl Ascend {
    fn open(device_id: i32) -> Result<(Self, Report)> {
        let api = Api::load()?;
        let count = device_count(&api)?;
        if device_id as u32 >= count {
            return Err(Error::new(
                ErrorKind::Device,
                format!(
                    "device_id {device_id}: the runtime shows {count} devices \
                     (ASCEND_RT_VISIBLE_DEVICES counts); use an ordinal below that"
                ),
            ));
        }
        let mut ascend = Self {
            api,
            device_id,
            context: std::ptr::null_mut(),
            choices: Choices::uniform(Strategy::Plain),
            batch_refused: AtomicBool::new(false),
        };
        let before = ascend.current().ok();
        // SAFETY: the ordinal is below the count. Never reset: torch_npu may share the device, and the
        // process's end releases it.
        unsafe { checked!(ascend.api, aclrtSetDevice(device_id)) }.map_err(|fault| fault.error)?;
        let context = ascend.current();
        let restored = Entered { ascend: &ascend, before, mode: None };
        drop(restored);
        ascend.context = context.map_err(|fault| fault.error)?;
        let description = format!(
            "{} (device {device_id}), AscendCL {}",
            ascend.api.soc_name(),
            ascend.api.version_text()
        );
        Ok((ascend, Report { kind: Self::KIND, description, ..Report::default() }))
    }

    /// The context of this thread.
    fn current(&self) -> std::result::Result<*mut c_void, Fault> {
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is a valid place.
        unsafe { checked!(self.api, aclrtGetCurrentContext(&mut context)) }.map(|()| context)
    }

    fn choose(&mut self, report: &mut Report) -> std::result::Result<(), Fault> {
        let functions = &self.api.functions;
        for (there, what) in [
            (
                functions.aclrtLaunchHostFunc.is_some(),
                "aclrtLaunchHostFunc, so completions are polled every 200 microseconds",
            ),
            (
                functions.aclrtHostRegisterV2.is_some(),
                "aclrtHostRegisterV2, so the arena is not page-locked and copies go through a buffer, \
                 each blocking its worker",
            ),
            (
                functions.aclrtMemcpyBatchAsync.is_some(),
                "aclrtMemcpyBatchAsync, so small slices cost one call each",
            ),
            (
                functions.aclrtPointerGetAttributes.is_some(),
                "aclrtPointerGetAttributes, so all addresses are taken for the device's: give none of host memory",
            ),
        ] {
            if !there {
                let version = self.api.version_text();
                report.fallbacks.push(format!(
                    "libascendcl.so (version {version}) has no {what}; a newer CANN has it"
                ));
            }
        }
        let mut set = StrategySet(vec![Strategy::Plain]);
        if functions.aclrtMemcpyBatchAsync.is_some() {
            set.0.insert(0, Strategy::Batch);
        }
        self.choices = match set.named(STRATEGY_VARIABLE, &mut report.fallbacks) {
            Some(strategy) => Choices::uniform(strategy),
            None => self.calibrate(&set)?,
        };
        Ok(())
    }

    /// Where the memory at an address lies. Where the runtime cannot tell, it is taken for the device's: the
    /// runtime's copy of it then says what is wrong, whereas the CPU would fault.
    fn reach_of(&self, address: usize) -> Result<Reach> {
        let Some(get) = self.api.functions.aclrtPointerGetAttributes else {
            return Ok(Reach::Device);
        };
        let mut attributes = PointerAttributes::default();
        // SAFETY: any address may be asked for; the place is valid.
        let status = unsafe { get(address as *const c_void, &mut attributes) };
        match attributes.location.kind {
            _ if status != api::SUCCESS => Ok(Reach::Device),
            api::LOCATION_DEVICE => Ok(Reach::Device),
            api::LOCATION_HOST | api::LOCATION_UNREGISTERED | api::LOCATION_HOST_NUMA => {
                Ok(Reach::Host)
            }
            other => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "address {address:#x} is memory of type {other} of aclrtMemLocationType, which is neither the \
                     device's nor the host's; give addresses of aclrtMalloc or of host memory"
                ),
            )),
        }
    }

    /// Enqueues copies of device memory.
    ///
    /// # Safety
    /// As `Driver::copy`.
    unsafe fn copy_device(
        &self,
        stream: Stream,
        lane: &mut Lane,
        direction: Direction,
        pieces: &[Piece],
        staging: Registration,
    ) -> std::result::Result<(), Fault> {
        if staging == Registration::Pageable {
            // SAFETY: passed on from the caller.
            return unsafe { self.copy_through(stream, lane, direction, pieces) };
        }
        let bytes: u64 = pieces.iter().map(Piece::bytes).sum();
        let strided = pieces.iter().any(|piece| !piece.is_contiguous());
        let mean = bytes / (pieces.len() as u64).max(1);
        let strategy = self.choices.pick(direction, mean, strided);
        // SAFETY: passed on from the caller.
        unsafe { self.copy_with(strategy, stream, lane, direction, pieces) }
    }
}

/// The context is current until this drops; then the thread has its own again.
pub(super) struct Entered<'a> {
    ascend: &'a Ascend,
    before: Option<*mut c_void>,
    mode: Option<c_int>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let functions = &self.ascend.api.functions;
        // SAFETY: restores what `enter` changed on this thread.
        unsafe {
            if let (Some(exchange), Some(mut mode)) =
                (functions.aclmdlRICaptureThreadExchangeMode, self.mode)
            {
                exchange(&mut mode);
            }
            if let Some(before) = self.before.filter(|before| !before.is_null()) {
                (functions.aclrtSetCurrentContext)(before);
            }
        }
    }
}

impl Driver for Ascend {
    const KIND: &'static str = "ascend";
    type Lane = Lane;
    type Descriptors = Vec<Batch>;
    type Entered<'a> = Entered<'a>;

    fn enter(&self) -> std::result::Result<Entered<'_>, Fault> {
        // A thread without a context gives an error here: it has nothing to restore.
        let before = self.current().ok();
        // SAFETY: the default context lives until the device is reset.
        unsafe { checked!(self.api, aclrtSetCurrentContext(self.context)) }?;
        let mut entered = Entered { ascend: self, before, mode: None };
        if let Some(exchange) = self.api.functions.aclmdlRICaptureThreadExchangeMode {
            let mut mode = api::CAPTURE_MODE_RELAXED;
            // SAFETY: `mode` is a valid place; it receives the thread's mode.
            let status = unsafe { exchange(&mut mode) };
            self.api.check("aclmdlRICaptureThreadExchangeMode", status)?;
            entered.mode = Some(mode);
        }
        Ok(entered)
    }

    fn create_stream(&self) -> std::result::Result<Stream, Fault> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is a valid place.
        unsafe { checked!(self.api, aclrtCreateStream(&mut stream)) }.map(|()| Stream(stream))
    }

    fn destroy_stream(&self, stream: Stream) {
        // SAFETY: the owner destroys it once.
        let _ = unsafe { (self.api.functions.aclrtDestroyStream)(stream.0) };
    }

    fn query_stream(&self, stream: Stream) -> std::result::Result<Progress, Fault> {
        let mut status_of = -1;
        // SAFETY: the stream lives; the place is valid.
        unsafe { checked!(self.api, aclrtStreamQuery(stream.0, &mut status_of)) }?;
        let done = status_of == api::STREAM_STATUS_COMPLETE;
        Ok(if done { Progress::Done } else { Progress::Pending })
    }

    fn synchronize(&self, stream: Stream) -> std::result::Result<(), Fault> {
        // SAFETY: the stream lives.
        unsafe { checked!(self.api, aclrtSynchronizeStream(stream.0)) }
    }

    // Of events that are made with this call the documentation of aclrtRecordEvent says: a wait takes the
    // recording before it, whatever is recorded later, and one that was never recorded counts as complete.
    fn create_event(&self) -> std::result::Result<Event, Fault> {
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` is a valid place.
        unsafe { checked!(self.api, aclrtCreateEventExWithFlag(&mut event, api::EVENT_SYNC)) }
            .map(|()| Event(event))
    }

    fn destroy_event(&self, event: Event) {
        // SAFETY: the owner destroys it once.
        let _ = unsafe { (self.api.functions.aclrtDestroyEvent)(event.0) };
    }

    fn record(&self, event: Event, stream: Stream) -> std::result::Result<(), Fault> {
        // SAFETY: both live.
        unsafe { checked!(self.api, aclrtRecordEvent(event.0, stream.0)) }
    }

    fn wait(&self, stream: Stream, event: Event) -> std::result::Result<(), Fault> {
        // SAFETY: both live.
        unsafe { checked!(self.api, aclrtStreamWaitEvent(stream.0, event.0)) }
    }

    fn query_event(&self, event: Event) -> std::result::Result<Progress, Fault> {
        let mut status_of = -1;
        // SAFETY: the event lives; the place is valid.
        unsafe { checked!(self.api, aclrtQueryEventStatus(event.0, &mut status_of)) }?;
        let done = status_of == api::EVENT_STATUS_COMPLETE;
        Ok(if done { Progress::Done } else { Progress::Pending })
    }

    fn check_waitable(&self, stream: Stream) -> std::result::Result<(), Fault> {
        let Some(get) = self.api.functions.aclmdlRICaptureGetInfo else { return Ok(()) };
        let (mut capturing, mut model) = (api::CAPTURE_STATUS_NONE, std::ptr::null_mut());
        // SAFETY: the caller's stream lives; the places are valid.
        let status = unsafe { get(stream.0, &mut capturing, &mut model) };
        if status != api::SUCCESS || capturing == api::CAPTURE_STATUS_NONE {
            return Ok(());
        }
        Err(Fault::capturing())
    }

    fn has_host_functions(&self) -> bool {
        self.api.functions.aclrtLaunchHostFunc.is_some()
    }

    unsafe fn notify(
        &self,
        stream: Stream,
        function: HostFunction,
        data: *mut c_void,
    ) -> std::result::Result<(), Fault> {
        let Some(launch) = self.api.functions.aclrtLaunchHostFunc else { return Ok(()) };
        // SAFETY: the stream lives; the caller vouches for `data`.
        let status = unsafe { launch(stream.0, function, data) };
        self.api.check("aclrtLaunchHostFunc", status)
    }

    unsafe fn register(
        &self,
        base: *mut u8,
        length: usize,
    ) -> std::result::Result<Registration, Fault> {
        let Some(register) = self.api.functions.aclrtHostRegisterV2 else {
            return Err(Fault {
                error: Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "libascendcl.so (version {}) has no aclrtHostRegisterV2; a newer CANN has it",
                        self.api.version_text()
                    ),
                ),
                context: ContextState::Unknown,
            });
        };
        // SAFETY: the caller keeps the range mapped until `unregister`.
        let status = unsafe { register(base.cast(), length as u64, api::REGISTER_PINNED) };
        self.api.check("aclrtHostRegisterV2", status)?;
        Ok(Registration::Pinned { offset: 0 })
    }

    fn unregister(&self, base: *mut u8) -> std::result::Result<(), Fault> {
        let Some(unregister) = self.api.functions.aclrtHostUnregister else { return Ok(()) };
        // SAFETY: `base` was registered; no copy of it is in flight, by the contract of `unpin`.
        let status = unsafe { unregister(base.cast()) };
        self.api.check("aclrtHostUnregister", status)
    }

    fn open_lane(&self) -> std::result::Result<Lane, Fault> {
        Ok(Lane::default())
    }

    fn close_lane(&self, lane: Lane) {
        if let Some(buffer) = lane.stand_in {
            // SAFETY: the lane's stream has been drained, so nothing uses its buffer.
            let _ = unsafe { (self.api.functions.aclrtFreeHost)(buffer.0.cast()) };
        }
    }

    fn take_descriptors(&self, lane: &mut Lane) -> Vec<Batch> {
        std::mem::take(&mut lane.batches)
    }

    fn check(&self, _lane: &Lane, pieces: &[Piece]) -> Result<Reach> {
        let mut reach = Reach::Device;
        for piece in pieces {
            piece.memory_end()?;
            if self.reach_of(piece.memory)? == Reach::Host {
                reach = Reach::Host;
            }
        }
        Ok(reach)
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
        if reach == Reach::Device {
            // SAFETY: passed on from the caller.
            return unsafe { self.copy_device(stream, lane, direction, pieces, staging) };
        }
        // One address of host memory is enough for a job to come this way: the others may be the device's.
        let is_host = |piece: &&Piece| matches!(self.reach_of(piece.memory), Ok(Reach::Host));
        let (host, device): (Vec<_>, Vec<_>) = pieces.iter().partition(is_host);
        let device: Vec<Piece> = device.into_iter().copied().collect();
        // SAFETY: passed on from the caller; the runtime says that the CPU reaches the memory of `host`.
        unsafe {
            if !device.is_empty() {
                self.copy_device(stream, lane, direction, &device, staging)?;
            }
            self.copy_by_cpu(stream, direction, host)
        }
    }
}

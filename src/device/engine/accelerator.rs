//! A device behind a vendor's driver: pinning, captured events, waiting streams, and what is known of
//! the context's health.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use super::driver::{ContextState, Driver, Fault, Registration, Stream};
use super::event::{EventPool, PooledEvent};
use super::gate::{Captured, Gates};
use super::queue::CopyQueue;
use super::watch::{Waker, Watch};
use crate::device::{CapturedEvent, CopyStream, Device, DeviceStaging, Marker, Report, Wake};
use crate::error::{Error, ErrorKind, Result};

/// Events made at open, so that submitting rarely makes one.
const EVENTS_AHEAD: usize = 16;

/// The watch's beat where host functions wake the workers: only a dead context needs it.
const BEAT_BACKUP: Duration = Duration::from_millis(50);

/// The beat where the driver has no host functions: the delay of a completion.
const BEAT_ALONE: Duration = Duration::from_micros(200);

/// What the device and its copy streams share.
pub(super) struct Shared<D: Driver> {
    pub(super) driver: Arc<D>,
    pub(super) pool: Arc<EventPool<D>>,
    gates: Gates<D>,
    pub(super) watch: Watch,
    ranges: RwLock<Vec<Range>>,
    lost: OnceLock<(Error, ContextState)>,
    fallbacks: Mutex<Vec<String>>,
}

struct Range {
    base: usize,
    length: usize,
    registration: Registration,
}

impl<D: Driver> Shared<D> {
    /// How the device knows this staging memory.
    pub(super) fn registration(&self, staging: usize, bytes: usize) -> Registration {
        self.ranges
            .read()
            .iter()
            .find(|range| range.base <= staging && staging + bytes <= range.base + range.length)
            .map_or(Registration::Pageable, |range| range.registration)
    }

    /// The error of everything after the device was lost.
    pub(super) fn lost(&self) -> Option<&(Error, ContextState)> {
        self.lost.get()
    }

    /// The device is dead for this process; the first reason stays.
    pub(super) fn lose(&self, fault: Fault) -> &(Error, ContextState) {
        self.lost.get_or_init(|| {
            let text =
                format!("the {} device is lost: {}; restart the process", D::KIND, fault.error);
            (Error::new(ErrorKind::Device, text), fault.context)
        })
    }

    fn healthy(&self) -> Result<()> {
        self.lost().map_or(Ok(()), |(error, _)| Err(error.clone()))
    }
}

impl<D: Driver> Drop for Shared<D> {
    fn drop(&mut self) {
        self.watch.stop();
        if self.lost().is_some() {
            return;
        }
        if let Ok(_entered) = self.driver.enter() {
            self.gates.close();
            self.pool.drain();
        }
    }
}

/// A point in a copy stream.
pub(super) enum Passed<D: Driver> {
    /// Recorded.
    Event(Arc<PooledEvent<D>>),
    /// The driver refused to record it, so nothing can wait for it.
    Refused(Error),
}

/// A device of one vendor.
pub(in crate::device) struct Accelerator<D: Driver> {
    shared: Arc<Shared<D>>,
    report: Report,
    numa_node: Option<u32>,
}

impl<D: Driver> Accelerator<D> {
    /// Makes what copies need, on a driver whose context lives.
    pub(in crate::device) fn open(
        driver: D,
        report: Report,
        numa_node: Option<u32>,
    ) -> Result<Self> {
        let driver = Arc::new(driver);
        let beat = if driver.has_host_functions() { BEAT_BACKUP } else { BEAT_ALONE };
        let watch = Watch::start(D::KIND, beat)?;
        let entered = driver.enter().map_err(|fault| fault.error)?;
        let pool = EventPool::new(driver.clone(), EVENTS_AHEAD).map_err(|fault| fault.error)?;
        let pool = Arc::new(pool);
        let gates = Gates::open(driver.clone(), pool.clone()).map_err(|fault| {
            pool.drain();
            fault.error
        })?;
        drop(entered);
        let shared = Arc::new(Shared {
            driver,
            pool,
            gates,
            watch,
            ranges: RwLock::default(),
            lost: OnceLock::new(),
            fallbacks: Mutex::default(),
        });
        Ok(Self { shared, report, numa_node })
    }
}

impl<D: Driver> Device for Accelerator<D> {
    fn name(&self) -> &'static str {
        D::KIND
    }

    unsafe fn capture_event(&self, event: *mut c_void) -> Result<CapturedEvent> {
        self.shared.healthy()?;
        if event.is_null() {
            return Ok(Arc::new(Captured::<D> { event: None }));
        }
        let _entered = self.shared.driver.enter().map_err(|fault| fault.error)?;
        // SAFETY: the caller vouches for the event.
        let captured = unsafe { self.shared.gates.capture(event) };
        captured.map(|captured| Arc::new(captured) as CapturedEvent).map_err(|fault| {
            Error::new(
                ErrorKind::Device,
                format!("wait_event is not an event of this device: {}", fault.error),
            )
        })
    }

    unsafe fn pin(&self, base: *mut u8, length: usize) -> Result<()> {
        self.shared.healthy()?;
        let _entered = self.shared.driver.enter().map_err(|fault| fault.error)?;
        // SAFETY: the caller keeps the range mapped until `unpin`.
        match unsafe { self.shared.driver.register(base, length) } {
            Ok(registration) => {
                self.shared.ranges.write().push(Range {
                    base: base as usize,
                    length,
                    registration,
                });
                Ok(())
            }
            Err(fault) => {
                let text = format!(
                    "{length} bytes of staging memory are not pinned, so copies block their worker and \
                     run at a fraction of the speed: {}",
                    fault.error
                );
                self.shared.fallbacks.lock().push(text);
                Err(fault.error)
            }
        }
    }

    fn unpin(&self, base: *mut u8) {
        let mut ranges = self.shared.ranges.write();
        let Some(at) = ranges.iter().position(|range| range.base == base as usize) else { return };
        let range = ranges.swap_remove(at);
        drop(ranges);
        // What somebody else had pinned before is theirs to unpin; memory of the device frees itself.
        if matches!(range.registration, Registration::Pinned { .. })
            && self.shared.lost().is_none()
            && let Ok(_entered) = self.shared.driver.enter()
        {
            // A refusal leaves the pages pinned until the context goes; nothing else can be done.
            let _ = self.shared.driver.unregister(base);
        }
    }

    fn staging(&self, bytes: usize) -> Result<Arc<dyn DeviceStaging>> {
        self.shared.healthy()?;
        let staging = self.shared.driver.staging(bytes)?;
        self.shared.ranges.write().push(Range {
            base: staging.base() as usize,
            length: staging.bytes(),
            registration: Registration::OnDevice,
        });
        Ok(staging)
    }

    fn open_stream(&self, wake: Wake) -> Result<Box<dyn CopyStream>> {
        self.shared.healthy()?;
        let waker = Waker::new(wake);
        self.shared.watch.add(&waker);
        Ok(Box::new(CopyQueue::open(self.shared.clone(), waker)?))
    }

    unsafe fn stream_wait(&self, stream: *mut c_void, markers: &[Marker]) -> Result<()> {
        self.shared.healthy()?;
        if markers.is_empty() {
            return Ok(());
        }
        let stream = Stream(stream);
        let driver = &self.shared.driver;
        let _entered = driver.enter().map_err(|fault| fault.error)?;
        driver.check_waitable(stream).map_err(|fault| fault.error)?;
        for marker in markers {
            let passed = marker.downcast_ref::<Passed<D>>().ok_or_else(|| {
                Error::new(ErrorKind::Internal, "a marker of another device; a defect in UCM")
            })?;
            match passed {
                Passed::Event(event) => {
                    driver.wait(stream, event.event()).map_err(|fault| fault.error)?;
                }
                Passed::Refused(error) => return Err(error.clone()),
            }
        }
        Ok(())
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }

    fn report(&self) -> Report {
        let mut report = self.report.clone();
        report.fallbacks.extend(self.shared.fallbacks.lock().iter().cloned());
        if let Some((error, _)) = self.shared.lost() {
            report.fallbacks.push(error.to_string());
        }
        report
    }
}

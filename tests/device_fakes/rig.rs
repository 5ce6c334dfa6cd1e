//! A device on its fake, with a pinned arena and a copy worker.

use std::sync::Arc;

use ucm::config::DeviceKind;
use ucm::device::{CapturedEvent, Device, open};
use ucm::error::Result;

use crate::fakes::{Fake, Kind, ModelEvent, Steering};
use crate::shards::{Pages, Worker};

pub fn device_kind(kind: Kind) -> DeviceKind {
    if kind.device == "cuda" { DeviceKind::Cuda } else { DeviceKind::Ascend }
}

/// Closes as a store does: the worker, the arena, the device.
pub struct Rig<'f> {
    pub worker: Worker,
    pub device: Arc<dyn Device>,
    /// Taken out where it must stay mapped.
    arena: Option<Pages>,
    registered: i64,
    fake: &'f Fake,
}

impl<'f> Rig<'f> {
    pub fn new(fake: &'f Fake, arena_bytes: usize) -> Self {
        Self::open(fake, arena_bytes).unwrap()
    }

    /// On a fake that may have been told what to fail.
    pub fn open(fake: &'f Fake, arena_bytes: usize) -> Result<Self> {
        Self::open_on(fake, 0, arena_bytes)
    }

    /// On a device of this ordinal.
    pub fn open_on(fake: &'f Fake, device_id: i32, arena_bytes: usize) -> Result<Self> {
        let (arena, registered) = (Pages::new(arena_bytes), fake.live()[4]);
        let device = open(device_kind(fake.kind()), device_id)?;
        // SAFETY: unpinned by drop before the pages go.
        let pinned = unsafe { device.pin(arena.base, arena.bytes) };
        let cannot = fake.is_old() && !fake.is_cuda();
        assert!(pinned.is_ok() || fake.failed().is_some() || cannot);
        match Worker::new(&*device) {
            Ok(worker) => Ok(Self { worker, device, arena: Some(arena), registered, fake }),
            Err(error) => {
                device.unpin(arena.base);
                Err(error)
            }
        }
    }

    pub fn arena(&self) -> &Pages {
        self.arena.as_ref().unwrap()
    }

    /// The first byte of the arena.
    pub fn staging(&self) -> *mut u8 {
        self.arena().base
    }

    /// Captures what an event stands for now.
    pub fn capture(&self, event: &ModelEvent<'_>) -> Result<CapturedEvent> {
        // SAFETY: the event lives.
        unsafe { self.device.capture_event(event.event) }
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        self.worker.close();
        let Some(arena) = self.arena.take() else { return };
        self.device.unpin(arena.base);
        if self.fake.live()[4] > self.registered {
            // The driver did not unpin: what the device may still touch stays mapped.
            std::mem::forget(arena);
        }
    }
}

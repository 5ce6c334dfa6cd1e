//! Where parts are staged: slots in host memory, or in device memory that the drive reaches.
//!
//! A slot holds a part as it lies in its extent: payload, padding, and a trailer page. In device memory the
//! trailers lie apart, in host memory, because the CPU writes and reads them; it can touch nothing else of such
//! slots, and is not given their bytes: [`Slots::host_payload`] has none.

#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::block::{Geometry, PAGE};
use crate::device::DeviceStaging;
use crate::io::DmaSlice;
use crate::mem::arena::Arena;

/// The slots of a store.
pub(super) struct Slots {
    place: Place,
    part_bytes: u64,
    payload_bytes: usize,
}

enum Place {
    /// Payload and trailer end to end.
    Host(Arena),
    /// Payloads end to end, and trailers end to end.
    Device { memory: Arc<dyn DeviceStaging>, trailers: Arena },
}

impl Slots {
    /// Slots in `arena`.
    pub(super) fn in_host(geometry: &Geometry, arena: Arena) -> Self {
        Self::new(geometry, Place::Host(arena))
    }

    /// Slots in device memory; `trailers` has a page for each.
    pub(super) fn on_device(
        geometry: &Geometry,
        memory: Arc<dyn DeviceStaging>,
        trailers: Arena,
    ) -> Self {
        Self::new(geometry, Place::Device { memory, trailers })
    }

    fn new(geometry: &Geometry, place: Place) -> Self {
        let (part_bytes, payload_bytes) = (geometry.part_bytes, geometry.payload_bytes() as usize);
        Self { place, part_bytes, payload_bytes }
    }

    /// The device memory, where the slots are there.
    pub(super) fn device(&self) -> Option<&Arc<dyn DeviceStaging>> {
        match &self.place {
            Place::Host(_) => None,
            Place::Device { memory, .. } => Some(memory),
        }
    }

    /// First byte of the memory that the device copies from and to.
    pub(super) fn start(&self) -> *mut u8 {
        match &self.place {
            Place::Host(arena) => arena.base(),
            Place::Device { memory, .. } => memory.base(),
        }
    }

    /// Bytes of all memory.
    pub(super) fn bytes(&self) -> usize {
        match &self.place {
            Place::Host(arena) => arena.len(),
            Place::Device { memory, trailers } => memory.bytes() + trailers.len(),
        }
    }

    /// First byte of a slot's payload: an address for copies and for the drive.
    pub(super) fn base(&self, slot: u32) -> *mut u8 {
        let stride = match &self.place {
            Place::Host(_) => self.payload_bytes + PAGE,
            Place::Device { .. } => self.payload_bytes,
        };
        let offset = slot as usize * stride;
        debug_assert!(offset + stride <= self.bytes());
        self.start().wrapping_add(offset)
    }

    /// Where a slot's payload begins in the memory of [`Slots::device`].
    pub(super) fn device_offset(&self, slot: u32) -> usize {
        self.base(slot).addr() - self.start().addr()
    }

    /// The bytes of a slot's part, for the CPU; `None` where only the device and the drive reach them.
    pub(super) fn host_payload(&self, slot: u32) -> Option<DmaSlice> {
        let payload = DmaSlice { pointer: self.base(slot), length: self.part_bytes as usize };
        self.device().is_none().then_some(payload)
    }

    /// A slot's trailer page, which is host memory.
    pub(super) fn trailer(&self, slot: u32) -> DmaSlice {
        let pointer = match &self.place {
            Place::Host(_) => self.base(slot).wrapping_add(self.payload_bytes),
            Place::Device { trailers, .. } => trailers.base().wrapping_add(slot as usize * PAGE),
        };
        DmaSlice { pointer, length: PAGE }
    }

    /// What is written to the extent, in order.
    pub(super) fn extent(&self, slot: u32) -> Vec<DmaSlice> {
        let pointer = self.base(slot);
        match &self.place {
            Place::Host(_) => vec![DmaSlice { pointer, length: self.payload_bytes + PAGE }],
            Place::Device { .. } => {
                vec![DmaSlice { pointer, length: self.payload_bytes }, self.trailer(slot)]
            }
        }
    }
}

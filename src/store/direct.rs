//! Transfers without a bounce: the drive reads and writes registered caller memory.
//!
//! A batch goes this way when it moves whole parts, every tensor slice is a page-aligned run of registered
//! host memory, and all backends are local (on a network mount a stuck read would hold the caller's memory
//! beyond its deadline). Nothing of it enters the Cache tier. A save's COPIED comes with the end of its
//! write, since until then the drive reads the caller's memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::Arc;

use super::engine::Engine;
use super::regions::Claim;
use crate::block::{PAGE, PartKey};
use crate::config::Checksum;
use crate::copy::{Job, Size, Urgency};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Class, DmaSlice};
use crate::parts::{PartId, Unit};
use crate::posix::{Extent, Found};
use crate::task::{Address, Task};

/// One page for the trailer of a part whose payload stays in caller memory.
struct TrailerPage(*mut u8);

// SAFETY: the page is owned by this value alone.
unsafe impl Send for TrailerPage {}

const TRAILER: Layout = match Layout::from_size_align(PAGE, PAGE) {
    Ok(layout) => layout,
    Err(_) => panic!("a page is a valid layout"),
};

impl TrailerPage {
    fn new() -> Self {
        // SAFETY: the layout is not empty.
        let page = unsafe { alloc_zeroed(TRAILER) };
        if page.is_null() {
            handle_alloc_error(TRAILER);
        }
        Self(page)
    }
}

impl Drop for TrailerPage {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.0, TRAILER) };
    }
}

impl Engine {
    /// Whether the whole task can go without a bounce.
    pub(super) fn goes_direct(&self, task: &Task) -> bool {
        if self.regions.is_empty() || !self.direct_possible() {
            return false;
        }
        (0..task.unit_count() as u32).all(|unit| {
            let aligned = pieces(task, unit)
                .all(|piece| piece.pointer.addr() % PAGE == 0 && piece.length % PAGE == 0);
            aligned && self.regions.claim(ranges(task, unit)).is_some()
        })
    }

    fn direct_possible(&self) -> bool {
        let geometry = &self.config.geometry;
        self.device.is_host()
            && self.tier.is_some()
            && !geometry.is_layerwise()
            && geometry.part_bytes.is_multiple_of(PAGE as u64)
            && self
                .layout
                .pieces()
                .iter()
                .all(|piece| piece.slices.iter().all(|slice| slice.is_contiguous()))
            && self.backends.iter().all(|backend| backend.is_local())
    }

    /// Claims the unit's memory and its regions; `None` where the task is over already.
    fn begin_direct(&self, unit: &Unit) -> Option<(Claim, Vec<DmaSlice>)> {
        let task = &unit.task;
        if !task.begin(unit.index) {
            return None;
        }
        match self.regions.claim(ranges(task, unit.index)) {
            Some(claim) => Some((claim, pieces(task, unit.index).collect())),
            None => {
                let text = "the memory of the batch was unregistered while the batch was submitted";
                task.end(unit.index, Err(Error::new(ErrorKind::InvalidArgument, text)));
                None
            }
        }
    }

    /// Drive to caller memory; verified in place.
    pub(super) fn direct_load(&self, unit: Unit, key: PartKey, found: Found) {
        let Some((claim, pieces)) = self.begin_direct(&unit) else { return };
        let engine = self.this();
        let (memory, expires) = (pieces.clone(), unit.task.deadline());
        let done = Box::new(move |result: Result<()>| match result {
            Ok(()) if engine.config.checksum == Checksum::Full => {
                let worker = Arc::clone(&engine);
                let verify = Box::new(move || {
                    // SAFETY: the read has ended and the unit's memory is claimed until `end`.
                    let result = unsafe { worker.tier().verify(&key, &found, &memory) };
                    worker.end_direct_load(unit, claim, key, found, result);
                    Vec::new()
                });
                let bytes = engine.config.geometry.part_bytes;
                engine.pool.read(Job::Compute(Urgency::Load, bytes, verify), Size::of(bytes));
            }
            result => engine.end_direct_load(unit, claim, key, found, result),
        });
        let range = 0..self.config.geometry.part_bytes;
        self.tier().read(&key, &found, range, pieces, Class::Load, expires, done);
    }

    fn end_direct_load(
        &self,
        unit: Unit,
        claim: Claim,
        key: PartKey,
        found: Found,
        result: Result<()>,
    ) {
        drop(claim);
        match result {
            Ok(()) => unit.task.end(unit.index, Ok(())),
            Err(error) => {
                let ended = Box::new(move |error| unit.task.end(unit.index, Err(error)));
                self.explain(key, found, error, ended);
            }
        }
    }

    /// Caller memory to drive.
    pub(super) fn direct_save(&self, part: PartId, unit: Unit, key: PartKey) {
        let Some((claim, pieces)) = self.begin_direct(&unit) else {
            let error = Error::new(ErrorKind::Cancelled, "the save ended before it began");
            return self.event(|parts, actions| parts.end_direct(part, &Err(error), actions));
        };
        let engine = self.this();
        let expires = unit.task.deadline();
        let reserved = move |extent: Result<Extent>| match extent {
            Ok(extent) => {
                let worker = Arc::clone(&engine);
                let seal = Box::new(move || {
                    worker.write_direct(part, unit, claim, pieces, extent);
                    Vec::new()
                });
                let bytes = engine.config.geometry.part_bytes;
                engine.pool.push(vec![Job::Compute(Urgency::Save, bytes, seal)]);
            }
            Err(error) => engine.end_direct_save(part, &unit, claim, Err(error)),
        };
        self.tier().reserve(&key, expires, Box::new(reserved));
    }

    fn write_direct(
        &self,
        part: PartId,
        unit: Unit,
        claim: Claim,
        mut pieces: Vec<DmaSlice>,
        extent: Extent,
    ) {
        let trailer = TrailerPage::new();
        // SAFETY: the unit's memory is claimed until `end`, the trailer page is ours.
        unsafe {
            let part_bytes = self.config.geometry.part_bytes;
            self.tier().seal(&extent, &pieces, part_bytes, None, trailer.0);
        }
        pieces.push(DmaSlice { pointer: trailer.0, length: PAGE });
        let engine = self.this();
        let expires = unit.task.deadline();
        let done = Box::new(move |result| {
            drop(trailer);
            engine.end_direct_save(part, &unit, claim, result);
        });
        self.tier().write(extent, pieces, Class::Save, expires, done);
    }

    fn end_direct_save(&self, part: PartId, unit: &Unit, claim: Claim, result: Result<()>) {
        drop(claim);
        self.event(|parts, actions| parts.end_direct(part, &result, actions));
        unit.task.end(unit.index, result.clone());
        unit.task.settle(unit.index, result);
    }
}

fn pieces(task: &Task, unit: u32) -> impl Iterator<Item = DmaSlice> + '_ {
    let lengths = task.piece(unit).slices.iter().map(|slice| slice.bytes() as usize);
    task.addresses(unit).zip(lengths).map(|(Address(address), length)| DmaSlice {
        pointer: std::ptr::with_exposed_provenance_mut(address),
        length,
    })
}

fn ranges(task: &Task, unit: u32) -> impl Iterator<Item = (usize, usize)> + '_ {
    pieces(task, unit).map(|piece| (piece.pointer.addr(), piece.length))
}

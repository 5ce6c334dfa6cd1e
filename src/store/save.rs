//! Saves: caller memory to slot, checksums, trailer, drive, publish.
//!
//! Where caller memory is plain memory and a part comes whole, its checksums are taken in the pass that gathers it,
//! before it is known which segment will hold it: see [`Tier::gather`](crate::posix::Tier::gather).

use std::sync::Arc;

use super::engine::Engine;
use super::read::push_slices;
use crate::block::PartKey;
use crate::copy::{Job, Urgency};
use crate::device::Direction;
use crate::error::Result;
use crate::log::{self, Level};
use crate::mem::runs::Runs;
use crate::parts::{PartId, Unit};
use crate::posix::{Extent, Taken};

impl Engine {
    /// The job that brings a unit's shard into its slot.
    pub(super) fn gather(&self, part: PartId, slot: u32, unit: Unit) -> Job {
        let whole = !self.config.geometry.is_layerwise();
        if !(whole && self.device.is_host() && self.tier.is_some()) {
            return self.copy(Direction::Gather, part, slot, unit);
        }
        let engine = self.this();
        let bytes = self.config.geometry.part_bytes;
        let gather = Box::new(move || engine.gather_whole(part, slot, unit));
        Job::Compute(Urgency::Save, bytes, gather)
    }

    fn gather_whole(&self, part: PartId, slot: u32, unit: Unit) -> Vec<Job> {
        let begun = unit.task.begin(unit.index);
        let sums = begun.then(|| {
            let mut runs = Runs::nowhere();
            push_slices(&mut runs, &unit);
            // SAFETY: the slot is pinned by the part table, which lets nobody else touch it while it fills, and the
            // caller's memory claimed by `begin`, until `gathered` and `end`.
            unsafe { self.tier().gather(&unit.key(), &mut runs, self.slots().base(slot)) }
        });
        let mut actions = Vec::new();
        {
            let mut parts = self.parts.lock();
            parts.summed(part, sums.flatten());
            parts.gathered(part, unit.clone(), Ok(begun), &mut actions);
            parts.flush(&mut actions);
        }
        // After the table knows of it, so that whoever waits for COPIED finds the part in DRAM.
        if begun {
            unit.task.end(unit.index, Ok(()));
        }
        self.carry_out(actions)
    }

    /// Room for a part that is in its slot, then its way to the drive.
    pub(super) fn reserve(&self, part: PartId, slot: u32, key: PartKey, sums: Option<Taken>) {
        let engine = self.this();
        let reserved = move |extent: Result<Extent>| match extent {
            // What is left to do is less than handing it to another thread.
            Ok(extent) if sums.as_ref().is_some_and(|sums| sums.are_of(&extent)) => {
                engine.seal(part, slot, extent, sums);
            }
            Ok(extent) => {
                let worker = Arc::clone(&engine);
                let seal = Box::new(move || {
                    if worker.slots().device().is_some() {
                        return worker.seal_on_device(part, slot, extent);
                    }
                    worker.seal(part, slot, extent, None);
                    Vec::new()
                });
                let bytes = engine.cpu_bytes(engine.config.geometry.part_bytes);
                engine.pool.push(vec![Job::Compute(Urgency::Save, bytes, seal)]);
            }
            Err(error) => engine.stored(part, &Err(error)),
        };
        self.tier().reserve(&key, None, Box::new(reserved));
    }

    fn seal(&self, part: PartId, slot: u32, extent: Extent, sums: Option<Taken>) {
        let geometry = &self.config.geometry;
        let (payload, trailer) = (self.slots().host_payload(slot), self.slots().trailer(slot));
        let payload = payload.expect("slots that are not on the device are in host memory");
        let padding = geometry.payload_bytes() as usize - payload.length;
        let shard_bytes = geometry.shard_bytes.min(geometry.part_bytes);
        // SAFETY: in the slot the padding follows the payload and the trailer page the padding, and in
        // state Storing the bytes are only read (scatters); nobody reads the padding or the trailer.
        unsafe {
            payload.pointer.add(payload.length).write_bytes(0, padding);
            self.tier().seal(&extent, &[payload], shard_bytes, sums, trailer.pointer);
        }
        self.write_slot(part, slot, extent);
    }

    pub(super) fn stored(&self, part: PartId, result: &Result<()>) {
        if let Err(error) = result {
            log::once(Level::Warning, "save failed", format_args!("a save failed: {error}"));
        }
        self.event(|parts, actions| parts.stored(part, result, actions));
    }
}

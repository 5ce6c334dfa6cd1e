//! Hold: blocks are brought into the Cache tier and kept there until somebody lets go.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::engine::Engine;
use super::submit::ENTRIES_MAX;
use crate::block::{BlockId, PartKey};
use crate::error::{Error, ErrorKind, Result};
use crate::parts::{Accepted, Unit};
use crate::task::{Kind, Notify, Plan, Task, UnitSpec};

impl Engine {
    pub(super) fn hold(&self, blocks: &[BlockId], timeout_ms: i64) -> Result<Arc<Task>> {
        self.check_transfers()?;
        if !self.config.pipeline.cache {
            let text =
                "store_pipeline has no Cache tier to hold blocks in; set it to `Cache|Posix`";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if blocks.is_empty() || blocks.len() > ENTRIES_MAX {
            let text = format!("count: {} blocks; allowed are 1 to {ENTRIES_MAX}", blocks.len());
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let owned = self.config.geometry.parts_owned;
        let units = self.part_units(blocks);
        self.admit(units.len())?;
        let task = self.make_task(Plan {
            kind: Kind::Hold,
            units,
            units_per_entry: owned as usize,
            layout: Arc::clone(&self.layout),
            addresses: Vec::new(),
            event: None,
            deadline: self.deadline(timeout_ms),
            notify: Notify::default(),
            user_data: 0,
            tag: 0,
        });
        let unit = |index| Unit { task: Arc::clone(&task), index };
        let unknown = self.hold_known((0..task.unit_count() as u32).map(unit).collect());
        self.look_again(unknown, Self::hold_known);
        Ok(task)
    }

    /// A unit for each part of each block that this store owns.
    fn part_units(&self, blocks: &[BlockId]) -> Vec<UnitSpec> {
        let geometry = &self.config.geometry;
        let parts = geometry.part_index..geometry.part_index + geometry.parts_owned;
        let unit = |block: BlockId, part: u32| UnitSpec {
            key: PartKey { block, part: part as u16 },
            shard: 0,
        };
        blocks.iter().flat_map(|block| parts.clone().map(move |part| unit(*block, part))).collect()
    }

    /// Holds the entries whose parts somebody knows; returns the units of the others. `units`: those of
    /// whole entries, in order.
    fn hold_known(&self, units: Vec<Unit>) -> Vec<Unit> {
        let found = self.find_units(&units);
        let entry = self.config.geometry.parts_owned as usize;
        self.event(|parts, actions| {
            let mut unknown = Vec::new();
            for (units, found) in units.chunks(entry).zip(found.chunks(entry)) {
                if parts.hold(units, found, actions) == Accepted::Unknown {
                    unknown.extend_from_slice(units);
                }
            }
            unknown
        })
    }
}

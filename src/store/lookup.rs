//! Lookup: answers from the index of storage in batches, and asks the DRAM tier about the rest only.

#![forbid(unsafe_code)]

use parking_lot::MutexGuard;

use super::engine::Engine;
use crate::block::{BlockId, PartKey};
use crate::cache::shared::View;
use crate::parts::Parts;

/// Blocks asked of the index at once by a prefix lookup: enough to overlap the misses of the CPU's caches,
/// few enough to stop soon after the first block that is not there.
const PREFIX_STEP: usize = 64;

impl Engine {
    /// Sets `found[i]` to 1 where every part of `blocks[i]` is present; returns how many are.
    pub(super) fn find_present(&self, blocks: &[BlockId], found: &mut [u8]) -> usize {
        match &self.tier {
            Some(tier) => tier.contains_blocks(blocks, found),
            None => found.fill(0),
        }
        let on_storage = found.iter().filter(|found| **found == 1).count();
        on_storage + if on_storage < blocks.len() { self.find_in_dram(blocks, found) } else { 0 }
    }

    /// The length of the longest prefix of which every part is present.
    pub(super) fn find_prefix(&self, blocks: &[BlockId]) -> usize {
        let mut found = [0; PREFIX_STEP];
        let mut hits = 0;
        for step in blocks.chunks(PREFIX_STEP) {
            let present = self.find_present(step, &mut found[..step.len()]);
            if present < step.len() {
                return hits + found.iter().take_while(|found| **found == 1).count();
            }
            hits += present;
        }
        hits
    }

    /// Looks for what storage does not have in DRAM, this store's and that of the host's others.
    fn find_in_dram(&self, blocks: &[BlockId], found: &mut [u8]) -> usize {
        let Some(dram) = Dram::open(self) else { return 0 };
        let missing = blocks.iter().zip(found).filter(|(_, found)| **found == 0);
        let mut hits = 0;
        for (block, found) in missing {
            *found = u8::from(dram.has(block));
            hits += usize::from(*found);
        }
        self.metrics.lookup_cache_hits.add(hits as u64);
        hits
    }
}

/// What is in DRAM, held still for one batch of questions.
struct Dram<'a> {
    engine: &'a Engine,
    own: Option<MutexGuard<'a, Parts>>,
    others: Option<View>,
}

impl<'a> Dram<'a> {
    /// `None` where no DRAM can have anything.
    fn open(engine: &'a Engine) -> Option<Self> {
        let own = (!engine.config.is_lookup_only()).then(|| engine.parts.lock());
        let own = own.filter(|parts| !parts.is_empty());
        let others = engine.shared.view().filter(|view| !view.is_empty());
        (own.is_some() || others.is_some()).then_some(Self { engine, own, others })
    }

    fn has(&self, block: &BlockId) -> bool {
        let geometry = &self.engine.config.geometry;
        let owned = geometry.part_index..geometry.part_index + geometry.parts_owned;
        // Of a block of one part storage has said already that it is not there.
        let storage = self.engine.tier.as_ref().filter(|_| geometry.part_count > 1);
        (0..geometry.part_count).all(|part| {
            let key = PartKey { block: *block, part: part as u16 };
            let mine = owned.contains(&part)
                && self.own.as_ref().is_some_and(|parts| parts.is_resident(&key));
            mine || self.others.as_ref().is_some_and(|view| view.contains(&key))
                || storage.is_some_and(|tier| tier.find(&key).is_some())
        })
    }
}

//! Loads: attach to what is under way, hit what is in DRAM, read the rest.

use super::{Action, Keep, PartId, Parts, State, Unit};
use crate::block::PartKey;
use crate::io::Class;
use crate::posix::Found;

/// What became of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// It will be settled.
    Yes,
    /// Nobody knows the part: refresh, and ask again.
    Unknown,
}

impl Parts {
    /// A load of one unit. `found`: what the index says of the part.
    pub(crate) fn load(
        &mut self,
        unit: Unit,
        key: PartKey,
        found: Option<Found>,
        actions: &mut Vec<Action>,
    ) -> Accepted {
        self.supersede(&key, found, actions);
        if let Some(&id) = self.map.get(&key) {
            let part = &mut self.parts[id as usize];
            match part.state {
                State::Ready | State::Storing => {
                    self.counts.hits += 1;
                    self.scatter(id, unit, actions);
                }
                State::Reading if part.filled.contains(unit.shard()) => {
                    self.counts.hits += 1;
                    self.scatter(id, unit, actions);
                }
                State::Reading | State::QueuedLoad => {
                    self.counts.shared += 1;
                    part.loads.push(unit);
                    self.to_read.push(id);
                }
                _ => return Accepted::Unknown,
            }
            return Accepted::Yes;
        }
        let Some(found) = found else { return Accepted::Unknown };
        self.counts.misses += 1;
        let id = self.create(key, State::QueuedLoad);
        let part = &mut self.parts[id as usize];
        part.found = Some(found);
        part.loads.push(unit);
        self.load_queue.push_back(id);
        self.pump(actions);
        Accepted::Yes
    }

    /// A hint: reads the part if a slot can be had without anybody waiting for it.
    pub(crate) fn prefetch(
        &mut self,
        key: PartKey,
        found: Found,
        actions: &mut Vec<Action>,
    ) -> bool {
        if self.rules.keep != Keep::Cached || self.map.contains_key(&key) || self.queued() > 0 {
            return false;
        }
        let Some(slot) = self.take_slot(actions) else { return false };
        let id = self.create(key, State::Reading);
        let part = &mut self.parts[id as usize];
        part.found = Some(found);
        part.class = Class::Background;
        self.give_slot(id, slot);
        self.start_read(id);
        true
    }

    /// A scatter has ended, whatever its result.
    pub(crate) fn scattered(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &mut self.parts[id as usize];
        part.pins -= 1;
        part.served += 1;
        self.release_if_done(id, actions);
        self.pump(actions);
    }

    pub(super) fn scatter(&mut self, id: PartId, unit: Unit, actions: &mut Vec<Action>) {
        let part = &mut self.parts[id as usize];
        part.pins += 1;
        let slot = part.slot.expect("a complete part has a slot");
        if part.state == State::Ready {
            self.policy.touch(slot);
        }
        actions.push(Action::Scatter { part: id, slot, unit });
    }
}

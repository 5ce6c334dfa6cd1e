//! Loads: attach to what is under way, hit what is in DRAM, read the rest.

use std::time::Instant;

use super::{Action, Keep, Part, PartId, Parts, State, Unit};
use crate::block::PartKey;
use crate::error::{Error, ErrorKind};
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
                State::Reading | State::QueuedLoad => {
                    self.counts.shared += 1;
                    part.loads.push(unit);
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
        self.start_read(id, actions);
        true
    }

    pub(super) fn start_read(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &mut self.parts[id as usize];
        part.state = State::Reading;
        actions.push(Action::Read {
            part: id,
            slot: part.slot.expect("a part that is read has a slot"),
            key: part.key,
            found: part.found.expect("a part that is read was found"),
            class: part.class,
            expires: latest_deadline(part),
        });
    }

    /// The slot holds the part's bytes, verified.
    pub(crate) fn verified(&mut self, id: PartId, actions: &mut Vec<Action>) {
        self.settle_in(id, actions);
        for unit in std::mem::take(&mut self.parts[id as usize].loads) {
            match unit.is_hold() {
                true => self.grant(id, unit, actions),
                false => self.scatter(id, unit, actions),
            }
        }
        self.release_if_done(id, actions);
        self.pump(actions);
    }

    /// The read failed, or what it brought is not the part. Returns those who wait for it.
    pub(crate) fn read_failed(
        &mut self,
        id: PartId,
        error: &Error,
        actions: &mut Vec<Action>,
    ) -> Vec<Unit> {
        self.drop_settled(id);
        let part = &mut self.parts[id as usize];
        if error.kind() == ErrorKind::Timeout && !part.loads.is_empty() {
            // The read had the deadline of others, who have gone; these have time left.
            self.start_read(id, actions);
            return Vec::new();
        }
        let loads = std::mem::take(&mut part.loads);
        self.discard(id, actions);
        self.pump(actions);
        loads
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

/// A read may take as long as the most patient of those who wait for it; a prefetch as long as it likes.
fn latest_deadline(part: &Part) -> Option<Instant> {
    part.loads.iter().map(|unit| unit.task.deadline()).reduce(|a, b| Some(a?.max(b?))).flatten()
}

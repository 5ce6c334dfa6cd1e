//! Holds: parts that stay in their slots until whoever holds them lets go.
//!
//! A hold waits for the bytes as a load does, in the list of the part's loads. From its arrival on the part
//! remembers the number of its task: a part that has such numbers is not evicted, and counts against the
//! share of the slots that may be held, also while it is read.

use super::{Accepted, Action, PartId, Parts, State, Unit, ghost_key};
use crate::error::{Error, ErrorKind};
use crate::posix::Found;
use crate::task::Task;

/// One in so many slots at most is held, so that saves and other loads always find some.
pub(crate) const HELD_SHARE: u32 = 2;

impl Parts {
    /// A hold of one entry: all of its parts or none. `found`: what the index says of each.
    pub(crate) fn hold(
        &mut self,
        units: &[Unit],
        found: &[Option<Found>],
        actions: &mut Vec<Action>,
    ) -> Accepted {
        // Released meanwhile: nobody would ever let go.
        if units.iter().all(Unit::is_settled) {
            return Accepted::Yes;
        }
        for (unit, found) in units.iter().zip(found) {
            self.supersede(&unit.key(), *found, actions);
        }
        if !units.iter().zip(found).all(|(unit, found)| self.can_bring(unit, *found)) {
            return Accepted::Unknown;
        }
        let held = |unit: &&Unit| {
            let id = self.map.get(&unit.key());
            id.is_some_and(|&id| !self.parts[id as usize].holders.is_empty())
        };
        let new = units.len() - units.iter().filter(held).count();
        if !self.may_hold(new as u32) {
            let error = self.too_many_held();
            units.iter().for_each(|unit| {
                actions.push(Action::Settle(unit.clone(), Err(error.clone())));
            });
            return Accepted::Yes;
        }
        for (unit, found) in units.iter().zip(found) {
            self.hold_part(unit, *found, actions);
        }
        self.pump(actions);
        Accepted::Yes
    }

    /// Whether the unit's part is in DRAM, on its way there, or on storage.
    fn can_bring(&self, unit: &Unit, found: Option<Found>) -> bool {
        match self.map.get(&unit.key()).map(|&id| self.parts[id as usize].state) {
            Some(State::Ready | State::Storing | State::Reading | State::QueuedLoad) => true,
            Some(_) => false,
            None => found.is_some(),
        }
    }

    /// Whether so many parts more may be held: half of the slots at most, and one is always left to those
    /// who neither hold nor save by shards.
    fn may_hold(&self, new: u32) -> bool {
        let held = self.held + new;
        let slots = self.rules.slots;
        new == 0 || (held <= slots / HELD_SHARE && held + self.partial < slots)
    }

    fn too_many_held(&self) -> Error {
        let (held, slots) = (self.held, self.rules.slots);
        let text = format!(
            "{held} of {slots} slots are held, and one in {HELD_SHARE} at most may be; release holds, or raise cache_buffer_capacity_gb"
        );
        Error::new(ErrorKind::Busy, text)
    }

    fn hold_part(&mut self, unit: &Unit, found: Option<Found>, actions: &mut Vec<Action>) {
        let key = unit.key();
        let id = match self.map.get(&key) {
            Some(&id) => id,
            None => {
                let id = self.create(key, State::QueuedLoad);
                self.parts[id as usize].found = found;
                self.load_queue.push_back(id);
                id
            }
        };
        self.claim(id, unit.task.number());
        let part = &mut self.parts[id as usize];
        match part.state {
            State::Ready | State::Storing => actions.push(Action::Settle(unit.clone(), Ok(()))),
            _ => part.loads.push(unit.clone()),
        }
    }

    fn claim(&mut self, id: PartId, task: u64) {
        let part = &mut self.parts[id as usize];
        if part.holders.is_empty() {
            self.held += 1;
            if let (State::Ready, Some(slot)) = (part.state, part.slot) {
                self.policy.remove(slot);
            }
        }
        part.holders.push(task);
    }

    /// A task holds the part no longer. The last one gives it back to eviction, as a newcomer.
    fn unclaim(&mut self, id: PartId, task: u64) {
        let part = &mut self.parts[id as usize];
        if part.holders.is_empty() {
            return;
        }
        part.holders.retain(|holder| *holder != task);
        if part.holders.is_empty() {
            self.held -= 1;
            if let (State::Ready, Some(slot)) = (part.state, part.slot) {
                self.policy.insert(slot, ghost_key(&part.key));
            }
        }
    }

    /// The part is given up: nobody holds it any more.
    pub(super) fn forget_holders(&mut self, id: PartId) {
        let holders = &mut self.parts[id as usize].holders;
        if !holders.is_empty() {
            holders.clear();
            self.held -= 1;
        }
    }

    /// The bytes are there: a hold that still wants them has them.
    pub(super) fn grant(&mut self, id: PartId, unit: Unit, actions: &mut Vec<Action>) {
        if unit.is_settled() {
            self.unclaim(id, unit.task.number());
        } else {
            actions.push(Action::Settle(unit, Ok(())));
        }
    }

    /// Takes those who no longer wait out of the part's loads.
    pub(super) fn drop_settled(&mut self, id: PartId) {
        let loads = std::mem::take(&mut self.parts[id as usize].loads);
        let (gone, waiting) = loads.into_iter().partition(Unit::is_settled);
        self.parts[id as usize].loads = waiting;
        let gone: Vec<Unit> = gone;
        gone.iter().filter(|unit| unit.is_hold()).for_each(|unit| {
            self.unclaim(id, unit.task.number());
        });
    }

    /// Lets go of everything that a task holds. Its units are settled already.
    pub(crate) fn release(&mut self, hold: &Task, actions: &mut Vec<Action>) {
        for unit in 0..hold.unit_count() as u32 {
            if let Some(&id) = self.map.get(&hold.unit(unit).key) {
                self.unclaim(id, hold.number());
            }
        }
        self.pump(actions);
    }

    /// Parts that are held, or read in order to be.
    pub(crate) fn held(&self) -> u32 {
        self.held
    }
}

//! Saves: shards are gathered in any order; the part is stored when the last one is in, or refused as a
//! whole. A second saver of a part under way attaches to the first and inherits its result.

use std::time::Instant;

use super::{Action, Part, PartId, Parts, Refusal, Sink, State, Unit, gave_up};
use crate::block::PartKey;
use crate::error::{Error, ErrorKind, Result};
use crate::posix::{Found, Taken};

/// Refusals remembered, per slot of the table.
const REFUSALS_PER_SLOT: usize = 4;

impl Parts {
    /// A save of one unit. `found`: what the index says of the part.
    pub(crate) fn save(
        &mut self,
        unit: Unit,
        key: PartKey,
        found: Option<Found>,
        actions: &mut Vec<Action>,
    ) {
        self.supersede(&key, found, actions);
        if let Some(&id) = self.map.get(&key) {
            self.attach(id, unit, found, actions);
            return;
        }
        if found.is_some() {
            self.refusals.remove(&key);
            self.counts.skipped += 1;
            actions.push(Action::Settle(unit, Ok(())));
            return;
        }
        if let Some(error) = self.refused(&key, unit.shard()) {
            actions.push(Action::Settle(unit, Err(error)));
            return;
        }
        let id = self.create(key, State::QueuedSave);
        let part = &mut self.parts[id as usize];
        part.claimed.insert(unit.shard());
        // Where nobody waits there is room, as a rule: the unit need not be kept for later.
        let may_start = self.queued() == 0 && (!self.is_layerwise() || self.may_start_partial());
        if may_start && let Some(slot) = self.take_slot(actions) {
            self.give_slot(id, slot);
            self.start_filling(id, actions);
            self.gather(id, unit, actions);
            return;
        }
        self.parts[id as usize].gathers.push(unit);
        self.save_queue.push_back(id);
        self.pump(actions);
    }

    /// Another process has published a part that this one is still saving, and may never complete: the part
    /// is present, which is all that its savers asked for.
    pub(super) fn supersede(
        &mut self,
        key: &PartKey,
        found: Option<Found>,
        actions: &mut Vec<Action>,
    ) {
        if found.is_none() {
            return;
        }
        let Some(&id) = self.map.get(key) else { return };
        let part = &mut self.parts[id as usize];
        match part.state {
            State::Filling if self.rules.shards_per_part > 1 => self.partial -= 1,
            State::Filling => {}
            State::QueuedSave => self.save_queue.retain(|queued| *queued != id),
            _ => return,
        }
        part.superseded = true;
        let gathers = std::mem::take(&mut part.gathers);
        gathers.into_iter().for_each(|unit| actions.push(Action::Settle(unit, Ok(()))));
        self.finish_saves(id, &Ok(()), actions);
        self.discard(id, actions);
        self.pump(actions);
    }

    /// Begins a save straight from caller memory. False: the part is known already, use `save`.
    pub(crate) fn begin_direct(&mut self, key: PartKey) -> Option<PartId> {
        (!self.map.contains_key(&key)).then(|| self.create(key, State::Direct))
    }

    /// A direct save has ended: those who attached to it inherit the result.
    pub(crate) fn end_direct(
        &mut self,
        id: PartId,
        result: &Result<()>,
        actions: &mut Vec<Action>,
    ) {
        for unit in std::mem::take(&mut self.parts[id as usize].saves) {
            actions.push(Action::Settle(unit, result.clone()));
        }
        self.discard(id, actions);
    }

    fn attach(&mut self, id: PartId, unit: Unit, found: Option<Found>, actions: &mut Vec<Action>) {
        let sink = self.rules.sink;
        let part = &mut self.parts[id as usize];
        match part.state {
            State::Ready if sink == Sink::Storage && found.is_none() => {
                // In DRAM, but no longer on storage: its segment was reclaimed. Store it from the slot.
                actions.push(Action::Copied(unit.clone()));
                part.saves.push(unit);
                let slot = part.slot.expect("a complete part has a slot");
                self.policy.remove(slot);
                self.start_storing(id, actions);
            }
            State::Ready | State::Reading | State::QueuedLoad | State::Doomed => {
                self.counts.skipped += 1;
                actions.push(Action::Settle(unit, Ok(())));
            }
            State::Storing | State::Direct => {
                actions.push(Action::Copied(unit.clone()));
                part.saves.push(unit);
            }
            State::Filling | State::QueuedSave if !part.claimed.insert(unit.shard()) => {
                actions.push(Action::Copied(unit.clone()));
                part.saves.push(unit);
            }
            State::QueuedSave => part.gathers.push(unit),
            State::Filling => self.gather(id, unit, actions),
        }
    }

    pub(super) fn may_start_partial(&self) -> bool {
        self.partial < ((self.rules.slots - self.held) / 2).max(1)
    }

    /// The part has a slot: gather what waits for it.
    pub(super) fn start_filling(&mut self, id: PartId, actions: &mut Vec<Action>) {
        self.touch(id);
        if self.is_layerwise() {
            self.partial += 1;
            if !std::mem::replace(&mut self.watching_partial, true) {
                actions.push(Action::WatchPartial(Instant::now() + self.rules.partial_timeout));
            }
        }
        let part = &mut self.parts[id as usize];
        part.state = State::Filling;
        for unit in std::mem::take(&mut part.gathers) {
            self.gather(id, unit, actions);
        }
    }

    /// Says that the part has got a shard now. A clock is read for nothing where one shard is all.
    fn touch(&mut self, id: PartId) {
        if self.is_layerwise() {
            self.parts[id as usize].touched = Some(Instant::now());
        }
    }

    fn gather(&mut self, id: PartId, unit: Unit, actions: &mut Vec<Action>) {
        let part = &mut self.parts[id as usize];
        part.pins += 1;
        actions.push(Action::Gather {
            part: id,
            slot: part.slot.expect("a part that fills has a slot"),
            unit,
        });
    }

    /// The checksums of a part that one gather has brought into its slot whole; to be told before `gathered`.
    pub(crate) fn summed(&mut self, id: PartId, sums: Option<Taken>) {
        self.parts[id as usize].sums = sums;
    }

    /// A gather has ended. `result`: `Ok(false)` where it never began, because its task was settled.
    pub(crate) fn gathered(
        &mut self,
        id: PartId,
        unit: Unit,
        result: Result<bool>,
        actions: &mut Vec<Action>,
    ) {
        self.touch(id);
        let part = &mut self.parts[id as usize];
        part.pins -= 1;
        if part.state == State::Doomed {
            let gave_up = part.gave_up.clone();
            let error = result.err().or(gave_up).unwrap_or_else(another_shard_failed);
            let result = if part.superseded { Ok(()) } else { Err(error) };
            actions.push(Action::Settle(unit, result));
            self.release_if_done(id, actions);
        } else {
            match result {
                Err(error) => {
                    actions.push(Action::Settle(unit, Err(error.clone())));
                    self.fail_filling(id, &error, actions);
                }
                Ok(false) => {
                    part.claimed.remove(unit.shard());
                    if part.claimed.len() == 0 {
                        self.fail_filling(id, &gave_up(), actions);
                    }
                }
                Ok(true) => {
                    part.filled.insert(unit.shard());
                    part.saves.push(unit);
                    if part.filled.len() == self.rules.shards_per_part {
                        self.complete(id, actions);
                    }
                }
            }
        }
        self.pump(actions);
    }

    fn complete(&mut self, id: PartId, actions: &mut Vec<Action>) {
        if self.is_layerwise() {
            self.partial -= 1;
        }
        match self.rules.sink {
            Sink::Storage => self.start_storing(id, actions),
            Sink::Nothing => {
                self.settle_in(id, actions);
                self.finish_saves(id, &Ok(()), actions);
                self.parts[id as usize].served = self.rules.shards_per_part;
                self.release_if_done(id, actions);
            }
        }
    }

    fn start_storing(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &mut self.parts[id as usize];
        part.state = State::Storing;
        let slot = part.slot.expect("a complete part has a slot");
        let sums = part.sums.take();
        actions.push(Action::Store { part: id, slot, key: part.key, sums });
    }

    /// The part is published, or could not be.
    pub(crate) fn stored(&mut self, id: PartId, result: &Result<()>, actions: &mut Vec<Action>) {
        self.finish_saves(id, result, actions);
        // What is held stays in DRAM, whatever storage said: its bytes are good.
        if result.is_ok() || !self.parts[id as usize].holders.is_empty() {
            self.settle_in(id, actions);
            self.parts[id as usize].served = self.rules.shards_per_part;
            self.release_if_done(id, actions);
        } else {
            self.discard(id, actions);
        }
        self.pump(actions);
    }

    fn finish_saves(&mut self, id: PartId, result: &Result<()>, actions: &mut Vec<Action>) {
        for unit in std::mem::take(&mut self.parts[id as usize].saves) {
            actions.push(Action::Settle(unit, result.clone()));
        }
    }

    fn fail_filling(&mut self, id: PartId, error: &Error, actions: &mut Vec<Action>) {
        if self.is_layerwise() {
            self.partial -= 1;
        }
        self.end_save(id, error, actions);
    }

    /// The part will not be stored: everybody who waits for it hears why, and so do its later shards.
    pub(super) fn end_save(&mut self, id: PartId, error: &Error, actions: &mut Vec<Action>) {
        self.counts.dropped += 1;
        let part = &mut self.parts[id as usize];
        part.gave_up = Some(error.clone());
        let (saves, gathers) = (std::mem::take(&mut part.saves), std::mem::take(&mut part.gathers));
        for unit in saves.into_iter().chain(gathers) {
            actions.push(Action::Settle(unit, Err(error.clone())));
        }
        if self.is_layerwise() && self.parts[id as usize].claimed.len() < self.rules.shards_per_part
        {
            self.remember_refusal(id, error);
        }
        self.discard(id, actions);
    }

    fn remember_refusal(&mut self, id: PartId, error: &Error) {
        let now = Instant::now();
        let (limit, age) =
            (self.rules.slots as usize * REFUSALS_PER_SLOT, self.rules.partial_timeout);
        if self.refusals.len() >= limit {
            self.refusals.retain(|_, refusal| now.duration_since(refusal.at) < age);
        }
        if self.refusals.len() < limit {
            let Part { key, claimed, .. } = &self.parts[id as usize];
            self.refusals
                .insert(*key, Refusal { claimed: claimed.clone(), error: error.clone(), at: now });
        }
    }

    /// Why this shard's part was refused, if it was and the shard has not been told before. A shard that
    /// comes again begins a new attempt.
    fn refused(&mut self, key: &PartKey, shard: u32) -> Option<Error> {
        let refusal = self.refusals.get_mut(key)?;
        let stale = refusal.at.elapsed() >= self.rules.partial_timeout;
        if stale || !refusal.claimed.insert(shard) {
            self.refusals.remove(key);
            return None;
        }
        let error = refusal.error.clone();
        if refusal.claimed.len() == self.rules.shards_per_part {
            self.refusals.remove(key);
        }
        Some(error)
    }

    /// Gives up parts that have had no new shard for the partial timeout. Returns when to call again.
    pub(crate) fn reclaim_partial(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.watching_partial = false;
        let timeout = self.rules.partial_timeout;
        let partial: Vec<PartId> =
            self.map.values().copied().filter(|&id| self.is_partial(id)).collect();
        let mut next: Option<Instant> = None;
        for id in partial {
            let due = self.parts[id as usize].touched.unwrap_or(now) + timeout;
            if due <= now && self.parts[id as usize].pins == 0 {
                let error = self.incomplete(id);
                self.fail_filling(id, &error, actions);
            } else {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        if let Some(next) = next {
            self.watching_partial = true;
            actions.push(Action::WatchPartial(next.max(now + timeout / 8)));
        }
        self.pump(actions);
    }

    fn is_partial(&self, id: PartId) -> bool {
        self.is_layerwise() && self.parts[id as usize].state == State::Filling
    }

    fn incomplete(&self, id: PartId) -> Error {
        let part = &self.parts[id as usize];
        let (here, all, timeout) =
            (part.filled.len(), self.rules.shards_per_part, self.rules.partial_timeout);
        let text = format!(
            "block {} part {}: {here} of {all} shards arrived, and no other for {timeout:?}; save every shard of a part",
            part.key.block, part.key.part
        );
        Error::new(ErrorKind::Timeout, text)
    }

    /// The store closes: nothing that still needs a shard or a slot will get it.
    pub(crate) fn cancel_waiting(&mut self, error: &Error, actions: &mut Vec<Action>) {
        for id in std::mem::take(&mut self.save_queue) {
            self.end_save(id, error, actions);
        }
        let partial: Vec<PartId> =
            self.map.values().copied().filter(|&id| self.is_partial(id)).collect();
        for id in partial {
            let part = &self.parts[id as usize];
            if part.claimed.len() < self.rules.shards_per_part {
                self.fail_filling(id, error, actions);
            }
        }
        for id in std::mem::take(&mut self.load_queue) {
            for unit in std::mem::take(&mut self.parts[id as usize].loads) {
                actions.push(Action::Settle(unit, Err(error.clone())));
            }
            self.discard(id, actions);
        }
    }
}

fn another_shard_failed() -> Error {
    Error::new(
        ErrorKind::Io,
        "another shard of the same part could not be saved, so the part was given up",
    )
}

//! Submit: a batch becomes a task, its units go to the part table, and what nobody knows is looked for once.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::engine::{Engine, Live};
use crate::block::{BlockId, PartKey};
use crate::error::{Error, ErrorKind, Result};
use crate::io::thread;
use crate::parts::{Accepted, Action, Parts, Unit};
use crate::posix::Tier;
use crate::task::{Kind, Notify, Plan, Task, TaskOwner, UnitSpec};

/// Entries of one batch at most.
pub const ENTRIES_MAX: usize = 1 << 20;

/// What to transfer. The slices are copied before submit returns.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// One id an entry.
    pub blocks: &'a [BlockId],
    /// One shard index an entry, inside the parts this store owns; `None`: all 0.
    pub shards: Option<&'a [u32]>,
    /// Entries times tensor slices of a shard, row by row: base addresses in caller memory.
    pub addresses: &'a [*mut c_void],
    /// A device event that the copies wait for, or null.
    pub wait_event: *mut c_void,
    /// Which stages go to the completion queue.
    pub notify: Notify,
    /// Given back by reap.
    pub user_data: u64,
    /// Given back by reap; the caller of the engine's own name for the task.
    pub tag: u64,
    /// This task's deadline in milliseconds; 0: the store's `timeout_ms`; below 0: none.
    pub timeout_ms: i64,
}

impl Engine {
    /// # Safety
    /// See [`super::Store::save`] and [`super::Store::load`].
    pub(super) unsafe fn submit(&self, kind: Kind, batch: &Batch<'_>) -> Result<Arc<Task>> {
        self.check_transfers()?;
        self.check_batch(batch)?;
        let addresses = self.layout.addresses(batch.addresses)?;
        let units = self.units(batch);
        self.admit(units.len())?;
        let event = if batch.wait_event.is_null() {
            None
        } else {
            // SAFETY: the caller vouches for the event.
            Some(unsafe { self.device.capture_event(batch.wait_event) }?)
        };
        let task = self.make_task(Plan {
            kind,
            units,
            units_per_entry: self.layout.pieces().len(),
            layout: Arc::clone(&self.layout),
            addresses,
            event,
            deadline: self.deadline(batch.timeout_ms),
            notify: batch.notify,
            user_data: batch.user_data,
            tag: batch.tag,
        });
        match kind {
            Kind::Save => self.save_units(&task),
            Kind::Load => self.load_units(&task),
            Kind::Hold => unreachable!("holds have a submit of their own"),
        }
        Ok(task)
    }

    /// Whether this store takes tasks at all.
    pub(super) fn check_transfers(&self) -> Result<()> {
        self.check_open()?;
        if let Some(error) = self.poison.get() {
            return Err(error.clone());
        }
        if self.config.is_lookup_only() {
            let text =
                "this store is lookup only (device_id: -1); open one with a device to save or load";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        Ok(())
    }

    fn check_batch(&self, batch: &Batch<'_>) -> Result<()> {
        let bad = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
        let count = batch.blocks.len();
        if count == 0 || count > ENTRIES_MAX {
            return bad(format!("count: {count} entries; allowed are 1 to {ENTRIES_MAX}"));
        }
        if let Some(shards) = batch.shards {
            let limit = self.config.geometry.shard_count();
            if shards.len() != count {
                return bad(format!("shards: {} indexes for {count} blocks", shards.len()));
            }
            if let Some((entry, shard)) =
                shards.iter().enumerate().find(|(_, shard)| **shard >= limit)
            {
                return bad(format!(
                    "shards[{entry}]: {shard} is not below {limit} (block_size / shard_size)"
                ));
            }
        }
        let slices = self.layout.slices_per_shard();
        if batch.addresses.len() != count * slices {
            let addresses = batch.addresses.len();
            return bad(format!(
                "addresses: {addresses} for {count} entries of {slices} tensor slices"
            ));
        }
        Ok(())
    }

    fn units(&self, batch: &Batch<'_>) -> Vec<UnitSpec> {
        let pieces = self.layout.pieces().len();
        let mut units = Vec::with_capacity(batch.blocks.len() * pieces);
        for (index, block) in batch.blocks.iter().enumerate() {
            let shard = batch.shards.map_or(0, |shards| shards[index]);
            units.extend((0..pieces).map(|piece| self.layout.unit(*block, shard, piece)));
        }
        units
    }

    /// Every queue has a limit.
    pub(super) fn admit(&self, units: usize) -> Result<()> {
        let busy = |text: String| {
            self.metrics.busy.add(1);
            Err(Error::new(ErrorKind::Busy, text))
        };
        let live = self.live_units.load(Ordering::Relaxed) as usize;
        let limit = self.config.running_queue_depth;
        if live > 0 && live + units > limit {
            return busy(format!(
                "running_queue_depth: {live} transfers are under way, {limit} are allowed"
            ));
        }
        let parts = self.parts.lock();
        if !parts.has_room() {
            let (used, all) = parts.slots();
            return busy(format!(
                "waiting_queue_depth: {} parts wait for one of {all} slots ({used} in use); raise cache_buffer_capacity_gb",
                parts.queued()
            ));
        }
        Ok(())
    }

    /// The deadline that a caller gave, counted from now.
    pub(super) fn deadline(&self, timeout_ms: i64) -> Option<Instant> {
        let timeout = match timeout_ms {
            0 => Some(self.config.timeout),
            limit => u64::try_from(limit).ok().map(Duration::from_millis),
        };
        timeout.and_then(|timeout| Instant::now().checked_add(timeout))
    }

    pub(super) fn make_task(&self, plan: Plan) -> Arc<Task> {
        let (count, deadline) = (plan.units.len() as u64, plan.deadline);
        let number = self.next_task.fetch_add(1, Ordering::Relaxed);
        let (completions, closed) = (Arc::clone(&self.completions), Arc::clone(&self.closed));
        let task = Task::new(number, plan, completions, closed, self.itself.clone());
        self.live_units.fetch_add(count, Ordering::Relaxed);
        let mut tasks = self.tasks.lock();
        // Under the lock: an alarm that rings at once finds the task.
        let alarm = deadline.map(|deadline| {
            let (engine, late) = (self.itself.clone(), Arc::downgrade(&task));
            self.clock.at(deadline, move || {
                if let (Some(engine), Some(task)) = (engine.upgrade(), late.upgrade()) {
                    engine.expire(&task);
                }
            })
        });
        tasks.insert(number, Live { task: Arc::clone(&task), alarm });
        task
    }

    fn expire(&self, task: &Task) {
        if task.statuses().is_some() {
            return;
        }
        let text = "the task's deadline passed; raise timeout_ms, or see `ucm doctor` for what makes the storage slow";
        task.fail(&Error::new(ErrorKind::Timeout, text));
        // Those who waited behind it for a slot.
        self.event(|parts, actions| parts.pump(actions));
    }

    fn save_units(&self, task: &Arc<Task>) {
        let found = self.find_all(task);
        // What an old index says is there may have been retired and freed since: it must not be acknowledged.
        let grace = self.config.lookup_refresh + self.config.timeout;
        let old =
            |tier: &&Arc<Tier>| found.iter().any(Option::is_some) && tier.refresh_age() > grace;
        let Some(tier) = self.tier.as_ref().filter(old) else {
            return self.save_found(task, found);
        };
        let (engine, task) = (self.this(), Arc::clone(task));
        tier.refresh(Box::new(move |_refreshed| {
            let found = engine.find_all(&task);
            engine.save_found(&task, found);
        }));
    }

    fn save_found(&self, task: &Arc<Task>, found: Vec<Option<crate::posix::Found>>) {
        let direct = self.goes_direct(task);
        let save = |parts: &mut Parts, actions: &mut Vec<Action>| {
            actions.reserve(found.len());
            for (index, found) in found.into_iter().enumerate() {
                let unit = Unit { task: Arc::clone(task), index: index as u32 };
                let key = task.unit(unit.index).key;
                match Some(())
                    .filter(|()| direct && found.is_none())
                    .and_then(|()| parts.begin_direct(key))
                {
                    Some(part) => actions.push(Action::DirectSave { part, unit, key }),
                    None => parts.save(unit, key, found, actions),
                }
            }
        };
        thread::batch(|| {
            let ((), jobs) = self.event_jobs(save);
            let submit = AssertUnwindSafe(|| self.pool.submit(jobs));
            if let Err(panic) = catch_unwind(submit) {
                // As in a copy worker: nothing is left to trust, and nobody is left waiting.
                self.fail_everything(&Error::panicked("the copy of a save", &*panic));
            }
        });
    }

    fn load_units(&self, task: &Arc<Task>) {
        let found = self.find_all(task);
        let direct = self.goes_direct(task);
        let unknown = self.event(|parts, actions| {
            let mut unknown = Vec::new();
            actions.reserve(found.len());
            for (index, found) in found.into_iter().enumerate() {
                let unit = Unit { task: Arc::clone(task), index: index as u32 };
                let key = task.unit(unit.index).key;
                match found.filter(|_| direct && !parts.knows(&key)) {
                    Some(found) => actions.push(Action::DirectLoad { unit, key, found }),
                    None if parts.load(unit.clone(), key, found, actions) == Accepted::Unknown => {
                        unknown.push(unit)
                    }
                    None => {}
                }
            }
            unknown
        });
        self.look_again(unknown, Self::load_known);
    }

    /// Loads what somebody knows; returns the rest.
    fn load_known(&self, units: Vec<Unit>) -> Vec<Unit> {
        let found = self.find_units(&units);
        self.event(|parts, actions| {
            let mut unknown = Vec::new();
            for (unit, found) in units.into_iter().zip(found) {
                let key = unit.key();
                if parts.load(unit.clone(), key, found, actions) == Accepted::Unknown {
                    unknown.push(unit);
                }
            }
            unknown
        })
    }

    pub(super) fn find_units(&self, units: &[Unit]) -> Vec<Option<crate::posix::Found>> {
        let find = |unit: &Unit| self.tier.as_ref().and_then(|tier| tier.find(&unit.key()));
        units.iter().map(find).collect()
    }

    fn find_all(&self, task: &Task) -> Vec<Option<crate::posix::Found>> {
        let keys = (0..task.unit_count() as u32).map(|unit| &task.unit(unit).key);
        match &self.tier {
            Some(tier) => tier.find_many(keys),
            None => keys.map(|_| None).collect(),
        }
    }

    /// Units of parts that nobody knows: another process may have published them since the last refresh, so
    /// there is one refresh, and `again`, before they are said not to be there.
    pub(super) fn look_again(&self, units: Vec<Unit>, again: fn(&Self, Vec<Unit>) -> Vec<Unit>) {
        if units.is_empty() {
            return;
        }
        let Some(tier) = &self.tier else { return self.settle_unknown(units) };
        let engine = self.this();
        tier.refresh(Box::new(move |_refreshed| {
            let unknown = again(&engine, units);
            engine.settle_unknown(unknown);
        }));
    }

    fn settle_unknown(&self, units: Vec<Unit>) {
        for unit in units {
            let PartKey { block, part } = unit.task.unit(unit.index).key;
            let text =
                format!("block {block} part {part} is not stored; look it up before loading");
            unit.task.settle(unit.index, Err(Error::new(ErrorKind::NotFound, text)));
        }
    }

    pub(super) fn prefetch(&self, blocks: &[BlockId]) {
        self.metrics.prefetch_blocks.add(blocks.len() as u64);
        let Some(tier) = self.tier.as_ref().filter(|_| !self.config.is_lookup_only()) else {
            return;
        };
        let geometry = &self.config.geometry;
        let parts = geometry.part_index..geometry.part_index + geometry.parts_owned;
        let keys = blocks.iter().flat_map(|block| {
            parts.clone().map(|part| PartKey { block: *block, part: part as u16 })
        });
        let known: Vec<_> =
            keys.filter_map(|key| tier.find(&key).map(|found| (key, found))).collect();
        self.event(|parts, actions| {
            for (key, found) in known {
                parts.prefetch(key, found, actions);
            }
        });
    }
}

impl TaskOwner for Engine {
    fn copied(&self, kind: Kind, after: Duration) {
        self.count_copied(kind, after);
    }

    fn settled(
        &self,
        kind: Kind,
        after: Duration,
        failures: &mut dyn Iterator<Item = Option<ErrorKind>>,
    ) {
        self.count_settled(kind, after, failures);
    }

    fn retire(&self, number: u64) {
        let live = self.tasks.lock().remove(&number);
        if let Some(Live { task, alarm }) = live {
            if let Some(alarm) = alarm {
                self.clock.cancel(alarm);
            }
            self.live_units.fetch_sub(task.unit_count() as u64, Ordering::Relaxed);
        }
        if self.closing.load(Ordering::Acquire) {
            let _guard = self.drain_lock.lock();
            self.drained.notify_all();
        }
    }

    fn release(&self, hold: &Task) {
        self.event(|parts, actions| parts.release(hold, actions));
    }
}

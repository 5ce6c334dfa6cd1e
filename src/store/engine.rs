//! The engine: what is behind the door, and the carrying out of the part table's actions.
//!
//! Events come from callers (`submit.rs`), reactors (reads, writes), copy workers (copies, checksums) and
//! the clock. Each takes the table's lock for its decision only, lets go, and then acts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::device_hash::Hashes;
use super::fresh::Fresh;
use super::regions::Regions;
use super::slots::Slots;
use crate::clock::{Clock, Ticket};
use crate::completion::CompletionQueue;
use crate::config::Config;
use crate::copy::{Copy, CopyPool, Job, Owner};
use crate::device::{Device, Direction, Staging};
use crate::error::{Error, Result};
use crate::hash::BlockHasher;
use crate::io::backend::Backend;
use crate::io::{DmaSlice, thread};
use crate::layout::Layout;
use crate::metrics::Metrics;
use crate::parts::{Action, PartId, Parts, Unit};
use crate::posix::Tier;
use crate::task::Task;

/// Everything an open store owns.
pub(super) struct Engine {
    pub config: Config,
    pub layout: Arc<Layout>,
    pub hasher: BlockHasher,
    pub device: Arc<dyn Device>,
    pub tier: Option<Arc<Tier>>,
    pub backends: Vec<Arc<Backend>>,
    pub parts: Mutex<Parts>,
    pub pool: CopyPool,
    pub hashes: Arc<Hashes>,
    pub clock: Clock,
    pub completions: Arc<CompletionQueue>,
    pub tasks: Mutex<HashMap<u64, Live>>,
    pub next_task: AtomicU64,
    pub live_units: AtomicU64,
    pub fresh: Fresh,
    pub regions: Regions,
    pub shared: super::open::Shared,
    pub metrics: Metrics,
    pub closing: AtomicBool,
    pub closed: Arc<AtomicBool>,
    /// Told when a task ends or the table changes while the store closes.
    pub drained: Condvar,
    pub drain_lock: Mutex<()>,
    pub poison: OnceLock<Error>,
    /// A device or a drive may still touch the arena: it is never unmapped.
    pub arena_lost: AtomicBool,
    pub itself: Weak<Engine>,
    /// Dropped last: everything above may point into it.
    pub slots: Option<Slots>,
}

/// A task that has not ended.
pub(super) struct Live {
    pub task: Arc<Task>,
    /// Rings at its deadline.
    pub alarm: Option<Ticket>,
}

impl Engine {
    pub(super) fn this(&self) -> Arc<Self> {
        self.itself.upgrade().expect("a method of the engine runs while the engine is alive")
    }

    pub(super) fn tier(&self) -> &Arc<Tier> {
        self.tier.as_ref().expect("parts are stored and read only where there is storage")
    }

    pub(super) fn slots(&self) -> &Slots {
        self.slots.as_ref().expect("a store that transfers has slots")
    }

    /// First byte of a slot's payload.
    pub(super) fn slot_base(&self, slot: u32) -> *mut u8 {
        self.slots().base(slot)
    }

    /// The first `length` bytes of a slot's payload.
    pub(super) fn slot_memory(&self, slot: u32, length: u64) -> DmaSlice {
        DmaSlice { pointer: self.slot_base(slot), length: length as usize }
    }

    /// Takes an event to the part table and carries out what it decides.
    pub(super) fn event<T>(&self, event: impl FnOnce(&mut Parts, &mut Vec<Action>) -> T) -> T {
        thread::batch(|| {
            let (answer, jobs) = self.event_jobs(event);
            self.pool.push(jobs);
            answer
        })
    }

    /// As `event`, for a copy worker: returns the jobs that follow, for it to do itself.
    pub(super) fn event_jobs<T>(
        &self,
        event: impl FnOnce(&mut Parts, &mut Vec<Action>) -> T,
    ) -> (T, Vec<Job>) {
        let mut actions = Vec::new();
        let answer = {
            let mut parts = self.parts.lock();
            let answer = event(&mut parts, &mut actions);
            parts.flush(&mut actions);
            answer
        };
        (answer, self.carry_out(actions))
    }

    pub(super) fn carry_out(&self, actions: Vec<Action>) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut left = actions.len();
        for action in actions {
            if let Action::Gather { .. } | Action::Scatter { .. } = action
                && jobs.is_empty()
            {
                jobs.reserve(left);
            }
            left -= 1;
            match action {
                Action::Gather { part, slot, unit } => jobs.push(self.gather(part, slot, unit)),
                Action::Scatter { part, slot, unit } => {
                    jobs.push(self.copy(Direction::Scatter, part, slot, unit))
                }
                Action::Read { piece, class, expires } => self.read(piece, class, expires),
                Action::Store { part, slot, key, sums } => self.reserve(part, slot, key, sums),
                Action::DirectLoad { unit, key, found } => self.direct_load(unit, key, found),
                Action::DirectSave { part, unit, key } => self.direct_save(part, unit, key),
                Action::Copied(unit) => unit.task.copied(unit.index),
                Action::Settle(unit, result) => unit.task.settle(unit.index, result),
                Action::Share(key) => self.shared.insert(&key),
                Action::Unshare(key) => self.shared.remove(&key),
                Action::WatchPartial(at) => self.watch_partial(at),
            }
        }
        if self.closing.load(Ordering::Acquire) {
            let _guard = self.drain_lock.lock();
            self.drained.notify_all();
        }
        jobs
    }

    pub(super) fn copy(&self, direction: Direction, part: PartId, slot: u32, unit: Unit) -> Job {
        let staging = self.slot_base(slot).wrapping_add(unit.task.offset(unit.index));
        Job::Copy(Copy { direction, part, unit, staging })
    }

    fn watch_partial(&self, at: Instant) {
        let engine = Weak::clone(&self.itself);
        self.clock.at(at, move || {
            if let Some(engine) = engine.upgrade() {
                engine.event(|parts, actions| parts.reclaim_partial(Instant::now(), actions));
            }
        });
    }

    /// Ends everything: after a panic on an engine thread nothing is left to trust.
    pub(super) fn fail_everything(&self, error: &Error) {
        let _ = self.poison.set(error.clone());
        self.fail_tasks(error);
    }

    pub(super) fn fail_tasks(&self, error: &Error) {
        self.live_tasks().iter().for_each(|task| task.fail(error));
    }

    /// Tasks that have not ended, or whose memory is still in use.
    pub(super) fn live_tasks(&self) -> Vec<Arc<Task>> {
        self.tasks.lock().values().map(|live| Arc::clone(&live.task)).collect()
    }
}

impl Owner for Engine {
    fn copied(&self, copy: Copy, result: Option<Result<()>>, staging: Staging) -> Vec<Job> {
        let Copy { direction, part, unit, .. } = copy;
        let mut actions = Vec::new();
        {
            let mut parts = self.parts.lock();
            if staging == Staging::Lost {
                self.arena_lost.store(true, Ordering::Release);
                parts.leak_slot(part);
            }
            match (direction, &result) {
                (Direction::Scatter, _) => parts.scattered(part, &mut actions),
                (Direction::Gather, None) => {
                    parts.gathered(part, unit.clone(), Ok(false), &mut actions)
                }
                (Direction::Gather, Some(result)) => {
                    parts.gathered(part, unit.clone(), result.clone().map(|()| true), &mut actions);
                }
            }
            parts.flush(&mut actions);
        }
        // After the table knows of it, so that whoever waits for COPIED finds the part in DRAM.
        if let Some(result) = result {
            unit.task.end(unit.index, result);
        }
        self.carry_out(actions)
    }

    fn poisoned(&self, error: Error) {
        self.fail_everything(&error);
    }
}

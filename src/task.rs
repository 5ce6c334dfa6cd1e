//! A task: one submitted batch, its stages, and who waits for them.
//!
//! A batch is cut into *units*: one unit is the piece of one entry that lies in one part, so an entry has
//! one unit, or several where its shard covers several parts. A task counts units; it knows neither
//! slots nor files. Every unit is claimed (`begin`) before anything touches its memory and given back
//! (`end`) afterwards; a unit that is settled by a deadline or a cancel can no longer be claimed. That
//! is all that stage RELEASED rests on.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::block::PartKey;
use crate::completion::{Completion, CompletionQueue};
use crate::device::{CapturedEvent, Marker};
use crate::error::{Error, ErrorKind, Result};
use crate::io::thread;
use crate::layout::{Layout, Origin, Piece};

/// What a task does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Device memory to storage.
    Save,
    /// Storage to device memory.
    Load,
    /// Storage to the Cache tier, kept there until the task's handle is released.
    Hold,
}

/// The points in a task's life that can be waited for. The numbers are the C ABI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Save: the device memory is the caller's again, and loads of this process find the block.
    Copied = 1,
    /// Save: any process can load the block.
    Persisted = 2,
    /// Load: the data is in place and visible to the device.
    Loaded = 3,
    /// Engine, kernel and device never touch the batch's memory again.
    Released = 4,
    /// No copy has yet to be enqueued on the device: `stream_wait` does not block.
    Enqueued = 5,
}

/// Answer of a poll or a wait.
#[derive(Clone, Debug)]
pub enum Progress {
    /// Not yet.
    Pending,
    /// Every entry reached the stage.
    Done,
    /// Every entry reached the stage or failed; this is the first error.
    Failed(Error),
}

/// Which stages are reported through the completion queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notify {
    /// After the last stage.
    pub last: bool,
    /// After COPIED too.
    pub copied: bool,
}

/// An address in caller memory. A plain number: who may touch it and when is what `begin` and `end` say.
#[derive(Clone, Copy, Debug)]
pub struct Address(pub usize);

/// What a unit transfers.
#[derive(Clone, Copy, Debug)]
pub struct UnitSpec {
    /// The part.
    pub key: PartKey,
    /// Index of the unit's first shard inside its part.
    pub shard: u32,
}

/// What submit knows of a batch.
pub(crate) struct Plan {
    pub kind: Kind,
    pub units: Vec<UnitSpec>,
    pub units_per_entry: usize,
    pub layout: Arc<Layout>,
    pub addresses: Vec<Address>,
    pub event: Option<CapturedEvent>,
    pub deadline: Option<Instant>,
    pub notify: Notify,
    pub user_data: u64,
    pub tag: u64,
}

/// The store, as its tasks know it. What it counts it counts before anybody who waits for the task, polls it
/// or reaps it learns of the event: the first three are called with the task's state locked.
pub(crate) trait TaskOwner: Send + Sync {
    /// Every unit is copied, or has failed, so long after submit. Called once.
    fn copied(&self, kind: Kind, after: Duration);
    /// Every entry has its result, so long after submit. Called once.
    fn settled(
        &self,
        kind: Kind,
        after: Duration,
        failures: &mut dyn Iterator<Item = Option<ErrorKind>>,
    );
    /// Nothing of the task is left to do. Called once.
    fn retire(&self, number: u64);
    /// The handle of a hold was released: what it holds is to be let go.
    fn release(&self, hold: &Task);
}

#[derive(Clone, Debug)]
enum Phase {
    Waiting,
    Copied,
    Settled(Result<()>),
}

/// What a stream that is to wait for a unit's copy has to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Nobody is at the unit's memory, but somebody may come.
    Expected,
    /// Claimed: a copy may be under way of which no marker knows.
    Claimed,
    /// All that is left to wait for is behind a marker; nobody comes any more.
    Ordered,
}

struct State {
    phases: Vec<Phase>,
    /// Units that have not been copied and have not failed.
    uncopied: usize,
    /// Units that have no final result.
    unsettled: usize,
    /// Units that are not `Ordered`: what `stream_wait` waits for.
    unordered: usize,
    access: Vec<Access>,
    /// Claims on caller memory.
    held: usize,
    copy_error: Option<Error>,
    error: Option<Error>,
    markers: Vec<Marker>,
    waiters: usize,
    /// What waiters were last woken for.
    milestones: Milestones,
    retired: bool,
    told_copied: bool,
    told_settled: bool,
}

/// What `wait_until` may wait for: its conditions depend on nothing else of the state, but for the store's end.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Milestones {
    copied: bool,
    settled: bool,
    released: bool,
    enqueued: bool,
    failed: bool,
}

impl State {
    fn milestones(&self) -> Milestones {
        Milestones {
            copied: self.uncopied == 0,
            settled: self.unsettled == 0,
            released: released(self),
            enqueued: self.unordered == 0,
            failed: self.error.is_some(),
        }
    }
}

/// One submitted batch.
pub struct Task {
    number: u64,
    plan: Plan,
    state: Mutex<State>,
    changed: Condvar,
    completions: Arc<CompletionQueue>,
    store_closed: Arc<AtomicBool>,
    freed: AtomicBool,
    started: Instant,
    owner: Weak<dyn TaskOwner>,
    itself: Weak<Task>,
}

impl Task {
    /// A task none of whose units has begun.
    pub(crate) fn new(
        number: u64,
        plan: Plan,
        completions: Arc<CompletionQueue>,
        store_closed: Arc<AtomicBool>,
        owner: Weak<dyn TaskOwner>,
    ) -> Arc<Self> {
        let count = plan.units.len();
        Arc::new_cyclic(|itself| Self {
            number,
            plan,
            state: Mutex::new(State {
                phases: vec![Phase::Waiting; count],
                uncopied: count,
                unsettled: count,
                unordered: count,
                access: vec![Access::Expected; count],
                held: 0,
                copy_error: None,
                error: None,
                markers: Vec::new(),
                waiters: 0,
                milestones: Milestones::default(),
                retired: false,
                told_copied: false,
                told_settled: false,
            }),
            changed: Condvar::new(),
            completions,
            store_closed,
            freed: AtomicBool::new(false),
            started: Instant::now(),
            owner,
            itself: Weak::clone(itself),
        })
    }

    /// Its number, unique in its store.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Save, load or hold.
    pub fn kind(&self) -> Kind {
        self.plan.kind
    }

    /// What the caller gave with the batch.
    pub fn user_data(&self) -> u64 {
        self.plan.user_data
    }

    /// When the task gives up.
    pub fn deadline(&self) -> Option<Instant> {
        self.plan.deadline
    }

    /// Entries of the batch.
    pub fn entry_count(&self) -> usize {
        self.plan.units.len() / self.plan.units_per_entry
    }

    pub(crate) fn unit_count(&self) -> usize {
        self.plan.units.len()
    }

    pub(crate) fn unit(&self, unit: u32) -> &UnitSpec {
        &self.plan.units[unit as usize]
    }

    /// The slices of a unit.
    pub(crate) fn piece(&self, unit: u32) -> &Piece {
        let pieces = self.plan.layout.pieces();
        &pieces[unit as usize % pieces.len()]
    }

    /// Base address of each slice of a unit.
    pub(crate) fn addresses(&self, unit: u32) -> impl Iterator<Item = Address> + '_ {
        let entry = unit as usize / self.plan.layout.pieces().len();
        let row = entry * self.plan.layout.slices_per_shard();
        let at = move |origin: &Origin| {
            Address(self.plan.addresses[row + origin.slice].0 + origin.offset)
        };
        self.piece(unit).origins.iter().map(at)
    }

    /// Offset of a unit's bytes in its part.
    pub(crate) fn offset(&self, unit: u32) -> usize {
        self.plan.layout.offset(self.unit(unit))
    }

    pub(crate) fn event(&self) -> Option<&CapturedEvent> {
        self.plan.event.as_ref()
    }

    /// Whether the unit has its final result.
    pub(crate) fn is_settled(&self, unit: u32) -> bool {
        matches!(self.state.lock().phases[unit as usize], Phase::Settled(_))
    }

    /// Claims the unit's memory. False: the unit is settled, do not touch its memory.
    pub(crate) fn begin(&self, unit: u32) -> bool {
        let mut state = self.state.lock();
        if matches!(state.phases[unit as usize], Phase::Settled(_)) {
            return false;
        }
        state.held += 1;
        let access = &mut state.access[unit as usize];
        debug_assert_eq!(*access, Access::Expected, "a unit's memory is claimed once");
        *access = Access::Claimed;
        true
    }

    /// Notes that the unit's copy is enqueued on the device: that of a load after verification, that of a save also
    /// where the unit was settled meanwhile, since the device reads its memory all the same.
    pub(crate) fn enqueued(&self, unit: u32, marker: &Marker) {
        let mut state = self.state.lock();
        set_ordered(&mut state, unit);
        if !state.markers.last().is_some_and(|last| Arc::ptr_eq(last, marker)) {
            state.markers.push(marker.clone());
        }
        self.wake(&mut state);
    }

    /// Gives a claim back, with the result of the copy: for a save its COPIED, for a load its end.
    pub(crate) fn end(&self, unit: u32, result: Result<()>) {
        let mut state = self.state.lock();
        unclaim(&mut state, unit);
        match (self.plan.kind, result) {
            (Kind::Save, Ok(())) => self.set_copied(&mut state, unit),
            (_, result) => self.set_settled(&mut state, unit, result),
        }
        self.after_change(state);
    }

    /// Gives a claim back whose result is not known yet; `settle` brings it.
    pub(crate) fn give_back(&self, unit: u32) {
        let mut state = self.state.lock();
        unclaim(&mut state, unit);
        self.after_change(state);
    }

    /// The unit needs no copy: its bytes are there already, or another task brings them.
    pub(crate) fn copied(&self, unit: u32) {
        let mut state = self.state.lock();
        self.set_copied(&mut state, unit);
        self.after_change(state);
    }

    /// The unit's final result. The first result stands.
    pub(crate) fn settle(&self, unit: u32, result: Result<()>) {
        let mut state = self.state.lock();
        self.set_settled(&mut state, unit, result);
        self.after_change(state);
    }

    /// Settles everything that is not settled. What has begun goes on, but its result is not waited for.
    pub(crate) fn fail(&self, error: &Error) {
        let mut state = self.state.lock();
        if state.unsettled == 0 {
            return;
        }
        for unit in 0..self.plan.units.len() as u32 {
            self.set_settled(&mut state, unit, Err(error.clone()));
        }
        self.after_change(state);
    }

    /// Cancels what has not begun and stops waiting for the rest.
    pub fn cancel(&self) {
        self.fail(&Error::new(ErrorKind::Cancelled, "the task was cancelled by its caller"));
    }

    /// Whether the caller's memory is never touched again.
    pub fn is_released(&self) -> bool {
        released(&self.state.lock())
    }

    /// Where the task stands with regard to `stage`, without waiting.
    pub fn poll(&self, stage: Stage) -> Progress {
        if let Some(failed) = self.refuse(stage) {
            return failed;
        }
        progress(&self.state.lock(), stage)
    }

    /// Waits for `stage`, `timeout` at most (`None`: no limit).
    pub fn wait(&self, stage: Stage, timeout: Option<Duration>) -> Progress {
        if let Some(failed) = self.refuse(stage) {
            return failed;
        }
        self.wait_until(timeout.and_then(|timeout| Instant::now().checked_add(timeout)), |state| {
            match progress(state, stage) {
                Progress::Pending => self.closed().map(Progress::Failed),
                known => Some(known),
            }
        })
        .unwrap_or(Progress::Pending)
    }

    /// Threads that wait for the task now.
    #[cfg(test)]
    pub(crate) fn waiters(&self) -> usize {
        self.state.lock().waiters
    }

    /// The store is closed: wakes those who wait for what may never come, such as RELEASED behind a drive
    /// that hangs. To be called after the store has said so.
    pub(crate) fn store_is_closed(&self) {
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Waits until no copy has yet to be enqueued, and returns the markers that a stream has to wait for. A load of
    /// which a unit has failed lacks bytes: its first error, at once. A save does not: the memory of a unit that has
    /// failed is no longer read, or only in front of a marker.
    pub(crate) fn wait_enqueued(&self) -> Result<Vec<Marker>> {
        if let Some(closed) = self.closed() {
            return Err(closed);
        }
        if self.plan.kind == Kind::Hold {
            let text = "a hold brings nothing to a device; wait for its stage LOADED, then load";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let loads = self.plan.kind == Kind::Load;
        self.wait_until(None, |state| match &state.error {
            Some(error) if loads => Some(Err(error.clone())),
            _ if state.unordered == 0 => Some(Ok(state.markers.clone())),
            _ => self.closed().map(Err),
        })
        .expect("a wait without a limit ends with an answer")
    }

    /// The result of every entry, once all have one.
    pub fn statuses(&self) -> Option<Vec<Result<()>>> {
        let state = self.state.lock();
        if state.unsettled > 0 {
            return None;
        }
        Some(self.entry_errors(&state).map(|error| error.cloned().map_or(Ok(()), Err)).collect())
    }

    /// The first error of each entry's units.
    fn entry_errors<'a>(&self, state: &'a State) -> impl Iterator<Item = Option<&'a Error>> {
        let error = |phase: &'a Phase| match phase {
            Phase::Settled(Err(error)) => Some(error),
            _ => None,
        };
        let entries = state.phases.chunks(self.plan.units_per_entry);
        entries.map(move |units| units.iter().find_map(error))
    }

    /// The first error, if there is one.
    pub fn error(&self) -> Option<Error> {
        self.closed().or_else(|| self.state.lock().error.clone())
    }

    /// The error that a task of a closed store answers with.
    pub fn closed(&self) -> Option<Error> {
        self.store_closed
            .load(Ordering::Acquire)
            .then(|| Error::new(ErrorKind::Closed, "the store of this task is closed"))
    }

    /// The caller no longer wants to hear of the task; its work goes on. A hold ends: what it holds may be
    /// evicted from now on, and what it has not read yet when the read is done.
    pub fn release_handle(&self) {
        if self.plan.kind == Kind::Hold {
            // First, so that nothing is granted any more that `release` would not see.
            self.fail(&Error::new(
                ErrorKind::Cancelled,
                "the hold was released before it was complete",
            ));
            if let Some(owner) = self.owner.upgrade() {
                owner.release(self);
            }
            return;
        }
        self.freed.store(true, Ordering::Release);
        self.completions.forget(self.plan.tag);
    }

    fn refuse(&self, stage: Stage) -> Option<Progress> {
        if let Some(error) = self.closed() {
            return Some(Progress::Failed(error));
        }
        let fits = match self.plan.kind {
            Kind::Save => stage != Stage::Loaded,
            Kind::Load => matches!(stage, Stage::Enqueued | Stage::Loaded | Stage::Released),
            Kind::Hold => matches!(stage, Stage::Loaded | Stage::Released),
        };
        (!fits).then(|| {
            let (kind, stages) = match self.plan.kind {
                Kind::Save => ("save", "ENQUEUED, COPIED, PERSISTED and RELEASED"),
                Kind::Load => ("load", "ENQUEUED, LOADED and RELEASED"),
                Kind::Hold => ("hold", "LOADED and RELEASED"),
            };
            let text = format!("stage: a {kind} has the stages {stages}, not {stage:?}");
            Progress::Failed(Error::new(ErrorKind::InvalidArgument, text))
        })
    }

    fn wait_until<T>(
        &self,
        until: Option<Instant>,
        ready: impl Fn(&State) -> Option<T>,
    ) -> Option<T> {
        let mut state = self.state.lock();
        state.waiters += 1;
        let answer = loop {
            if let Some(answer) = ready(&state) {
                break Some(answer);
            }
            match until {
                Some(until) if Instant::now() >= until => break None,
                Some(until) => drop(self.changed.wait_until(&mut state, until)),
                None => self.changed.wait(&mut state),
            }
        };
        state.waiters -= 1;
        answer
    }

    /// Wakes waiters when something that one of them may wait for has come. Most changes of a large batch
    /// are one unit of many, and waking for each costs two system calls a unit.
    fn wake(&self, state: &mut State) {
        let now = state.milestones();
        if now != state.milestones && state.waiters > 0 {
            self.wake_waiters();
        }
        state.milestones = now;
    }

    /// At the end of this thread's batch, if it is in one: who is woken by the first of several tasks that end
    /// together then finds the others ended too, instead of sleeping and being woken for each.
    fn wake_waiters(&self) {
        if let Some(task) = self.itself.upgrade() {
            thread::after_batch_once(Arc::as_ptr(&task).addr(), move || {
                task.changed.notify_all();
            });
        }
    }

    fn set_copied(&self, state: &mut State, unit: u32) {
        let phase = &mut state.phases[unit as usize];
        if matches!(phase, Phase::Waiting) {
            *phase = Phase::Copied;
            state.uncopied -= 1;
        }
        order_if_unclaimed(state, unit);
    }

    fn set_settled(&self, state: &mut State, unit: u32, result: Result<()>) {
        let phase = &mut state.phases[unit as usize];
        match phase {
            Phase::Settled(_) => return,
            Phase::Waiting => {
                state.uncopied -= 1;
                if let Err(error) = &result {
                    state.copy_error.get_or_insert_with(|| error.clone());
                }
            }
            Phase::Copied => {}
        }
        if let Err(error) = &result {
            state.error.get_or_insert_with(|| error.clone());
        }
        *phase = Phase::Settled(result);
        state.unsettled -= 1;
        order_if_unclaimed(state, unit);
    }

    /// Tells the store, the completion queue and waiters, each once, what the change under `state` meant. In
    /// this order, so that whoever has waited for a stage can reap it, and whoever knows of it finds it counted.
    fn after_change(&self, mut state: parking_lot::MutexGuard<'_, State>) {
        let save = self.plan.kind == Kind::Save;
        let copied = state.uncopied == 0 && !std::mem::replace(&mut state.told_copied, true);
        let settled = state.unsettled == 0 && !std::mem::replace(&mut state.told_settled, true);
        let over = state.unsettled == 0 && state.held == 0;
        let retired = over && !std::mem::replace(&mut state.retired, true);
        let news = copied || settled || retired;
        let owner = if news { self.owner.upgrade() } else { None };
        if let Some(owner) = &owner {
            self.tell_owner(&**owner, &state, copied, settled, retired);
        }
        if copied && save && self.plan.notify.copied {
            self.notify(Stage::Copied, state.copy_error.clone().map_or(Ok(()), Err));
        }
        if settled && self.plan.notify.last {
            let last = if save { Stage::Persisted } else { Stage::Loaded };
            self.notify(last, state.error.clone().map_or(Ok(()), Err));
        }
        self.wake(&mut state);
        // Before the owner, which may be the last thing that keeps the store's threads alive.
        drop(state);
    }

    fn tell_owner(
        &self,
        owner: &dyn TaskOwner,
        state: &State,
        copied: bool,
        settled: bool,
        retired: bool,
    ) {
        let (kind, after) = (self.plan.kind, self.started.elapsed());
        if copied {
            owner.copied(kind, after);
        }
        if settled {
            let failures = self.entry_errors(state);
            owner.settled(kind, after, &mut failures.map(|error| error.map(Error::kind)));
        }
        if retired {
            owner.retire(self.number);
        }
    }

    /// Called with the task's state locked; the queue's own lock is taken after it, never the other way round.
    fn notify(&self, stage: Stage, result: Result<()>) {
        if !self.freed.load(Ordering::Acquire) {
            let (tag, user_data) = (self.plan.tag, self.plan.user_data);
            self.completions.push(Completion { tag, user_data, stage, result });
        }
    }
}

/// Gives a claim back.
fn unclaim(state: &mut State, unit: u32) {
    state.held -= 1;
    let access = &mut state.access[unit as usize];
    if *access == Access::Claimed {
        *access = Access::Expected;
    }
    // A unit that was settled while it was claimed is claimed by nobody any more.
    if !matches!(state.phases[unit as usize], Phase::Waiting) {
        set_ordered(state, unit);
    }
}

/// The unit is copied or settled: nobody will claim it any more.
fn order_if_unclaimed(state: &mut State, unit: u32) {
    if state.access[unit as usize] != Access::Claimed {
        set_ordered(state, unit);
    }
}

fn set_ordered(state: &mut State, unit: u32) {
    let access = &mut state.access[unit as usize];
    if std::mem::replace(access, Access::Ordered) != Access::Ordered {
        state.unordered -= 1;
    }
}

/// Nothing is claimed, and nothing that is left to do needs the caller's memory: a save may still be on
/// its way to storage.
fn released(state: &State) -> bool {
    state.uncopied == 0 && state.held == 0
}

fn progress(state: &State, stage: Stage) -> Progress {
    let (left, error) = match stage {
        Stage::Copied => (state.uncopied, &state.copy_error),
        Stage::Persisted | Stage::Loaded => (state.unsettled, &state.error),
        Stage::Released => (usize::from(!released(state)), &None),
        Stage::Enqueued => (state.unordered, &None),
    };
    match (left, error) {
        (0, None) => Progress::Done,
        (0, Some(error)) => Progress::Failed(error.clone()),
        _ => Progress::Pending,
    }
}

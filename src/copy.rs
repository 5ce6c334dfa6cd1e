//! Copy workers: the threads that gather, scatter, verify and seal.
//!
//! Each worker owns one [`CopyStream`]. Workers share two queues, one for loads and one for saves; loads
//! go first. A worker hands every job it has to the device at once, so that a device which batches
//! copies can, and parks when it has neither jobs nor copies to wait for: it is woken by a new job, or by
//! the device through [`Wake`](crate::device::Wake). CPU work on the bytes (checksums) runs here, next to the
//! copy of the same bytes. What follows from a worker's job is done next by the same worker, which has the bytes
//! in its cache.
//!
//! A reactor hands what it has read to the workers, except where that costs more than it gains: with the host
//! device it does small jobs itself, and of larger ones two each time it looks ([`CopyPool::read`]). Nor does a caller
//! hand over what is small as a whole ([`CopyPool::submit`]).

mod hashing;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use crate::device::{CopyJob, CopyStream, Device, Direction, Finished, HASH_BEAT, Staging, Wake};
use crate::error::{Error, Result};
use crate::io::thread;
use crate::parts::{PartId, Unit};
use crate::task::Address;
pub(crate) use hashing::Hash;
use hashing::Hashes;

/// Jobs a worker takes at once from the shared queues where the device copies by itself.
const BATCH_DEVICE: usize = 64;
/// The same where the worker's own thread copies: the others can then share the work.
const BATCH_HOST: usize = 1;

/// Bytes of CPU work after which a worker looks after its stream again, and leaves the rest to others: copies that
/// follow from the work begin, and ended ones are told of, within a fraction of a millisecond.
const CPU_BYTES_AT_ONCE: u64 = 4 << 20;

/// CPU work that whoever submits a batch does itself: some ten microseconds, about what waking a worker costs it.
const CALLER_BYTES: u64 = 128 << 10;

/// Jobs that a woken worker is expected to do before another one is woken: two copies of a MiB take less
/// than waking a thread and putting it to sleep again.
const JOBS_A_WAKE: usize = 2;

/// Of the parts that have ended together a reactor verifies and copies so many by itself. Where the drive is faster
/// than the reactor copies, more have ended each time it looks, and the workers get the others.
const READS_HERE: usize = 2;

/// A copy between a unit's memory and the slot of its part.
pub(crate) struct Copy {
    pub direction: Direction,
    pub part: PartId,
    pub unit: Unit,
    /// First byte of the unit's shard in the slot.
    pub staging: *mut u8,
}

// SAFETY: the address lies in a slot that the part table keeps pinned until the copy's end is reported.
unsafe impl Send for Copy {}

/// Work for a copy worker.
pub(crate) enum Job {
    /// A copy for the device.
    Copy(Copy),
    /// Checksums for the device.
    Hash(Hash),
    /// CPU work on so many bytes: runs on the worker and returns the copies that follow from it.
    Compute(Urgency, u64, Box<dyn FnOnce() -> Vec<Job> + Send>),
}

/// What a worker can still take at once.
#[derive(Clone, Copy)]
struct Room {
    jobs: usize,
    cpu_bytes: u64,
}

impl Room {
    fn of(batch: usize) -> Self {
        Self { jobs: batch, cpu_bytes: CPU_BYTES_AT_ONCE }
    }

    fn is_left(self) -> bool {
        self.jobs > 0 && self.cpu_bytes > 0
    }

    fn take(&mut self, job: &Job) {
        self.jobs -= 1;
        self.cpu_bytes = self.cpu_bytes.saturating_sub(job.cpu_bytes());
    }
}

/// A job's size, as a reactor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// Less than handing it to another thread.
    Small,
    /// Less than the time between two ends, unless the drive is fast.
    Medium,
    /// Too much for a thread that others wait for.
    Large,
}

impl Size {
    const SMALL_BYTES: u64 = 64 << 10;
    const MEDIUM_BYTES: u64 = 4 << 20;

    /// The size of a job on so many bytes.
    pub(crate) fn of(bytes: u64) -> Self {
        if bytes <= Self::SMALL_BYTES {
            Self::Small
        } else if bytes <= Self::MEDIUM_BYTES {
            Self::Medium
        } else {
            Self::Large
        }
    }
}

/// Which of the two queues a job goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    Load,
    Save,
}

impl Job {
    fn urgency(&self) -> Urgency {
        match self {
            Job::Copy(Copy { direction: Direction::Scatter, .. }) => Urgency::Load,
            Job::Copy(Copy { direction: Direction::Gather, .. }) => Urgency::Save,
            Job::Hash(Hash { urgency, .. }) | Job::Compute(urgency, ..) => *urgency,
        }
    }

    /// Does what the CPU is to do; returns what is left.
    fn compute(self) -> Vec<Job> {
        match self {
            Job::Copy(_) | Job::Hash(_) => vec![self],
            Job::Compute(_, _, work) => work(),
        }
    }

    fn cpu_bytes(&self) -> u64 {
        match self {
            Job::Copy(_) | Job::Hash(_) => 0,
            Job::Compute(_, bytes, _) => *bytes,
        }
    }
}

/// Who is told what became of copies.
pub(crate) trait Owner: Send + Sync {
    /// A copy ended; `None`: it never began, since its task was settled before. Returns what to do next.
    fn copied(&self, copy: Copy, result: Option<Result<()>>, staging: Staging) -> Vec<Job>;
    /// A worker's thread panicked: nothing is left to trust.
    fn poisoned(&self, error: Error);
}

#[derive(Default)]
struct Queues {
    loads: VecDeque<Job>,
    saves: VecDeque<Job>,
    /// Of these, work that a device does by itself: one worker hands over as much as there is.
    handed_on: usize,
    /// Bytes of CPU work that are queued.
    cpu_bytes: u64,
    /// Jobs that a worker takes at once.
    batch: usize,
    /// Workers that sleep.
    idle: usize,
    /// Of these, workers that were woken and have not looked yet.
    waking: usize,
    stopped: bool,
}

struct Shared {
    queues: Mutex<Queues>,
    wake: Condvar,
}

thread_local! {
    /// Jobs that the batch of this thread has brought so far, by pool.
    static HELD: RefCell<Vec<(Arc<Shared>, Vec<Job>)>> = const { RefCell::new(Vec::new()) };
    /// While this thread works for a pool: the pool, and the jobs that its work has brought.
    static BROUGHT: RefCell<Option<(Arc<Shared>, Vec<Job>)>> = const { RefCell::new(None) };
    /// Reads that have ended in the batch of this reactor, by pool.
    static READ: RefCell<Vec<(CopyPool, Vec<Job>)>> = const { RefCell::new(Vec::new()) };
}

/// The workers of one store.
#[derive(Clone)]
pub(crate) struct CopyPool {
    shared: Arc<Shared>,
    workers: Arc<Mutex<Vec<JoinHandle<()>>>>,
    /// The one that has no thread, for reactors; only where the device copies with the caller's thread.
    guest: Arc<Mutex<Option<Worker>>>,
}

impl CopyPool {
    /// A pool without threads yet: `start` gives it some.
    pub(crate) fn new() -> Self {
        let shared = Shared { queues: Mutex::new(Queues::default()), wake: Condvar::new() };
        Self { shared: Arc::new(shared), workers: Arc::default(), guest: Arc::default() }
    }

    /// Starts `streams` workers, each with a stream of `device`.
    pub(crate) fn start(
        &self,
        device: &dyn Device,
        streams: usize,
        owner: &Arc<dyn Owner>,
    ) -> Result<()> {
        let batch = if device.is_host() { BATCH_HOST } else { BATCH_DEVICE };
        self.shared.queues.lock().batch = batch;
        for index in 0..streams {
            let worker = self.worker(device, Role::Thread { batch }, owner)?;
            let builder = std::thread::Builder::new().name(format!("ucm-copy-{index}"));
            let thread = thread::quietly(|| builder.spawn(move || worker.run_to_end()))
                .map_err(|error| Error::io("start a copy worker", None, &error))?;
            self.workers.lock().push(thread);
        }
        if device.is_host() {
            *self.guest.lock() = Some(self.worker(device, Role::Guest, owner)?);
        }
        Ok(())
    }

    fn worker(&self, device: &dyn Device, role: Role, owner: &Arc<dyn Owner>) -> Result<Worker> {
        let news = Arc::new(AtomicBool::new(false));
        let (flag, shared) = (Arc::clone(&news), Arc::clone(&self.shared));
        let wake: Wake = Arc::new(move || {
            flag.store(true, Ordering::Release);
            let _queues = shared.queues.lock();
            shared.wake.notify_all();
        });
        Ok(Worker {
            shared: Arc::clone(&self.shared),
            stream: device.open_stream(Arc::clone(&wake))?,
            hashes: Hashes::default(),
            wake,
            news,
            role,
            owner: Arc::clone(owner),
            flying: Vec::new(),
            free: Vec::new(),
            finished: Vec::new(),
        })
    }

    /// The jobs of a batch, from the thread that submits it: done by itself where all of it is less than handing it
    /// over, with neighbours in order, so that they are written together; queued otherwise.
    pub(crate) fn submit(&self, mut jobs: Vec<Job>) {
        let computes = |job: &Job| matches!(job, Job::Compute(..));
        let bytes: u64 = jobs.iter().map(Job::cpu_bytes).sum();
        if bytes <= CALLER_BYTES && jobs.iter().all(computes) {
            jobs = jobs.into_iter().flat_map(Job::compute).collect();
        }
        self.push(jobs);
    }

    /// The job that follows a read, from the reactor that read: done by itself, with what follows, if it is small
    /// or among the first of its batch; otherwise queued.
    pub(crate) fn read(&self, job: Job, size: Size) {
        match size {
            Size::Small => return self.run_here(vec![job]),
            Size::Medium => {}
            Size::Large => return self.push(vec![job]),
        }
        READ.with_borrow_mut(|read| {
            match read.iter_mut().find(|(pool, _)| Arc::ptr_eq(&pool.shared, &self.shared)) {
                Some((_, jobs)) => jobs.push(job),
                None => {
                    read.push((self.clone(), vec![job]));
                    thread::after_batch(|| {
                        for (pool, mut jobs) in READ.with_borrow_mut(std::mem::take) {
                            pool.push(jobs.split_off(READS_HERE.min(jobs.len())));
                            thread::batch(|| pool.run_here(jobs));
                        }
                    });
                }
            }
        });
    }

    /// Does jobs, and what follows from them, on the calling thread, where the device allows it and no other
    /// thread is at it; queues them otherwise.
    fn run_here(&self, mut jobs: Vec<Job>) {
        match self.guest.try_lock().as_deref_mut() {
            Some(Some(guest)) => guest.finish(&mut jobs),
            _ => return self.push(jobs),
        }
        // Who heard of the last job's end may have closed the store before we came to here.
        if self.shared.queues.lock().stopped {
            self.dismiss_guest();
        }
    }

    /// Ends the guest, which keeps its owner alive that owns the pool; whoever is at work as it does so afterwards.
    fn dismiss_guest(&self) {
        let guest = self.guest.try_lock().and_then(|mut guest| guest.take());
        drop(guest);
    }

    /// Queues jobs; one lock and at most one wake-up a job. Inside a batch of the calling thread, all of
    /// the batch's jobs are queued at its end.
    pub(crate) fn push(&self, jobs: Vec<Job>) {
        if !thread::in_batch() {
            return hand_over(&self.shared, jobs);
        }
        HELD.with_borrow_mut(|held| {
            match held.iter_mut().find(|(shared, _)| Arc::ptr_eq(shared, &self.shared)) {
                Some((_, waiting)) => waiting.extend(jobs),
                None => {
                    held.push((Arc::clone(&self.shared), jobs));
                    thread::after_batch(|| {
                        let held = HELD.with_borrow_mut(std::mem::take);
                        held.into_iter().for_each(|(shared, jobs)| hand_over(&shared, jobs));
                    });
                }
            }
        });
    }

    /// Lets the workers finish what is queued and in flight, and ends them.
    pub(crate) fn stop(&self) {
        self.shared.queues.lock().stopped = true;
        self.shared.wake.notify_all();
        let this = std::thread::current().id();
        for worker in std::mem::take(&mut *self.workers.lock()) {
            if worker.thread().id() != this {
                let _ = worker.join();
            }
        }
        self.dismiss_guest();
    }
}

/// Queues jobs, or leaves them with the worker of that pool that this thread is.
fn hand_over(shared: &Arc<Shared>, jobs: Vec<Job>) {
    // A thread whose locals are gone is no worker.
    let is_own = |brought: &RefCell<Option<(Arc<Shared>, _)>>| {
        brought.borrow().as_ref().is_some_and(|(own, _)| Arc::ptr_eq(own, shared))
    };
    if !BROUGHT.try_with(is_own).unwrap_or(false) {
        return shared.push(jobs);
    }
    BROUGHT.with_borrow_mut(|brought| {
        if let Some((_, mine)) = brought {
            mine.extend(jobs);
        }
    });
}

/// While it lives, what the thread brings to the pool is left with it.
struct Brought;

impl Brought {
    fn begin(shared: &Arc<Shared>) -> Self {
        BROUGHT.set(Some((Arc::clone(shared), Vec::new())));
        Self
    }

    fn take(&self) -> Vec<Job> {
        let take = |brought: &mut Option<(_, Vec<Job>)>| {
            brought.as_mut().map(|(_, jobs)| std::mem::take(jobs))
        };
        BROUGHT.with_borrow_mut(take).unwrap_or_default()
    }
}

impl Drop for Brought {
    fn drop(&mut self) {
        BROUGHT.set(None);
    }
}

impl Queues {
    fn add(&mut self, job: Job) {
        self.handed_on += usize::from(self.hands_on(&job));
        self.cpu_bytes += job.cpu_bytes();
        match job.urgency() {
            Urgency::Load => self.loads.push_back(job),
            Urgency::Save => self.saves.push_back(job),
        }
    }

    fn next(&mut self) -> Option<Job> {
        let job = self.loads.pop_front().or_else(|| self.saves.pop_front())?;
        self.handed_on -= usize::from(self.hands_on(&job));
        self.cpu_bytes -= job.cpu_bytes();
        Some(job)
    }

    /// Whether the device copies by itself.
    fn is_device(&self) -> bool {
        self.batch > BATCH_HOST
    }

    fn hands_on(&self, job: &Job) -> bool {
        self.is_device() && matches!(job, Job::Copy(_) | Job::Hash(_))
    }

    /// Workers that what is queued is work for.
    fn wanted(&self) -> usize {
        let shared = self.loads.len() + self.saves.len() - self.handed_on;
        let wanted = shared.div_ceil(JOBS_A_WAKE);
        if !self.is_device() {
            return wanted;
        }
        // What is verified late is copied late: a device waits for its bytes.
        let for_bytes = self.cpu_bytes.div_ceil(CPU_BYTES_AT_ONCE) as usize;
        wanted.max(for_bytes).max(self.handed_on.div_ceil(self.batch))
    }
}

impl Shared {
    fn push(&self, jobs: Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let mut queues = self.queues.lock();
        jobs.into_iter().for_each(|job| queues.add(job));
        // A reactor hands over one job after another: those that come before the first worker has looked
        // wait for it, instead of waking the others for one job each.
        let wake = queues.wanted().min(queues.idle).saturating_sub(queues.waking);
        queues.waking += wake;
        drop(queues);
        for _ in 0..wake {
            self.wake.notify_one();
        }
    }

    /// As many jobs as a worker takes at once; waits for one unless the device has news or its work could be lost
    /// sight of.
    fn take(&self, batch: usize, news: &AtomicBool, flying: Flying, taken: &mut Vec<Job>) -> Taken {
        let mut queues = self.queues.lock();
        loop {
            let mut room = Room::of(batch);
            while room.is_left() {
                let Some(job) = queues.next() else { break };
                room.take(&job);
                taken.push(job);
            }
            if !taken.is_empty() || news.swap(false, Ordering::AcqRel) {
                return Taken::Some;
            }
            if queues.stopped && flying == Flying::Nothing {
                return Taken::End;
            }
            queues.idle += 1;
            let late = match flying {
                Flying::Hashes => self.wake.wait_for(&mut queues, HASH_BEAT).timed_out(),
                Flying::Copies | Flying::Nothing => {
                    self.wake.wait(&mut queues);
                    false
                }
            };
            queues.idle -= 1;
            queues.waking = queues.waking.saturating_sub(1);
            if late {
                return Taken::Some;
            }
        }
    }
}

/// What a worker waits for of its device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flying {
    Nothing,
    /// The stream wakes it.
    Copies,
    /// Also copies, perhaps. A device that has failed wakes nobody.
    Hashes,
}

#[derive(PartialEq, Eq)]
enum Taken {
    Some,
    End,
}

/// Whose thread a worker works on.
#[derive(Clone, Copy)]
enum Role {
    /// Its own; it takes so many jobs at once.
    Thread { batch: usize },
    /// That of a reactor, for a moment.
    Guest,
}

impl Role {
    /// Takes out of what follows from a worker's jobs what others are to do.
    fn share(self, next: &mut Vec<Job>) -> Vec<Job> {
        match self {
            Role::Thread { batch } => {
                let mut room = Room::of(batch);
                let full = next.iter().position(|job| {
                    !room.is_left() || {
                        room.take(job);
                        false
                    }
                });
                full.map_or_else(Vec::new, |full| next.split_off(full))
            }
            // A save that got its slot now is not what the reactor was asked for.
            Role::Guest => next.extract_if(.., |job| job.urgency() == Urgency::Save).collect(),
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    stream: Box<dyn CopyStream>,
    hashes: Hashes,
    /// Called where a poll of the stream or of the checksums would find news.
    wake: Wake,
    news: Arc<AtomicBool>,
    role: Role,
    owner: Arc<dyn Owner>,
    /// Copies in flight, by ticket.
    flying: Vec<Option<Copy>>,
    free: Vec<u64>,
    finished: Vec<Finished>,
}

impl Worker {
    fn run_to_end(mut self) {
        let owner = Arc::clone(&self.owner);
        let run = std::panic::AssertUnwindSafe(|| self.run());
        if let Err(panic) = std::panic::catch_unwind(run) {
            owner.poisoned(Error::panicked("a copy worker", &*panic));
            // The device may still be moving bytes of the copies in flight: their record stays.
            std::mem::forget(self);
        }
    }

    fn run(&mut self) {
        let Role::Thread { batch } = self.role else { return };
        let mut jobs = Vec::new();
        loop {
            let flying = if !self.hashes.is_empty() {
                Flying::Hashes
            } else if self.flying.len() > self.free.len() {
                Flying::Copies
            } else {
                Flying::Nothing
            };
            if self.shared.take(batch, &self.news, flying, &mut jobs) == Taken::End {
                return;
            }
            self.finish(&mut jobs);
        }
    }

    /// Does jobs and what follows from them, as far as the device has ended it.
    fn finish(&mut self, jobs: &mut Vec<Job>) {
        let brought = Brought::begin(&self.shared);
        loop {
            let mut next = self.perform(jobs);
            next.append(&mut self.reap());
            next.append(&mut brought.take());
            self.shared.push(self.role.share(&mut next));
            *jobs = next;
            if jobs.is_empty() {
                return;
            }
        }
    }

    fn perform(&mut self, jobs: &mut Vec<Job>) -> Vec<Job> {
        let mut next = Vec::new();
        let mut copies = Vec::new();
        for job in jobs.drain(..) {
            match job {
                Job::Compute(_, _, work) => next.append(&mut work()),
                Job::Hash(hash) => self.hashes.push(hash),
                Job::Copy(copy) if copy.unit.task.begin(copy.unit.index) => copies.push(copy),
                Job::Copy(copy) => next.append(&mut self.owner.copied(copy, None, Staging::Free)),
            }
        }
        if !copies.is_empty() {
            self.enqueue(copies);
        }
        next
    }

    fn enqueue(&mut self, copies: Vec<Copy>) {
        let addresses: Vec<Vec<*mut c_void>> = copies.iter().map(addresses).collect();
        let waits: Vec<_> = copies.iter().map(|copy| copy.unit.task.event().cloned()).collect();
        let units: Vec<Unit> = copies.iter().map(|copy| copy.unit.clone()).collect();
        let mut jobs = Vec::with_capacity(copies.len());
        for ((copy, addresses), wait) in copies.into_iter().zip(&addresses).zip(&waits) {
            let (direction, staging) = (copy.direction, copy.staging);
            let ticket = self.board(copy);
            let slices = &*units[jobs.len()].task.piece(units[jobs.len()].index).slices;
            jobs.push(CopyJob {
                ticket,
                direction,
                staging,
                addresses,
                slices,
                wait: wait.as_ref(),
            });
        }
        // SAFETY: the slot is pinned by the part table and the caller's memory claimed by `begin`, both
        // until the copy, which stays in `flying`, is reported by `reap`.
        if let Some(marker) = unsafe { self.stream.enqueue(&jobs) } {
            // A unit whose copy failed is left to `reap`: a stream must not wait for bytes that never come.
            let failed = self.stream.failed();
            for (unit, job) in units.iter().zip(&jobs) {
                if !failed.contains(&job.ticket) {
                    unit.task.enqueued(unit.index, &marker);
                }
            }
        }
    }

    fn board(&mut self, copy: Copy) -> u64 {
        match self.free.pop() {
            Some(ticket) => {
                self.flying[ticket as usize] = Some(copy);
                ticket
            }
            None => {
                self.flying.push(Some(copy));
                self.flying.len() as u64 - 1
            }
        }
    }

    fn reap(&mut self) -> Vec<Job> {
        let mut next = Vec::new();
        self.stream.poll(&mut self.finished);
        for Finished { ticket, result, staging } in self.finished.drain(..) {
            let copy = self.flying.get_mut(ticket as usize).and_then(Option::take);
            let copy = copy.expect("the device reports each ticket once");
            self.free.push(ticket);
            next.append(&mut self.owner.copied(copy, Some(result), staging));
        }
        next.append(&mut self.hashes.advance(&self.wake));
        next
    }
}

fn addresses(copy: &Copy) -> Vec<*mut c_void> {
    let addresses = copy.unit.task.addresses(copy.unit.index);
    addresses.map(|Address(address)| std::ptr::with_exposed_provenance_mut(address)).collect()
}

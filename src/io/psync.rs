//! The engine of threads that block: with `pread` and `pwrite` for places where `io_uring` is refused, with
//! another [`Carrier`] for memory that the kernel does not reach.
//!
//! Owns its threads and their queue. Threads start when operations wait and nobody is free, up to the
//! depth or [`THREADS_MAX`], and leave after a while without work. Ends are handed out in batches.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::carrier::{Carrier, SystemCalls};
use super::engine::{Ended, Io, Op, Patience, Token, Wake};
use super::{Class, CloseWatcher, DmaSlice, FileId, Operation, thread};
use crate::error::Result;

/// More threads than this cost more in switching than they gain on any drive that psync is used for.
pub const THREADS_MAX: u32 = 32;
/// Operations held for each thread: with a second one waiting, a thread that ends a transfer begins the next
/// without sleeping in between.
const HELD_PER_THREAD: u32 = 2;
/// A thread without work leaves after this time.
const IDLE: Duration = Duration::from_secs(5);

/// A pool of threads that transfer.
pub struct Psync {
    shared: Arc<Shared>,
    carrier: Arc<dyn Carrier>,
    depth: u32,
    pushed: Vec<Job>,
    watcher: Option<Weak<dyn CloseWatcher>>,
}

struct Job {
    carrier: Arc<dyn Carrier>,
    token: Token,
    operation: Operation,
    file: FileId,
    raw: i32,
    offset: u64,
    memory: DmaSlice,
    class: Class,
}

struct Shared {
    threads_max: usize,
    jobs: Mutex<Jobs>,
    work: Condvar,
    ends: Mutex<Ends>,
    ended: Condvar,
    system_calls: AtomicU64,
}

#[derive(Default)]
struct Jobs {
    /// One queue a class: loads are taken first, as the ring's I/O priorities would have it.
    waiting: [VecDeque<Job>; Class::COUNT],
    threads: usize,
    idle: usize,
    /// Closed files of which the carrier keeps something. One thread at a time drops that, which may block: the others
    /// go on with transfers.
    forgotten: VecDeque<(Arc<dyn Carrier>, FileId)>,
    forgetting: bool,
    closed: bool,
}

#[derive(Default)]
struct Ends {
    ready: Vec<Ended>,
    /// The reactor sleeps until so many are ready.
    wanted: usize,
    woken: bool,
}

impl Psync {
    /// An engine with `depth` threads, or [`THREADS_MAX`].
    pub fn new(depth: u32) -> Self {
        Self::carried_by(Arc::new(SystemCalls), depth)
    }

    /// As [`Psync::new`], with somebody else than the kernel to carry the transfers.
    pub fn carried_by(carrier: Arc<dyn Carrier>, depth: u32) -> Self {
        let threads = depth.clamp(1, THREADS_MAX);
        let shared = Shared {
            threads_max: threads as usize,
            jobs: Mutex::default(),
            work: Condvar::new(),
            ends: Mutex::default(),
            ended: Condvar::new(),
            system_calls: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
            carrier,
            depth: threads * HELD_PER_THREAD,
            pushed: Vec::new(),
            watcher: None,
        }
    }

    fn start_pushed(&mut self) {
        if self.pushed.is_empty() {
            return;
        }
        let mut jobs = self.shared.jobs.lock();
        for job in self.pushed.drain(..) {
            jobs.waiting[job.class.index()].push_back(job);
        }
        if !self.staff(&mut jobs) {
            // The process is out of threads: the reactor tries again later.
            let mut ends = self.shared.ends.lock();
            while let Some(job) = jobs.next() {
                ends.ready.push(Ended { token: job.token, result: -libc::EAGAIN });
            }
        }
    }

    /// Wakes or starts threads for what waits; whether there is one that will come to it.
    fn staff(&self, jobs: &mut Jobs) -> bool {
        let transfers = jobs.waiting.iter().map(VecDeque::len).sum::<usize>();
        let waiting = transfers + usize::from(jobs.can_forget());
        for _ in 0..waiting.min(jobs.idle) {
            self.shared.work.notify_one();
        }
        let room = self.shared.threads_max - jobs.threads;
        for _ in 0..waiting.saturating_sub(jobs.idle).min(room) {
            let shared = Arc::clone(&self.shared);
            match thread::spawn("ucm-psync", self.carrier.stack(), move || shared.work()) {
                Ok(_) => jobs.threads += 1,
                Err(_) => return jobs.threads > 0, // Those that run will come to it.
            }
        }
        true
    }
}

impl Io for Psync {
    fn name(&self) -> &'static str {
        self.carrier.name()
    }

    fn features(&self) -> Vec<String> {
        let mut features = self.carrier.features();
        features.push(format!("up to {} threads", self.shared.threads_max));
        features
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn stack(&self) -> thread::Stack {
        self.carrier.stack()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.shared) as Arc<dyn Wake>
    }

    fn push(&mut self, op: &Op<'_>) {
        if let Some(watcher) = &self.watcher
            && self.carrier.keeps(op.memory)
        {
            op.file.watch(watcher.clone());
        }
        self.pushed.push(Job {
            carrier: Arc::clone(&self.carrier),
            token: op.token,
            operation: op.operation,
            file: op.file.id(),
            raw: op.file.raw(),
            offset: op.offset,
            memory: op.memory,
            class: op.class,
        });
    }

    fn wait(&mut self, patience: Patience, ended: &mut Vec<Ended>) -> Result<()> {
        self.start_pushed();
        let mut ends = self.shared.ends.lock();
        let gathered = Instant::now() + patience.gather;
        while !ends.woken && patience.at_least > 0 {
            let now = Instant::now();
            let until = if now < gathered { Some(gathered) } else { patience.until };
            ends.wanted = if now < gathered { patience.at_least } else { 1 };
            if ends.ready.len() >= ends.wanted {
                break;
            }
            if patience.until.is_some_and(|until| until <= now) {
                break;
            }
            let until = match (until, patience.until) {
                (Some(left), Some(right)) => Some(left.min(right)),
                (left, right) => left.or(right),
            };
            match until {
                Some(until) => drop(self.shared.ended.wait_until(&mut ends, until)),
                None => self.shared.ended.wait(&mut ends),
            }
        }
        ends.woken = false;
        ends.wanted = 0;
        ended.append(&mut ends.ready);
        Ok(())
    }

    fn set_close_watcher(&mut self, watcher: Weak<dyn CloseWatcher>) {
        self.watcher = Some(watcher);
    }

    fn forget_file(&mut self, file: FileId) {
        let mut jobs = self.shared.jobs.lock();
        jobs.forgotten.push_back((Arc::clone(&self.carrier), file));
        // Without a thread it waits for the next transfer's.
        self.staff(&mut jobs);
    }

    fn system_calls(&self) -> u64 {
        self.shared.system_calls.load(Ordering::Relaxed)
    }
}

impl Drop for Psync {
    fn drop(&mut self) {
        // Threads in a transfer end it first; the reactor that owns the memory has drained, or leaks it.
        self.shared.jobs.lock().closed = true;
        self.shared.work.notify_all();
    }
}

impl Wake for Shared {
    fn wake(&self) {
        self.ends.lock().woken = true;
        self.ended.notify_one();
    }
}

impl Jobs {
    fn next(&mut self) -> Option<Job> {
        self.waiting.iter_mut().find_map(VecDeque::pop_front)
    }

    fn can_forget(&self) -> bool {
        !self.forgetting && !self.forgotten.is_empty()
    }
}

impl Shared {
    fn work(&self) {
        let mut jobs = self.jobs.lock();
        loop {
            // Before transfers: under a load that never pauses the space of deleted files would never be free.
            if jobs.can_forget()
                && let Some((carrier, file)) = jobs.forgotten.pop_front()
            {
                jobs.forgetting = true;
                drop(jobs);
                carrier.forget(file);
                drop(carrier);
                jobs = self.jobs.lock();
                jobs.forgetting = false;
                continue;
            }
            if let Some(job) = jobs.next() {
                drop(jobs);
                self.transfer(job);
                jobs = self.jobs.lock();
                continue;
            }
            if jobs.closed {
                break;
            }
            jobs.idle += 1;
            let timed_out = self.work.wait_for(&mut jobs, IDLE).timed_out();
            jobs.idle -= 1;
            if timed_out && !jobs.can_forget() && jobs.waiting.iter().all(VecDeque::is_empty) {
                break;
            }
        }
        jobs.threads -= 1;
    }

    fn transfer(&self, job: Job) {
        // SAFETY: the contract of `Io::push`: file and memory stay valid until the end is handed out,
        // which is after this call.
        let result = unsafe {
            job.carrier.transfer(job.operation, job.file, job.raw, job.offset, job.memory)
        };
        self.system_calls.fetch_add(1, Ordering::Relaxed);
        let token = job.token;
        // Before the end is known: who has drained the engine may take the carrier down.
        drop(job);
        let mut ends = self.ends.lock();
        // Below 2^31: a single call moves at most 0x7fff_f000 bytes.
        ends.ready.push(Ended { token, result: result as i32 });
        let wake = ends.wanted > 0 && ends.ready.len() >= ends.wanted;
        drop(ends);
        if wake {
            self.ended.notify_one();
        }
    }
}

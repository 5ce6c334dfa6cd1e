//! A reactor: one thread that owns one engine and keeps it full.
//!
//! Owns the thread. Requests reach it through a `mailbox`; with nothing to do it sleeps in the engine's own
//! wait, without timer ticks. What happens to a request on its way through the thread is `schedule`'s.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::engine::{Ended, Io, Patience, Registration};
use super::mailbox::{BROKEN, Command, Mailbox, RUNNING, STOPPED, STOPPING};
use super::report::Counters;
use super::schedule::{Limits, Schedule};
use super::{Class, CloseWatcher, DmaSlice, Request, thread};
use crate::error::{Error, ErrorKind, Result};

/// Ends to collect in one wait, at most, while many operations are in flight: each wait is a system call.
const GATHER_ENDS_MAX: usize = 8;
/// One end in so many of the operations in flight is collected: the drive keeps seven eighths of its queue.
const GATHER_SHARE: usize = 8;
/// Ends a second above which they are collected at all: below, the timer of such a wait costs more than the
/// calls it saves (measured: 1 MiB reads at 2.5 GB/s took 1.4 times the CPU).
const GATHER_RATE: f64 = 8000.0;
/// The rate is looked at once in so many ends.
const PACE_WINDOW_ENDS: usize = 256;
/// No end waits longer than this for company. Small beside the milliseconds that a queue of 16 or more
/// transfers takes.
const GATHER_TIME: Duration = Duration::from_micros(500);
/// With that many requests in flight submitters need not wake the reactor, which comes back with the next end:
/// a request waits an eighth of a transfer's time at most, on average, and two system calls less are made for it.
const PLENTY_IN_FLIGHT: usize = 8;
/// That holds for so long; then the reactor parks properly, so that deadlines of what arrives are kept even if
/// the engine is stuck.
const PLENTY_NAP: Duration = Duration::from_millis(10);
/// Not as long where neighbours share operations, so that there are fewer ends to come back with: about half of what
/// a drive takes for one.
const SHARED_NAP: Duration = Duration::from_micros(250);
/// Registration of memory may take 35 ms a GiB; a reactor stuck in the kernel never answers.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// A broken reactor waits that long for operations in flight before it leaks them.
const BROKEN_DRAIN: Duration = Duration::from_secs(30);

/// Whether everything that was in flight has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Nothing touches memory or files any more.
    Yes,
    /// Some operation has not ended. Its memory and files stay allocated for as long as it takes, for ever
    /// if need be.
    Leaked,
}

/// A handle to a reactor; dropping it does not stop the thread, [`Reactor::stop`] does.
pub struct Reactor {
    shared: Arc<Mailbox>,
}

/// What a reactor is told at its start.
#[derive(Clone, Debug)]
pub struct ReactorConfig {
    /// Name of the thread.
    pub name: String,
    /// CPU to pin it to.
    pub cpu: Option<usize>,
    /// Largest single operation.
    pub io_bytes: usize,
    /// Requests that may wait in each class.
    pub queue_depth: usize,
}

impl Reactor {
    /// Starts the thread; an engine that cannot start, or a thread that cannot, is an error.
    pub fn start(io: Box<dyn Io>, config: &ReactorConfig) -> Result<Self> {
        let shared = Arc::new(Mailbox::new(io.waker(), config.queue_depth));
        let waiting = shared.queues.each_ref().map(|queue| Arc::clone(&queue.waiting));
        let limits = Limits { depth: io.depth(), io_bytes: config.io_bytes };
        let mut owned = Owned {
            schedule: Schedule::new(limits, waiting),
            shared: Arc::clone(&shared),
            ended: Vec::with_capacity(limits.depth as usize),
            pace: Pace::new(),
            io,
        };
        let (report, started) = mpsc::sync_channel(1);
        let (cpu, stack) = (config.cpu, owned.io.stack());
        thread::spawn(&config.name, stack, move || {
            thread::mark_reactor();
            let start = cpu.map_or(Ok(()), thread::pin).and_then(|()| owned.io.start());
            let good = start.is_ok();
            let _ = report.send(start);
            if good {
                owned.live();
            }
        })?;
        match started.recv() {
            Ok(start) => start.map(|()| Self { shared }),
            Err(_) => Err(Error::new(ErrorKind::Internal, "an I/O thread died at its start")),
        }
    }

    /// Queues requests in order; those that find no room end with `Busy` on this thread. Never blocks.
    pub fn submit(&self, requests: impl IntoIterator<Item = Request>) {
        let shared = &*self.shared;
        for request in requests {
            shared.enqueue(request);
        }
        self.wake();
        // The thread may have left between the check in `enqueue` and the push: then it is on us.
        if !shared.accepts() {
            shared.fail_queued();
        }
    }

    /// At the end of this thread's batch, if it is in one: the reactor then finds neighbours together.
    fn wake(&self) {
        if thread::in_batch() && self.shared.is_parked() {
            let shared = Arc::clone(&self.shared);
            let key = Arc::as_ptr(&shared).addr();
            return thread::after_batch_once(key, move || shared.wake_if_parked());
        }
        self.shared.wake_if_parked();
    }

    /// Registers memory for fixed-buffer operations. Waits for the reactor.
    pub fn register_memory(&self, memory: DmaSlice) -> Result<Registration> {
        self.command(|reply| Command::Register(memory, reply))
    }

    /// Undoes [`Reactor::register_memory`]; `Busy` while a request uses the memory.
    pub fn unregister_memory(&self, base: *mut u8, length: usize) -> Result<()> {
        self.command(|reply| Command::Unregister(base as usize, length, reply))?
    }

    fn command<T>(&self, command: impl FnOnce(mpsc::SyncSender<T>) -> Command) -> Result<T> {
        let shared = &*self.shared;
        let (reply, answer) = mpsc::sync_channel(1);
        shared.commands.push(command(reply));
        shared.wake_if_parked();
        if !shared.accepts() {
            while shared.commands.pop().is_some() {}
        }
        answer.recv_timeout(COMMAND_TIMEOUT).map_err(|error| match error {
            mpsc::RecvTimeoutError::Disconnected => shared.refusal(),
            mpsc::RecvTimeoutError::Timeout => Error::new(
                ErrorKind::Timeout,
                "an I/O thread has not answered for 60 s; it is stuck in the kernel: check the mount",
            ),
        })
    }

    /// Asks the thread to leave: what has not begun ends with `Closed`, what has begun runs to its end.
    pub fn ask_to_stop(&self) {
        let shared = &*self.shared;
        let _ =
            shared.state.compare_exchange(RUNNING, STOPPING, Ordering::SeqCst, Ordering::SeqCst);
        shared.waker.wake();
    }

    /// As [`Reactor::ask_to_stop`], and waits until `deadline` for the thread to have left.
    pub fn stop(&self, deadline: Instant) -> Drained {
        self.ask_to_stop();
        let mut left = self.shared.left.lock();
        while !*left {
            if self.shared.leaving.wait_until(&mut left, deadline).timed_out() {
                return if *left { Drained::Yes } else { Drained::Leaked };
            }
        }
        Drained::Yes
    }

    /// Why the reactor takes no more requests, if it broke.
    pub fn broken(&self) -> Option<Error> {
        self.shared.why_broken.lock().clone()
    }

    /// What it did so far.
    pub fn counters(&self) -> Counters {
        let shared = &*self.shared;
        let mut counters = *shared.counters.lock();
        counters.wakes = shared.wakes.load(Ordering::Relaxed);
        counters.refused = shared.refused.load(Ordering::Relaxed);
        counters.queued =
            shared.queues.iter().map(|queue| queue.waiting.load(Ordering::Relaxed) as u64).sum();
        counters
    }

    /// Bytes of memory registered with its engine.
    pub fn registered_bytes(&self) -> u64 {
        self.shared.registered_bytes.load(Ordering::Relaxed)
    }
}

/// What the thread owns.
struct Owned {
    io: Box<dyn Io>,
    schedule: Schedule,
    shared: Arc<Mailbox>,
    ended: Vec<Ended>,
    pace: Pace,
}

/// How fast operations end.
struct Pace {
    since: Instant,
    ends: usize,
    /// Above [`GATHER_RATE`] when last looked at.
    fast: bool,
}

impl Pace {
    fn new() -> Self {
        Self { since: Instant::now(), ends: 0, fast: false }
    }

    fn count(&mut self, ends: usize) {
        self.ends += ends;
        if self.ends >= PACE_WINDOW_ENDS {
            let now = Instant::now();
            let window = now.duration_since(self.since).as_secs_f64();
            self.fast = self.ends as f64 > window * GATHER_RATE;
            *self = Self { since: now, ends: 0, fast: self.fast };
        }
    }
}

/// Why the loop ended.
enum End {
    Stopped,
    Broken(Error),
}

impl Owned {
    fn live(mut self) {
        let shared = Arc::clone(&self.shared);
        let watcher: Arc<dyn CloseWatcher> = shared.clone();
        self.io.set_close_watcher(Arc::downgrade(&watcher));
        drop(watcher);
        let end = catch_unwind(AssertUnwindSafe(|| self.run())).unwrap_or_else(|_| {
            End::Broken(Error::new(
                ErrorKind::Internal,
                "an I/O thread panicked; this is a defect in UCM. Close the store and open it again",
            ))
        });
        match end {
            End::Stopped => shared.state.store(STOPPED, Ordering::SeqCst),
            End::Broken(error) => {
                *shared.why_broken.lock() = Some(error.clone());
                shared.state.store(BROKEN, Ordering::SeqCst);
                if !self.fail_all(&error) {
                    // Some operation never ended: its memory, file and callback stay as they are.
                    std::mem::forget(self);
                    return;
                }
            }
        }
        shared.fail_queued();
        drop(self); // The engine first, then tell: nothing touches memory any more.
        *shared.left.lock() = true;
        shared.leaving.notify_all();
    }

    fn run(&mut self) -> End {
        loop {
            let stopping = self.shared.state.load(Ordering::SeqCst) != RUNNING;
            self.take_in();
            if stopping {
                self.schedule.refuse_waiting(&self.shared.refusal());
            }
            self.schedule.expire();
            if let Err(error) = self.call_ended() {
                return End::Broken(error);
            }
            if stopping && self.schedule.is_empty() {
                self.publish();
                return End::Stopped;
            }
            self.schedule.fill(&mut *self.io);
            self.publish();
            if let Err(error) = self.park() {
                return End::Broken(error);
            }
            self.pace.count(self.ended.len());
            self.schedule.settle(&mut self.ended);
            if let Err(error) = self.call_ended() {
                return End::Broken(error);
            }
        }
    }

    /// Calls the `done` of what has ended, after the counters tell of it.
    fn call_ended(&mut self) -> Result<()> {
        if !self.schedule.has_ended() {
            return Ok(());
        }
        self.publish();
        self.schedule.call_ended()
    }

    /// Takes commands and requests from the queues of the submitters.
    fn take_in(&mut self) {
        while let Some(file) = self.shared.closed_files.pop() {
            self.io.forget_file(file);
        }
        for class in Class::ALL {
            while let Some(request) = self.shared.queues[class.index()].requests.pop() {
                self.schedule.accept(request);
            }
        }
        while let Some(command) = self.shared.commands.pop() {
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Register(memory, reply) => {
                let registration = self.io.register_memory(memory);
                let fixed = registration == Registration::Fixed;
                let bytes = if fixed { memory.length as u64 } else { 0 };
                // Before the answer: whoever has it may ask for the count.
                self.shared.registered_bytes.fetch_add(bytes, Ordering::Relaxed);
                if reply.send(registration).is_err() && fixed {
                    // The caller has given up and may unmap the memory: other pages that come to its
                    // address must not be taken for these.
                    let _ = self.io.unregister_memory(memory.pointer);
                    self.shared.registered_bytes.fetch_sub(bytes, Ordering::Relaxed);
                }
            }
            Command::Unregister(base, length, reply) => {
                if self.schedule.uses(base, length) {
                    let text = "the memory is used by transfers in flight; wait for RELEASED first";
                    let _ = reply.send(Err(Error::new(ErrorKind::Busy, text)));
                    return;
                }
                if self.io.unregister_memory(base as *mut u8) {
                    self.shared.registered_bytes.fetch_sub(length as u64, Ordering::Relaxed);
                }
                let _ = reply.send(Ok(()));
            }
        }
    }

    /// Starts what was pushed and sleeps until there is something to do.
    fn park(&mut self) -> Result<()> {
        let together = (self.schedule.in_flight() / GATHER_SHARE).clamp(1, GATHER_ENDS_MAX);
        let mut patience = Patience {
            at_least: if self.pace.fast { together } else { 1 },
            gather: GATHER_TIME,
            until: self.schedule.next_event(),
        };
        if let Some(nap) = self.nap() {
            // What arrives cannot begin, or can wait for the next end: nobody needs to wake us.
            let nap = Instant::now() + nap;
            let event = patience.until;
            patience.until = Some(event.map_or(nap, |event| event.min(nap)));
            self.io.wait(patience, &mut self.ended)?;
            if !self.ended.is_empty() {
                return Ok(());
            }
            patience.until = event;
        }
        self.shared.parked.store(true, Ordering::Relaxed);
        // Pairs with the fence in `wake_if_parked`.
        fence(Ordering::SeqCst);
        if self.shared.has_news() {
            patience.at_least = 0;
        }
        let waited = self.io.wait(patience, &mut self.ended);
        self.shared.parked.store(false, Ordering::Relaxed);
        waited
    }

    /// How long nobody needs to wake the thread, if at all.
    fn nap(&self) -> Option<Duration> {
        let operations = self.schedule.in_flight();
        if self.schedule.is_full() || operations >= PLENTY_IN_FLIGHT {
            return Some(PLENTY_NAP);
        }
        let shared = operations > 0 && self.schedule.transfers() >= PLENTY_IN_FLIGHT;
        shared.then_some(SHARED_NAP)
    }

    /// Ends every request with `error`, once nothing is in flight. False where that never comes.
    fn fail_all(&mut self, error: &Error) -> bool {
        let failed = catch_unwind(AssertUnwindSafe(|| {
            self.schedule.refuse_waiting(error);
            self.schedule.fail_idle(error);
            self.shared.fail_queued();
            let _ = self.schedule.call_ended();
            let until = Instant::now() + BROKEN_DRAIN;
            while self.schedule.in_flight() > 0 && Instant::now() < until {
                let patience = Patience { at_least: 1, gather: Duration::ZERO, until: Some(until) };
                if self.io.wait(patience, &mut self.ended).is_err() {
                    return false;
                }
                self.schedule.settle_failed(&mut self.ended, error);
                let _ = self.schedule.call_ended();
            }
            self.publish();
            self.schedule.in_flight() == 0
        }));
        failed.unwrap_or(false)
    }

    fn publish(&self) {
        let mut counters = self.schedule.counters();
        counters.system_calls = self.io.system_calls();
        *self.shared.counters.lock() = counters;
    }
}

#[cfg(test)]
mod tests {
    use super::super::engine::{Op, Wake};
    use super::super::{Access, Create, Files, OpenHow, Operation, OsFiles};
    use super::*;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    /// An engine that registers memory and transfers nothing.
    struct Registers {
        registered: Arc<AtomicUsize>,
        waker: Arc<Waker>,
    }

    #[derive(Default)]
    struct Waker(parking_lot::Mutex<bool>, parking_lot::Condvar);

    impl Wake for Waker {
        fn wake(&self) {
            *self.0.lock() = true;
            self.1.notify_one();
        }
    }

    impl Io for Registers {
        fn name(&self) -> &'static str {
            "registers"
        }
        fn depth(&self) -> u32 {
            1
        }
        fn waker(&self) -> Arc<dyn Wake> {
            Arc::clone(&self.waker) as Arc<dyn Wake>
        }
        fn push(&mut self, _op: &Op<'_>) {}
        fn wait(&mut self, patience: Patience, _ended: &mut Vec<Ended>) -> Result<()> {
            let mut woken = self.waker.0.lock();
            while patience.at_least > 0 && !*woken {
                self.waker.1.wait(&mut woken);
            }
            *woken = false;
            Ok(())
        }
        fn register_memory(&mut self, _memory: DmaSlice) -> Registration {
            self.registered.fetch_add(1, Ordering::SeqCst);
            Registration::Fixed
        }
        fn unregister_memory(&mut self, _base: *mut u8) -> bool {
            self.registered.fetch_sub(1, Ordering::SeqCst) > 0
        }
        fn system_calls(&self) -> u64 {
            0
        }
    }

    /// Goal: a registration whose caller has stopped waiting for it is undone, because the caller takes its
    /// memory for its own.
    #[test]
    fn a_registration_nobody_waits_for_is_undone() {
        let registered = Arc::new(AtomicUsize::new(0));
        let io = Registers { registered: Arc::clone(&registered), waker: Arc::default() };
        let config =
            ReactorConfig { name: "ucm-test".into(), cpu: None, io_bytes: 4096, queue_depth: 4 };
        let reactor = Reactor::start(Box::new(io), &config).unwrap();
        let memory = DmaSlice { pointer: std::ptr::without_provenance_mut(4096), length: 4096 };
        assert_eq!(reactor.register_memory(memory).unwrap(), Registration::Fixed);
        assert_eq!((registered.load(Ordering::SeqCst), reactor.registered_bytes()), (1, 4096));
        let (reply, answer) = mpsc::sync_channel(1);
        drop(answer);
        reactor.shared.commands.push(Command::Register(memory, reply));
        // Commands are obeyed in order: when this one is answered, the one before has been.
        reactor.unregister_memory(memory.pointer, memory.length).unwrap();
        assert_eq!((registered.load(Ordering::SeqCst), reactor.registered_bytes()), (0, 0));
        assert_eq!(reactor.stop(Instant::now() + Duration::from_secs(60)), Drained::Yes);
    }

    /// An engine that begins operations and ends none before it is told to.
    #[derive(Default)]
    struct Holds {
        begun: Vec<Ended>,
        /// Of the operations that have begun.
        pages: Arc<AtomicUsize>,
        may_end: Arc<AtomicBool>,
        waker: Arc<Waker>,
    }

    impl Io for Holds {
        fn name(&self) -> &'static str {
            "holds"
        }
        fn depth(&self) -> u32 {
            64
        }
        fn waker(&self) -> Arc<dyn Wake> {
            Arc::clone(&self.waker) as Arc<dyn Wake>
        }
        fn push(&mut self, op: &Op<'_>) {
            self.begun.push(Ended { token: op.token, result: op.memory.length as i32 });
            self.pages.fetch_add(op.memory.length / 4096, Ordering::SeqCst);
        }
        fn wait(&mut self, patience: Patience, ended: &mut Vec<Ended>) -> Result<()> {
            let mut woken = self.waker.0.lock();
            let end = patience.until.unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
            while patience.at_least > 0 && !*woken {
                if self.waker.1.wait_until(&mut woken, end).timed_out() {
                    break;
                }
            }
            *woken = false;
            if self.may_end.load(Ordering::SeqCst) {
                ended.append(&mut self.begun);
            }
            Ok(())
        }
        fn system_calls(&self) -> u64 {
            0
        }
    }

    /// Goal: a request that nobody wakes the reactor for, because many are in flight in one operation, begins although
    /// that operation does not end.
    #[test]
    fn a_request_beside_neighbours_in_one_operation_begins() {
        let io = Holds::default();
        let (pages, may_end, waker) =
            (Arc::clone(&io.pages), Arc::clone(&io.may_end), Arc::clone(&io.waker));
        let config = ReactorConfig {
            name: "ucm-test".into(),
            cpu: None,
            io_bytes: 1 << 20,
            queue_depth: 64,
        };
        let reactor = Reactor::start(Box::new(io), &config).unwrap();
        let how = OpenHow { access: Access::Read, create: Create::No, direct: false };
        let file = OsFiles::new().open(Path::new("/dev/null"), how).unwrap();
        let (ends, ended) = mpsc::channel();
        let request = |page: usize| {
            let ends = ends.clone();
            let pointer = std::ptr::without_provenance_mut((page + 1) * 4096);
            Request {
                operation: Operation::Write,
                file: file.clone(),
                offset: page as u64 * 4096,
                memory: DmaSlice { pointer, length: 4096 },
                class: Class::Save,
                expires: None,
                done: Box::new(move |result| ends.send(result).unwrap()),
            }
        };
        reactor.submit((0..PLENTY_IN_FLIGHT).map(request));
        let wait_for = |count| {
            let late = Instant::now() + Duration::from_secs(30);
            while pages.load(Ordering::SeqCst) < count && Instant::now() < late {
                std::thread::yield_now();
            }
            assert_eq!(pages.load(Ordering::SeqCst), count, "pages whose requests have begun");
        };
        wait_for(PLENTY_IN_FLIGHT);
        reactor.submit([request(100)]);
        wait_for(PLENTY_IN_FLIGHT + 1);
        may_end.store(true, Ordering::SeqCst);
        waker.wake();
        for _ in 0..=PLENTY_IN_FLIGHT {
            ended.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        }
        assert_eq!(reactor.stop(Instant::now() + Duration::from_secs(60)), Drained::Yes);
    }
}

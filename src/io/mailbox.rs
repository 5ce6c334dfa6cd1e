//! The mailbox of a reactor: what other threads share with it.
//!
//! Owns the bounded lock-free queues that submitters push into, and the flag that says whether the thread
//! sleeps: only then is it woken. It knows nothing of what the thread does with the requests.

#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, mpsc};

use crossbeam_queue::{ArrayQueue, SegQueue};
use parking_lot::{Condvar, Mutex};

use super::engine::{Registration, Wake};
use super::report::Counters;
use super::{Class, CloseWatcher, DmaSlice, FileId, Request};
use crate::error::{Error, ErrorKind, Result};

/// States of a reactor, in the order they are gone through.
pub(super) const RUNNING: u8 = 0;
/// Takes no more requests; those that have begun end.
pub(super) const STOPPING: u8 = 1;
/// The thread has left.
pub(super) const STOPPED: u8 = 2;
/// The thread or its engine failed.
pub(super) const BROKEN: u8 = 3;

/// See the head of this file.
pub(super) struct Mailbox {
    pub(super) queues: [Queue; Class::COUNT],
    pub(super) commands: SegQueue<Command>,
    pub(super) closed_files: SegQueue<FileId>,
    pub(super) state: AtomicU8,
    pub(super) why_broken: Mutex<Option<Error>>,
    /// The thread sleeps, or is about to, and wants to be woken.
    pub(super) parked: AtomicBool,
    pub(super) waker: Arc<dyn Wake>,
    /// The thread has left, and nothing is in flight.
    pub(super) left: Mutex<bool>,
    pub(super) leaving: Condvar,
    pub(super) wakes: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) counters: Mutex<Counters>,
    pub(super) registered_bytes: AtomicU64,
}

/// The requests of one class.
pub(super) struct Queue {
    pub(super) requests: ArrayQueue<Request>,
    /// Requests that have not begun: those in `requests` and those the thread has taken in.
    pub(super) waiting: Arc<AtomicUsize>,
}

/// What is asked of the thread itself, with where the answer goes.
pub(super) enum Command {
    Register(DmaSlice, mpsc::SyncSender<Registration>),
    Unregister(usize, usize, mpsc::SyncSender<Result<()>>),
}

impl Mailbox {
    pub(super) fn new(waker: Arc<dyn Wake>, queue_depth: usize) -> Self {
        let queue =
            || Queue { requests: ArrayQueue::new(queue_depth.max(1)), waiting: Arc::default() };
        Self {
            queues: [queue(), queue(), queue()],
            commands: SegQueue::new(),
            closed_files: SegQueue::new(),
            state: AtomicU8::new(RUNNING),
            why_broken: Mutex::new(None),
            parked: AtomicBool::new(false),
            waker,
            left: Mutex::new(false),
            leaving: Condvar::new(),
            wakes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            counters: Mutex::default(),
            registered_bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn accepts(&self) -> bool {
        self.state.load(Ordering::SeqCst) == RUNNING
    }

    /// The error for requests that come too late.
    pub(super) fn refusal(&self) -> Error {
        match &*self.why_broken.lock() {
            Some(error) => error.clone(),
            None => Error::new(ErrorKind::Closed, "the storage backend is closed"),
        }
    }

    pub(super) fn enqueue(&self, request: Request) {
        let queue = &self.queues[request.class.index()];
        let limit = queue.requests.capacity();
        if queue.waiting.fetch_add(1, Ordering::Relaxed) >= limit {
            queue.waiting.fetch_sub(1, Ordering::Relaxed);
            return self.refuse(request, limit);
        }
        // Those waiting are at most `limit`, so the queue of that size has room.
        if let Err(request) = queue.requests.push(request) {
            queue.waiting.fetch_sub(1, Ordering::Relaxed);
            self.refuse(request, limit);
        }
    }

    fn refuse(&self, request: Request, limit: usize) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let text = format!(
            "{limit} requests wait for the storage already; it is slower than what is asked of it, \
             or waiting_queue_depth is too low"
        );
        (request.done)(Err(Error::new(ErrorKind::Busy, text)));
    }

    /// Whether what was pushed before needs a wake-up to be seen.
    pub(super) fn is_parked(&self) -> bool {
        // Pairs with the fence in the thread's `park`: either this sees the flag, or the thread sees the push.
        fence(Ordering::SeqCst);
        self.parked.load(Ordering::Relaxed)
    }

    pub(super) fn wake_if_parked(&self) {
        if self.is_parked() && self.parked.swap(false, Ordering::Relaxed) {
            self.wakes.fetch_add(1, Ordering::Relaxed);
            self.waker.wake();
        }
    }

    pub(super) fn has_news(&self) -> bool {
        !self.queues.iter().all(|queue| queue.requests.is_empty())
            || !self.commands.is_empty()
            || !self.closed_files.is_empty()
            || !self.accepts()
    }

    /// Ends all that is queued, on whichever thread found that the reactor has left.
    pub(super) fn fail_queued(&self) {
        for queue in &self.queues {
            while let Some(request) = queue.requests.pop() {
                queue.waiting.fetch_sub(1, Ordering::Relaxed);
                let refusal = self.refusal();
                let done = request.done;
                let _ = catch_unwind(AssertUnwindSafe(|| done(Err(refusal))));
            }
        }
        while self.commands.pop().is_some() {}
    }
}

impl CloseWatcher for Mailbox {
    fn closed(&self, file: FileId) {
        self.closed_files.push(file);
        self.wake_if_parked();
    }
}

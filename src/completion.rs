//! The completion queue: finished tasks that asked to be reaped, and the descriptor that is readable
//! while there are any.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::task::Stage;

/// What a reap returns of one task and stage.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The batch's tag: the name of the task among those of the caller of the engine.
    pub tag: u64,
    /// The batch's user data.
    pub user_data: u64,
    /// The stage that was reached, or failed.
    pub stage: Stage,
    /// The task's result at that stage.
    pub result: Result<()>,
}

/// Completions in the order in which they happened, bounded by the tasks that are alive.
pub struct CompletionQueue {
    queue: Mutex<VecDeque<Completion>>,
    event: OwnedFd,
}

impl CompletionQueue {
    /// An empty queue with its event descriptor.
    pub fn new() -> Result<Self> {
        // SAFETY: eventfd takes no pointers.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if raw < 0 {
            return Err(Error::io("eventfd", None, &std::io::Error::last_os_error()));
        }
        // SAFETY: `raw` was just opened and nobody else owns it.
        let event = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { queue: Mutex::new(VecDeque::new()), event })
    }

    /// The descriptor, readable while completions wait. It stays the queue's.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    pub(crate) fn push(&self, completion: Completion) {
        let mut queue = self.queue.lock();
        queue.push_back(completion);
        if queue.len() == 1 {
            self.signal();
        }
    }

    /// Takes up to `capacity` completions.
    pub fn reap(&self, capacity: usize) -> Vec<Completion> {
        let mut queue = self.queue.lock();
        let count = capacity.min(queue.len());
        let reaped = queue.drain(..count).collect();
        self.clear_if_empty(&queue, count);
        reaped
    }

    /// Drops the completions of a task whose handle was freed.
    pub(crate) fn forget(&self, tag: u64) {
        let mut queue = self.queue.lock();
        let before = queue.len();
        queue.retain(|completion| completion.tag != tag);
        self.clear_if_empty(&queue, before - queue.len());
    }

    fn clear_if_empty(&self, queue: &VecDeque<Completion>, removed: usize) {
        if removed > 0 && queue.is_empty() {
            let mut counter = 0u64;
            // SAFETY: reads 8 bytes into `counter`; the descriptor is non-blocking, and EAGAIN means
            // that it is clear already.
            unsafe { libc::read(self.fd(), (&raw mut counter).cast(), 8) };
        }
    }

    fn signal(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes from `one`. It can fail only with a full counter, which is readable too.
        unsafe { libc::write(self.fd(), (&raw const one).cast(), 8) };
    }
}

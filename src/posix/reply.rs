//! Answers that are given exactly once, and joining several into one.
//!
//! Knows nothing of what is answered. A reply that is dropped (its job was refused, or panicked) answers
//! with an error, so that nobody waits for ever; one that is leaked with an undrainable reactor stays silent.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::io::backend::Backend;

/// A closure that takes the answer.
pub type Answer<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// The right and the duty to answer once.
pub struct Reply<T>(Option<Answer<T>>);

impl<T: 'static> Reply<T> {
    /// `answer` will be called once.
    pub fn new(answer: impl FnOnce(Result<T>) + Send + 'static) -> Self {
        Self(Some(Box::new(answer)))
    }

    /// As [`Reply::new`], without boxing again.
    pub fn boxed(answer: Answer<T>) -> Self {
        Self(Some(answer))
    }

    /// Answers.
    pub fn send(mut self, result: Result<T>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
    }

    /// The answer as a plain closure, for requests.
    pub fn into_done(self) -> Answer<T> {
        Box::new(move |result| self.send(result))
    }

    /// The same answer, or `late` where none has come by `when`; one that comes later is dropped.
    pub fn by(self, clock: &Arc<Clock>, when: Instant, late: Error) -> Self {
        let shared = Arc::new(Mutex::new(Some(self)));
        let waiting = Arc::clone(&shared);
        let ticket = clock.at(when, move || {
            let reply = waiting.lock().take();
            if let Some(reply) = reply {
                reply.send(Err(late));
            }
        });
        let clock = Arc::clone(clock);
        Self::new(move |result| {
            clock.cancel(ticket);
            let reply = shared.lock().take();
            if let Some(reply) = reply {
                reply.send(result);
            }
        })
    }

    /// Runs `job` on the path pool of `backend`; where the pool refuses, the refusal is the answer.
    pub fn run_on(self, backend: &Backend, job: impl FnOnce(Self) + Send + 'static) {
        let shared = Arc::new(Mutex::new(Some(self)));
        let inside = Arc::clone(&shared);
        let refused = backend.run(Box::new(move || {
            let reply = inside.lock().take();
            if let Some(reply) = reply {
                job(reply);
            }
        }));
        if let Err(error) = refused {
            let reply = shared.lock().take();
            if let Some(reply) = reply {
                reply.send(Err(error));
            }
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            answer(Err(Error::new(
                ErrorKind::Internal,
                "a file operation was given up; the backend was closed, or this is a defect in UCM",
            )));
        }
    }
}

/// Whether an error says that the operation was refused before it began, so that nothing has happened.
pub fn never_began(error: &Error) -> bool {
    let refused =
        matches!(error.kind(), ErrorKind::Busy | ErrorKind::Timeout | ErrorKind::Cancelled);
    refused && error.errno().is_none()
}

/// Several operations that end as one: when the last has ended, with the first error if any failed.
pub struct Join {
    left: AtomicUsize,
    error: Mutex<Option<Error>>,
    reply: Mutex<Option<Reply<()>>>,
}

impl Join {
    /// `count` operations, at least one.
    pub fn new(count: usize, reply: Reply<()>) -> Arc<Self> {
        debug_assert!(count > 0);
        Arc::new(Self {
            left: AtomicUsize::new(count),
            error: Mutex::new(None),
            reply: Mutex::new(Some(reply)),
        })
    }

    /// One has ended.
    pub fn ended(&self, result: Result<()>) {
        if let Err(error) = result {
            let mut first = self.error.lock();
            // What began and failed weighs more than what was refused: memory or file were touched.
            if first.as_ref().is_none_or(|first| never_began(first) && !never_began(&error)) {
                *first = Some(error);
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let error = self.error.lock().take();
            let reply = self.reply.lock().take();
            if let Some(reply) = reply {
                reply.send(error.map_or(Ok(()), Err));
            }
        }
    }
}

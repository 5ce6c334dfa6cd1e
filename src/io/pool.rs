//! The path pool of a backend: the few threads that may block on its file system (open, stat, readdir,
//! fsync, rename). Owns its queue and its threads; knows nothing of what the jobs do.
//!
//! Threads start when work waits and nobody is free, and leave after a while without work: an idle store
//! has none. A hung mount holds at most [`THREADS_MAX`] of them, and only this backend's.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::thread::{self, Stack};
use crate::error::{Error, ErrorKind, Result};

/// Threads of one pool. Path calls mostly wait for a server; four keep a manifest tail of many writers
/// moving without a crowd of threads.
pub const THREADS_MAX: usize = 4;
/// Jobs that may wait: a refresh tails one manifest a job, and a namespace has at most a few thousand writers.
pub const QUEUE_MAX: usize = 8192;
/// A thread without work leaves after this time.
const IDLE: Duration = Duration::from_secs(5);

/// A job.
pub type Job = Box<dyn FnOnce() + Send>;

/// A bounded pool of threads that may block.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    name: String,
    threads_max: usize,
    stack: Stack,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
    panics: u64,
}

impl Pool {
    /// A pool without threads yet.
    pub fn new(name: &str, stack: Stack) -> Self {
        Self::with_threads(name, stack, THREADS_MAX)
    }

    /// As [`Pool::new`], with another bound.
    pub fn with_threads(name: &str, stack: Stack, threads_max: usize) -> Self {
        let inner = Inner {
            name: name.into(),
            threads_max,
            stack,
            state: Mutex::default(),
            work: Condvar::new(),
        };
        Self(Arc::new(inner))
    }

    /// Queues a job; `Busy` where [`QUEUE_MAX`] wait already, `Closed` after [`Pool::close`].
    pub fn run(&self, job: Job) -> Result<()> {
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(Error::new(ErrorKind::Closed, "the backend is closed"));
        }
        if state.jobs.len() >= QUEUE_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{QUEUE_MAX} file operations wait already; the file system does not answer or is too slow"
                ),
            ));
        }
        state.jobs.push_back(job);
        if state.jobs.len() <= state.idle {
            self.0.work.notify_one();
        } else if state.threads < self.0.threads_max {
            self.add_thread(&mut state)?;
        }
        Ok(())
    }

    /// Called with the state locked, so that on failure the last job is still the caller's.
    fn add_thread(&self, state: &mut State) -> Result<()> {
        let inner = Arc::clone(&self.0);
        match thread::spawn(&self.0.name, self.0.stack, move || inner.work()) {
            Ok(_) => state.threads += 1,
            Err(_) if state.threads > 0 => (), // The others will come to it.
            Err(error) => {
                state.jobs.pop_back();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes no more jobs; those that wait still run, and the threads then leave.
    pub fn close(&self) {
        self.0.state.lock().closed = true;
        self.0.work.notify_all();
    }

    /// Jobs that ended in a panic: each is a defect.
    pub fn panics(&self) -> u64 {
        self.0.state.lock().panics
    }

    /// Threads that live now.
    pub fn threads(&self) -> usize {
        self.0.state.lock().threads
    }
}

impl Inner {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                let outcome = catch_unwind(AssertUnwindSafe(job));
                state = self.state.lock();
                state.panics += u64::from(outcome.is_err());
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let timed_out = self.work.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if timed_out && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Goal: many jobs share a few threads, all run, and none is lost when some panic.
    #[test]
    fn every_job_runs_once_on_few_threads() {
        let pool = Pool::new("ucm-test", Stack::Engine);
        let (sender, receiver) = mpsc::channel();
        for number in 0..500u32 {
            let sender = sender.clone();
            pool.run(Box::new(move || {
                sender.send(number).unwrap();
                assert!(number % 100 != 7, "a job that panics, on purpose");
            }))
            .unwrap();
        }
        drop(sender);
        let mut seen: Vec<u32> = receiver.iter().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..500).collect::<Vec<_>>());
        assert!(pool.threads() <= THREADS_MAX);
    }

    /// Goal: with all threads stuck the queue fills to its limit and the next job gets Busy, at once.
    #[test]
    fn a_hung_file_system_ends_in_busy() {
        let pool = Pool::with_threads("ucm-test", Stack::Engine, 1);
        let (release, stuck) = mpsc::channel::<()>();
        pool.run(Box::new(move || _ = stuck.recv())).unwrap();
        let mut accepted = 0;
        let error = loop {
            match pool.run(Box::new(|| ())) {
                Ok(()) => accepted += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!((QUEUE_MAX - 1..=QUEUE_MAX).contains(&accepted), "{accepted}");
        drop(release);
        pool.close();
        assert_eq!(pool.run(Box::new(|| ())).unwrap_err().kind(), ErrorKind::Closed);
    }
}

//! The clock: one thread that runs short jobs later (deadlines of tasks and of waiters, heartbeats).
//!
//! It starts with the first job and sleeps until the next one is due: a job that comes earlier wakes it, one that
//! is cancelled does not, so it may wake once for nothing. An idle store never wakes it. It knows nothing of what
//! the jobs do.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::io::thread::quietly;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// By time, then by order of arrival.
    jobs: BTreeMap<(Instant, u64), Job>,
    arrivals: u64,
    /// When the thread looks again by itself; `None`: only when it is woken. Waking it costs the caller more than
    /// the rest of a submit, and deadlines mostly come in order.
    looks_at: Option<Instant>,
    thread: Option<JoinHandle<()>>,
    closed: bool,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

/// A job that waits for its time.
pub struct Ticket((Instant, u64));

/// Runs jobs at their time. Jobs must not block: they hand blocking work to a path pool.
#[derive(Default)]
pub struct Clock(Arc<Inner>);

impl Clock {
    /// Runs `job` at `when`, or soon after. Jobs that wait when the clock is dropped are dropped.
    pub fn at(&self, when: Instant, job: impl FnOnce() + Send + 'static) -> Ticket {
        let mut state = self.0.state.lock();
        state.arrivals += 1;
        let key = (when, state.arrivals);
        if state.closed {
            return Ticket(key);
        }
        state.jobs.insert(key, Box::new(job));
        if state.thread.is_none() {
            let inner = Arc::clone(&self.0);
            let thread = std::thread::Builder::new().name("ucm-clock".into());
            match quietly(|| thread.spawn(move || inner.run())) {
                Ok(thread) => state.thread = Some(thread),
                Err(error) => crate::log::warning(format_args!(
                    "no thread for deadlines: {error}; raise the limit on threads (ulimit -u)"
                )),
            }
        } else if state.looks_at.is_none_or(|looks_at| when < looks_at) {
            // Whoever comes next finds it awake.
            state.looks_at = Some(when);
            self.0.changed.notify_one();
        }
        Ticket(key)
    }

    /// Drops a job that has not run yet.
    pub fn cancel(&self, ticket: Ticket) {
        let job = self.0.state.lock().jobs.remove(&ticket.0);
        drop(job);
    }

    /// Drops the jobs that wait and ends the thread; waits for its end, unless it is the caller. Jobs that
    /// come later are dropped.
    pub fn stop(&self) {
        // A job may drop the last reference to what owns this clock: it cannot wait for itself.
        let this = std::thread::current().id();
        if let Some(thread) = self.end().filter(|thread| thread.thread().id() != this) {
            let _ = thread.join();
        }
    }

    fn end(&self) -> Option<JoinHandle<()>> {
        let mut state = self.0.state.lock();
        state.closed = true;
        self.0.changed.notify_one();
        let jobs = std::mem::take(&mut state.jobs);
        let thread = state.thread.take();
        drop(state);
        drop(jobs);
        thread
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.end();
    }
}

impl Inner {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let next = state.jobs.first_key_value().map(|((when, _), _)| *when);
            state.looks_at = next;
            match next {
                None => self.changed.wait(&mut state),
                Some(when) if when > Instant::now() => {
                    self.changed.wait_until(&mut state, when);
                }
                Some(_) => {
                    let job = state.jobs.pop_first();
                    drop(state);
                    if let Some((_, job)) = job {
                        // A defect in one job must not take the deadlines of all others with it.
                        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                    }
                    state = self.state.lock();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Goal: jobs run in the order of their times, none runs early, and none that was cancelled.
    #[test]
    fn jobs_run_in_order_of_time_unless_cancelled() {
        let clock = Clock::default();
        let start = Instant::now();
        let (sender, receiver) = mpsc::channel();
        let tickets = [30u64, 10, 15, 20].map(|wait| {
            let sender = sender.clone();
            let due = start + Duration::from_millis(wait);
            clock.at(due, move || sender.send((wait, Instant::now() >= due)).unwrap())
        });
        let [_, _, cancelled, _] = tickets;
        clock.cancel(cancelled);
        let order: Vec<(u64, bool)> = receiver.iter().take(3).collect();
        assert_eq!(order, [(10, true), (20, true), (30, true)]);
        clock.stop();
    }
}

//! The clock: one thread that calls back when deadlines pass, parked without a timer while there are none.
//!
//! It knows nothing of what its alarms do; they must be short. Deadlines of tasks that ended in time are
//! dropped when they come up: they hold a weak reference only.

#![forbid(unsafe_code)]

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Deadlines that pass within this are handled together.
const GRAIN: Duration = Duration::from_millis(1);

type Alarm = Box<dyn FnOnce() + Send>;

struct Entry {
    at: Instant,
    alarm: Alarm,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    // The heap's top is the earliest deadline.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.cmp(&self.at)
    }
}

#[derive(Default)]
struct State {
    alarms: BinaryHeap<Entry>,
    thread: Option<JoinHandle<()>>,
    stopped: bool,
}

/// A queue of alarms and the thread that rings them, started with the first.
#[derive(Clone, Default)]
pub struct Clock(Arc<(Mutex<State>, Condvar)>);

impl Clock {
    /// Calls `alarm` on the clock's thread at `at`, or soon after. After `stop` it does nothing.
    pub fn at(&self, at: Instant, alarm: impl FnOnce() + Send + 'static) {
        let (state, changed) = &*self.0;
        let mut state = state.lock();
        if state.stopped {
            return;
        }
        let earliest = state.alarms.peek().is_none_or(|first| at < first.at);
        state.alarms.push(Entry { at, alarm: Box::new(alarm) });
        if state.thread.is_none() {
            let shared = Arc::clone(&self.0);
            let thread = std::thread::Builder::new().name("ucm-clock".into());
            state.thread = thread.spawn(move || run(&shared)).ok();
        } else if earliest {
            changed.notify_one();
        }
    }

    /// Drops all alarms and ends the thread.
    pub fn stop(&self) {
        let (state, changed) = &*self.0;
        let (thread, alarms) = {
            let mut state = state.lock();
            state.stopped = true;
            changed.notify_one();
            (state.thread.take(), std::mem::take(&mut state.alarms))
        };
        drop(alarms);
        // An alarm may drop the last reference to what owns this clock: then it cannot wait for itself.
        if let Some(thread) =
            thread.filter(|thread| thread.thread().id() != std::thread::current().id())
        {
            let _ = thread.join();
        }
    }
}

fn run((state, changed): &(Mutex<State>, Condvar)) {
    let mut due: Vec<Alarm> = Vec::new();
    let mut guard = state.lock();
    loop {
        if guard.stopped {
            return;
        }
        let now = Instant::now() + GRAIN;
        while guard.alarms.peek().is_some_and(|first| first.at <= now) {
            due.extend(guard.alarms.pop().map(|entry| entry.alarm));
        }
        if !due.is_empty() {
            parking_lot::MutexGuard::unlocked(&mut guard, || {
                due.drain(..).for_each(|alarm| alarm())
            });
            continue;
        }
        match guard.alarms.peek().map(|first| first.at) {
            Some(at) => drop(changed.wait_until(&mut guard, at)),
            None => changed.wait(&mut guard),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Goal: alarms ring in the order of their deadlines, whatever the order of the calls.
    #[test]
    fn rings_in_order_of_deadlines() {
        let clock = Clock::default();
        let (sender, receiver) = mpsc::channel();
        let start = Instant::now();
        for delay in [60u64, 20, 40] {
            let sender = sender.clone();
            clock.at(start + Duration::from_millis(delay), move || sender.send(delay).unwrap());
        }
        let rung: Vec<u64> =
            (0..3).map(|_| receiver.recv_timeout(Duration::from_secs(5)).unwrap()).collect();
        assert_eq!(rung, [20, 40, 60]);
        assert!(start.elapsed() >= Duration::from_millis(59));
        clock.stop();
    }
}

//! Events that go back to a pool when nobody needs them: none is made per copy, none is leaked.

#![forbid(unsafe_code)]

use std::sync::Arc;

use parking_lot::Mutex;

use super::driver::{Driver, Event, Fault, Progress};

/// How many pooled events are asked before a new one is made, where events in use may not be recorded
/// again.
const REUSE_TRIES: usize = 4;

/// The events of one device that are not in use.
pub(super) struct EventPool<D: Driver> {
    driver: Arc<D>,
    free: Mutex<Vec<Event>>,
}

impl<D: Driver> EventPool<D> {
    /// Makes `count` events ahead.
    pub(super) fn new(driver: Arc<D>, count: usize) -> Result<Self, Fault> {
        let pool = Self { driver, free: Mutex::new(Vec::with_capacity(count)) };
        for _ in 0..count {
            let event = pool.driver.create_event()?;
            pool.free.lock().push(event);
        }
        Ok(pool)
    }

    /// An event that nothing will record or query until it is dropped.
    pub(super) fn take(self: &Arc<Self>) -> Result<PooledEvent<D>, Fault> {
        if let Some(event) = self.reusable() {
            return Ok(PooledEvent { event, pool: self.clone() });
        }
        Ok(PooledEvent { event: self.driver.create_event()?, pool: self.clone() })
    }

    fn reusable(&self) -> Option<Event> {
        let mut free = self.free.lock();
        if D::EVENTS_REUSABLE {
            return free.pop();
        }
        for back in 1..=REUSE_TRIES.min(free.len()) {
            let at = free.len() - back;
            if matches!(self.driver.query_event(free[at]), Ok(Progress::Done)) {
                return Some(free.swap_remove(at));
            }
        }
        None
    }

    /// Destroys the events that are not in use. The context is current.
    pub(super) fn drain(&self) {
        for event in self.free.lock().drain(..) {
            self.driver.destroy_event(event);
        }
    }
}

/// An event in use.
pub(super) struct PooledEvent<D: Driver> {
    event: Event,
    pool: Arc<EventPool<D>>,
}

impl<D: Driver> PooledEvent<D> {
    pub(super) fn event(&self) -> Event {
        self.event
    }
}

impl<D: Driver> Drop for PooledEvent<D> {
    fn drop(&mut self) {
        self.pool.free.lock().push(self.event);
    }
}

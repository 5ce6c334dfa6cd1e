//! Events that go back to a pool when nobody needs them: none is made per copy, none is leaked.

#![forbid(unsafe_code)]

use std::sync::Arc;

use parking_lot::Mutex;

use super::driver::{Driver, Event, Fault};

/// The events of one device that are not in use.
pub(super) struct EventPool<D: Driver> {
    driver: Arc<D>,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    events: Vec<Event>,
    /// The device is closed: an event that comes back now is destroyed.
    closed: bool,
}

impl<D: Driver> EventPool<D> {
    /// Makes `count` events ahead.
    pub(super) fn new(driver: Arc<D>, count: usize) -> Result<Self, Fault> {
        let pool = Self { driver, free: Mutex::default() };
        for _ in 0..count {
            match pool.driver.create_event() {
                Ok(event) => pool.free.lock().events.push(event),
                Err(fault) => {
                    pool.drain();
                    return Err(fault);
                }
            }
        }
        Ok(pool)
    }

    /// An event that nothing will record or query until it is dropped. Streams may still be waiting for its last
    /// recording: recording it again changes nothing for them.
    pub(super) fn take(self: &Arc<Self>) -> Result<PooledEvent<D>, Fault> {
        let free = self.free.lock().events.pop();
        let event = free.map_or_else(|| self.driver.create_event(), Ok)?;
        Ok(PooledEvent { event, pool: self.clone() })
    }

    /// Destroys the events that are not in use, and from now on those that come back. The context is
    /// current.
    pub(super) fn drain(&self) {
        let mut free = self.free.lock();
        free.closed = true;
        for event in free.events.drain(..) {
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
        let mut free = self.pool.free.lock();
        if !free.closed {
            free.events.push(self.event);
            return;
        }
        drop(free);
        // A task's handle has outlived its store. Where the context is gone, its events went with it.
        if let Ok(_entered) = self.pool.driver.enter() {
            self.pool.driver.destroy_event(self.event);
        }
    }
}

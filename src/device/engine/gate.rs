//! Capturing what a caller's event stands for, without blocking and without holding the event.
//!
//! A private stream (a gate) waits for the caller's event, and an event of ours is recorded behind the
//! wait. From then on the caller may record its event again or destroy it.

use std::ffi::c_void;
use std::sync::Arc;

use parking_lot::Mutex;

use super::driver::{Driver, Event, Fault, Progress, Stream};
use super::event::{EventPool, PooledEvent};

/// Gates of a device. Captures of unrelated streams pass through different gates while there are idle
/// ones; beyond that a later capture waits for an earlier one, which costs time and never order. Few,
/// because each stream with a pending wait takes one of the GPU's connections (8 by default).
const GATES: usize = 4;

/// The state of a caller's event.
pub(super) struct Captured<D: Driver> {
    /// `None`: it had happened already.
    pub(super) event: Option<PooledEvent<D>>,
}

struct Gate {
    stream: Stream,
}

/// The gates of a device.
pub(super) struct Gates<D: Driver> {
    driver: Arc<D>,
    pool: Arc<EventPool<D>>,
    gates: Mutex<(usize, Vec<Gate>)>,
}

impl<D: Driver> Gates<D> {
    pub(super) fn open(driver: Arc<D>, pool: Arc<EventPool<D>>) -> Result<Self, Fault> {
        let this = Self { driver, pool, gates: Mutex::new((0, Vec::with_capacity(GATES))) };
        for _ in 0..GATES {
            match this.driver.create_stream() {
                Ok(stream) => this.gates.lock().1.push(Gate { stream }),
                Err(fault) => {
                    this.close();
                    return Err(fault);
                }
            }
        }
        Ok(this)
    }

    /// Captures `event`. The context is current.
    ///
    /// # Safety
    /// `event` is a live event of this device's runtime.
    pub(super) unsafe fn capture(&self, event: *mut c_void) -> Result<Captured<D>, Fault> {
        let event = Event(event);
        if self.driver.query_event(event)? == Progress::Done {
            return Ok(Captured { event: None });
        }
        let ours = self.pool.take()?;
        let mut gates = self.gates.lock();
        let stream = self.idle(&mut gates);
        self.driver.wait(stream, event)?;
        self.driver.record(ours.event(), stream)?;
        Ok(Captured { event: Some(ours) })
    }

    /// The gate used last if it is idle, else the next in turn: one query, for the caller waits.
    fn idle(&self, gates: &mut (usize, Vec<Gate>)) -> Stream {
        let stream = gates.1[gates.0].stream;
        if matches!(self.driver.query_stream(stream), Ok(Progress::Done)) {
            return stream;
        }
        gates.0 = (gates.0 + 1) % gates.1.len();
        gates.1[gates.0].stream
    }

    /// Destroys the gates. The context is current.
    pub(super) fn close(&self) {
        for gate in self.gates.lock().1.drain(..) {
            self.driver.destroy_stream(gate.stream);
        }
    }
}

//! The watch thread of a device: wakes copy workers that have copies in flight, at a slow beat, in case
//! the driver never calls back. Parked while nothing is in flight.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::device::Wake;
use crate::error::{Error, ErrorKind, Result};
use crate::io::thread::quietly;

/// Wakes the worker of one copy stream.
pub(super) struct Waker {
    wake: Wake,
    in_flight: AtomicUsize,
}

impl Waker {
    pub(super) fn new(wake: Wake) -> Arc<Self> {
        Arc::new(Self { wake, in_flight: AtomicUsize::new(0) })
    }

    /// Calls the worker's function; a panic of it must not cross the driver's frames.
    pub(super) fn wake(&self) {
        let _ = catch_unwind(AssertUnwindSafe(|| (self.wake)()));
    }

    /// Says how many runs of copies the worker waits for.
    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count, Ordering::Release);
    }

    /// The function that the driver calls when copies have ended.
    ///
    /// # Safety
    /// `data` is a `Waker` that outlives the call.
    pub(super) unsafe extern "C" fn called_by_driver(data: *mut c_void) {
        // SAFETY: the queue that passed `data` keeps the waker until its streams are drained, or for ever.
        let waker = unsafe { &*data.cast::<Waker>() };
        waker.wake();
    }
}

struct State {
    wakers: Mutex<Watched>,
    changed: Condvar,
}

#[derive(Default)]
struct Watched {
    wakers: Vec<Weak<Waker>>,
    busy: bool,
    stopped: bool,
}

/// The thread and what it watches.
pub(super) struct Watch {
    state: Arc<State>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    pub(super) fn start(name: &'static str, beat: Duration) -> Result<Self> {
        let state = Arc::new(State { wakers: Mutex::default(), changed: Condvar::new() });
        let shared = state.clone();
        let builder = std::thread::Builder::new().name(format!("ucm-{name}-watch"));
        let thread = quietly(|| builder.spawn(move || run(&shared, beat))).map_err(|e| {
            Error::new(
                ErrorKind::OutOfMemory,
                format!("the watch thread cannot start: {e}; raise the limit of threads"),
            )
        })?;
        Ok(Self { state, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn add(&self, waker: &Arc<Waker>) {
        let mut watched = self.state.wakers.lock();
        watched.wakers.retain(|waker| waker.strong_count() > 0);
        watched.wakers.push(Arc::downgrade(waker));
    }

    /// Says that something is in flight.
    pub(super) fn stir(&self) {
        let mut watched = self.state.wakers.lock();
        if !watched.busy {
            watched.busy = true;
            self.state.changed.notify_one();
        }
    }

    pub(super) fn stop(&self) {
        self.state.wakers.lock().stopped = true;
        self.state.changed.notify_one();
        if let Some(thread) = self.thread.lock().take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(state: &State, beat: Duration) {
    loop {
        let mut watched = state.wakers.lock();
        while !watched.busy && !watched.stopped {
            state.changed.wait(&mut watched);
        }
        if watched.stopped {
            return;
        }
        state.changed.wait_for(&mut watched, beat);
        let wakers: Vec<_> = watched
            .wakers
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|waker| waker.in_flight.load(Ordering::Acquire) > 0)
            .collect();
        watched.busy = !wakers.is_empty();
        drop(watched);
        for waker in wakers {
            waker.wake();
        }
    }
}

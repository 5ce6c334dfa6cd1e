//! Close: what can be finished is finished, the rest is cancelled, and what cannot be drained is leaked.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::engine::Engine;
use crate::error::{Error, ErrorKind};
use crate::io::reactor::Drained;
use crate::log;

/// How long reactors and the tier get to finish once nothing is in flight any more.
const TEARDOWN: Duration = Duration::from_secs(2);

/// How often a closing store looks whether it is drained, should a wake-up get lost.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

pub(super) fn close(engine: &Arc<Engine>) {
    if engine.closing.swap(true, Ordering::AcqRel) {
        // Another thread closes: return when it is done.
        wait_until(engine, None, || engine.closed.load(Ordering::Acquire));
        return;
    }
    let mut end = End { engine, quiet: false };
    let deadline = Instant::now() + engine.config.timeout;
    let cancelled =
        Error::new(ErrorKind::Cancelled, "the store was closed before the transfer began");
    engine.event(|parts, actions| parts.cancel_waiting(&cancelled, actions));
    let drained = wait_until(engine, Some(deadline), || is_drained(engine));
    engine.fail_tasks(&Error::new(ErrorKind::Closed, "the store was closed before the task ended"));
    if let Some(tier) = &engine.tier {
        tier.close(Instant::now() + TEARDOWN);
    }
    // Workers end what they are at before they can be joined. Neither a copy nor a checksum begins from here on: the
    // tasks were ended above.
    let hashes_ended = engine.hashes.shut();
    let copies_ended = hashes_ended && (drained || !engine.parts.lock().is_copying());
    if copies_ended {
        engine.pool.stop();
    }
    let stopped = engine.backends.iter().map(|backend| backend.stop(Instant::now() + TEARDOWN));
    let io_ended = stopped.fold(true, |all, one| all & (one == Drained::Yes));
    engine.clock.stop();
    engine.shared.close();
    end.quiet = copies_ended && io_ended && !engine.arena_lost.load(Ordering::Acquire);
}

/// The last step of a close. Also taken when a step before it panics: who waits for the close must not wait
/// for ever.
struct End<'a> {
    engine: &'a Arc<Engine>,
    /// Nothing touches the arena any more.
    quiet: bool,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        let engine = self.engine;
        if !self.quiet {
            // A drive or a device that never answered may still write to the arena.
            log::warning(format_args!(
                "the store closed with transfers that never ended; their memory is leaked"
            ));
            std::mem::forget(Arc::clone(engine));
        } else if let Some(slots) = &engine.slots {
            engine.device.unpin(slots.start());
        }
        engine.closed.store(true, Ordering::Release);
        engine.live_tasks().iter().for_each(|task| task.store_is_closed());
        let _guard = engine.drain_lock.lock();
        engine.drained.notify_all();
    }
}

fn is_drained(engine: &Engine) -> bool {
    engine.tasks.lock().is_empty() && !engine.parts.lock().is_busy()
}

/// Waits for `ready`; false when the deadline came first.
fn wait_until(engine: &Engine, deadline: Option<Instant>, ready: impl Fn() -> bool) -> bool {
    loop {
        if ready() {
            return true;
        }
        let now = Instant::now();
        if deadline.is_some_and(|deadline| now >= deadline) {
            return false;
        }
        let until = deadline.map_or(now + LOOK_AGAIN, |deadline| deadline.min(now + LOOK_AGAIN));
        let mut guard = engine.drain_lock.lock();
        engine.drained.wait_until(&mut guard, until);
    }
}

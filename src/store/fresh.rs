//! Freshness: lookups older than `lookup_refresh_ms` share one refresh; an idle store asks for none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::log::{self, Level};

/// A lookup waits this long for the refresh it needs; after that, and while that refresh is still under
/// way, lookups answer from what is known: a slow mount must not stall a scheduler.
const LOOKUP_WAIT_MAX: Duration = Duration::from_millis(250);

/// The refresh that lookups share.
#[derive(Default)]
pub(super) struct Fresh {
    /// When the refresh under way began.
    since: Mutex<Option<Instant>>,
    ended: Condvar,
    widened: AtomicBool,
}

impl Engine {
    /// Makes sure that the index is not older than `lookup_refresh_ms`, if that is to be had in time.
    pub(super) fn freshen(&self) {
        let Some(tier) = &self.tier else { return };
        let geometry = &self.config.geometry;
        // A store that transfers tails its own parts only, until somebody asks about whole blocks.
        let narrow = !self.config.is_lookup_only() && geometry.parts_owned < geometry.part_count;
        let widen = narrow && !self.fresh.widened.swap(true, Ordering::AcqRel);
        if widen {
            tier.widen();
        }
        if !widen && tier.refresh_age() <= self.config.lookup_refresh {
            return;
        }
        let mut since = self.fresh.since.lock();
        let began = match *since {
            Some(began) => began,
            None => {
                let now = Instant::now();
                *since = Some(now);
                parking_lot::MutexGuard::unlocked(&mut since, || self.start_refresh());
                now
            }
        };
        let until = began + LOOKUP_WAIT_MAX;
        while since.is_some() && !self.fresh.ended.wait_until(&mut since, until).timed_out() {}
    }

    fn start_refresh(&self) {
        let engine = self.this();
        let done = move |result: Result<()>| {
            if let Err(error) = result {
                log::once(
                    Level::Warning,
                    "refresh failed",
                    format_args!("a refresh failed: {error}"),
                );
            }
            *engine.fresh.since.lock() = None;
            engine.fresh.ended.notify_all();
        };
        self.tier().refresh(Box::new(done));
    }

    /// A refresh that begins now; waits for its end.
    pub(super) fn refresh(&self, timeout: Option<Duration>) -> Result<()> {
        self.shared.refresh();
        let Some(tier) = &self.tier else { return Ok(()) };
        let outcome = Arc::new((Mutex::new(None), Condvar::new()));
        let ended = Arc::clone(&outcome);
        tier.refresh(Box::new(move |result| {
            *ended.0.lock() = Some(result);
            ended.1.notify_all();
        }));
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut result = outcome.0.lock();
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            match until {
                None => outcome.1.wait(&mut result),
                Some(until) if !outcome.1.wait_until(&mut result, until).timed_out() => {}
                Some(_) if result.is_some() => {}
                Some(_) => {
                    let text =
                        "the storage backends did not answer the refresh in time; check the mounts";
                    return Err(Error::new(ErrorKind::Timeout, text));
                }
            }
        }
    }
}

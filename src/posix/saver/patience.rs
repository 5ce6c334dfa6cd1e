//! How long a home is waited for, and what is done with one that fails or does not answer: it rests, and saves
//! go elsewhere.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Extent, Saver, State};
use crate::error::{Error, ErrorKind};

/// A home that failed is tried again after this time.
const RETRY: Duration = Duration::from_secs(3);
/// A save waits at most this long for one home.
const PATIENCE_MAX: Duration = Duration::from_secs(10);
/// A full one sooner: space comes back when something is reclaimed.
const RETRY_NO_SPACE: Duration = Duration::from_millis(500);

/// Data writes on their way, to see a drive that does not answer.
#[derive(Default)]
pub(super) struct Writes {
    in_flight: usize,
    /// When the last one ended, or the first of those in flight began.
    progress: Option<Instant>,
}

impl Saver {
    /// Why the home takes no saves now, if so.
    pub fn failure(&self) -> Option<Error> {
        let state = self.state.lock();
        let (until, error) = state.failed.as_ref()?;
        (Instant::now() < *until).then(|| error.clone())
    }

    pub(super) fn fail(&self, state: &mut State, error: &Error) {
        let wait = if error.kind() == ErrorKind::NoSpace { RETRY_NO_SPACE } else { RETRY };
        if state.failed.is_none() {
            crate::log::warning(format_args!(
                "{} takes no saves for a while: {error}",
                self.home.backend.directory().display()
            ));
        }
        state.failed = Some((Instant::now() + wait, error.clone()));
    }

    /// A data write has failed: the segment is filled no further and the home rests.
    pub fn write_failed(self: &Arc<Self>, extent: &Extent, error: &Error) {
        let mut state = self.state.lock();
        self.fail(&mut state, error);
        let is_current =
            state.current.as_ref().is_some_and(|current| current.handle == extent.segment().handle);
        if is_current {
            state.current = state.next.take();
        }
        drop(state);
        self.close_filled(Some((Arc::clone(extent.writer()), Arc::clone(extent.segment()))));
    }

    pub(super) fn watch_waiters(self: &Arc<Self>, when: Instant) {
        let saver = Arc::downgrade(self);
        self.clock.at(when, move || {
            if let Some(saver) = saver.upgrade() {
                saver.expire_waiters();
            }
        });
    }

    fn expire_waiters(self: &Arc<Self>) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let waiters = std::mem::take(&mut state.waiters);
        let (over, waiting): (VecDeque<_>, VecDeque<_>) =
            waiters.into_iter().partition(|waiter| waiter.expires <= now);
        let next = waiting.iter().map(|waiter| waiter.expires).min();
        state.waiters = waiting;
        state.watched = next;
        if !over.is_empty() && state.preparing {
            self.fail(&mut state, &expired());
        }
        drop(state);
        if let Some(next) = next {
            self.watch_waiters(next);
        }
        over.into_iter().for_each(|waiter| waiter.reply.send(Err(expired())));
    }

    /// How long a save waits for this home before it is taken elsewhere.
    pub(super) fn patience(&self) -> Duration {
        self.home.layout.config.timeout.min(PATIENCE_MAX)
    }

    /// A data write goes to the drive.
    pub fn write_begins(&self) {
        let mut writes = self.writes.lock();
        if writes.in_flight == 0 {
            writes.progress = Some(Instant::now());
        }
        writes.in_flight += 1;
    }

    /// A data write has ended, one way or the other.
    pub fn write_ended(&self) {
        let mut writes = self.writes.lock();
        writes.in_flight -= 1;
        writes.progress = Some(Instant::now());
    }

    /// A drive on which writes are under way and none has ended for long takes no more: each would hold
    /// memory of the store that other backends could use.
    pub(super) fn hung(&self) -> Option<Error> {
        let writes = self.writes.lock();
        let since = writes.progress.filter(|_| writes.in_flight > 0)?;
        (since.elapsed() > self.patience()).then(|| {
            Error::new(
                ErrorKind::Timeout,
                "the storage does not answer writes; check the mount and its server",
            )
            .at(self.home.backend.directory())
        })
    }
}

/// What a save is told that waited too long.
pub(super) fn expired() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "the deadline passed while the save waited for a segment; check the mount, or raise timeout_ms",
    )
}

//! The saver of one home: the current writer, its segments, and the saves that wait for room.
//!
//! Owns which writer is current and which segment is being filled; prepares the next one on the path pool
//! while the current one fills. A home that fails is latched with its reason and tried again after a while;
//! other homes go on. Knows manifests and segments by their doors only.

#![forbid(unsafe_code)]

mod extent;
mod patience;
mod writer;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::Mutex;

pub use self::extent::Extent;
pub use self::writer::Writer;

use self::patience::{Writes, expired};
use self::writer::append;
use crate::block::{PAGE, PartKey};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::posix::capacity::Capacity;
use crate::posix::catalog::Catalog;
use crate::posix::format::{Kind, Record};
use crate::posix::home::Home;
use crate::posix::host::wall_ms;
use crate::posix::open_files::OpenFiles;
use crate::posix::reply::Reply;
use crate::posix::segment::{Closing, OwnSegment, Room};

/// Saves that may wait for a segment to be made.
const WAITERS_MAX: usize = 4096;

/// A segment that has no room any more, and its writer.
type Filled = (Arc<Writer>, Arc<OwnSegment>);

struct Waiter {
    key: PartKey,
    expires: Instant,
    reply: Reply<Extent>,
}

#[derive(Default)]
struct State {
    writer: Option<Arc<Writer>>,
    current: Option<Arc<OwnSegment>>,
    next: Option<Arc<OwnSegment>>,
    preparing: bool,
    /// Writers whose manifest was given up, until it is fenced.
    former: Vec<Arc<Writer>>,
    waiters: VecDeque<Waiter>,
    /// When it is looked next whether waiters have waited long enough.
    watched: Option<Instant>,
    failed: Option<(Instant, Error)>,
    closed: bool,
    beating: bool,
    /// Records for the manifest of a writer that is not there yet.
    early: Vec<Record>,
}

/// Saves into one home.
pub struct Saver {
    /// The home.
    pub home: Arc<Home>,
    catalog: Arc<Catalog>,
    files: Arc<OpenFiles>,
    clock: Arc<Clock>,
    capacity: Arc<Capacity>,
    state: Mutex<State>,
    /// Held while a writer is made: one at a time.
    making: Mutex<()>,
    /// Ids of the writers that this saver is or was, until fenced, so that their manifests are not tailed.
    own_ids: Mutex<Vec<u64>>,
    writes: Mutex<Writes>,
}

impl Saver {
    /// A saver that has no writer yet: it gets one with the first save.
    pub fn new(
        home: Arc<Home>,
        catalog: Arc<Catalog>,
        files: Arc<OpenFiles>,
        clock: Arc<Clock>,
        capacity: Arc<Capacity>,
    ) -> Arc<Self> {
        Arc::new(Self {
            home,
            catalog,
            files,
            clock,
            capacity,
            state: Mutex::default(),
            making: Mutex::default(),
            own_ids: Mutex::default(),
            writes: Mutex::default(),
        })
    }

    /// Takes room for a part: at once where there is some, else when a segment was made.
    pub fn reserve(
        self: &Arc<Self>,
        key: &PartKey,
        expires: Option<Instant>,
        reply: Reply<Extent>,
    ) {
        let mut state = self.state.lock();
        let refused = if state.closed {
            Some(Error::new(ErrorKind::Closed, "the store is closed"))
        } else {
            let resting = state.failed.as_ref().filter(|(until, _)| Instant::now() < *until);
            resting.map(|(_, error)| error.clone()).or_else(|| self.hung())
        };
        if let Some(error) = refused {
            drop(state);
            return reply.send(Err(error));
        }
        self.drop_latched_writer(&mut state);
        // Where the mount hangs the save goes elsewhere, or is dropped: it holds memory meanwhile.
        let latest = Instant::now() + self.patience();
        let expires = expires.map_or(latest, |expires| expires.min(latest));
        let (extent, filled) = self.take(&mut state, key);
        let prepare = self.should_prepare(&mut state, extent.is_none());
        let refusal = match extent {
            Some(extent) => {
                drop(state);
                reply.send(Ok(extent));
                None
            }
            None if state.waiters.len() >= WAITERS_MAX => {
                drop(state);
                Some(reply)
            }
            None => {
                state.waiters.push_back(Waiter { key: *key, expires, reply });
                let watch = state.watched.is_none_or(|watched| expires < watched);
                if watch {
                    state.watched = Some(expires);
                }
                drop(state);
                if watch {
                    self.watch_waiters(expires);
                }
                None
            }
        };
        if let Some(reply) = refusal {
            reply.send(Err(Error::new(
                ErrorKind::Busy,
                format!("{WAITERS_MAX} saves wait for a segment already; storage does not keep up"),
            )));
        }
        self.close_filled(filled);
        if prepare {
            self.prepare();
        }
    }

    /// An extent of the current segment, or of the next one, which then is the current one.
    fn take(
        self: &Arc<Self>,
        state: &mut State,
        key: &PartKey,
    ) -> (Option<Extent>, Option<Filled>) {
        let Some(writer) = state.writer.clone() else { return (None, None) };
        let mut filled = None;
        loop {
            let Some(segment) = state.current.clone() else { return (None, filled) };
            if let Some(page) = segment.take() {
                let extent = Extent::new(*key, Arc::clone(self), writer, segment, page);
                return (Some(extent), filled);
            }
            let Some(next) = state.next.take() else { return (None, filled) };
            filled = Some((Arc::clone(&writer), segment));
            state.current = Some(next);
        }
    }

    fn should_prepare(&self, state: &mut State, must: bool) -> bool {
        let half = || state.current.as_ref().is_none_or(|segment| segment.room() != Room::Plenty);
        let needed = must || (state.next.is_none() && half());
        let begin = needed && !state.preparing && !state.closed;
        state.preparing |= begin;
        begin
    }

    fn close_filled(&self, filled: Option<Filled>) {
        if let Some((writer, segment)) = filled {
            let closing = segment.close();
            self.seal(&writer, &segment, closing);
        }
    }

    /// Records that a segment will not grow any more, and gives its unused end back.
    fn seal(&self, writer: &Arc<Writer>, segment: &Arc<OwnSegment>, closing: Closing) {
        let Closing::Seal(pages) = closing else { return };
        writer.note_sealed(segment.handle);
        let record = Record {
            segment: segment.name.number,
            generation: segment.name.generation,
            page: pages,
            ..Record::of(Kind::Seal, wall_ms())
        };
        append(writer, record);
        if segment.used_bytes() < segment.bytes() {
            let (home, segment) = (Arc::clone(&self.home), Arc::clone(segment));
            let capacity = Arc::clone(&self.capacity);
            let _ = self.home.backend.run(Box::new(move || {
                let used = segment.used_bytes();
                if home.backend.files().truncate(&segment.file, used).is_ok() {
                    capacity.give(segment.bytes() - used);
                }
            }));
        }
    }

    /// Removes a segment that nothing was ever put into, and closes any other. Blocks; on a path pool only.
    fn close_or_discard(&self, writer: &Arc<Writer>, segment: &Arc<OwnSegment>) {
        let closing = segment.close();
        if segment.is_untouched() {
            self.discard(writer, segment);
        } else {
            self.seal(writer, segment, closing);
        }
    }

    fn discard(&self, writer: &Writer, segment: &OwnSegment) {
        writer.segments.lock().retain(|other| other.handle != segment.handle);
        self.files.remove(segment.handle);
        let files = self.home.backend.files();
        // Truncated first: on NFS an unlinked file that is open still holds its space.
        let _ = files.truncate(&segment.file, 0);
        if files.unlink(&segment.path).is_ok() {
            self.capacity.give(segment.bytes());
        }
    }

    /// Makes a writer where there is none, and the next segment, on the path pool.
    fn prepare(self: &Arc<Self>) {
        let saver = Arc::clone(self);
        let reply = Reply::new(move |made: Result<(Arc<Writer>, Arc<OwnSegment>)>| {
            saver.prepared(made);
        });
        let saver = Arc::clone(self);
        reply.run_on(&self.home.backend, move |reply| reply.send(saver.make()));
    }

    fn make(self: &Arc<Self>) -> Result<(Arc<Writer>, Arc<OwnSegment>)> {
        let writer = self.ensure_writer()?;
        let number = writer.next_number.fetch_add(1, Ordering::Relaxed);
        let bytes = PAGE as u64
            + u64::from(self.home.layout.extents_of(number)) * self.home.layout.extent_bytes();
        let made = self.capacity.take(bytes).and_then(|()| {
            OwnSegment::create(&self.home, writer.id, number, |name| {
                self.catalog.intern(self.home.number, name)
            })
            .inspect_err(|_| self.capacity.give(bytes))
        });
        // A number that named no file is free: first segments are small because of theirs.
        let segment = made.inspect_err(|_| {
            let _ = writer.next_number.compare_exchange(
                number + 1,
                number,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        })?;
        self.capacity.give(bytes.saturating_sub(segment.bytes()));
        self.files.insert(segment.handle, segment.file.clone());
        writer.segments.lock().push(Arc::clone(&segment));
        Ok((writer, segment))
    }

    fn prepared(self: &Arc<Self>, made: Result<(Arc<Writer>, Arc<OwnSegment>)>) {
        let mut state = self.state.lock();
        state.preparing = false;
        let mut answers: Vec<(Reply<Extent>, Result<Extent>)> = Vec::new();
        let mut filled = Vec::new();
        let mut discarded = None;
        let is_current = |state: &State, writer: &Arc<Writer>| {
            state.writer.as_ref().is_some_and(|current| Arc::ptr_eq(current, writer))
        };
        match made {
            // The store was closed meanwhile, or the writer given up: nobody will fill it.
            Ok((writer, segment)) if !is_current(&state, &writer) => {
                discarded = Some((writer, segment));
            }
            Ok((_, segment)) => {
                state.failed = None;
                if state.current.as_ref().is_none_or(|current| current.room() == Room::None) {
                    if let (Some(old), Some(writer)) =
                        (state.current.replace(segment), state.writer.clone())
                    {
                        filled.push((writer, old));
                    }
                } else {
                    state.next = Some(segment);
                }
                while let Some(waiter) = state.waiters.pop_front() {
                    if waiter.expires <= Instant::now() {
                        answers.push((waiter.reply, Err(expired())));
                        continue;
                    }
                    let (extent, full) = self.take(&mut state, &waiter.key);
                    filled.extend(full);
                    match extent {
                        Some(extent) => answers.push((waiter.reply, Ok(extent))),
                        None => {
                            state.waiters.push_front(waiter);
                            break;
                        }
                    }
                }
            }
            Err(error) => {
                let exhausted =
                    state.current.as_ref().is_none_or(|segment| segment.room() == Room::None);
                if exhausted {
                    self.fail(&mut state, &error);
                }
                let waiters = std::mem::take(&mut state.waiters);
                answers.extend(waiters.into_iter().map(|w| (w.reply, Err(error.clone()))));
            }
        }
        let must = !state.waiters.is_empty();
        let again = must && self.should_prepare(&mut state, must);
        drop(state);
        if let Some((writer, segment)) = discarded {
            self.discard(&writer, &segment);
        }
        answers.into_iter().for_each(|(reply, answer)| reply.send(answer));
        filled.into_iter().for_each(|filled| self.close_filled(Some(filled)));
        if again {
            self.prepare();
        }
    }
}

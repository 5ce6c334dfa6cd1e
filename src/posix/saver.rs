//! The saver of one home: the current writer, its segments, and the saves that wait for room.
//!
//! Owns which writer is current and which segment is being filled; prepares the next one on the path pool
//! while the current one fills. A home that fails is latched with its reason and tried again after a while;
//! other homes go on. Knows manifests and segments by their doors only.

#![forbid(unsafe_code)]

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::block::{PAGE, PartKey};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::posix::capacity::Capacity;
use crate::posix::catalog::Catalog;
use crate::posix::format::{Kind, NO_CHECKSUM, Record, SEAL_MANIFEST};
use crate::posix::home::Home;
use crate::posix::host::{random_id, wall_ms};
use crate::posix::manifest::{Item, Manifest, Urgency};
use crate::posix::names::{Fence, ManifestName};
use crate::posix::open_files::OpenFiles;
use crate::posix::reply::Reply;
use crate::posix::segment::{Closing, OwnSegment, Room};

/// Saves that may wait for a segment to be made.
const WAITERS_MAX: usize = 4096;
/// Records kept for a writer that may never come.
const EARLY_MAX: usize = 4096;
/// A home that failed is tried again after this time.
const RETRY: Duration = Duration::from_secs(3);
/// A save waits at most this long for one home.
const PATIENCE_MAX: Duration = Duration::from_secs(10);
/// A full one sooner: space comes back when something is reclaimed.
const RETRY_NO_SPACE: Duration = Duration::from_millis(500);

/// One writer: a manifest and the segments it fills.
pub struct Writer {
    /// Its random id.
    pub id: u64,
    /// Its manifest.
    pub manifest: Arc<Manifest>,
    next_number: AtomicU32,
    /// Segments that are not sealed. Each holds a descriptor, so sealed ones are not kept.
    segments: Mutex<Vec<Arc<OwnSegment>>>,
    /// Handles of those that are sealed.
    sealed: Mutex<HashSet<u32>>,
}

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

/// Data writes on their way, to see a drive that does not answer.
#[derive(Default)]
struct Writes {
    in_flight: usize,
    /// When the last one ended, or the first of those in flight began.
    progress: Option<Instant>,
}

/// Room for one part in a segment. Dropped unwritten, it goes back to its segment.
pub struct Extent {
    key: PartKey,
    saver: Arc<Saver>,
    writer: Arc<Writer>,
    segment: Arc<OwnSegment>,
    page: u32,
    checksum: AtomicU64,
    spent: bool,
}

impl Extent {
    /// The part it is for.
    pub fn key(&self) -> &PartKey {
        &self.key
    }

    /// Its segment.
    pub fn segment(&self) -> &Arc<OwnSegment> {
        &self.segment
    }

    /// Its writer.
    pub fn writer(&self) -> &Arc<Writer> {
        &self.writer
    }

    /// Its saver.
    pub fn saver(&self) -> &Arc<Saver> {
        &self.saver
    }

    /// Its first page in the segment.
    pub fn page(&self) -> u32 {
        self.page
    }

    /// Byte offset in the segment.
    pub fn offset(&self) -> u64 {
        u64::from(self.page) * PAGE as u64
    }

    /// The checksum of the part, once taken.
    pub fn checksum(&self) -> u64 {
        self.checksum.load(Ordering::Acquire)
    }

    /// Sets the checksum.
    pub fn set_checksum(&self, checksum: u64) {
        self.checksum.store(checksum, Ordering::Release);
    }

    /// Bytes may have been written: it can never be handed out again.
    pub fn spend(mut self) {
        self.spent = true;
        let closing = self.segment.written();
        self.saver.seal(&self.writer, &self.segment, closing);
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        if !self.spent {
            let closing = self.segment.give_back(self.page);
            self.saver.seal(&self.writer, &self.segment, closing);
        }
    }
}

impl Writer {
    /// Segments that are being filled, oldest first.
    pub fn segments(&self) -> Vec<Arc<OwnSegment>> {
        self.segments.lock().clone()
    }

    /// Whether a segment of it will not grow any more.
    pub fn is_sealed(&self, handle: u32) -> bool {
        self.sealed.lock().contains(&handle)
    }

    fn note_sealed(&self, handle: u32) {
        self.sealed.lock().insert(handle);
        self.segments.lock().retain(|segment| segment.handle != handle);
    }

    /// Forgets a segment that was reclaimed.
    pub fn remove_segment(&self, handle: u32) {
        self.sealed.lock().remove(&handle);
    }
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

    /// Whether a writer is one of ours.
    pub fn is_own(&self, writer: u64) -> bool {
        self.own_ids.lock().contains(&writer)
    }

    /// The current writer.
    pub fn writer(&self) -> Option<Arc<Writer>> {
        self.state.lock().writer.clone()
    }

    /// Whether a segment is one of the current writer's and will not grow any more.
    pub fn is_sealed(&self, handle: u32) -> bool {
        self.writer().is_some_and(|writer| writer.is_sealed(handle))
    }

    /// Forgets a segment that was reclaimed; its file is closed when nobody uses it any more.
    pub fn forget_segment(&self, handle: u32) {
        if let Some(writer) = self.writer() {
            writer.remove_segment(handle);
        }
    }

    /// Why the home takes no saves now, if so.
    pub fn failure(&self) -> Option<Error> {
        let state = self.state.lock();
        let (until, error) = state.failed.as_ref()?;
        (Instant::now() < *until).then(|| error.clone())
    }

    /// The writer, made where there is none; the answer may come on this thread.
    pub fn with_writer(self: &Arc<Self>, reply: Reply<Arc<Writer>>) {
        let writer = self.writer().filter(|writer| writer.manifest.latched().is_none());
        if let Some(writer) = writer {
            return reply.send(Ok(writer));
        }
        let saver = Arc::clone(self);
        reply.run_on(&self.home.backend, move |reply| reply.send(saver.ensure_writer()));
    }

    /// Appends a record for which nobody waits. Where there is no writer one is made for it; where none can
    /// be made the record waits for the first one that can.
    pub fn record(self: &Arc<Self>, record: Record) {
        {
            let mut state = self.state.lock();
            if state.early.len() >= EARLY_MAX {
                return;
            }
            state.early.push(record);
        }
        let saver = Arc::clone(self);
        self.with_writer(Reply::new(move |writer: Result<Arc<Writer>>| {
            if let Ok(writer) = writer {
                saver.append_early(&writer);
            }
        }));
    }

    fn append_early(&self, writer: &Writer) {
        let early = std::mem::take(&mut self.state.lock().early);
        early.into_iter().for_each(|record| append(writer, record));
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
                let extent = Extent {
                    key: *key,
                    saver: Arc::clone(self),
                    writer,
                    segment,
                    page,
                    checksum: AtomicU64::new(NO_CHECKSUM),
                    spent: false,
                };
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

    /// Gives a writer up whose manifest takes no more records; its segments are closed.
    fn drop_latched_writer(self: &Arc<Self>, state: &mut State) {
        let latched = state.writer.take_if(|writer| writer.manifest.latched().is_some());
        let Some(writer) = latched else { return };
        let open = [state.current.take(), state.next.take()];
        state.former.push(Arc::clone(&writer));
        let saver = Arc::clone(self);
        let _ = self.home.backend.run(Box::new(move || {
            for segment in open.into_iter().flatten() {
                saver.close_or_discard(&writer, &segment);
            }
            saver.fence_former();
        }));
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

    /// Fences the manifests that were given up, as others do with those of the dead: from then on they are
    /// read like anybody's, what they published counts, and the rest of their segments is given back.
    /// Blocks; on a path pool only.
    pub fn fence_former(&self) {
        let former = std::mem::take(&mut self.state.lock().former);
        for writer in former {
            let from = writer.manifest.path();
            let name = ManifestName { fence: Fence::Fenced, ..writer.manifest.name() };
            let fenced =
                self.home.backend.files().rename(from, &self.home.manifests.join(name.to_string()));
            match fenced {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    self.state.lock().former.push(writer);
                }
                _ => self.own_ids.lock().retain(|id| *id != writer.id),
            }
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

    /// The writer, made where there is none. Blocks; on a path pool only.
    fn ensure_writer(self: &Arc<Self>) -> Result<Arc<Writer>> {
        let _one_at_a_time = self.making.lock();
        {
            let mut state = self.state.lock();
            if state.closed {
                return Err(Error::new(ErrorKind::Closed, "the store is closed"));
            }
            self.drop_latched_writer(&mut state);
            if let Some(writer) = &state.writer {
                return Ok(Arc::clone(writer));
            }
        }
        let id = random_id();
        self.own_ids.lock().push(id);
        let manifest = self.create_manifest(id).inspect_err(|_| {
            self.own_ids.lock().retain(|other| *other != id);
        })?;
        let writer = Arc::new(Writer {
            id,
            manifest,
            next_number: AtomicU32::new(0),
            segments: Mutex::default(),
            sealed: Mutex::default(),
        });
        let mut state = self.state.lock();
        if state.closed {
            drop(state);
            let _ = self.home.backend.files().unlink(writer.manifest.path());
            return Err(Error::new(ErrorKind::Closed, "the store is closed"));
        }
        state.writer = Some(Arc::clone(&writer));
        let beat = !std::mem::replace(&mut state.beating, true);
        drop(state);
        if beat {
            self.schedule_heartbeat();
        }
        self.append_early(&writer);
        Ok(writer)
    }

    /// A backend that was away when the store opened has no folders yet.
    fn create_manifest(&self, id: u64) -> Result<Arc<Manifest>> {
        match Manifest::create(&self.home, id, 0) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.home.create_folders()?;
                Manifest::create(&self.home, id, 0)
            }
            made => made,
        }
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

    fn fail(&self, state: &mut State, error: &Error) {
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
            state.current.as_ref().is_some_and(|current| current.handle == extent.segment.handle);
        if is_current {
            state.current = state.next.take();
        }
        drop(state);
        self.close_filled(Some((Arc::clone(&extent.writer), Arc::clone(&extent.segment))));
    }

    fn watch_waiters(self: &Arc<Self>, when: Instant) {
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
    fn patience(&self) -> Duration {
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
    fn hung(&self) -> Option<Error> {
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

    /// A sign of life every third of the lease, for as long as there is a manifest.
    fn schedule_heartbeat(self: &Arc<Self>) {
        let third = self.home.layout.config.lease / 3;
        let saver = Arc::downgrade(self);
        self.clock.at(Instant::now() + third, move || {
            if let Some(saver) = saver.upgrade() {
                saver.heartbeat();
            }
        });
    }

    fn heartbeat(self: &Arc<Self>) {
        let (writer, closed) = {
            let state = self.state.lock();
            (state.writer.clone(), state.closed)
        };
        if closed {
            return;
        }
        let third = self.home.layout.config.lease / 3;
        if let Some(writer) = writer.filter(|w| w.manifest.silence() * 10 >= third * 9) {
            let item = Item {
                record: Record::of(Kind::Heartbeat, wall_ms()),
                data: None,
                reply: Reply::new(|_| ()),
            };
            writer.manifest.push(item, Urgency::Now);
        }
        self.schedule_heartbeat();
    }

    /// Takes no more saves. Returns the writer, whose segments and manifest remain to be closed.
    pub fn stop(self: &Arc<Self>) -> Option<Arc<Writer>> {
        let mut state = self.state.lock();
        state.closed = true;
        self.drop_latched_writer(&mut state);
        state.current = None;
        state.next = None;
        let writer = state.writer.take();
        let waiters = std::mem::take(&mut state.waiters);
        drop(state);
        for waiter in waiters {
            waiter.reply.send(Err(Error::new(ErrorKind::Closed, "the store is closed")));
        }
        writer
    }

    /// Closes what `stop` returned: trims segments to what was used, removes what holds nothing, and seals
    /// the manifest. Blocks; on a path pool only. `reply` comes when the last record counts.
    pub fn close_writer(&self, writer: &Arc<Writer>, reply: Reply<()>) {
        let files = self.home.backend.files();
        for segment in writer.segments() {
            self.close_or_discard(writer, &segment);
        }
        if writer.manifest.is_empty() {
            return reply.send(files.unlink(writer.manifest.path()));
        }
        let record = Record { segment: SEAL_MANIFEST, ..Record::of(Kind::Seal, wall_ms()) };
        let (manifest, backend) = (Arc::clone(&writer.manifest), Arc::clone(&self.home.backend));
        let reply = Reply::new(move |sealed: Result<()>| match sealed {
            Ok(()) => reply.run_on(&backend, move |reply| reply.send(manifest.trim())),
            Err(error) => reply.send(Err(error)),
        });
        writer.manifest.push(Item { record, data: None, reply }, Urgency::Now);
    }
}

/// Appends a record for which nobody waits.
fn append(writer: &Writer, record: Record) {
    let item = Item { record, data: None, reply: Reply::new(|_| ()) };
    writer.manifest.push(item, Urgency::MayGather);
}

fn expired() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "the deadline passed while the save waited for a segment; check the mount, or raise timeout_ms",
    )
}

//! The writer of a home: made with the first thing to say, kept alive by heartbeats, given up when its
//! manifest takes no more records, and closed with the store.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use parking_lot::Mutex;

use super::{Saver, State};
use crate::error::{Error, ErrorKind, Result};
use crate::posix::format::{Kind, Record, SEAL_MANIFEST};
use crate::posix::host::{random_id, wall_ms};
use crate::posix::manifest::{Item, Manifest, Urgency};
use crate::posix::names::{Fence, ManifestName};
use crate::posix::reply::Reply;
use crate::posix::segment::OwnSegment;

/// Records kept for a writer that may never come.
const EARLY_MAX: usize = 4096;

/// One writer: a manifest and the segments it fills.
pub struct Writer {
    /// Its random id.
    pub id: u64,
    /// Its manifest.
    pub manifest: Arc<Manifest>,
    pub(super) next_number: AtomicU32,
    /// Segments that are not sealed. Each holds a descriptor, so sealed ones are not kept.
    pub(super) segments: Mutex<Vec<Arc<OwnSegment>>>,
    /// Handles of those that are sealed.
    sealed: Mutex<HashSet<u32>>,
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

    pub(super) fn note_sealed(&self, handle: u32) {
        self.sealed.lock().insert(handle);
        self.segments.lock().retain(|segment| segment.handle != handle);
    }

    /// Forgets a segment that was reclaimed.
    pub fn remove_segment(&self, handle: u32) {
        self.sealed.lock().remove(&handle);
    }
}

impl Saver {
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

    /// The writer, made where there is none. Blocks; on a path pool only.
    pub(super) fn ensure_writer(self: &Arc<Self>) -> Result<Arc<Writer>> {
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

    /// Gives a writer up whose manifest takes no more records; its segments are closed.
    pub(super) fn drop_latched_writer(self: &Arc<Self>, state: &mut State) {
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
pub(super) fn append(writer: &Writer, record: Record) {
    let item = Item { record, data: None, reply: Reply::new(|_| ()) };
    writer.manifest.push(item, Urgency::MayGather);
}

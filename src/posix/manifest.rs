//! The manifest that this process writes in one backend: records in, group commits out.
//!
//! Owns the file, the partial tail and the queue of records that wait. A commit gathers everything that
//! waits: flush of the data (where durability asks), full pages, then the head page that makes them count,
//! flush of the manifest, and the replies. One commit runs at a time. Knows nothing of what a record means.
//!
//! A write whose outcome is unknown latches the manifest: its places are never written again with other
//! records, because a reader may have seen the first ones. The home then gets a new writer.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::block::PAGE;
use crate::config::Durability;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Access, Class, Create, File, OpenHow, Operation, Request};
use crate::posix::format::{
    HEAD_PAGE_FIRST, Head, Kind, ManifestHeader, RECORD_BYTES, RECORD_PAGE_FIRST, RECORDS_PER_PAGE,
    Record, head_record_mut, record_seal,
};
use crate::posix::home::Home;
use crate::posix::host::{boot_time, wall_ms};
use crate::posix::names::{Fence, ManifestName};
use crate::posix::pages::Pages;
use crate::posix::reply::{Reply, never_began};
use crate::posix::segment::OwnSegment;

/// Records of one commit: 64 full pages.
const COMMIT_RECORDS_MAX: usize = 64 * RECORDS_PER_PAGE;
/// A commit waits until it carries this share of the data writes in flight, so that a full ring pays for a
/// head page every few parts and a lone save pays at once.
const COMMIT_SHARE: usize = 4;
/// How often in a lease a writer looks whether its manifest's name is still its own.
const LOOKS_PER_LEASE: u32 = 3;
/// Pages that a manifest is preallocated by, at first and at most.
const GROWTH_PAGES: std::ops::Range<u32> = 16..1024;

/// A record that waits, and who waits for it.
pub struct Item {
    /// What is said; its sequence is set by the commit.
    pub record: Record,
    /// The segment that must be flushed before (for PUBLISH).
    pub data: Option<Arc<OwnSegment>>,
    /// Told when the record counts.
    pub reply: Reply<()>,
}

/// Whether a commit may wait for more records.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Data writes are in flight that will bring more.
    MayGather,
    /// Now.
    Now,
}

struct State {
    queue: Vec<Item>,
    committing: bool,
    latched: Option<Error>,
    tail: Vec<Record>,
    page: u32,
    commit: u64,
    pages_allocated: u32,
    /// When it was last known that the manifest is still ours: just before a head page was written that
    /// others then saw change, or before its name was looked at.
    proof: Duration,
    /// When its name was last looked at.
    looked: Duration,
}

/// The manifest of this process in one backend.
pub struct Manifest {
    home: Arc<Home>,
    name: ManifestName,
    path: PathBuf,
    file: File,
    identity: (u64, u64),
    seal: [u8; 12],
    in_flight: AtomicUsize,
    state: Mutex<State>,
}

/// One group of records on its way. Dropped before its end (a pool refused it), it fails its records.
struct Commit {
    manifest: Arc<Manifest>,
    items: Vec<Item>,
    full: Option<Pages>,
    full_page: u32,
    head: Pages,
    head_page: u32,
    tail: Vec<Record>,
    page: u32,
    /// Bytes of the manifest may have changed.
    begun: bool,
    /// Just before the head page was written.
    began_at: Duration,
}

impl Manifest {
    /// Creates the manifest of a new writer. Blocks; on a path pool only.
    pub fn create(home: &Arc<Home>, writer: u64, epoch: u32) -> Result<Arc<Self>> {
        // Creating may take longer than a lease: what others saw of it by then is nothing.
        let began = boot_time();
        let layout = &home.layout;
        let parts = &layout.parts;
        let name = ManifestName {
            writer,
            part_first: parts.start,
            part_number: parts.end - parts.start,
            epoch,
            fence: Fence::Open,
        };
        let path = home.manifests.join(name.to_string());
        let files = home.backend.files();
        let how =
            OpenHow { access: Access::ReadWrite, create: Create::New, direct: home.is_direct() };
        let file = files.open(&path, how)?;
        let seal = record_seal(writer, epoch);
        let created = (|| {
            files.allocate(&file, u64::from(GROWTH_PAGES.start) * PAGE as u64)?;
            let mut pages = Pages::new(RECORD_PAGE_FIRST as usize);
            let (header, heads) = pages.bytes_mut().split_at_mut(PAGE);
            ManifestHeader {
                fingerprint: layout.fingerprint,
                writer,
                part_first: name.part_first,
                part_number: name.part_number,
                epoch,
                process: layout.process,
                lease_ms: layout.config.lease.as_millis() as u64,
                part_bytes: layout.part_bytes,
                created_ms: wall_ms(),
            }
            .encode(header);
            first_head(writer, epoch).encode(heads);
            pages.write_to(&**files, &file, 0, 0, RECORD_PAGE_FIRST as usize)?;
            if layout.config.durability == Durability::Durable {
                files.sync_data(&file)?;
                files.sync_dir(&home.manifests)?;
            }
            files.file_metadata(&file)
        })();
        let metadata = match created {
            Ok(metadata) => metadata,
            Err(error) => {
                let _ = files.unlink(&path);
                return Err(error.at(&path));
            }
        };
        let state = State {
            queue: Vec::new(),
            committing: false,
            latched: None,
            tail: Vec::new(),
            page: RECORD_PAGE_FIRST,
            commit: first_head(writer, epoch).commit,
            pages_allocated: GROWTH_PAGES.start,
            proof: began,
            looked: began,
        };
        Ok(Arc::new(Self {
            home: Arc::clone(home),
            name,
            path,
            file,
            identity: metadata.identity,
            seal,
            in_flight: AtomicUsize::new(0),
            state: Mutex::new(state),
        }))
    }

    /// Its name.
    pub fn name(&self) -> ManifestName {
        self.name
    }

    /// Its path.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Gives back what was preallocated and not used. Blocks; after the last commit only.
    pub fn trim(&self) -> Result<()> {
        let page = self.state.lock().page;
        self.home.backend.files().truncate(&self.file, u64::from(page) * PAGE as u64)
    }

    /// Why it takes no more records, if so.
    pub fn latched(&self) -> Option<Error> {
        self.state.lock().latched.clone()
    }

    /// Whether no record was ever added.
    pub fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.page == RECORD_PAGE_FIRST && state.tail.is_empty() && state.queue.is_empty()
    }

    /// Time since the manifest was last known to be ours.
    pub fn silence(&self) -> Duration {
        boot_time().saturating_sub(self.state.lock().proof)
    }

    /// Time since its name was last looked at.
    fn unlooked(&self) -> Duration {
        boot_time().saturating_sub(self.state.lock().looked)
    }

    /// A data write that will bring a record has begun.
    pub fn data_begins(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// It has ended; what waits may have to go without it.
    pub fn data_ended(self: &Arc<Self>) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Adds a record; its reply comes when it counts.
    pub fn push(self: &Arc<Self>, item: Item, urgency: Urgency) {
        let mut state = self.state.lock();
        if let Some(error) = &state.latched {
            let error = error.clone();
            drop(state);
            item.reply.send(Err(error));
            return;
        }
        state.queue.push(item);
        drop(state);
        self.kick(urgency);
    }

    /// Starts a commit if one is due.
    pub fn kick(self: &Arc<Self>, urgency: Urgency) {
        let mut state = self.state.lock();
        let due = match urgency {
            Urgency::Now => 1,
            Urgency::MayGather => (self.in_flight.load(Ordering::Relaxed) / COMMIT_SHARE).max(1),
        };
        if state.committing || state.queue.len() < due {
            return;
        }
        state.committing = true;
        let count = state.queue.len().min(COMMIT_RECORDS_MAX);
        let items: Vec<Item> = state.queue.drain(..count).collect();
        let commit = self.build(&state, items);
        self.grow(&mut state, commit.page);
        drop(state);
        commit.flush_data();
    }

    /// Lays the records out: the tail and the new ones fill pages, the rest goes into the next head page.
    fn build(self: &Arc<Self>, state: &State, items: Vec<Item>) -> Commit {
        let mut tail = state.tail.clone();
        let first = sequence_of(state.page, tail.len());
        tail.extend((first..).zip(&items).map(|(sequence, i)| Record { sequence, ..i.record }));
        let full_pages = tail.len() / RECORDS_PER_PAGE;
        let full = (full_pages > 0).then(|| {
            let mut pages = Pages::new(full_pages);
            let places = pages.bytes_mut().chunks_exact_mut(RECORD_BYTES);
            tail.drain(..full_pages * RECORDS_PER_PAGE)
                .zip(places)
                .for_each(|(record, place)| record.encode(&self.seal, place));
            pages
        });
        let page = state.page + full_pages as u32;
        let head = Head {
            commit: state.commit + 1,
            page,
            count: tail.len() as u32,
            writer: self.name.writer,
            epoch: self.name.epoch,
            time_ms: wall_ms(),
        };
        let mut head_page = Pages::new(1);
        for (index, record) in tail.iter().enumerate() {
            record.encode(&self.seal, head_record_mut(head_page.bytes_mut(), index));
        }
        head.encode(head_page.bytes_mut());
        Commit {
            manifest: Arc::clone(self),
            items,
            full,
            full_page: state.page,
            head: head_page,
            head_page: head.place(),
            tail,
            page,
            begun: false,
            began_at: Duration::ZERO,
        }
    }

    /// Preallocates ahead, so that commits rarely extend the file. Failing to is no error.
    fn grow(self: &Arc<Self>, state: &mut State, page: u32) {
        let chunk = state.pages_allocated.clamp(GROWTH_PAGES.start, GROWTH_PAGES.end);
        if page + chunk / 2 < state.pages_allocated {
            return;
        }
        state.pages_allocated = page.max(state.pages_allocated) + chunk;
        let bytes = u64::from(state.pages_allocated) * PAGE as u64;
        let (home, file) = (Arc::clone(&self.home), self.file.clone());
        let _ = self.home.backend.run(Box::new(move || {
            let _ = home.backend.files().allocate(&file, bytes);
        }));
    }

    /// Whether the name still leads to our file: a reclaimer that took us for dead has renamed it.
    fn check_ownership(&self) -> Result<()> {
        let files = self.home.backend.files();
        // A network file system may answer from names it has seen before.
        files.revalidate_dir(&self.home.manifests)?;
        match files.metadata(&self.path) {
            Ok(metadata) if metadata.identity == self.identity => Ok(()),
            Ok(_) => Err(self.lost()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(self.lost()),
            Err(error) => Err(error),
        }
    }

    fn lost(&self) -> Error {
        Error::new(
            ErrorKind::Io,
            "this writer was paused longer than its lease and others took it for dead; it goes on as a new writer",
        )
        .at(&self.path)
    }
}

/// Ordinal of the record at `index` of page `page`.
pub fn sequence_of(page: u32, index: usize) -> u64 {
    u64::from(page - RECORD_PAGE_FIRST) * RECORDS_PER_PAGE as u64 + index as u64
}

fn first_head(writer: u64, epoch: u32) -> Head {
    let head =
        Head { commit: 1, page: RECORD_PAGE_FIRST, count: 0, writer, epoch, time_ms: wall_ms() };
    debug_assert_eq!(head.place(), HEAD_PAGE_FIRST);
    head
}

impl Commit {
    /// Promise 1: where durability asks, data is on storage before its record.
    fn flush_data(self) {
        let manifest = Arc::clone(&self.manifest);
        let mut data: Vec<Arc<OwnSegment>> = Vec::new();
        if manifest.home.layout.config.durability != Durability::None {
            for segment in self.items.iter().filter_map(|item| item.data.as_ref()) {
                if data.iter().all(|other| other.handle != segment.handle) {
                    data.push(Arc::clone(segment));
                }
            }
        }
        if data.is_empty() {
            return self.write_full();
        }
        self.on_pool(move |commit| {
            let files = commit.manifest.home.backend.files();
            match data.iter().try_for_each(|segment| segment.flush(&**files)) {
                Ok(()) => commit.write_full(),
                Err(error) => commit.end(Err(error)),
            }
        });
    }

    fn write_full(self) {
        match &self.full {
            None => self.write_head(),
            Some(pages) => {
                let memory = pages.slice(0, pages.count());
                let page = self.full_page;
                self.write(page, memory, Self::write_head);
            }
        }
    }

    fn write_head(mut self) {
        self.began_at = boot_time();
        let memory = self.head.slice(0, 1);
        let page = self.head_page;
        self.write(page, memory, Self::flush_records);
    }

    /// Writes through the reactor; where its queue is full, on the path pool.
    fn write(mut self, page: u32, memory: crate::io::DmaSlice, then: fn(Self)) {
        let manifest = Arc::clone(&self.manifest);
        let begun = std::mem::replace(&mut self.begun, true);
        let request = Request {
            operation: Operation::Write,
            file: manifest.file.clone(),
            offset: u64::from(page) * PAGE as u64,
            memory,
            class: Class::Save,
            expires: None,
            done: Box::new(move |result| match result {
                Ok(()) => then(self),
                Err(error) if never_began(&error) => {
                    self.begun = begun;
                    self.write_slowly(page, then);
                }
                // No room for a full page: nothing of it counts, and nothing of it comes later.
                Err(error) if error.kind() == ErrorKind::NoSpace && page >= RECORD_PAGE_FIRST => {
                    self.begun = begun;
                    self.end(Err(error));
                }
                Err(error) => self.end(Err(error)),
            }),
        };
        manifest.home.backend.submit(request);
    }

    fn write_slowly(self, page: u32, then: fn(Self)) {
        self.on_pool(move |mut commit| {
            let is_head = page < RECORD_PAGE_FIRST;
            commit.begun = true;
            let written = {
                let pages = if is_head { Some(&commit.head) } else { commit.full.as_ref() };
                let files = commit.manifest.home.backend.files();
                let offset = u64::from(page) * PAGE as u64;
                let write = |pages: &Pages| {
                    pages.write_to(&**files, &commit.manifest.file, offset, 0, pages.count())
                };
                pages.map_or(Ok(()), write)
            };
            match written {
                Ok(()) => then(commit),
                Err(error) => commit.end(Err(error)),
            }
        });
    }

    fn flush_records(self) {
        let manifest = Arc::clone(&self.manifest);
        let config = &manifest.home.layout.config;
        let flush = config.durability == Durability::Durable;
        // Promise 6: after a pause, ask who owns the name before anything is acknowledged. A heartbeat asks
        // too: it has time, and a silent writer that was taken for dead learns of it.
        // Under load it is asked as often as heartbeats would: whoever decided on its death before it woke up
        // may act on that later.
        let beats = self.items.iter().any(|item| item.record.kind == Kind::Heartbeat);
        let check = beats
            || manifest.silence() > config.lease / 2
            || manifest.unlooked() > config.lease / LOOKS_PER_LEASE;
        if !flush && !check {
            return self.end(Ok(()));
        }
        self.on_pool(move |commit| {
            let manifest = &commit.manifest;
            let flushed = if flush {
                manifest.home.backend.files().sync_data(&manifest.file)
            } else {
                Ok(())
            };
            let looked = boot_time();
            let owned = if check { manifest.check_ownership() } else { Ok(()) };
            if check && owned.is_ok() {
                manifest.state.lock().looked = looked;
            }
            commit.end(flushed.and(owned));
        });
    }

    fn on_pool(self, job: impl FnOnce(Self) + Send + 'static) {
        let manifest = Arc::clone(&self.manifest);
        // A refusal drops the job and the commit in it, which ends it.
        let _ = manifest.home.backend.run(Box::new(move || job(self)));
    }

    fn end(mut self, result: Result<()>) {
        self.finish(result);
    }

    fn finish(&mut self, result: Result<()>) {
        let items = std::mem::take(&mut self.items);
        let manifest = Arc::clone(&self.manifest);
        let mut orphans = Vec::new();
        let mut state = manifest.state.lock();
        state.committing = false;
        match &result {
            Ok(()) => {
                state.tail = std::mem::take(&mut self.tail);
                state.page = self.page;
                state.commit += 1;
                state.proof = self.began_at.max(state.looked);
            }
            Err(error) if self.begun => {
                crate::log::warning(format_args!("a manifest is given up: {error}"));
                state.latched = Some(error.clone().at(&manifest.path));
                orphans = std::mem::take(&mut state.queue);
            }
            Err(_) => {}
        }
        drop(state);
        for item in items.into_iter().chain(orphans) {
            item.reply.send(result.clone());
        }
        manifest.kick(Urgency::MayGather);
    }
}

impl Drop for Commit {
    fn drop(&mut self) {
        // Whatever ends a commit takes its items; some are left only where a pool refused the job.
        if !self.items.is_empty() {
            self.finish(Err(Error::new(
                ErrorKind::Busy,
                "the path pool of the backend is full or closed; storage does not keep up",
            )));
        }
    }
}

//! The Posix tier: the one door to segments and manifests of a namespace in all its backends.
//!
//! Owns the catalog, one saver a home, the refresher and the open files, and carries parts between memory
//! and extents. Knows no slots, no devices and no tasks; callers own the memory.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::block::{BlockId, Namespace, PAGE, PartKey};
use crate::clock::Clock;
use crate::config::Checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::io::backend::Backend;
use crate::io::{Class, DmaSlice, Done, File, Operation, Request};
use crate::posix::capacity::Capacity;
use crate::posix::catalog::{Catalog, SegmentRef};
use crate::posix::format::{Kind, NO_CHECKSUM, ProcessIdentity, Record, Trailer};
use crate::posix::home::{Home, Layout, TierConfig};
use crate::posix::host::{this_process, wall_ms};
use crate::posix::index::{Found, Location};
use crate::posix::manifest::{Item, Urgency};
use crate::posix::open_files::OpenFiles;
use crate::posix::reclaim::Reclaim;
use crate::posix::recover::{self, Recovered};
use crate::posix::refresh::{self, Refresher};
use crate::posix::reply::{Join, Reply, never_began};
use crate::posix::saver::{Extent, Saver, Writer};
use crate::posix::stats::{BackendStats, TierStats};

/// Which manifests a store reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Those that can hold its own parts.
    Own,
    /// All.
    All,
}

/// What a store does in a namespace.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The parts it saves; empty for a store that only looks up.
    pub parts: Range<u16>,
    /// Which manifests it reads.
    pub tail: Tail,
}

/// Bytes that go to one backend before the next gets its turn: neighbours of a prompt lie together.
const TURN_BYTES: u64 = 1 << 20;
/// Of the time to open, one part in so many is for a backend that makes no folders while others do.
const FOLDERS_SHARE: u32 = 4;
/// A refresh waits this long for a backend, or the tier's timeout if that is shorter.
const REFRESH_PATIENCE: Duration = Duration::from_secs(10);

/// The tier.
pub struct Tier {
    layout: Arc<Layout>,
    savers: Vec<Arc<Saver>>,
    catalog: Arc<Catalog>,
    files: Arc<OpenFiles>,
    refresher: Arc<Refresher>,
    clock: Arc<Clock>,
    capacity: Arc<Capacity>,
    reclaim: Arc<Reclaim>,
    turn: AtomicU64,
    writing: Arc<AtomicUsize>,
    closed: Mutex<bool>,
}

impl Tier {
    /// Opens a namespace in `backends`: creates what is missing, reads all manifests once. Backends that
    /// fail are left out of saves and told; an error only where none works.
    pub fn open(
        namespace: &Namespace,
        scope: Scope,
        backends: Vec<Arc<Backend>>,
        config: TierConfig,
        deadline: Instant,
    ) -> Result<Arc<Self>> {
        Self::open_as(this_process(), namespace, scope, backends, config, deadline)
    }

    /// As [`Tier::open`], in the name of `process`.
    pub(crate) fn open_as(
        process: ProcessIdentity,
        namespace: &Namespace,
        scope: Scope,
        backends: Vec<Arc<Backend>>,
        config: TierConfig,
        deadline: Instant,
    ) -> Result<Arc<Self>> {
        let part_count = u16::try_from(namespace.part_count).map_err(|_| {
            Error::new(ErrorKind::InvalidConfig, "part_count: more parts than 65535")
        })?;
        let patience = config.timeout.min(REFRESH_PATIENCE);
        let layout = Arc::new(Layout {
            fingerprint: namespace.fingerprint(),
            part_bytes: namespace.part_bytes,
            part_count,
            parts: scope.parts.clone(),
            config,
            process,
        });
        let catalog = Arc::new(Catalog::new(layout.part_bytes, part_count));
        let files = Arc::new(OpenFiles::default());
        let clock = Arc::new(Clock::default());
        let capacity = Arc::new(Capacity::new(layout.config.capacity_bytes));
        let saver = |(number, backend)| {
            let home = Home::new(number, backend, namespace, Arc::clone(&layout));
            let (catalog, files) = (Arc::clone(&catalog), Arc::clone(&files));
            Saver::new(Arc::new(home), catalog, files, Arc::clone(&clock), Arc::clone(&capacity))
        };
        let savers: Vec<Arc<Saver>> = (0u16..).zip(backends).map(saver).collect();
        create_folders(&savers, deadline)?;
        let wide = scope.tail == Tail::All || scope.parts.is_empty();
        let reading = if wide { refresh::Scope::All } else { refresh::Scope::Own };
        // The first round reads everything there is, which may take longer than any later one; the rest of the
        // time is for the answer, should a backend hang.
        let first = deadline.saturating_duration_since(Instant::now()) / 4 * 3;
        let (index, alarm) = (Arc::clone(&catalog), Arc::clone(&clock));
        let refresher = Refresher::new(&savers, index, alarm, reading, first);
        let reclaim = Arc::new(Reclaim {
            catalog: Arc::clone(&catalog),
            files: Arc::clone(&files),
            refresher: Arc::clone(&refresher),
            clock: Arc::clone(&clock),
            capacity: Arc::clone(&capacity),
            savers: savers.clone(),
            state: Mutex::default(),
        });
        let tier = Arc::new(Self {
            layout,
            savers,
            catalog,
            files,
            refresher,
            clock,
            capacity,
            reclaim,
            turn: AtomicU64::new(0),
            writing: Arc::default(),
            closed: Mutex::new(false),
        });
        wait(deadline, "reading the manifests", |done| tier.refresh(done))?;
        tier.refresher.set_patience(patience);
        let house = Arc::downgrade(&tier);
        tier.capacity.set_alarm(move || {
            if let Some(tier) = house.upgrade() {
                tier.reclaim(Box::new(|_| ()));
            }
        });
        tier.keep_house();
        Ok(tier)
    }

    /// Where a part is. Memory only.
    pub fn find(&self, key: &PartKey) -> Option<Found> {
        self.catalog.index.find(key)
    }

    /// Where parts are, in the order of `keys`. Memory only, and faster than one by one.
    pub fn find_many<'a>(&self, keys: impl Iterator<Item = &'a PartKey>) -> Vec<Option<Found>> {
        let mut found = Vec::with_capacity(keys.size_hint().0);
        self.catalog
            .index
            .find_many(keys.map(|key| (&key.block, key.part)), |_, part| found.push(part));
        found
    }

    /// Whether all parts of a block can be found. Memory only.
    pub fn contains_block(&self, block: &BlockId) -> bool {
        self.catalog.contains_block(block)
    }

    /// For each block 1 where all its parts can be found, else 0. Memory only, and faster than one by one.
    ///
    /// # Panics
    /// If `found` is shorter than `blocks`.
    pub fn contains_blocks(&self, blocks: &[BlockId], found: &mut [u8]) {
        self.catalog.contains_blocks(blocks, found);
    }

    /// From now on reads the manifests of all parts, from the next refresh on.
    pub fn widen(&self) {
        self.refresher.widen();
    }

    /// Whether it reads the manifests of all parts.
    pub fn is_wide(&self) -> bool {
        self.refresher.is_wide()
    }

    /// Brings the index up to date: `done` comes after a round over all manifests that began after this
    /// call, on a thread that may block.
    pub fn refresh(&self, done: Done) {
        self.refresher.refresh(Reply::boxed(done));
    }

    /// Time since the last completed refresh began.
    pub fn refresh_age(&self) -> Duration {
        self.refresher.age()
    }

    /// Bytes of an extent: payload padded to pages, then the trailer page.
    pub fn extent_bytes(&self) -> u64 {
        self.layout.extent_bytes()
    }

    /// Reads a range of pages of an extent into `pieces`, end to end; not verified. The range may include
    /// the trailer page, which is the last of [`Tier::extent_bytes`]. The memory must stay valid until `done`
    /// has been called or leaked.
    #[allow(clippy::too_many_arguments)]
    pub fn read(
        self: &Arc<Self>,
        key: &PartKey,
        found: &Found,
        range: Range<u64>,
        pieces: Vec<DmaSlice>,
        class: Class,
        expires: Option<Instant>,
        done: Done,
    ) {
        let total: usize = pieces.iter().map(|piece| piece.length).sum();
        if range.end > self.extent_bytes() || range.start + total as u64 != range.end {
            return done(Err(Error::new(
                ErrorKind::Internal,
                format!("a read of {range:?} into {total} bytes does not fit part {key:?}"),
            )));
        }
        let Some(segment) = self.catalog.segment(found.location.segment) else {
            return done(Err(gone(key)));
        };
        let home = &self.savers[usize::from(segment.home)].home;
        let offset = u64::from(found.location.page) * PAGE as u64 + range.start;
        let backend = Arc::clone(&home.backend);
        let submit = move |file: File, reply: Reply<()>| {
            transfer(&backend, Operation::Read, &file, offset, pieces, class, expires, reply);
        };
        let reply = Reply::boxed(done);
        if let Some(file) = self.files.get(found.location.segment) {
            return submit(file, reply);
        }
        let opened = Reply::new(move |file: Result<File>| match file {
            Ok(file) => submit(file, reply),
            Err(error) => reply.send(Err(error)),
        });
        self.files.open(home, found.location.segment, segment.name, opened);
    }

    /// Whether the bytes of a whole part are the ones that were saved. Work for the CPU only.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile.
    pub unsafe fn verify(&self, key: &PartKey, found: &Found, pieces: &[DmaSlice]) -> Result<()> {
        if self.layout.config.checksum == Checksum::Off || found.checksum == NO_CHECKSUM {
            return Ok(());
        }
        let segment = self.catalog.segment(found.location.segment).ok_or_else(|| gone(key))?;
        let identity = self.layout.identity(key, segment.name.generation);
        // SAFETY: as promised by the caller.
        match unsafe { identity.part(pieces, self.layout.part_bytes) } == found.checksum {
            true => Ok(()),
            false => Err(self.mismatch(key, found, &segment)),
        }
    }

    /// Reads a trailer page that was loaded, and checks that it is the one of this part: its unit checksums
    /// verify parts of the part.
    pub fn trailer(&self, key: &PartKey, found: &Found, page: &[u8]) -> Result<Trailer> {
        let segment = self.catalog.segment(found.location.segment).ok_or_else(|| gone(key))?;
        let trailer = Trailer::decode(page).ok().filter(|trailer| {
            trailer.fingerprint == self.layout.fingerprint
                && (trailer.block, trailer.part) == (key.block, key.part)
                && trailer.writer == segment.name.writer
                && trailer.segment == segment.name.number
                && trailer.generation == segment.name.generation
                && trailer.page == found.location.page
                && trailer.part_bytes == self.layout.part_bytes
                && trailer.checksum == found.checksum
        });
        trailer.ok_or_else(|| self.mismatch(key, found, &segment))
    }

    /// Bytes that can be verified on their own in a part with this trailer.
    pub fn unit_bytes(&self, trailer: &Trailer) -> u64 {
        if trailer.units.is_empty() { self.layout.part_bytes } else { trailer.unit_bytes }
    }

    /// Whether the bytes of unit `unit` (of [`Tier::unit_bytes`]) are the ones that were saved.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile.
    pub unsafe fn verify_unit(
        &self,
        key: &PartKey,
        found: &Found,
        trailer: &Trailer,
        unit: u32,
        pieces: &[DmaSlice],
    ) -> Result<()> {
        if trailer.units.is_empty() {
            // SAFETY: as promised by the caller.
            return unsafe { self.verify(key, found, pieces) };
        }
        if self.layout.config.checksum == Checksum::Off || trailer.checksum == NO_CHECKSUM {
            return Ok(());
        }
        let segment = self.catalog.segment(found.location.segment).ok_or_else(|| gone(key))?;
        let identity = self.layout.identity(key, segment.name.generation);
        let left = self.layout.part_bytes.saturating_sub(u64::from(unit) * trailer.unit_bytes);
        let bytes = trailer.unit_bytes.min(left);
        // SAFETY: as promised by the caller.
        let sum = unsafe { identity.unit(unit, pieces, 0, bytes) };
        match trailer.units.get(unit as usize) == Some(&sum) {
            true => Ok(()),
            false => Err(self.mismatch(key, found, &segment)),
        }
    }

    /// A read failed, or what it brought did not verify: the part is not found there any more, and its
    /// manifest is read again to say whether it was gone (`NotFound`) or is damaged (`Corrupt`).
    pub fn read_failed(
        self: &Arc<Self>,
        key: &PartKey,
        found: &Found,
        error: Error,
        done: Box<dyn FnOnce(Error) + Send>,
    ) {
        if never_began(&error) || error.kind() == ErrorKind::Closed {
            return done(error);
        }
        self.catalog.index.remove_at(key, found.location);
        self.files.remove(found.location.segment);
        let Some(segment) = self.catalog.segment(found.location.segment) else {
            return done(gone(key));
        };
        let (tier, key, found) = (Arc::clone(self), *key, *found);
        let saver = &self.savers[usize::from(segment.home)];
        let reply = Reply::new(move |verdict: Result<Error>| done(verdict.unwrap_or_else(|e| e)));
        reply.run_on(&saver.home.backend, move |reply| {
            reply.send(Ok(tier.judge(&key, &found, segment.name.generation, error)));
        });
    }

    /// Blocks; on a path pool only.
    fn judge(&self, key: &PartKey, found: &Found, generation: u32, error: Error) -> Error {
        let Location { segment: handle, .. } = found.location;
        let Some(segment) = self.catalog.segment(handle) else { return gone(key) };
        debug_assert_eq!(generation, segment.name.generation);
        let saver = &self.savers[usize::from(segment.home)];
        let own = saver.is_own(segment.name.writer);
        let listed = match self.refresher.poll_writer(segment.home, segment.name.writer) {
            Ok(listed) => own || listed,
            // The drive fails altogether: nothing is known about the part that was not known before.
            Err(failure) => {
                self.find_again(key, found);
                return if error.kind() == ErrorKind::Corrupt { failure } else { error };
            }
        };
        let retired = self.catalog.segment(handle).is_none_or(|segment| segment.is_retired());
        let path = saver.home.segments.join(segment.name.to_string());
        let stands = saver.home.backend.files().metadata(&path);
        let vanished = stands.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound);
        if !listed || retired || vanished {
            return gone(key);
        }
        if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) {
            self.catalog.quarantine(key, found.location);
            self.catalog.counters.quarantined.fetch_add(1, Ordering::Relaxed);
            self.record_drop(saver, key, found, &segment);
            return self.mismatch(key, found, &segment);
        }
        // The drive failed, which says nothing about the part: others may still read it, and so may we.
        self.find_again(key, found);
        error
    }

    fn find_again(&self, key: &PartKey, found: &Found) {
        if self.catalog.index.find(key).is_none() {
            self.catalog.publish(key, *found);
        }
    }

    fn record_drop(&self, saver: &Arc<Saver>, key: &PartKey, found: &Found, segment: &SegmentRef) {
        let record = Record {
            part: key.part,
            block: key.block,
            segment: segment.name.number,
            generation: segment.name.generation,
            page: found.location.page,
            checksum: segment.name.writer,
            ..Record::of(Kind::Drop, wall_ms())
        };
        saver.record(record);
    }

    /// Takes room for a part: `done` is called at once where a segment has room, else when one was made.
    pub fn reserve(
        self: &Arc<Self>,
        key: &PartKey,
        expires: Option<Instant>,
        done: Box<dyn FnOnce(Result<Extent>) + Send>,
    ) {
        if !self.layout.parts.contains(&key.part) {
            return done(Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "part {} is not among the parts {:?} that this store saves; check part_index and parts_owned",
                    key.part, self.layout.parts
                ),
            )));
        }
        let turn = self.turn.fetch_add(self.extent_bytes(), Ordering::Relaxed) / TURN_BYTES;
        self.reserve_at(turn as usize, self.savers.len(), *key, expires, Reply::boxed(done));
    }

    /// Tries the home whose turn it is, then the others: a failing one takes no saves with it.
    fn reserve_at(
        self: &Arc<Self>,
        turn: usize,
        tries: usize,
        key: PartKey,
        expires: Option<Instant>,
        reply: Reply<Extent>,
    ) {
        let tier = Arc::clone(self);
        let saver = Arc::clone(&self.savers[turn % self.savers.len()]);
        if tries <= 1 {
            return saver.reserve(&key, expires, reply);
        }
        let attempt = Reply::new(move |extent: Result<Extent>| match extent {
            Err(error) if error.kind() != ErrorKind::Closed => {
                tier.reserve_at(turn + 1, tries - 1, key, expires, reply);
            }
            extent => reply.send(extent),
        });
        saver.reserve(&key, expires, attempt);
    }

    /// Takes the checksums of a part that lies in `pieces` and writes its trailer page. Work for the CPU
    /// only; any thread.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile; `trailer` is valid for writing one
    /// page.
    pub unsafe fn seal(
        &self,
        extent: &Extent,
        pieces: &[DmaSlice],
        shard_bytes: u64,
        trailer: *mut u8,
    ) {
        let name = extent.segment().name;
        let part_bytes = self.layout.part_bytes;
        let sums = match self.layout.config.checksum {
            // SAFETY: as promised by the caller.
            Checksum::Full => unsafe {
                let identity = self.layout.identity(extent.key(), name.generation);
                identity.all(pieces, part_bytes, shard_bytes)
            },
            Checksum::Off => crate::posix::checksum::PartChecksums {
                part: NO_CHECKSUM,
                unit_bytes: part_bytes,
                units: Vec::new(),
            },
        };
        extent.set_checksum(sums.part);
        // SAFETY: one page, as promised by the caller.
        let page = unsafe { std::slice::from_raw_parts_mut(trailer, PAGE) };
        Trailer {
            fingerprint: self.layout.fingerprint,
            block: extent.key().block,
            part: extent.key().part,
            writer: name.writer,
            segment: name.number,
            generation: name.generation,
            page: extent.page(),
            part_bytes,
            checksum: sums.part,
            unit_bytes: sums.unit_bytes,
            units: sums.units,
            time_ms: wall_ms(),
        }
        .encode(page);
    }

    /// Writes a sealed part (padded payload and trailer, end to end in `pieces`), flushes as durability
    /// asks, publishes it, makes it findable here, then calls `done`. The memory must stay valid until
    /// `done` has been called or leaked.
    pub fn write(
        self: &Arc<Self>,
        extent: Extent,
        pieces: Vec<DmaSlice>,
        class: Class,
        expires: Option<Instant>,
        done: Done,
    ) {
        let writing = Arc::clone(&self.writing);
        writing.fetch_add(1, Ordering::AcqRel);
        let reply = Reply::new(move |result| {
            writing.fetch_sub(1, Ordering::AcqRel);
            done(result);
        });
        let total: u64 = pieces.iter().map(|piece| piece.length as u64).sum();
        if total != self.extent_bytes() {
            return reply.send(Err(Error::new(
                ErrorKind::Internal,
                format!("a write of {total} bytes is no extent of {}", self.extent_bytes()),
            )));
        }
        let manifest = Arc::clone(&extent.writer().manifest);
        manifest.data_begins();
        let saver = Arc::clone(extent.saver());
        saver.write_begins();
        let backend = Arc::clone(&extent.saver().home.backend);
        let (file, offset) = (extent.segment().file.clone(), extent.offset());
        let tier = Arc::clone(self);
        let written = Reply::new(move |result: Result<()>| {
            saver.write_ended();
            manifest.data_ended();
            match result {
                Ok(()) => tier.publish(extent, reply),
                Err(error) => {
                    if !never_began(&error) {
                        extent.saver().write_failed(&extent, &error);
                        extent.spend();
                    }
                    manifest.kick(Urgency::MayGather);
                    reply.send(Err(error));
                }
            }
        });
        transfer(&backend, Operation::Write, &file, offset, pieces, class, expires, written);
    }

    fn publish(self: &Arc<Self>, extent: Extent, reply: Reply<()>) {
        let name = extent.segment().name;
        let (key, checksum) = (*extent.key(), extent.checksum());
        let record = Record {
            part: key.part,
            block: key.block,
            segment: name.number,
            generation: name.generation,
            page: extent.page(),
            length: self.layout.part_bytes as u32,
            checksum,
            ..Record::of(Kind::Publish, wall_ms())
        };
        let location = Location { segment: extent.segment().handle, page: extent.page() };
        let manifest = Arc::clone(&extent.writer().manifest);
        let data = Some(Arc::clone(extent.segment()));
        let catalog = Arc::clone(&self.catalog);
        let reply = Reply::new(move |result: Result<()>| {
            match &result {
                Ok(()) => catalog.publish(&key, Found { location, checksum }),
                Err(error) if extent.segment().is_lost() => {
                    extent.saver().write_failed(&extent, error);
                }
                Err(_) => {}
            }
            extent.spend();
            reply.send(result);
        });
        manifest.push(Item { record, data, reply }, Urgency::MayGather);
    }

    /// Tells everyone that announced blocks will not come. A store that never saved becomes a writer for it.
    pub fn abandon(self: &Arc<Self>, blocks: &[BlockId], done: Done) {
        blocks.iter().for_each(|block| self.catalog.abandon(*block));
        let reply = Reply::boxed(done);
        if blocks.is_empty() {
            return reply.send(Ok(()));
        }
        if self.layout.parts.is_empty() {
            return reply.send(Err(Error::new(
                ErrorKind::Unsupported,
                "a store that only looks up announces nothing",
            )));
        }
        // Any backend will do: first those that it saves in already, and not those that do not work.
        let mut savers: Vec<Arc<Saver>> = self.savers.clone();
        savers.sort_by_key(|saver| (saver.failure().is_some(), saver.writer().is_none()));
        self.announce(savers.into(), blocks.into(), reply);
    }

    fn announce(
        self: &Arc<Self>,
        mut savers: VecDeque<Arc<Saver>>,
        blocks: Arc<[BlockId]>,
        reply: Reply<()>,
    ) {
        let Some(saver) = savers.pop_front() else {
            return reply.send(Err(Error::new(
                ErrorKind::InvalidConfig,
                "storage_backends: none is given",
            )));
        };
        let (tier, again) = (Arc::clone(self), Arc::clone(&blocks));
        let attempt = Reply::new(move |result: Result<()>| match result {
            Err(error) if error.kind() != ErrorKind::Closed && !savers.is_empty() => {
                tier.announce(savers, again, reply);
            }
            result => reply.send(result),
        });
        let patience = self.layout.config.timeout.min(REFRESH_PATIENCE);
        let late = timeout("announcing abandoned blocks");
        let attempt = attempt.by(&self.clock, Instant::now() + patience, late);
        saver.with_writer(Reply::new(move |writer: Result<Arc<Writer>>| match writer {
            Err(error) => attempt.send(Err(error)),
            Ok(writer) => {
                let join = Join::new(blocks.len(), attempt);
                for block in blocks.iter() {
                    let record = Record { block: *block, ..Record::of(Kind::Abandoned, wall_ms()) };
                    let join = Arc::clone(&join);
                    let reply = Reply::new(move |result| join.ended(result));
                    writer.manifest.push(Item { record, data: None, reply }, Urgency::Now);
                }
            }
        }));
    }

    /// Whether an announced block will not come.
    pub fn is_abandoned(&self, block: &BlockId) -> bool {
        self.catalog.is_abandoned(block)
    }

    /// Takes no more saves, waits for those on their way, seals and trims; idempotent. What does not end by
    /// `deadline` is left to the next open.
    pub fn close(&self, deadline: Instant) {
        if std::mem::replace(&mut *self.closed.lock(), true) {
            return;
        }
        let writers: Vec<_> = self.savers.iter().map(|saver| (saver, saver.stop())).collect();
        while self.writing.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(CLOSE_POLL);
        }
        let (sender, ended) = std::sync::mpsc::channel();
        let mut left = 0;
        for (saver, writer) in writers {
            let Some(writer) = writer else { continue };
            let (sender, saver) = (sender.clone(), Arc::clone(saver));
            let reply = Reply::new(move |result: Result<()>| drop(sender.send(result)));
            let home = Arc::clone(&saver.home);
            reply.run_on(&home.backend, move |reply| saver.close_writer(&writer, reply));
            left += 1;
        }
        for _ in 0..left {
            let patience = deadline.saturating_duration_since(Instant::now());
            match ended.recv_timeout(patience) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => crate::log::warning(format_args!("closing: {error}")),
                Err(_) => break,
            }
        }
        self.clock.stop();
        self.files.clear();
    }

    /// What the tier holds and what happened to it.
    pub fn stats(&self) -> TierStats {
        let catalog = &self.catalog;
        let (manifests, live) = self.refresher.manifests();
        let counters = &self.refresher.counters;
        let backend = |saver: &Arc<Saver>| BackendStats {
            directory: saver.home.backend.directory().to_path_buf(),
            direct: saver.home.is_direct(),
            holds_manifests: saver.home.can_hold(),
            failure: saver.failure().map(|error| error.to_string()),
        };
        TierStats {
            parts: catalog.index.len() as u64,
            index_bytes: catalog.index.bytes() as u64,
            segments: catalog.segment_count() as u64,
            segment_bytes: self.capacity.used(),
            capacity_bytes: self.capacity.limit(),
            open_files: self.files.count() as u64,
            writers: manifests as u64,
            live_writers: live as u64,
            bad_records: catalog.counters.bad_records.load(Ordering::Relaxed),
            misfit_records: catalog.counters.misfits.load(Ordering::Relaxed),
            quarantined: catalog.counters.quarantined.load(Ordering::Relaxed),
            refreshes: counters.rounds.load(Ordering::Relaxed),
            refreshes_left_behind: counters.left_behind.load(Ordering::Relaxed),
            manifests_unreadable: counters.unreadable.load(Ordering::Relaxed),
            backends: self.savers.iter().map(backend).collect(),
        }
    }

    /// The savers, for tests that look inside.
    #[cfg(test)]
    pub(crate) fn savers(&self) -> &[Arc<Saver>] {
        &self.savers
    }

    /// Cleans up after dead writers, in all backends; `done` gets what was done. Stores that only look up
    /// need not: those that save do it when they open.
    pub fn recover(&self, done: Box<dyn FnOnce(Result<Recovered>) + Send>) {
        let sum = Arc::new(Mutex::new(Recovered::default()));
        let total = Arc::clone(&sum);
        let reply = Reply::new(move |result: Result<()>| {
            let sum = *total.lock();
            done(result.map(|()| sum));
        });
        let join = Join::new(self.savers.len(), reply);
        for saver in &self.savers {
            let (join, sum) = (Arc::clone(&join), Arc::clone(&sum));
            let (catalog, refresher) = (Arc::clone(&self.catalog), Arc::clone(&self.refresher));
            let home = Arc::clone(&saver.home);
            let backend = Arc::clone(&home.backend);
            let reply = Reply::new(move |result| join.ended(result));
            reply.run_on(&backend, move |reply| {
                let recovered = recover::recover(&home, &catalog, &refresher);
                reply.send(recovered.map(|recovered| sum.lock().add(&recovered)));
            });
        }
    }

    /// One round of reclaim; `done` gets the bytes that will be freed after the grace. Stores that only look
    /// up reclaim nothing.
    pub fn reclaim(&self, done: Box<dyn FnOnce(Result<u64>) + Send>) {
        self.reclaim.round(Reply::boxed(done));
    }

    /// Recovery and reclaim run on the path pools, apart from everything else, at open and at every interval.
    fn keep_house(self: &Arc<Self>) {
        if self.layout.parts.is_empty() {
            return;
        }
        self.recover(Box::new(|result| {
            if let Err(error) = result {
                crate::log::warning(format_args!("cleaning up after dead writers: {error}"));
            }
        }));
        self.reclaim(Box::new(|result| {
            if let Err(error) = result {
                crate::log::warning(format_args!("reclaim: {error}"));
            }
        }));
        let tier = Arc::downgrade(self);
        self.clock.at(Instant::now() + self.layout.config.gc.interval, move || {
            let Some(tier) = tier.upgrade() else { return };
            // Who died and who ended is known from reading manifests, which an idle store does not do.
            let house = Arc::downgrade(&tier);
            tier.refresh(Box::new(move |_| {
                if let Some(tier) = house.upgrade() {
                    tier.keep_house();
                }
            }));
        });
    }

    fn mismatch(&self, key: &PartKey, found: &Found, segment: &SegmentRef) -> Error {
        let home = &self.savers[usize::from(segment.home)].home;
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "part {} of block {} at page {} does not match its checksum; it counts as missing",
                key.part, key.block, found.location.page
            ),
        )
        .at(&home.segments.join(segment.name.to_string()))
    }
}

/// How often a close looks whether the saves on their way have ended.
const CLOSE_POLL: Duration = Duration::from_millis(1);

impl Drop for Tier {
    fn drop(&mut self) {
        self.close(Instant::now() + self.layout.config.timeout.min(REFRESH_PATIENCE));
    }
}

fn gone(key: &PartKey) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("part {} of block {} is not there any more", key.part, key.block),
    )
}

/// Moves `pieces`, end to end, from or to `offset`.
#[allow(clippy::too_many_arguments)]
fn transfer(
    backend: &Backend,
    operation: Operation,
    file: &File,
    offset: u64,
    pieces: Vec<DmaSlice>,
    class: Class,
    expires: Option<Instant>,
    reply: Reply<()>,
) {
    let request = |offset, memory, done: Done| Request {
        operation,
        file: file.clone(),
        offset,
        memory,
        class,
        expires,
        done,
    };
    if let [memory] = pieces[..] {
        return backend.submit(request(offset, memory, reply.into_done()));
    }
    if pieces.is_empty() {
        return reply.send(Ok(()));
    }
    let join = Join::new(pieces.len(), reply);
    let mut at = offset;
    let requests = pieces.into_iter().map(|memory| {
        let join = Arc::clone(&join);
        let request = request(at, memory, Box::new(move |result| join.ended(result)));
        at += memory.length as u64;
        request
    });
    backend.submit_all(requests.collect());
}

/// Creates the folders of all homes; an error only where none could be. One that does not answer is given a
/// part of the time while others do: opening goes on without it.
fn create_folders(savers: &[Arc<Saver>], deadline: Instant) -> Result<()> {
    let (sender, created) = std::sync::mpsc::channel();
    for saver in savers {
        let sender = sender.clone();
        let reply = Reply::new(move |result: Result<()>| drop(sender.send(result)));
        let home = Arc::clone(&saver.home);
        let backend = Arc::clone(&home.backend);
        reply.run_on(&backend, move |reply| reply.send(home.create_folders()));
    }
    let now = Instant::now();
    let patience = deadline.saturating_duration_since(now);
    let early = now + patience / FOLDERS_SHARE;
    let mut succeeded = 0;
    let mut error = Error::new(ErrorKind::InvalidConfig, "storage_backends: none is given");
    for _ in savers {
        let until = if succeeded > 0 { early } else { deadline };
        match created.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Ok(())) => succeeded += 1,
            Ok(Err(failure)) => {
                crate::log::warning(format_args!("a storage backend is left out: {failure}"));
                error = failure;
            }
            Err(_) => {
                error = timeout("creating the namespace's folders");
                crate::log::warning(format_args!("a storage backend is left out: {error}"));
                break;
            }
        }
    }
    if succeeded > 0 { Ok(()) } else { Err(error) }
}

/// Waits for one answer.
fn wait(deadline: Instant, what: &str, ask: impl FnOnce(Done)) -> Result<()> {
    let (sender, answer) = std::sync::mpsc::channel();
    ask(Box::new(move |result| drop(sender.send(result))));
    match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(result) => result,
        Err(_) => Err(timeout(what)),
    }
}

fn timeout(what: &str) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!("{what} did not end in time; check that the mount of storage_backends answers"),
    )
}

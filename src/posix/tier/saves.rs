//! Saving parts: room in a segment, checksums and trailer, the write, and the record that makes it count.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Tier;
use super::reads::transfer;
use crate::block::{PAGE, PartKey};
use crate::config::Checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Class, DmaSlice, Done, Operation};
use crate::mem::runs::Runs;
use crate::posix::checksum::{Identity, PartChecksums, Wanted};
use crate::posix::format::{Kind, Record, Trailer};
use crate::posix::host::wall_ms;
use crate::posix::index::{Found, Location};
use crate::posix::manifest::{Item, Urgency};
use crate::posix::reply::{Reply, never_began};
use crate::posix::saver::Extent;
use crate::posix::segment::GENERATION_FIRST;

/// Checksums of a part that were taken before it had a place.
pub struct Taken {
    identity: Identity,
    sums: PartChecksums,
}

impl Taken {
    /// Whether they are those of the part in this extent.
    pub fn are_of(&self, extent: &Extent) -> bool {
        let generation = extent.segment().name.generation;
        (self.identity.key, self.identity.generation) == (*extent.key(), generation)
    }
}

/// Bytes that go to one backend before the next gets its turn: neighbours of a prompt lie together.
const TURN_BYTES: u64 = 1 << 20;

impl Tier {
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

    /// Brings a whole part from `runs` to `staging` and takes its checksums in the same pass, before it is known which
    /// segment will hold it: they are right where that is a new file, as nearly all are. `None` where there are to be
    /// no checksums. Work for the CPU only; any thread.
    ///
    /// # Safety
    /// The runs are valid for reading a part and `staging` for writing it; they do not overlap, and nobody writes the
    /// runs or touches `staging` meanwhile.
    pub unsafe fn gather(
        &self,
        key: &PartKey,
        runs: &mut Runs<'_>,
        staging: *mut u8,
    ) -> Option<Taken> {
        let part_bytes = self.layout.part_bytes;
        if self.layout.config.checksum == Checksum::Off {
            // SAFETY: as promised by the caller.
            unsafe { runs.gather(staging, part_bytes as usize) };
            return None;
        }
        let identity = self.layout.identity(key, GENERATION_FIRST);
        // SAFETY: as promised by the caller.
        let sums = unsafe { identity.gathered(runs, staging, part_bytes) };
        Some(Taken { identity, sums })
    }

    /// Takes the checksums of a part that lies in `pieces`, unless `taken` are those, and writes its trailer page.
    /// Work for the CPU only; any thread.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile; `trailer` is valid for writing one
    /// page.
    pub unsafe fn seal(
        &self,
        extent: &Extent,
        pieces: &[DmaSlice],
        shard_bytes: u64,
        taken: Option<Taken>,
        trailer: *mut u8,
    ) {
        let name = extent.segment().name;
        let part_bytes = self.layout.part_bytes;
        let sums = match (self.layout.config.checksum, taken) {
            (Checksum::Full, Some(taken)) if taken.are_of(extent) => taken.sums,
            // SAFETY: as promised by the caller.
            (Checksum::Full, _) => unsafe {
                let identity = self.layout.identity(extent.key(), name.generation);
                identity.all(pieces, part_bytes, shard_bytes)
            },
            (Checksum::Off, _) => PartChecksums::none(part_bytes),
        };
        // SAFETY: one page, as promised by the caller.
        self.describe(extent, sums, unsafe { std::slice::from_raw_parts_mut(trailer, PAGE) });
    }

    /// The bytes of a part whose hashes [`Tier::seal_hashed`] needs; none where checksums are off.
    pub fn hashes_wanted(&self, extent: &Extent, shard_bytes: u64) -> Vec<Wanted> {
        let identity = self.layout.identity(extent.key(), extent.segment().name.generation);
        match self.layout.config.checksum {
            Checksum::Full => identity.wanted(self.layout.part_bytes, shard_bytes),
            Checksum::Off => Vec::new(),
        }
    }

    /// As [`Tier::seal`], where somebody else has hashed what [`Tier::hashes_wanted`] asks for.
    pub fn seal_hashed(
        &self,
        extent: &Extent,
        shard_bytes: u64,
        hashes: &[u64],
        trailer: &mut [u8],
    ) {
        let part_bytes = self.layout.part_bytes;
        let sums = match hashes {
            [] => PartChecksums::none(part_bytes),
            hashes => PartChecksums::of_hashes(part_bytes, shard_bytes, hashes),
        };
        self.describe(extent, sums, trailer);
    }

    /// Writes the trailer page.
    fn describe(&self, extent: &Extent, sums: PartChecksums, page: &mut [u8]) {
        let name = extent.segment().name;
        let part_bytes = self.layout.part_bytes;
        extent.set_checksum(sums.part);
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
}

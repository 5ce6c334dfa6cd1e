//! Judging what was read: whether it is what was saved, and what it means if not.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Tier;
use crate::block::PartKey;
use crate::config::Checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::io::DmaSlice;
use crate::mem::runs::Runs;
use crate::posix::catalog::SegmentRef;
use crate::posix::checksum::Claim;
use crate::posix::format::{Kind, NO_CHECKSUM, Record, Trailer};
use crate::posix::host::wall_ms;
use crate::posix::index::{Found, Location};
use crate::posix::reply::{Reply, never_began};
use crate::posix::saver::Saver;

impl Tier {
    /// Whether the bytes of a whole part are the ones that were saved. Work for the CPU only.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile.
    pub unsafe fn verify(&self, key: &PartKey, found: &Found, pieces: &[DmaSlice]) -> Result<()> {
        // SAFETY: as promised by the caller; runs that lead nowhere write nothing.
        unsafe { self.verify_along(key, found, pieces, &mut Runs::nowhere()) }
    }

    /// As [`Tier::verify`]; copies the bytes to `along` in the same pass, before it is known whether they are right.
    ///
    /// # Safety
    /// As for [`Tier::verify`]; the runs are valid for writing, and overlap no piece.
    pub unsafe fn verify_along(
        &self,
        key: &PartKey,
        found: &Found,
        pieces: &[DmaSlice],
        along: &mut Runs<'_>,
    ) -> Result<()> {
        let claim = self.claim_part(key, found)?;
        // SAFETY: as promised by the caller.
        match unsafe { check_along(claim, pieces, self.layout.part_bytes, along) } {
            true => Ok(()),
            false => Err(self.refuted(key, found)),
        }
    }

    /// The checksum that a whole part must have; `None` where it has none.
    pub fn claim_part(&self, key: &PartKey, found: &Found) -> Result<Option<Claim>> {
        if self.layout.config.checksum == Checksum::Off || found.checksum == NO_CHECKSUM {
            return Ok(None);
        }
        let segment = self.catalog.segment(found.location.segment).ok_or_else(|| gone(key))?;
        let identity = self.layout.identity(key, segment.name.generation);
        Ok(Some(identity.claim_part(self.layout.part_bytes, found.checksum)))
    }

    /// The checksum that unit `unit` (of [`Tier::unit_bytes`]) must have; `None` where it has none.
    pub fn claim_unit(
        &self,
        key: &PartKey,
        found: &Found,
        trailer: &Trailer,
        unit: u32,
    ) -> Result<Option<Claim>> {
        if trailer.units.is_empty() {
            return self.claim_part(key, found);
        }
        if self.layout.config.checksum == Checksum::Off || trailer.checksum == NO_CHECKSUM {
            return Ok(None);
        }
        let segment = self.catalog.segment(found.location.segment).ok_or_else(|| gone(key))?;
        let identity = self.layout.identity(key, segment.name.generation);
        let from = u64::from(unit) * trailer.unit_bytes;
        let bytes = trailer.unit_bytes.min(self.layout.part_bytes.saturating_sub(from));
        // A unit that the trailer does not have matches nothing.
        let sum = trailer.units.get(unit as usize).copied().unwrap_or(NO_CHECKSUM);
        Ok(Some(identity.claim_unit(unit, from, bytes, sum)))
    }

    /// The error of bytes that a claim does not hold for.
    pub fn refuted(&self, key: &PartKey, found: &Found) -> Error {
        match self.catalog.segment(found.location.segment) {
            Some(segment) => self.mismatch(key, found, &segment),
            None => gone(key),
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

    /// Whether the bytes of unit `unit` (of [`Tier::unit_bytes`]) are the ones that were saved; copies them to
    /// `along` in the same pass, before that is known.
    ///
    /// # Safety
    /// As for [`Tier::verify_along`].
    pub unsafe fn verify_unit(
        &self,
        key: &PartKey,
        found: &Found,
        trailer: &Trailer,
        unit: u32,
        pieces: &[DmaSlice],
        along: &mut Runs<'_>,
    ) -> Result<()> {
        let claim = self.claim_unit(key, found, trailer, unit)?;
        let from = u64::from(unit) * self.unit_bytes(trailer);
        let bytes = self.unit_bytes(trailer).min(self.layout.part_bytes.saturating_sub(from));
        // SAFETY: as promised by the caller.
        match unsafe { check_along(claim, pieces, bytes, along) } {
            true => Ok(()),
            false => Err(self.refuted(key, found)),
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

/// Whether a claim holds for the first `bytes` bytes of `pieces`; copies them to `along` in any case. Without a claim
/// they count as right.
///
/// # Safety
/// As for [`Tier::verify_along`].
unsafe fn check_along(
    claim: Option<Claim>,
    pieces: &[DmaSlice],
    bytes: u64,
    along: &mut Runs<'_>,
) -> bool {
    // SAFETY: as promised by the caller.
    unsafe {
        match claim {
            Some(claim) => claim.holds_along(pieces, along),
            None => {
                copy(pieces, bytes, along);
                true
            }
        }
    }
}

/// Copies the first `bytes` bytes of `pieces` to where they go.
///
/// # Safety
/// The pieces are valid for reading and the runs for writing; they do not overlap.
unsafe fn copy(pieces: &[DmaSlice], bytes: u64, along: &mut Runs<'_>) {
    let mut left = bytes as usize;
    for piece in pieces {
        let length = piece.length.min(left);
        // SAFETY: as promised by the caller.
        unsafe { along.scatter(piece.pointer, length) };
        left -= length;
    }
}

/// Why a part is not served that the index named.
pub(super) fn gone(key: &PartKey) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("part {} of block {} is not there any more", key.part, key.block),
    )
}

//! Slots in device memory: the device computes the checksums, the CPU compares them, and only then are bytes
//! handed on. A load's bytes reach the caller's pages by a copy that follows the comparison; a save's checksum is
//! of the bytes that the drive then reads.

use std::sync::Arc;

use parking_lot::Mutex;

use super::engine::Engine;
use crate::copy::Job;
use crate::device::{DeviceStaging, HashRun};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Class;
use crate::parts::{Check, Outcome, PartId, Piece};
use crate::posix::{Claim, Extent, Trailer, Wanted};

/// The checksums that the device computes now, each of which holds a copy worker in the driver for as long as the
/// device takes. A store that closes does not wait for what may never end: it lets no further one begin, and is
/// leaked where one is under way.
#[derive(Default)]
pub(super) struct Hashes(Mutex<Counted>);

#[derive(Default)]
struct Counted {
    under_way: usize,
    shut: bool,
}

/// One of them.
struct UnderWay<'a>(&'a Hashes);

impl Hashes {
    fn begin(&self) -> Result<UnderWay<'_>> {
        let mut counted = self.0.lock();
        if counted.shut {
            let text = "the store was closed before the device had computed a checksum";
            return Err(Error::new(ErrorKind::Closed, text));
        }
        counted.under_way += 1;
        Ok(UnderWay(self))
    }

    /// Lets no more begin; whether none is under way, so that no copy worker is in the driver for one, nor will be.
    pub(super) fn shut(&self) -> bool {
        let mut counted = self.0.lock();
        counted.shut = true;
        counted.under_way == 0
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.0.lock().under_way -= 1;
    }
}

impl Engine {
    /// The hashes of these runs of a slot.
    fn hash(&self, memory: &dyn DeviceStaging, slot: u32, wanted: &[Wanted]) -> Result<Vec<u64>> {
        let _under_way = self.hashes.begin()?;
        memory.hash(&self.hash_runs(slot, wanted))
    }

    /// As `verify_whole` and `verify_shards`, of a piece in device memory; all of it in one request to the device.
    pub(super) fn verify_on_device(
        &self,
        piece: &Piece,
        trailer: Option<Arc<Trailer>>,
        memory: &dyn DeviceStaging,
    ) -> Outcome {
        let found_now = trailer.clone().filter(|_| matches!(piece.check, Check::First));
        let (shards, error) = match self.bad_shards(piece, trailer.as_deref(), memory) {
            Ok(bad) if bad.is_empty() => return Outcome::Good(found_now),
            Ok(bad) => (bad, self.tier().refuted(&piece.key, &piece.found)),
            // Nothing is known of the bytes, so nobody gets them.
            Err(error) => (piece.shards.clone().collect(), error),
        };
        Outcome::Bad { shards, error, trailer: found_now }
    }

    /// The shards of a piece that are not what was saved: of a whole part all, if it is not.
    fn bad_shards(
        &self,
        piece: &Piece,
        trailer: Option<&Trailer>,
        memory: &dyn DeviceStaging,
    ) -> Result<Vec<u32>> {
        let claims = self.claims(piece, trailer)?;
        let wanted: Vec<Wanted> = claims.iter().map(|(_, claim)| claim.wanted).collect();
        let hashes = self.hash(memory, piece.slot, &wanted)?;
        let broken = |(_, claim): &&(u32, Claim), hash: &u64| !claim.holds(*hash);
        let mut bad: Vec<u32> = claims
            .iter()
            .zip(&hashes)
            .filter(|(claim, hash)| broken(claim, hash))
            .map(|((shard, _), _)| *shard)
            .collect();
        bad.dedup();
        if trailer.is_none() && !bad.is_empty() {
            bad = piece.shards.clone().collect();
        }
        Ok(bad)
    }

    /// What must hold for a piece, each claim with the shard it belongs to.
    fn claims(&self, piece: &Piece, trailer: Option<&Trailer>) -> Result<Vec<(u32, Claim)>> {
        let tier = self.tier();
        let Some(trailer) = trailer else {
            if !matches!(piece.check, Check::Whole) {
                return Ok(Vec::new());
            }
            let claim = tier.claim_part(&piece.key, &piece.found)?;
            return Ok(claim.map(|claim| (piece.shards.start, claim)).into_iter().collect());
        };
        let units = (self.config.geometry.shard_bytes / tier.unit_bytes(trailer)) as u32;
        let mut claims = Vec::new();
        for shard in piece.shards.clone() {
            for unit in shard * units..(shard + 1) * units {
                let claim = tier.claim_unit(&piece.key, &piece.found, trailer, unit)?;
                claims.extend(claim.map(|claim| (shard, claim)));
            }
        }
        Ok(claims)
    }

    fn hash_runs(&self, slot: u32, wanted: &[Wanted]) -> Vec<HashRun> {
        let start = self.slots().device_offset(slot);
        let run = |wanted: &Wanted| HashRun {
            offset: start + wanted.from as usize,
            bytes: wanted.bytes,
            seed: wanted.seed,
        };
        wanted.iter().map(run).collect()
    }

    /// As `seal`, of a slot in device memory.
    pub(super) fn seal_on_device(
        &self,
        part: PartId,
        slot: u32,
        extent: Extent,
        memory: &dyn DeviceStaging,
    ) -> Vec<Job> {
        let geometry = &self.config.geometry;
        let shard_bytes = geometry.shard_bytes.min(geometry.part_bytes);
        let wanted = self.tier().hashes_wanted(&extent, shard_bytes);
        let hashes = match self.hash(memory, slot, &wanted) {
            Ok(hashes) => hashes,
            // The extent goes back to its segment.
            Err(error) => {
                self.stored(part, &Err(error));
                return Vec::new();
            }
        };
        let trailer = self.slots().trailer(slot);
        // SAFETY: a page of host memory that belongs to the slot; in state Storing nobody else touches it.
        let page = unsafe { std::slice::from_raw_parts_mut(trailer.pointer, trailer.length) };
        self.tier().seal_hashed(&extent, shard_bytes, &hashes, page);
        self.write_slot(part, slot, extent);
        Vec::new()
    }

    /// A sealed slot goes to its extent.
    pub(super) fn write_slot(&self, part: PartId, slot: u32, extent: Extent) {
        let engine = self.this();
        let done = Box::new(move |result: std::result::Result<(), Error>| {
            engine.stored(part, &result);
        });
        self.tier().write(extent, self.slots().extent(slot), Class::Save, None, done);
    }
}

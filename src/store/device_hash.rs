//! Slots in device memory: the device computes the checksums, the CPU compares them, and only then are bytes
//! handed on. A load's bytes reach the caller's pages by a copy that follows the comparison; a save's checksum is
//! of the bytes that the drive then reads.

use std::sync::Arc;

use parking_lot::Mutex;

use super::engine::Engine;
use crate::copy::{Hash, Job, Urgency};
use crate::device::HashRun;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Class;
use crate::parts::{Check, Outcome, PartId, Piece};
use crate::posix::{Claim, Extent, Trailer, Wanted};

/// The checksums that were asked of the device and are not there. A store that closes does not wait for what may never
/// end: it lets no further one be asked for, and is leaked where one is under way.
#[derive(Default)]
pub(super) struct Hashes(Mutex<Counted>);

#[derive(Default)]
struct Counted {
    under_way: usize,
    shut: bool,
}

/// One of them.
struct UnderWay(Arc<Hashes>);

impl Hashes {
    fn begin(self: &Arc<Self>) -> Result<UnderWay> {
        let mut counted = self.0.lock();
        if counted.shut {
            let text = "the store was closed before the device had computed a checksum";
            return Err(Error::new(ErrorKind::Closed, text));
        }
        counted.under_way += 1;
        Ok(UnderWay(Arc::clone(self)))
    }

    /// Lets no more begin; whether none is under way, so that no copy worker waits for one, nor will.
    pub(super) fn shut(&self) -> bool {
        let mut counted = self.0.lock();
        counted.shut = true;
        counted.under_way == 0
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.0.lock().under_way -= 1;
    }
}

impl Engine {
    /// The job that has the device compute what is wanted of a slot, and then goes on with the hashes.
    fn hash(
        &self,
        urgency: Urgency,
        slot: u32,
        wanted: &[Wanted],
        then: impl FnOnce(&Engine, Result<Vec<u64>>) -> Vec<Job> + Send + 'static,
    ) -> Vec<Job> {
        let memory = self.slots().device().filter(|_| !wanted.is_empty());
        let Some(memory) = memory.map(Arc::clone) else { return then(self, Ok(Vec::new())) };
        let under_way = match self.hashes.begin() {
            Ok(under_way) => under_way,
            Err(error) => return then(self, Err(error)),
        };
        let engine = self.this();
        let then = move |hashes| {
            drop(under_way);
            then(&engine, hashes)
        };
        let (runs, then) = (self.hash_runs(slot, wanted), Box::new(then));
        vec![Job::Hash(Hash { urgency, memory, runs, then })]
    }

    /// As `verify`, of a piece in device memory; all of it in one request to the device.
    pub(super) fn verify_on_device(
        &self,
        piece: &Piece,
        trailer: Option<Arc<Trailer>>,
    ) -> Vec<Job> {
        let found_now = trailer.clone().filter(|_| matches!(piece.check, Check::First));
        let claims = match self.claims(piece, trailer.as_deref()) {
            Ok(claims) => claims,
            Err(error) => return self.unknown(piece, error, found_now),
        };
        let wanted: Vec<Wanted> = claims.iter().map(|(_, claim)| claim.wanted).collect();
        let whole = trailer.is_none();
        let piece = piece.clone();
        self.hash(Urgency::Load, piece.slot, &wanted, move |engine, hashes| {
            let shards = match hashes {
                Ok(hashes) if whole => whole_if_any(bad_shards(&claims, &hashes), &piece),
                Ok(hashes) => bad_shards(&claims, &hashes),
                Err(error) => return engine.unknown(&piece, error, found_now),
            };
            let outcome = if shards.is_empty() {
                Outcome::Good(found_now)
            } else {
                let error = engine.tier().refuted(&piece.key, &piece.found);
                Outcome::Bad { shards, error, trailer: found_now }
            };
            engine.verified(&piece, outcome, Vec::new())
        })
    }

    /// Nothing is known of a piece's bytes, so nobody gets them.
    fn unknown(&self, piece: &Piece, error: Error, trailer: Option<Arc<Trailer>>) -> Vec<Job> {
        let shards = piece.shards.clone().collect();
        self.verified(piece, Outcome::Bad { shards, error, trailer }, Vec::new())
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
    pub(super) fn seal_on_device(&self, part: PartId, slot: u32, extent: Extent) -> Vec<Job> {
        let geometry = &self.config.geometry;
        let shard_bytes = geometry.shard_bytes.min(geometry.part_bytes);
        let wanted = self.tier().hashes_wanted(&extent, shard_bytes);
        self.hash(Urgency::Save, slot, &wanted, move |engine, hashes| {
            let hashes = match hashes {
                Ok(hashes) => hashes,
                // The extent goes back to its segment.
                Err(error) => {
                    engine.stored(part, &Err(error));
                    return Vec::new();
                }
            };
            let trailer = engine.slots().trailer(slot);
            // SAFETY: a page of host memory that belongs to the slot; in state Storing nobody else touches it.
            let page = unsafe { std::slice::from_raw_parts_mut(trailer.pointer, trailer.length) };
            engine.tier().seal_hashed(&extent, shard_bytes, &hashes, page);
            engine.write_slot(part, slot, extent);
            Vec::new()
        })
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

/// The shards of which a claim does not hold.
fn bad_shards(claims: &[(u32, Claim)], hashes: &[u64]) -> Vec<u32> {
    let broken = |((_, claim), hash): &(&(u32, Claim), &u64)| !claim.holds(**hash);
    let mut bad: Vec<u32> =
        claims.iter().zip(hashes).filter(broken).map(|((shard, _), _)| *shard).collect();
    bad.dedup();
    bad
}

/// Of a part that has one checksum all shards are bad, if it is not what was saved.
fn whole_if_any(bad: Vec<u32>, piece: &Piece) -> Vec<u32> {
    if bad.is_empty() { bad } else { piece.shards.clone().collect() }
}

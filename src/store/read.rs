//! Reads: drive to slot, verify and copy, tell the part table; and what a read that failed means.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::engine::Engine;
use crate::block::{PAGE, PartKey};
use crate::config::Checksum;
use crate::copy::{Job, Size, Urgency};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Class, DmaSlice, thread};
use crate::mem::runs::Runs;
use crate::parts::{Check, Outcome, Piece, Unit};
use crate::posix::{Found, Trailer};
use crate::task::Address;

/// The two reads of a first piece, until both have ended.
#[derive(Default)]
struct Pair {
    shards: Option<Result<()>>,
    trailer: Option<Result<()>>,
}

impl Engine {
    pub(super) fn read(&self, piece: Piece, class: Class, expires: Option<Instant>) {
        let memory = self.piece_memory(&piece);
        let engine = self.this();
        let (key, found) = (piece.key, piece.found);
        let start = memory.pointer.addr() - self.slot_base(piece.slot).addr();
        let range = start as u64..(start + memory.length) as u64;
        if !(matches!(piece.check, Check::First) && self.verifies()) {
            let done = Box::new(move |result| engine.piece_done(piece, result));
            return self.tier().read(&key, &found, range, vec![memory], class, expires, done);
        }
        let (trailer, end) = (self.trailer_memory(piece.slot), self.tier().extent_bytes());
        let pair = Arc::new(Mutex::new(Pair::default()));
        let (other, second) = (Arc::clone(&pair), piece.clone());
        let done = Box::new(move |result| {
            pair.lock().shards = Some(result);
            engine.pair_done(piece, &pair);
        });
        self.tier().read(&key, &found, range, vec![memory], class, expires, done);
        let engine = self.this();
        let done = Box::new(move |result| {
            other.lock().trailer = Some(result);
            engine.pair_done(second, &other);
        });
        let range = end - PAGE as u64..end;
        self.tier().read(&key, &found, range, vec![trailer], class, expires, done);
    }

    /// How many of so many bytes of a slot the CPU hashes.
    pub(super) fn cpu_bytes(&self, bytes: u64) -> u64 {
        if self.slots().device().is_some() { 0 } else { bytes }
    }

    fn verifies(&self) -> bool {
        self.config.checksum == Checksum::Full
    }

    /// Where a piece lies in its slot. A whole part comes with its padding, which the drive wants.
    fn piece_memory(&self, piece: &Piece) -> DmaSlice {
        let geometry = &self.config.geometry;
        if let Check::Whole = piece.check {
            return self.slot_memory(piece.slot, geometry.payload_bytes());
        }
        let shard = geometry.shard_bytes as usize;
        let (from, to) = (piece.shards.start as usize * shard, piece.shards.end as usize * shard);
        let pointer = self.slot_base(piece.slot).wrapping_add(from);
        DmaSlice { pointer, length: to - from }
    }

    fn trailer_memory(&self, slot: u32) -> DmaSlice {
        self.slots().trailer(slot)
    }

    /// One of the two reads of a first piece has ended.
    fn pair_done(self: Arc<Self>, piece: Piece, pair: &Mutex<Pair>) {
        let (shards, trailer) = {
            let mut pair = pair.lock();
            if pair.shards.is_none() || pair.trailer.is_none() {
                return;
            }
            (pair.shards.take(), pair.trailer.take())
        };
        match (shards, trailer) {
            // Without its trailer the part may still be good as a whole.
            (Some(Ok(())), Some(Err(_))) => {
                let jobs = self.piece_ended(&piece, Outcome::Misfit, Vec::new());
                self.pool.push(jobs);
            }
            (Some(result), _) => self.piece_done(piece, result),
            (None, _) => {}
        }
    }

    /// On a reactor: the bytes are verified by whoever will copy them, a copy worker or the reactor itself.
    fn piece_done(self: Arc<Self>, piece: Piece, result: Result<()>) {
        if let Check::Shards(_) = piece.check {
            self.event(|parts, _| parts.arrived(&piece));
        }
        match result {
            Err(error) => {
                let jobs = self.piece_failed(&piece, error);
                self.pool.push(jobs);
            }
            Ok(()) => {
                let bytes = self.cpu_bytes(self.piece_memory(&piece).length as u64);
                let engine = Arc::clone(&self);
                let verify = Box::new(move || engine.verify(&piece));
                self.pool.read(Job::Compute(Urgency::Load, bytes, verify), Size::of(bytes));
            }
        }
    }

    fn piece_failed(&self, piece: &Piece, error: Error) -> Vec<Job> {
        let shards = piece.shards.clone().collect();
        self.piece_ended(piece, Outcome::Bad { shards, error, trailer: None }, Vec::new())
    }

    /// Tells the part table, those whose copies were made along with the verification, and those who will not get
    /// what they wait for.
    fn piece_ended(&self, piece: &Piece, outcome: Outcome, landed: Vec<Unit>) -> Vec<Job> {
        let (bad, error) = match &outcome {
            Outcome::Bad { shards, error, .. } => (shards.clone(), Some(error.clone())),
            _ => (Vec::new(), None),
        };
        let (mut failed, jobs) = thread::batch(|| {
            self.event_jobs(|parts, actions| {
                let failed = parts.read_ended(piece, outcome, actions);
                landed.iter().for_each(|_| parts.landed(piece.part, actions));
                failed
            })
        });
        // After the table knows of it, so that whoever waits for LOADED finds the part in DRAM.
        for unit in landed {
            if bad.contains(&unit.shard()) {
                unit.task.give_back(unit.index);
                failed.push(unit);
            } else {
                unit.task.end(unit.index, Ok(()));
            }
        }
        if let Some(error) = error {
            self.explain_failure(piece.key, piece.found, error, failed);
        }
        jobs
    }

    /// Verifies a piece and, where caller memory is plain memory, copies it in the same pass to those who wait for
    /// it: bytes that a drive has just brought are fetched from memory once. They are in the callers' memory before
    /// it is known whether they are right, which only callers hear whose entries are OK; nobody else, and no later
    /// load, is served from the slot before.
    fn verify(&self, piece: &Piece) -> Vec<Job> {
        let trailer = match &piece.check {
            Check::First if self.verifies() => match self.trailer_of(piece) {
                Some(trailer) => Some(trailer),
                None => return self.piece_ended(piece, Outcome::Misfit, Vec::new()),
            },
            Check::Shards(trailer) => trailer.clone(),
            Check::Whole | Check::First => None,
        };
        if self.slots().device().is_some() {
            return self.verify_on_device(piece, trailer);
        }
        let landing =
            if self.device.is_host() { self.parts.lock().land(piece) } else { Vec::new() };
        let outcome = match &piece.check {
            Check::Whole => self.verify_whole(piece, &landing),
            _ => self.verify_shards(piece, trailer, &landing),
        };
        self.verified(piece, outcome, landing)
    }

    /// Counts what verifying a piece has found, and tells of it.
    pub(super) fn verified(&self, piece: &Piece, outcome: Outcome, landing: Vec<Unit>) -> Vec<Job> {
        // A device that failed says nothing of the bytes, nor does a store that closes.
        if let Outcome::Bad { error, .. } = &outcome
            && !matches!(error.kind(), ErrorKind::Device | ErrorKind::Closed)
        {
            self.metrics.verify_failures.add(1);
        }
        self.piece_ended(piece, outcome, landing)
    }

    fn verify_whole(&self, piece: &Piece, landing: &[Unit]) -> Outcome {
        let payload = self.slots().host_payload(piece.slot);
        let payload = payload.expect("slots that are not on the device are in host memory");
        let mut runs = self.runs(piece.shards.clone(), landing);
        // SAFETY: the piece is the whole part and its read has ended; until `read_ended` nobody else touches
        // the slot. The runs are memory that `land` has claimed.
        let verdict =
            unsafe { self.tier().verify_along(&piece.key, &piece.found, &[payload], &mut runs) };
        match verdict {
            Ok(()) => Outcome::Good(None),
            Err(error) => {
                let shards = piece.shards.clone().collect();
                Outcome::Bad { shards, error, trailer: None }
            }
        }
    }

    /// Where bytes of these shards go for those who wait for them. Sorted by shard, at most one each.
    fn runs<'a>(&self, shards: Range<u32>, landing: &'a [Unit]) -> Runs<'a> {
        let mut runs = Runs::nowhere();
        let mut landing = landing.iter().peekable();
        // The bytes of a part that is one shard are those of its one unit.
        let shard_bytes = self.config.geometry.shard_bytes.min(self.config.geometry.part_bytes);
        for shard in shards {
            let Some(unit) = landing.next_if(|unit| unit.shard() == shard) else {
                runs.push_gap(shard_bytes as usize);
                continue;
            };
            push_slices(&mut runs, unit);
        }
        runs
    }

    /// The part's trailer, if it has checksums of which each shard is made of whole ones.
    fn trailer_of(&self, piece: &Piece) -> Option<Arc<Trailer>> {
        let memory = self.trailer_memory(piece.slot);
        // SAFETY: one page of the slot, initialised by the read that has ended; a part has one first piece
        // at a time, so nobody writes there now.
        let page = unsafe { std::slice::from_raw_parts(memory.pointer, memory.length) };
        let trailer = self.tier().trailer(&piece.key, &piece.found, page).ok()?;
        let unit_bytes = self.tier().unit_bytes(&trailer);
        let fits = self.config.geometry.shard_bytes.is_multiple_of(unit_bytes);
        (fits && !trailer.units.is_empty()).then(|| Arc::new(trailer))
    }

    /// Shard by shard, each with the checksums that a trailer has for it; without one they count as right.
    fn verify_shards(
        &self,
        piece: &Piece,
        trailer: Option<Arc<Trailer>>,
        landing: &[Unit],
    ) -> Outcome {
        let mut bad = Vec::new();
        let mut first = None;
        for shard in piece.shards.clone() {
            let unit = landing.iter().position(|unit| unit.shard() == shard);
            let landing = unit.map_or(&[][..], |index| &landing[index..=index]);
            let mut runs = self.runs(shard..shard + 1, landing);
            if let Err(error) = self.verify_shard(piece, trailer.as_deref(), shard, &mut runs) {
                bad.push(shard);
                first.get_or_insert(error);
            }
        }
        // A trailer that came with the piece is news for the table.
        let trailer = trailer.filter(|_| matches!(piece.check, Check::First));
        match first {
            None => Outcome::Good(trailer),
            Some(error) => Outcome::Bad { shards: bad, error, trailer },
        }
    }

    fn verify_shard(
        &self,
        piece: &Piece,
        trailer: Option<&Trailer>,
        shard: u32,
        runs: &mut Runs<'_>,
    ) -> Result<()> {
        let shard_bytes = self.config.geometry.shard_bytes;
        let base = self.slot_base(piece.slot).wrapping_add(shard as usize * shard_bytes as usize);
        let Some(trailer) = trailer else {
            // SAFETY: the shard lies in the piece, whose read has ended; the runs are memory that `land` claimed.
            unsafe { runs.scatter(base, shard_bytes as usize) };
            return Ok(());
        };
        let unit_bytes = self.tier().unit_bytes(trailer);
        let units = (shard_bytes / unit_bytes) as u32;
        (0..units).try_for_each(|index| {
            let at = index as usize * unit_bytes as usize;
            let memory = DmaSlice { pointer: base.wrapping_add(at), length: unit_bytes as usize };
            let (unit, pieces) = (shard * units + index, [memory]);
            // SAFETY: the unit lies in the piece, whose read has ended; until `read_ended` nobody else touches
            // the piece's shards, whatever is done with others of the slot. The runs are memory that `land`
            // has claimed.
            unsafe {
                self.tier().verify_unit(&piece.key, &piece.found, trailer, unit, &pieces, runs)
            }
        })
    }

    /// Asks the tier what the failed read means, and ends the loads with the answer.
    fn explain_failure(&self, key: PartKey, found: Found, error: Error, units: Vec<Unit>) {
        let ended = move |error: Error| {
            units.iter().for_each(|unit| unit.task.settle(unit.index, Err(error.clone())));
        };
        self.explain(key, found, error, Box::new(ended));
    }

    /// A read that failed for good takes its entry out of the index; what passes leaves it there.
    pub(super) fn explain(
        &self,
        key: PartKey,
        found: Found,
        error: Error,
        ended: Box<dyn FnOnce(Error) + Send>,
    ) {
        let passing =
            [ErrorKind::Timeout, ErrorKind::Busy, ErrorKind::Cancelled, ErrorKind::Closed];
        if passing.contains(&error.kind()) {
            ended(error);
        } else {
            self.tier().read_failed(&key, &found, error, ended);
        }
    }
}

/// Adds the caller memory of a unit.
pub(super) fn push_slices<'a>(runs: &mut Runs<'a>, unit: &'a Unit) {
    let slices = unit.task.piece(unit.index).slices.iter();
    for (Address(address), shape) in unit.task.addresses(unit.index).zip(slices) {
        runs.push_slice(std::ptr::with_exposed_provenance_mut(address), shape);
    }
}

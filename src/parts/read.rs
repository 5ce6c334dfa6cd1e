//! Reads: a part comes from storage in one piece or in several, those that are waited for first.
//!
//! Where all shards of a part are wanted, or nobody waits for any, the part is read whole and verified by
//! the one checksum that the index has. Where some are wanted, the first piece is what is wanted at the
//! beginning of the queue, together with the trailer, which has checksums for shards; the rest follows in
//! larger pieces, wanted shards before others, until the slot has the whole part. So whoever waits for one
//! layer waits for little more than that layer, and all layers together take hardly longer than one large
//! read. Nobody is served a shard that is not verified, and a part counts as resident when it is complete.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::shards::ShardSet;
use super::{Action, Part, PartId, Parts, State, Unit};
use crate::block::PartKey;
use crate::error::{Error, ErrorKind};
use crate::posix::{Found, Trailer};

/// Pieces of one part that are on their way from the drive at a time, once its first is there: enough to
/// keep the drive busy between the end of one and the beginning of the next, few enough that a shard which
/// is wanted all of a sudden does not wait for the rest of the part.
const PIECES_AT_A_TIME: u32 = 4;

/// What the bytes of a piece are compared with.
#[derive(Clone)]
pub(crate) enum Check {
    /// The whole part with the checksum that the index has.
    Whole,
    /// Shards with the checksums of the trailer, which is read with this piece.
    First,
    /// Shards with the checksums of this trailer; none where checksums are off.
    Shards(Option<Arc<Trailer>>),
}

/// A run of shards of one part that is read at once.
#[derive(Clone)]
pub(crate) struct Piece {
    pub part: PartId,
    pub slot: u32,
    pub key: PartKey,
    pub found: Found,
    pub shards: Range<u32>,
    pub check: Check,
}

/// What became of a piece.
pub(crate) enum Outcome {
    /// Its shards are in the slot and verified. The trailer, where it came with the piece.
    Good(Option<Arc<Trailer>>),
    /// There are no checksums for shards of this size: the part has to be read whole.
    Misfit,
    /// These of its shards are not to be had; the others are good.
    Bad { shards: Vec<u32>, error: Error, trailer: Option<Arc<Trailer>> },
}

/// What is known of a part while it is read.
pub(super) struct Progress {
    /// Shards on their way from the drive, or being verified.
    coming: ShardSet,
    /// Pieces on their way from the drive, but for the first and for whole parts, which come alone.
    pieces: u32,
    trailer: Option<Arc<Trailer>>,
    /// Its trailer does not serve: it is read whole.
    whole: bool,
    /// Something of it could not be read. It is not in the map any more, nobody finds it; who waits for
    /// another shard still gets it.
    damaged: bool,
    /// Where reading goes on when nothing else is wanted.
    next: u32,
}

impl Progress {
    pub(super) fn new(shards: u32) -> Self {
        Self {
            coming: ShardSet::new(shards),
            pieces: 0,
            trailer: None,
            whole: false,
            damaged: false,
            next: 0,
        }
    }

    /// Whether a read or a verification uses the slot.
    pub(super) fn is_under_way(&self) -> bool {
        self.coming.len() > 0
    }
}

impl Parts {
    /// The part has a slot: read it.
    pub(super) fn start_read(&mut self, id: PartId) {
        self.parts[id as usize].state = State::Reading;
        self.to_read.push(id);
    }

    /// Asks for the reads that the events since the last call made necessary. Called once for all units of a
    /// batch, so that shards which are wanted together are read together.
    pub(crate) fn flush(&mut self, actions: &mut Vec<Action>) {
        for id in std::mem::take(&mut self.to_read) {
            while let Some((shards, check)) = self.next_piece(id) {
                self.read_piece(id, shards, check, actions);
            }
        }
    }

    fn read_piece(
        &mut self,
        id: PartId,
        shards: Range<u32>,
        check: Check,
        actions: &mut Vec<Action>,
    ) {
        let part = &mut self.parts[id as usize];
        let progress = &mut part.progress;
        for shard in shards.clone() {
            progress.coming.insert(shard);
        }
        progress.pieces += u32::from(matches!(check, Check::Shards(_)));
        progress.next = shards.end % self.rules.shards_per_part;
        let piece = Piece {
            part: id,
            slot: part.slot.expect("a part that is read has a slot"),
            key: part.key,
            found: part.found.expect("a part that is read was found"),
            shards,
            check,
        };
        let (class, expires) = (part.class, latest_deadline(part));
        actions.push(Action::Read { piece, class, expires });
    }

    /// What of a part is to be read now; `None`: nothing, or not yet.
    fn next_piece(&self, id: PartId) -> Option<(Range<u32>, Check)> {
        let part = &self.parts[id as usize];
        let progress = &part.progress;
        if part.state != State::Reading || progress.pieces >= PIECES_AT_A_TIME {
            return None;
        }
        let all = self.rules.shards_per_part;
        let wanted = wanted(part, all);
        let nothing_yet = part.filled.len() == 0;
        if nothing_yet {
            if progress.is_under_way() {
                return None;
            }
            let undivided = wanted.len() == 0 || wanted.len() == all;
            if progress.whole || (undivided && !progress.damaged) {
                return Some((0..all, Check::Whole));
            }
        }
        let missing = |shard: u32| !part.filled.contains(shard) && !progress.coming.contains(shard);
        let mut waiting = part.loads.iter().filter(|unit| !unit.is_hold()).map(Unit::shard);
        let first = waiting.find(|shard| missing(*shard)).or_else(|| {
            let mut others = (progress.next..all).chain(0..progress.next);
            others.find(|shard| missing(*shard) && !progress.damaged)
        })?;
        // Nothing is read ahead with the first piece, nor of a part that will not be kept.
        let only_wanted = nothing_yet || progress.damaged;
        let take = |shard: &u32| missing(*shard) && (!only_wanted || wanted.contains(*shard));
        let limit = match nothing_yet {
            true => self.rules.shards_per_piece.saturating_mul(PIECES_AT_A_TIME),
            false => self.rules.shards_per_piece,
        };
        let end = first.saturating_add(limit).min(all);
        let last = (first + 1..end).find(|shard| !take(shard)).unwrap_or(end);
        let check = match nothing_yet {
            true => Check::First,
            false => Check::Shards(progress.trailer.clone()),
        };
        Some((first..last, check))
    }

    /// The drive has brought a piece, or failed to: it may begin the next.
    pub(crate) fn arrived(&mut self, piece: &Piece) {
        if matches!(piece.check, Check::Shards(_)) {
            self.parts[piece.part as usize].progress.pieces -= 1;
            self.to_read.push(piece.part);
        }
    }

    /// Loads whose copies can be made in the pass that verifies the piece, in the order of their shards and one for
    /// each at most: their memory is claimed, and they no longer wait. Each is told of by `landed` when
    /// `read_ended` has been called.
    pub(crate) fn land(&mut self, piece: &Piece) -> Vec<Unit> {
        let part = &mut self.parts[piece.part as usize];
        let mut taken = ShardSet::new(self.rules.shards_per_part);
        let lands = |unit: &mut Unit| {
            !unit.is_hold()
                && piece.shards.contains(&unit.shard())
                && taken.insert(unit.shard())
                && unit.task.begin(unit.index)
        };
        let mut landing: Vec<Unit> = part.loads.extract_if(.., lands).collect();
        landing.sort_by_key(Unit::shard);
        part.pins += landing.len() as u32;
        landing
    }

    /// A load that was made in the pass that verified its bytes has ended, whatever its result.
    pub(crate) fn landed(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &self.parts[id as usize];
        if let (State::Ready, Some(slot)) = (part.state, part.slot) {
            self.policy.touch(slot);
        }
        self.scattered(id, actions);
    }

    /// A piece has come to its end. Returns those who will not get what they wait for; nobody else is told
    /// that it failed.
    pub(crate) fn read_ended(
        &mut self,
        piece: &Piece,
        outcome: Outcome,
        actions: &mut Vec<Action>,
    ) -> Vec<Unit> {
        let id = piece.part;
        let progress = &mut self.parts[id as usize].progress;
        piece.shards.clone().for_each(|shard| progress.coming.remove(shard));
        self.to_read.push(id);
        let failed = match outcome {
            Outcome::Good(trailer) => {
                self.take_in(piece, trailer, &[], actions);
                Vec::new()
            }
            Outcome::Misfit => {
                progress.whole = true;
                Vec::new()
            }
            Outcome::Bad { shards, error, trailer } => {
                self.take_in(piece, trailer, &shards, actions);
                self.fail_shards(id, &shards, error.kind(), actions)
            }
        };
        self.end_damaged(id, actions);
        self.pump(actions);
        failed
    }

    /// The shards of a piece are there, but for `bad`: who waits for them gets them.
    fn take_in(
        &mut self,
        piece: &Piece,
        trailer: Option<Arc<Trailer>>,
        bad: &[u32],
        actions: &mut Vec<Action>,
    ) {
        let id = piece.part;
        let part = &mut self.parts[id as usize];
        if trailer.is_some() {
            part.progress.trailer = trailer;
        }
        for shard in piece.shards.clone().filter(|shard| !bad.contains(shard)) {
            part.filled.insert(shard);
        }
        let filled = part.filled.clone();
        let complete = filled.len() == self.rules.shards_per_part && !part.progress.damaged;
        if complete {
            self.settle_in(id, actions);
        }
        let loads = std::mem::take(&mut self.parts[id as usize].loads);
        let mut waiting = Vec::new();
        for unit in loads {
            match unit.is_hold() {
                true if complete => self.grant(id, unit, actions),
                false if filled.contains(unit.shard()) => self.scatter(id, unit, actions),
                _ => waiting.push(unit),
            }
        }
        self.parts[id as usize].loads = waiting;
        if complete {
            self.release_if_done(id, actions);
        }
    }

    /// Shards that could not be had: the part will not be complete. Returns who waits for them.
    fn fail_shards(
        &mut self,
        id: PartId,
        bad: &[u32],
        kind: ErrorKind,
        actions: &mut Vec<Action>,
    ) -> Vec<Unit> {
        self.drop_settled(id);
        if kind == ErrorKind::Timeout && !self.parts[id as usize].loads.is_empty() {
            // The read had the deadline of others, who have gone; these have time left.
            return Vec::new();
        }
        self.unmap(id, actions);
        self.forget_holders(id);
        let part = &mut self.parts[id as usize];
        part.progress.damaged = true;
        let loads = std::mem::take(&mut part.loads);
        let (failed, waiting) =
            loads.into_iter().partition(|unit| unit.is_hold() || bad.contains(&unit.shard()));
        part.loads = waiting;
        failed
    }

    /// A damaged part goes when nobody waits for it any more.
    fn end_damaged(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &self.parts[id as usize];
        let over = part.loads.is_empty() && !part.progress.is_under_way();
        if part.state == State::Reading && part.progress.damaged && over {
            self.discard(id, actions);
        }
    }
}

/// The shards that somebody waits for.
fn wanted(part: &Part, shards: u32) -> ShardSet {
    let mut wanted = ShardSet::new(shards);
    for unit in part.loads.iter().filter(|unit| !unit.is_hold()) {
        wanted.insert(unit.shard());
    }
    wanted
}

/// A read may take as long as the most patient of those who wait for it; a prefetch as long as it likes.
fn latest_deadline(part: &Part) -> Option<Instant> {
    part.loads.iter().map(|unit| unit.task.deadline()).reduce(|a, b| Some(a?.max(b?))).flatten()
}

//! The table driven by hand and at random, with a model of the slots and of who waits.

mod holds;
mod random;
mod reads;
mod streams;
mod transfers;

use std::collections::{HashMap, HashSet};
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::block::{BlockId, Geometry, SliceShape};
use crate::completion::CompletionQueue;
use crate::layout::Layout;
use crate::posix::{Location, Trailer};
use crate::task::{Kind, Notify, Plan, Progress, Stage, TaskOwner};

const FOUND: Found = Found { location: Location { segment: 1, page: 1 }, checksum: 7 };

fn rules(slots: u32, shards_per_part: u32, keep: Keep, sink: Sink) -> Rules {
    let partial_timeout = Duration::from_secs(3600);
    Rules {
        slots,
        shards_per_part,
        shards_per_piece: 2,
        keep,
        sink,
        queue_max: 1000,
        partial_timeout,
    }
}

fn key(block: u8) -> PartKey {
    PartKey { block: BlockId([block; 16]), part: 0 }
}

/// Nobody: the tests carry out what a store would.
struct Nobody;

impl TaskOwner for Nobody {
    fn copied(&self, _kind: Kind, _after: Duration) {}
    fn settled(
        &self,
        _kind: Kind,
        _after: Duration,
        _failures: &mut dyn Iterator<Item = Option<ErrorKind>>,
    ) {
    }
    fn retire(&self, _number: u64) {}
    fn release(&self, _hold: &Task) {}
}

fn task(kind: Kind, block: u8, shard: u32, shards_per_part: u32) -> Arc<Task> {
    let geometry = Geometry {
        part_bytes: 4096 * u64::from(shards_per_part),
        part_count: 1,
        part_index: 0,
        parts_owned: 1,
        shard_bytes: 4096,
        slices: vec![SliceShape::contiguous(4096)],
    };
    let layout = Arc::new(Layout::new(&geometry).unwrap());
    let plan = Plan {
        kind,
        units: vec![layout.unit(BlockId([block; 16]), shard, 0)],
        units_per_entry: 1,
        layout,
        addresses: vec![crate::task::Address(4096)],
        event: None,
        deadline: None,
        notify: Notify::default(),
        user_data: 0,
        tag: 0,
    };
    let completions = Arc::new(CompletionQueue::new().unwrap());
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let (number, owner) = (NEXT.fetch_add(1, Ordering::Relaxed), Weak::<Nobody>::new());
    Task::new(number, plan, completions, Arc::new(AtomicBool::new(false)), owner)
}

fn unit(task: &Arc<Task>) -> Unit {
    Unit { task: Arc::clone(task), index: 0 }
}

/// How an outstanding action ends. What is not for reads fails them all alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Well,
    Fails,
    /// The first shard of the piece does not verify.
    Damaged,
    /// The trailer is not for shards of this size.
    Misfits,
    /// The deadline of those who waited passed before it began.
    Late,
}

fn trailer() -> Trailer {
    Trailer {
        fingerprint: [0; 16],
        block: BlockId([0; 16]),
        part: 0,
        writer: 0,
        segment: 0,
        generation: 0,
        page: 0,
        part_bytes: 0,
        checksum: 0,
        unit_bytes: 0,
        units: Vec::new(),
        time_ms: 0,
    }
}

/// A slot and a shard in it.
type Place = (u32, u32);

/// Carries out actions the way the store does, a chosen one at a time, and checks what must always hold.
struct Driver {
    parts: Parts,
    outstanding: Vec<Action>,
    /// What a place, a shard of a slot, is being used for: writers must be alone.
    writing: HashMap<Place, usize>,
    reading: HashMap<Place, usize>,
    /// Whose good bytes are in a place.
    content: HashMap<Place, PartKey>,
    shared: HashSet<PartKey>,
    stored: HashSet<PartKey>,
    /// Whether loads are copied in the pass that verifies a piece, and those of each piece whose pass has begun, by
    /// its first place.
    lands: bool,
    landing: HashMap<Place, Vec<Unit>>,
}

impl Driver {
    fn new(rules: Rules) -> Self {
        Self {
            parts: Parts::new(rules),
            outstanding: Vec::new(),
            writing: HashMap::new(),
            reading: HashMap::new(),
            content: HashMap::new(),
            shared: HashSet::new(),
            stored: HashSet::new(),
            lands: false,
            landing: HashMap::new(),
        }
    }

    fn take_all(&mut self, mut actions: Vec<Action>) {
        self.parts.flush(&mut actions);
        self.take(actions);
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match &action {
                Action::Settle(unit, result) => unit.task.settle(unit.index, result.clone()),
                Action::Copied(unit) => unit.task.copied(unit.index),
                Action::Share(key) => drop(self.shared.insert(*key)),
                Action::Unshare(key) => drop(self.shared.remove(key)),
                Action::WatchPartial(_) => {}
                Action::Gather { .. } | Action::Read { .. } => {
                    for place in self.places(&action) {
                        assert!(!self.reading.contains_key(&place), "filled while it is read");
                        assert!(!self.writing.contains_key(&place), "filled by two");
                        self.content.remove(&place);
                        self.writing.insert(place, 1);
                    }
                    self.outstanding.push(action);
                }
                Action::Scatter { .. } | Action::Store { .. } => {
                    let key = match &action {
                        Action::Scatter { unit, .. } => unit.key(),
                        Action::Store { key, .. } => *key,
                        _ => unreachable!(),
                    };
                    for place in self.places(&action) {
                        assert!(!self.writing.contains_key(&place), "read while it is filled");
                        assert_eq!(self.content.get(&place), Some(&key), "bytes not verified");
                        *self.reading.entry(place).or_default() += 1;
                    }
                    self.outstanding.push(action);
                }
                Action::DirectLoad { .. } | Action::DirectSave { .. } => {
                    unreachable!("not driven here")
                }
            }
        }
    }

    /// What of the arena an action touches.
    fn places(&self, action: &Action) -> Vec<Place> {
        let (slot, shards) = match action {
            Action::Gather { slot, unit, .. } | Action::Scatter { slot, unit, .. } => {
                (*slot, unit.shard()..unit.shard() + 1)
            }
            Action::Read { piece, .. } => (piece.slot, piece.shards.clone()),
            Action::Store { slot, .. } => (*slot, 0..self.parts.rules.shards_per_part),
            _ => return Vec::new(),
        };
        shards.map(|shard| (slot, shard)).collect()
    }

    fn release(map: &mut HashMap<Place, usize>, places: &[Place]) {
        for place in places {
            let count = map.get_mut(place).unwrap();
            *count -= 1;
            if *count == 0 {
                map.remove(place);
            }
        }
    }

    fn found(&self, block: u8) -> Option<Found> {
        self.stored.contains(&key(block)).then_some(FOUND)
    }

    fn save(&mut self, task: &Arc<Task>, block: u8) {
        let (mut actions, found) = (Vec::new(), self.found(block));
        self.parts.save(unit(task), key(block), found, &mut actions);
        self.take_all(actions);
    }

    fn load(&mut self, task: &Arc<Task>, block: u8) {
        let (mut actions, found) = (Vec::new(), self.found(block));
        if self.parts.load(unit(task), key(block), found, &mut actions) == Accepted::Unknown {
            task.settle(0, Err(Error::new(ErrorKind::NotFound, "unknown")));
        }
        self.take_all(actions);
    }

    fn hold(&mut self, task: &Arc<Task>, block: u8) {
        let (mut actions, found) = (Vec::new(), self.found(block));
        if self.parts.hold(&[unit(task)], &[found], &mut actions) == Accepted::Unknown {
            task.settle(0, Err(Error::new(ErrorKind::NotFound, "unknown")));
        }
        self.take_all(actions);
    }

    fn release_hold(&mut self, task: &Arc<Task>) {
        task.release_handle();
        let mut actions = Vec::new();
        self.parts.release(task, &mut actions);
        self.take_all(actions);
    }

    /// Loads a stored block and lets it end.
    fn load_through(&mut self, block: u8) -> Arc<Task> {
        self.stored.insert(key(block));
        let task = task(Kind::Load, block, 0, 1);
        self.load(&task, block);
        self.drain();
        task
    }

    /// Ends the outstanding action at `index`, well or not.
    fn end(&mut self, index: usize, well: bool) {
        self.end_as(index, if well { Fate::Well } else { Fate::Fails });
    }

    fn end_as(&mut self, index: usize, fate: Fate) {
        let mut actions = Vec::new();
        let failure = || Error::new(ErrorKind::Io, "injected");
        let (well, action) = (fate == Fate::Well, self.outstanding.remove(index));
        let places = self.places(&action);
        match action {
            Action::Gather { part, unit, .. } => {
                Self::release(&mut self.writing, &places);
                if unit.task.begin(0) {
                    let result = if well { Ok(true) } else { Err(failure()) };
                    if well {
                        self.content.insert(places[0], unit.key());
                    }
                    self.parts.gathered(part, unit.clone(), result.clone(), &mut actions);
                    unit.task.end(0, result.map(drop));
                } else {
                    self.parts.gathered(part, unit, Ok(false), &mut actions);
                }
            }
            Action::Scatter { part, unit, .. } => {
                Self::release(&mut self.reading, &places);
                if unit.task.begin(0) {
                    unit.task.end(0, Ok(()));
                }
                self.parts.scattered(part, &mut actions);
            }
            Action::Read { piece, class, expires } => {
                let landing = self.landing.remove(&places[0]);
                if self.lands && landing.is_none() && matches!(fate, Fate::Well | Fate::Damaged) {
                    let landing = self.parts.land(&piece);
                    self.landing.insert(places[0], landing);
                    // It ends when it is chosen again.
                    return self.outstanding.push(Action::Read { piece, class, expires });
                }
                Self::release(&mut self.writing, &places);
                self.parts.arrived(&piece);
                let fate = if landing.is_some() && !well { Fate::Damaged } else { fate };
                let landing = landing.unwrap_or_default();
                self.end_read(&piece, fate, landing, &mut actions);
            }
            Action::Store { part, key, .. } => {
                Self::release(&mut self.reading, &places);
                if well {
                    self.stored.insert(key);
                }
                let result = if well { Ok(()) } else { Err(failure()) };
                self.parts.stored(part, &result, &mut actions);
            }
            _ => unreachable!("only these are outstanding"),
        }
        self.parts.flush(&mut actions);
        self.take(actions);
    }

    fn end_read(
        &mut self,
        piece: &Piece,
        fate: Fate,
        landing: Vec<Unit>,
        actions: &mut Vec<Action>,
    ) {
        let trailer = || matches!(piece.check, Check::First).then(|| Arc::new(trailer()));
        let bad = |shards: Vec<u32>, kind, trailer| Outcome::Bad {
            shards,
            error: Error::new(kind, "injected"),
            trailer,
        };
        let all = || piece.shards.clone().collect();
        let whole = matches!(piece.check, Check::Whole);
        let outcome = match fate {
            Fate::Well => Outcome::Good(trailer()),
            Fate::Misfits if matches!(piece.check, Check::First) => Outcome::Misfit,
            Fate::Fails | Fate::Misfits => bad(all(), ErrorKind::Io, None),
            Fate::Damaged if whole => bad(all(), ErrorKind::Corrupt, None),
            Fate::Damaged => bad(vec![piece.shards.start], ErrorKind::Corrupt, trailer()),
            Fate::Late => bad(all(), ErrorKind::Timeout, None),
        };
        let good: Vec<u32> = match &outcome {
            Outcome::Good(_) => all(),
            Outcome::Bad { shards, .. } => {
                piece.shards.clone().filter(|shard| !shards.contains(shard)).collect()
            }
            Outcome::Misfit => Vec::new(),
        };
        for &shard in &good {
            self.content.insert((piece.slot, shard), piece.key);
        }
        let mut failed = self.parts.read_ended(piece, outcome, actions);
        for unit in landing {
            self.parts.landed(piece.part, actions);
            if good.contains(&unit.shard()) {
                unit.task.end(unit.index, Ok(()));
            } else {
                unit.task.give_back(unit.index);
                failed.push(unit);
            }
        }
        for unit in failed {
            unit.task.settle(unit.index, Err(Error::new(ErrorKind::Io, "injected")));
        }
    }

    /// What was granted and not released is in DRAM, and the count of held parts is right.
    fn check_holds(&self, holds: &[(u8, Arc<Task>)]) {
        for (block, hold) in holds {
            if matches!(hold.poll(Stage::Loaded), Progress::Done) {
                assert!(self.parts.is_resident(&key(*block)), "a held part was given up");
            }
        }
        let held = |id: &&PartId| !self.parts.parts[**id as usize].holders.is_empty();
        assert_eq!(self.parts.map.values().filter(held).count(), self.parts.held() as usize);
        assert!(self.parts.held() <= self.parts.rules.slots / hold::HELD_SHARE);
    }

    fn drain(&mut self) {
        while !self.outstanding.is_empty() {
            self.end(self.outstanding.len() - 1, true);
        }
    }
}

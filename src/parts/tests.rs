//! The table driven by hand and at random, with a model of the slots and of who waits.

use std::collections::{HashMap, HashSet};
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::block::{BlockId, Geometry, SliceShape};
use crate::completion::CompletionQueue;
use crate::layout::Layout;
use crate::posix::Location;
use crate::task::{Kind, Notify, Plan, Progress, Stage, TaskOwner};

const FOUND: Found = Found { location: Location { segment: 1, page: 1 }, checksum: 7 };

fn rules(slots: u32, shards_per_part: u32, keep: Keep, sink: Sink) -> Rules {
    let partial_timeout = Duration::from_secs(3600);
    Rules { slots, shards_per_part, keep, sink, queue_max: 1000, partial_timeout }
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

/// Carries out actions the way the store does, a chosen one at a time, and checks what must always hold.
struct Driver {
    parts: Parts,
    outstanding: Vec<Action>,
    /// What a slot is being used for: writers must be alone.
    writing: HashMap<u32, usize>,
    reading: HashMap<u32, usize>,
    shared: HashSet<PartKey>,
    stored: HashSet<PartKey>,
}

impl Driver {
    fn new(rules: Rules) -> Self {
        Self {
            parts: Parts::new(rules),
            outstanding: Vec::new(),
            writing: HashMap::new(),
            reading: HashMap::new(),
            shared: HashSet::new(),
            stored: HashSet::new(),
        }
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match &action {
                Action::Settle(unit, result) => unit.task.settle(unit.index, result.clone()),
                Action::Copied(unit) => unit.task.copied(unit.index),
                Action::Share(key) => drop(self.shared.insert(*key)),
                Action::Unshare(key) => drop(self.shared.remove(key)),
                Action::WatchPartial(_) => {}
                Action::Gather { slot, .. } => {
                    assert!(!self.reading.contains_key(slot), "a slot is filled while it is read");
                    *self.writing.entry(*slot).or_default() += 1;
                    self.outstanding.push(action);
                }
                Action::Read { slot, .. } => {
                    assert!(!self.writing.contains_key(slot) && !self.reading.contains_key(slot));
                    *self.writing.entry(*slot).or_default() += 1;
                    self.outstanding.push(action);
                }
                Action::Scatter { slot, .. } | Action::Store { slot, .. } => {
                    assert!(!self.writing.contains_key(slot), "a slot is read while it is filled");
                    *self.reading.entry(*slot).or_default() += 1;
                    self.outstanding.push(action);
                }
                Action::DirectLoad { .. } | Action::DirectSave { .. } => {
                    unreachable!("not driven here")
                }
            }
        }
    }

    fn release(map: &mut HashMap<u32, usize>, slot: u32) {
        let count = map.get_mut(&slot).unwrap();
        *count -= 1;
        if *count == 0 {
            map.remove(&slot);
        }
    }

    fn found(&self, block: u8) -> Option<Found> {
        self.stored.contains(&key(block)).then_some(FOUND)
    }

    fn save(&mut self, task: &Arc<Task>, block: u8) {
        let (mut actions, found) = (Vec::new(), self.found(block));
        self.parts.save(unit(task), key(block), found, &mut actions);
        self.take(actions);
    }

    fn load(&mut self, task: &Arc<Task>, block: u8) {
        let (mut actions, found) = (Vec::new(), self.found(block));
        if self.parts.load(unit(task), key(block), found, &mut actions) == Accepted::Unknown {
            task.settle(0, Err(Error::new(ErrorKind::NotFound, "unknown")));
        }
        self.take(actions);
    }

    fn hold(&mut self, task: &Arc<Task>, block: u8) {
        let (mut actions, found) = (Vec::new(), self.found(block));
        if self.parts.hold(&[unit(task)], &[found], &mut actions) == Accepted::Unknown {
            task.settle(0, Err(Error::new(ErrorKind::NotFound, "unknown")));
        }
        self.take(actions);
    }

    fn release_hold(&mut self, task: &Arc<Task>) {
        task.release_handle();
        let mut actions = Vec::new();
        self.parts.release(task, &mut actions);
        self.take(actions);
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
        let mut actions = Vec::new();
        let failure = || Error::new(ErrorKind::Io, "injected");
        match self.outstanding.swap_remove(index) {
            Action::Gather { part, slot, unit } => {
                Self::release(&mut self.writing, slot);
                if unit.task.begin(0) {
                    let result = if well { Ok(true) } else { Err(failure()) };
                    self.parts.gathered(part, unit.clone(), result.clone(), &mut actions);
                    unit.task.end(0, result.map(drop));
                } else {
                    self.parts.gathered(part, unit, Ok(false), &mut actions);
                }
            }
            Action::Scatter { part, slot, unit } => {
                Self::release(&mut self.reading, slot);
                if unit.task.begin(0) {
                    unit.task.end(0, Ok(()));
                }
                self.parts.scattered(part, &mut actions);
            }
            Action::Read { part, slot, .. } => {
                Self::release(&mut self.writing, slot);
                if well {
                    self.parts.verified(part, &mut actions);
                } else {
                    for unit in self.parts.read_failed(part, &failure(), &mut actions) {
                        unit.task.settle(unit.index, Err(failure()));
                    }
                }
            }
            Action::Store { part, slot, key } => {
                Self::release(&mut self.reading, slot);
                if well {
                    self.stored.insert(key);
                }
                let result = if well { Ok(()) } else { Err(failure()) };
                self.parts.stored(part, &result, &mut actions);
            }
            _ => unreachable!("only these are outstanding"),
        }
        self.take(actions);
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

/// Goal: a part is stored when its last shard is in, in whatever order the shards came, and not before.
#[test]
fn a_part_is_stored_with_its_last_shard() {
    let mut driver = Driver::new(rules(4, 3, Keep::Cached, Sink::Storage));
    let tasks: Vec<_> = [2, 0, 1].map(|shard| task(Kind::Save, 1, shard, 3)).into();
    for (index, task) in tasks.iter().enumerate() {
        driver.save(task, 1);
        assert!(matches!(driver.outstanding[0], Action::Gather { .. }));
        driver.end(0, true);
        assert!(matches!(task.poll(Stage::Copied), Progress::Done));
        let stores = driver.outstanding.iter().any(|action| matches!(action, Action::Store { .. }));
        assert_eq!(stores, index == 2, "after shard {index}");
    }
    assert!(tasks.iter().all(|task| matches!(task.poll(Stage::Persisted), Progress::Pending)));
    driver.drain();
    assert!(tasks.iter().all(|task| matches!(task.poll(Stage::Persisted), Progress::Done)));
}

/// Goal: an earlier shard's failure fails the part and every later shard, whatever the last one says.
#[test]
fn an_earlier_shards_failure_fails_the_part() {
    let mut driver = Driver::new(rules(4, 3, Keep::Cached, Sink::Storage));
    let tasks: Vec<_> = (0..3).map(|shard| task(Kind::Save, 1, shard, 3)).collect();
    for (index, task) in tasks.iter().enumerate() {
        driver.save(task, 1);
        if !driver.outstanding.is_empty() {
            driver.end(0, index != 0);
        }
        assert!(matches!(task.poll(Stage::Persisted), Progress::Failed(_)), "shard {index}");
    }
    assert!(driver.stored.is_empty() && !driver.parts.is_resident(&key(1)));
    assert_eq!(driver.parts.slots().0, 0, "the slot came back");
    let again = task(Kind::Save, 1, 0, 3);
    driver.save(&again, 1);
    assert!(matches!(driver.outstanding[0], Action::Gather { .. }), "a new attempt begins anew");
}

/// Goal: parts that never complete are given up, and their slots serve others.
#[test]
fn a_part_that_never_completes_is_reclaimed() {
    let mut driver = Driver::new(rules(2, 2, Keep::Cached, Sink::Storage));
    let half = task(Kind::Save, 1, 0, 2);
    driver.save(&half, 1);
    driver.end(0, true);
    let (mut actions, later) = (Vec::new(), Instant::now() + Duration::from_secs(7200));
    driver.parts.reclaim_partial(later, &mut actions);
    driver.take(actions);
    assert!(
        matches!(half.poll(Stage::Persisted), Progress::Failed(error) if error.kind() == ErrorKind::Timeout)
    );
    assert_eq!((driver.parts.slots().0, driver.parts.counts.dropped), (0, 1));
}

/// Goal: concurrent loads of one part cause one read.
#[test]
fn concurrent_loads_read_once() {
    let mut driver = Driver::new(rules(4, 1, Keep::Cached, Sink::Storage));
    driver.stored.insert(key(1));
    let tasks: Vec<_> = (0..5).map(|_| task(Kind::Load, 1, 0, 1)).collect();
    tasks.iter().for_each(|task| driver.load(task, 1));
    assert_eq!(driver.outstanding.len(), 1);
    driver.drain();
    assert!(tasks.iter().all(|task| matches!(task.poll(Stage::Loaded), Progress::Done)));
    assert_eq!(driver.parts.counts.misses, 1);
}

/// Goal: when every slot is busy loads wait in front of saves.
#[test]
fn waiting_loads_go_before_waiting_saves() {
    let mut driver = Driver::new(rules(1, 1, Keep::Cached, Sink::Storage));
    driver.stored.insert(key(2));
    let (first, save, load) =
        (task(Kind::Save, 1, 0, 1), task(Kind::Save, 3, 0, 1), task(Kind::Load, 2, 0, 1));
    driver.save(&first, 1);
    driver.save(&save, 3);
    driver.load(&load, 2);
    assert_eq!((driver.outstanding.len(), driver.parts.queued()), (1, 2));
    driver.end(0, true);
    driver.end(0, true);
    assert!(matches!(driver.outstanding[0], Action::Read { .. }));
    driver.drain();
    assert!(matches!(save.poll(Stage::Persisted), Progress::Done));
}

/// Goal: what is held survives any number of loads of other parts, and goes like everything else once it is
/// released.
#[test]
fn held_parts_are_not_evicted() {
    let mut driver = Driver::new(rules(4, 1, Keep::Cached, Sink::Storage));
    driver.stored.extend([key(1), key(2)]);
    let (read, resident) = (task(Kind::Hold, 1, 0, 1), task(Kind::Hold, 2, 0, 1));
    driver.hold(&read, 1);
    assert!(matches!(read.poll(Stage::Loaded), Progress::Pending), "not read yet");
    driver.drain();
    driver.load_through(2);
    driver.hold(&resident, 2);
    for hold in [&read, &resident] {
        assert!(matches!(hold.poll(Stage::Loaded), Progress::Done));
    }
    let misses = driver.parts.counts.misses;
    for block in 10..60 {
        assert!(matches!(driver.load_through(block).poll(Stage::Loaded), Progress::Done));
    }
    assert!(driver.parts.is_resident(&key(1)) && driver.parts.is_resident(&key(2)));
    assert_eq!((driver.parts.held(), driver.parts.counts.misses), (2, misses + 50));
    driver.stored.clear();
    driver.load_through(1);
    assert_eq!(driver.parts.counts.misses, misses + 50, "a load of a held part needs no storage");
    for hold in [&read, &resident] {
        driver.release_hold(hold);
    }
    assert_eq!(driver.parts.held(), 0);
    (60..80).for_each(|block| drop(driver.load_through(block)));
    assert!(!driver.parts.is_resident(&key(1)) && !driver.parts.is_resident(&key(2)));
}

/// Goal: half of the slots can be held; the next hold is refused at once, a part that is held already costs
/// nothing, and loads go on.
#[test]
fn at_most_half_of_the_slots_are_held() {
    let mut driver = Driver::new(rules(5, 1, Keep::Cached, Sink::Storage));
    driver.stored.extend((1..9).map(key));
    let holds: Vec<_> = (1..5).map(|block| task(Kind::Hold, block, 0, 1)).collect();
    (1..5).zip(&holds).for_each(|(block, hold)| driver.hold(hold, block));
    for hold in &holds[2..] {
        assert!(
            matches!(hold.poll(Stage::Loaded), Progress::Failed(error) if error.kind() == ErrorKind::Busy)
        );
    }
    let again = task(Kind::Hold, 2, 0, 1);
    driver.hold(&again, 2);
    driver.drain();
    assert!(matches!(again.poll(Stage::Loaded), Progress::Done));
    assert!(matches!(driver.load_through(8).poll(Stage::Loaded), Progress::Done));
    driver.release_hold(&holds[1]);
    assert_eq!(driver.parts.held(), 2, "the other hold of the same part stands");
    driver.release_hold(&again);
    let late = task(Kind::Hold, 3, 0, 1);
    driver.hold(&late, 3);
    driver.drain();
    assert!(matches!(late.poll(Stage::Loaded), Progress::Done));
}

/// Goal: a hold that is released, cancelled or fails while its part is read holds nothing afterwards.
#[test]
fn a_hold_that_ends_while_its_part_is_read_holds_nothing() {
    for how in 0..3 {
        let mut driver = Driver::new(rules(4, 1, Keep::Cached, Sink::Storage));
        driver.stored.insert(key(1));
        let hold = task(Kind::Hold, 1, 0, 1);
        driver.hold(&hold, 1);
        assert_eq!(driver.parts.held(), 1);
        match how {
            0 => driver.release_hold(&hold),
            1 => hold.cancel(),
            _ => driver.end(0, false),
        }
        assert!(matches!(hold.poll(Stage::Loaded), Progress::Failed(_)));
        driver.drain();
        assert_eq!(driver.parts.held(), 0, "way {how}");
        (10..30).for_each(|block| drop(driver.load_through(block)));
        assert!(!driver.parts.is_resident(&key(1)));
    }
}

/// Goal: an entry of several parts is held whole or not at all.
#[test]
fn an_entry_is_held_with_all_its_parts_or_not_at_all() {
    let mut driver = Driver::new(rules(3, 1, Keep::Cached, Sink::Storage));
    let holds = [task(Kind::Hold, 1, 0, 1), task(Kind::Hold, 2, 0, 1)];
    let units = [unit(&holds[0]), unit(&holds[1])];
    let mut actions = Vec::new();
    let accepted = driver.parts.hold(&units, &[Some(FOUND), None], &mut actions);
    assert!(accepted == Accepted::Unknown && actions.is_empty() && driver.parts.is_empty());
    driver.parts.hold(&units, &[Some(FOUND), Some(FOUND)], &mut actions);
    driver.take(actions);
    assert!(driver.outstanding.is_empty() && driver.parts.held() == 0);
    for hold in &holds {
        assert!(
            matches!(hold.poll(Stage::Loaded), Progress::Failed(error) if error.kind() == ErrorKind::Busy)
        );
    }
}

/// Goal: a part that is held while it is saved stays in DRAM when storage refuses it.
#[test]
fn a_held_part_survives_a_failed_save() {
    let mut driver = Driver::new(rules(4, 1, Keep::Cached, Sink::Storage));
    let (save, hold) = (task(Kind::Save, 1, 0, 1), task(Kind::Hold, 1, 0, 1));
    driver.save(&save, 1);
    driver.end(0, true);
    driver.hold(&hold, 1);
    assert!(matches!(hold.poll(Stage::Loaded), Progress::Done));
    driver.end(0, false);
    assert!(matches!(save.poll(Stage::Persisted), Progress::Failed(_)));
    assert!(driver.parts.is_resident(&key(1)));
    driver.release_hold(&hold);
    (10..30).for_each(|block| drop(driver.load_through(block)));
    assert!(!driver.parts.is_resident(&key(1)));
}

#[derive(Clone, Debug)]
enum Step {
    Save {
        block: u8,
        shard: u32,
    },
    Load {
        block: u8,
        shard: u32,
    },
    Prefetch {
        block: u8,
    },
    Hold {
        block: u8,
    },
    Release {
        which: usize,
    },
    Retire {
        block: u8,
    },
    /// Another process publishes.
    Publish {
        block: u8,
    },
    Cancel {
        which: usize,
    },
    End {
        which: usize,
        well: bool,
    },
}

fn step(shards: u32) -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0u8..12, 0..shards).prop_map(|(block, shard)| Step::Save { block, shard }),
        3 => (0u8..12, 0..shards).prop_map(|(block, shard)| Step::Load { block, shard }),
        1 => (0u8..12).prop_map(|block| Step::Prefetch { block }),
        2 => (0u8..12).prop_map(|block| Step::Hold { block }),
        1 => any::<usize>().prop_map(|which| Step::Release { which }),
        1 => (0u8..12).prop_map(|block| Step::Retire { block }),
        1 => (0u8..12).prop_map(|block| Step::Publish { block }),
        1 => any::<usize>().prop_map(|which| Step::Cancel { which }),
        6 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(which, well)| Step::End { which, well }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Goal: whatever the order of events, no slot is written while it is read, every unit is settled, every
    /// slot comes back, and what is held is in DRAM.
    #[test]
    fn random_events_keep_slots_apart_and_settle_everything(
        (shards, steps) in (1u32..4).prop_flat_map(|shards| (Just(shards), prop::collection::vec(step(shards), 1..120))),
        slots in 2u32..6,
        cached in any::<bool>(),
        stores in any::<bool>(),
    ) {
        let keep = if cached { Keep::Cached } else { Keep::Staged };
        let sink = if stores { Sink::Storage } else { Sink::Nothing };
        let mut driver = Driver::new(rules(slots, shards, keep, sink));
        let mut tasks: Vec<Arc<Task>> = Vec::new();
        let mut holds: Vec<(u8, Arc<Task>)> = Vec::new();
        for step in steps {
            match step {
                Step::Save { block, shard } => {
                    tasks.push(task(Kind::Save, block, shard, shards));
                    driver.save(tasks.last().unwrap(), block);
                }
                Step::Load { block, shard } => {
                    tasks.push(task(Kind::Load, block, shard, shards));
                    driver.load(tasks.last().unwrap(), block);
                }
                Step::Prefetch { block } => if let Some(found) = driver.found(block) {
                    let mut actions = Vec::new();
                    driver.parts.prefetch(key(block), found, &mut actions);
                    driver.take(actions);
                },
                Step::Hold { block } => if cached {
                    let hold = task(Kind::Hold, block, 0, shards);
                    driver.hold(&hold, block);
                    tasks.push(Arc::clone(&hold));
                    holds.push((block, hold));
                },
                Step::Release { which } => if !holds.is_empty() {
                    let (_, hold) = holds.swap_remove(which % holds.len());
                    driver.release_hold(&hold);
                },
                Step::Retire { block } => drop(driver.stored.remove(&key(block))),
                Step::Publish { block } => if stores {
                    driver.stored.insert(key(block));
                },
                Step::Cancel { which } => if !tasks.is_empty() {
                    tasks[which % tasks.len()].cancel();
                },
                Step::End { which, well } => if !driver.outstanding.is_empty() {
                    let index = which % driver.outstanding.len();
                    driver.end(index, well);
                },
            }
            let (used, all) = driver.parts.slots();
            prop_assert!(used <= all);
            driver.check_holds(&holds);
        }
        driver.drain();
        let (mut actions, error) = (Vec::new(), Error::new(ErrorKind::Cancelled, "closing"));
        driver.parts.cancel_waiting(&error, &mut actions);
        driver.take(actions);
        driver.drain();
        prop_assert!(driver.writing.is_empty() && driver.reading.is_empty());
        for task in &tasks {
            prop_assert!(task.statuses().is_some(), "a unit was never settled");
            prop_assert!(task.is_released());
        }
        prop_assert!(!driver.parts.is_busy());
        driver.check_holds(&holds);
        holds.iter().for_each(|(_, hold)| driver.release_hold(hold));
        prop_assert_eq!(driver.parts.held(), 0);
        let resident: HashSet<PartKey> = driver.parts.map.keys().copied().collect();
        prop_assert_eq!(driver.parts.slots().0 as usize, resident.len());
        if cached {
            prop_assert_eq!(&driver.shared, &resident);
        }
    }
}

//! Events in any order, against what must hold after each.

use proptest::prelude::*;

use super::*;

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
        fate: Fate,
    },
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        12 => Just(Fate::Well),
        1 => Just(Fate::Fails),
        1 => Just(Fate::Damaged),
        1 => Just(Fate::Misfits),
        1 => Just(Fate::Late),
    ]
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
        7 => (any::<usize>(), fate()).prop_map(|(which, fate)| Step::End { which, fate }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Goal: whatever the order of events, no shard of a slot is written while it is read, nobody gets a shard that
    /// was not verified, every unit is settled, every slot comes back, and what is held is in DRAM.
    #[test]
    fn random_events_keep_slots_apart_and_settle_everything(
        (shards, steps) in (1u32..9).prop_flat_map(|shards| (Just(shards), prop::collection::vec(step(shards), 1..120))),
        slots in 2u32..6,
        cached in any::<bool>(),
        stores in any::<bool>(),
        lands in any::<bool>(),
    ) {
        let keep = if cached { Keep::Cached } else { Keep::Staged };
        let sink = if stores { Sink::Storage } else { Sink::Nothing };
        let mut driver = Driver::new(rules(slots, shards, keep, sink));
        driver.lands = lands;
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
                    driver.take_all(actions);
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
                Step::End { which, fate } => if !driver.outstanding.is_empty() {
                    let index = which % driver.outstanding.len();
                    driver.end_as(index, fate);
                },
            }
            let (used, all) = driver.parts.slots();
            prop_assert!(used <= all);
            driver.check_holds(&holds);
        }
        driver.drain();
        let (mut actions, error) = (Vec::new(), Error::new(ErrorKind::Cancelled, "closing"));
        driver.parts.cancel_waiting(&error, &mut actions);
        driver.take_all(actions);
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

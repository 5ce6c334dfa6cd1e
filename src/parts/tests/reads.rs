//! Reads by shards: what is read when, who is served when, and what damage costs.

use super::*;

const SHARDS: u32 = 8;

fn stored(block: u8) -> Driver {
    let mut driver = Driver::new(rules(4, SHARDS, Keep::Cached, Sink::Storage));
    driver.stored.insert(key(block));
    driver
}

fn load_shards(driver: &mut Driver, block: u8, shards: &[u32]) -> Vec<Arc<Task>> {
    let tasks: Vec<_> =
        shards.iter().map(|shard| task(Kind::Load, block, *shard, SHARDS)).collect();
    tasks.iter().for_each(|task| driver.load(task, block));
    tasks
}

/// What is being read, first shard and end, in the order of asking.
fn pieces(driver: &Driver) -> Vec<(u32, u32)> {
    let read = |action: &Action| match action {
        Action::Read { piece, .. } => Some((piece.shards.start, piece.shards.end)),
        _ => None,
    };
    driver.outstanding.iter().filter_map(read).collect()
}

fn end_piece(driver: &mut Driver, first: u32, fate: Fate) {
    let is_it = |action: &Action| matches!(action, Action::Read { piece, .. } if piece.shards.start == first);
    let index = driver.outstanding.iter().position(is_it).expect("such a piece is being read");
    driver.end_as(index, fate);
}

fn end_scatters(driver: &mut Driver) {
    let is_it = |action: &Action| matches!(action, Action::Scatter { .. });
    while let Some(index) = driver.outstanding.iter().position(is_it) {
        driver.end(index, true);
    }
}

fn is_loaded(task: &Task) -> bool {
    matches!(task.poll(Stage::Loaded), Progress::Done)
}

fn is_failed(task: &Task) -> bool {
    matches!(task.poll(Stage::Loaded), Progress::Failed(_))
}

/// Goal: the first shard that is asked for is read by itself, and whoever waits for it waits for nothing else;
/// what is wanted next is read before what is not, a limited number of pieces at a time, until the part is whole.
#[test]
fn the_first_shard_does_not_wait_for_the_last() {
    let mut driver = stored(1);
    let tasks = load_shards(&mut driver, 1, &[2, 6]);
    assert_eq!(pieces(&driver), [(2, 3)], "the first comes alone, with the trailer");
    end_piece(&mut driver, 2, Fate::Well);
    end_scatters(&mut driver);
    assert!(is_loaded(&tasks[0]) && !is_loaded(&tasks[1]) && !driver.parts.is_resident(&key(1)));
    assert_eq!(pieces(&driver), [(6, 8), (0, 2), (3, 5), (5, 6)]);
    let again = load_shards(&mut driver, 1, &[2]);
    end_scatters(&mut driver);
    assert!(is_loaded(&again[0]), "a shard that is there needs no complete part");
    end_piece(&mut driver, 6, Fate::Well);
    end_scatters(&mut driver);
    assert!(is_loaded(&tasks[1]));
    driver.drain();
    assert!(driver.parts.is_resident(&key(1)));
    assert_eq!(driver.parts.counts.misses, 1);
}

/// Goal: shards that are asked for in order are read in order.
#[test]
fn shards_that_are_wanted_in_order_are_read_in_order() {
    let mut driver = stored(1);
    load_shards(&mut driver, 1, &(0..SHARDS).collect::<Vec<_>>());
    let mut order = Vec::new();
    while let Some((start, end)) = pieces(&driver).first().copied() {
        order.extend(start..end);
        end_piece(&mut driver, start, Fate::Well);
    }
    assert_eq!(order, (0..SHARDS).collect::<Vec<_>>());
    driver.drain();
}

/// Goal: shards that are wanted together are read together: all of a part in one read, and a prefetch and a hold
/// too, since nobody waits for a part of theirs.
#[test]
fn what_is_wanted_together_is_one_read() {
    let mut driver = stored(1);
    let tasks: Vec<_> = (0..SHARDS).map(|shard| task(Kind::Load, 1, shard, SHARDS)).collect();
    let mut actions = Vec::new();
    for task in &tasks {
        driver.parts.load(unit(task), key(1), Some(FOUND), &mut actions);
    }
    driver.take_all(actions);
    assert_eq!(pieces(&driver), [(0, SHARDS)]);
    driver.drain();
    assert!(tasks.iter().all(|task| is_loaded(task)));
    driver.stored.extend([key(2), key(3)]);
    let hold = task(Kind::Hold, 2, 0, SHARDS);
    driver.hold(&hold, 2);
    assert_eq!(pieces(&driver), [(0, SHARDS)]);
    driver.drain();
    let mut actions = Vec::new();
    driver.parts.prefetch(key(3), FOUND, &mut actions);
    driver.take_all(actions);
    assert_eq!(pieces(&driver), [(0, SHARDS)]);
    driver.drain();
}

/// Goal: a part whose checksums do not fit the shards is read whole, and then serves everybody.
#[test]
fn a_part_without_fitting_checksums_is_read_whole() {
    let mut driver = stored(1);
    let tasks = load_shards(&mut driver, 1, &[3, 4]);
    end_piece(&mut driver, 3, Fate::Misfits);
    assert!(tasks.iter().all(|task| !is_loaded(task)), "nothing was verified");
    assert_eq!(pieces(&driver), [(0, SHARDS)]);
    driver.drain();
    assert!(tasks.iter().all(|task| is_loaded(task)) && driver.parts.is_resident(&key(1)));
}

/// Goal: damage to one shard fails the loads of that shard only; the part is not kept, nobody finds it any more,
/// nothing of it is read that nobody waits for, and its slot comes back.
#[test]
fn a_damaged_shard_fails_alone_and_the_part_is_not_kept() {
    let mut driver = stored(1);
    let tasks = load_shards(&mut driver, 1, &[0, 1, 7]);
    let hold = task(Kind::Hold, 1, 0, SHARDS);
    driver.hold(&hold, 1);
    end_piece(&mut driver, 0, Fate::Well);
    assert_eq!(pieces(&driver)[0], (1, 3));
    driver.stored.clear();
    end_piece(&mut driver, 1, Fate::Damaged);
    assert!(is_failed(&tasks[1]) && is_failed(&hold) && !driver.parts.knows(&key(1)));
    assert_eq!(driver.parts.held(), 0);
    driver.drain();
    assert!(is_loaded(&tasks[0]) && is_loaded(&tasks[2]));
    assert_eq!(driver.parts.slots().0, 0, "the slot came back");
    assert!(!driver.parts.is_busy());
}

/// Goal: when the drive was too late for those who had asked, others who wait for the same shard still get it.
#[test]
fn a_read_that_was_too_late_for_some_is_repeated_for_others() {
    let mut driver = stored(1);
    let late = load_shards(&mut driver, 1, &[5]);
    let patient = load_shards(&mut driver, 1, &[5]);
    late[0].cancel();
    end_piece(&mut driver, 5, Fate::Late);
    assert_eq!(pieces(&driver), [(5, 6)]);
    driver.drain();
    assert!(is_loaded(&patient[0]) && driver.parts.is_resident(&key(1)));
    let mut driver = stored(1);
    let late = load_shards(&mut driver, 1, &[5]);
    late[0].cancel();
    end_piece(&mut driver, 5, Fate::Late);
    assert!(driver.outstanding.is_empty() && driver.parts.slots().0 == 0, "nobody waits");
}

/// Goal: without a Cache tier the slot goes when every shard was handed out, also those that were served early.
#[test]
fn a_staged_part_goes_when_all_its_shards_were_served() {
    let mut driver = Driver::new(rules(4, SHARDS, Keep::Staged, Sink::Storage));
    driver.stored.insert(key(1));
    let tasks = load_shards(&mut driver, 1, &(0..SHARDS).collect::<Vec<_>>());
    driver.drain();
    assert!(tasks.iter().all(|task| is_loaded(task)));
    assert_eq!(driver.parts.slots().0, 0);
}

/// Goal: a load that is copied in the pass that verifies its part keeps the staged part's slot until it has ended,
/// and no longer; others who wait for the same bytes are copied from the slot.
#[test]
fn a_load_that_lands_holds_the_slot_until_it_has_ended() {
    let mut driver = Driver::new(rules(2, 1, Keep::Staged, Sink::Storage));
    driver.lands = true;
    driver.stored.insert(key(1));
    let (first, second) = (task(Kind::Load, 1, 0, 1), task(Kind::Load, 1, 0, 1));
    driver.load(&first, 1);
    driver.load(&second, 1);
    driver.end(0, true);
    assert!(matches!(first.poll(Stage::Loaded), Progress::Pending), "not verified yet");
    driver.end(0, true);
    assert!(matches!(first.poll(Stage::Loaded), Progress::Done));
    assert!(matches!(second.poll(Stage::Loaded), Progress::Pending), "its copy is another");
    assert_eq!(driver.parts.slots().0, 1);
    driver.drain();
    assert!(matches!(second.poll(Stage::Loaded), Progress::Done));
    assert_eq!(driver.parts.slots().0, 0);
}

/// Goal: a load whose bytes were copied along and do not verify fails, and its memory is released at once though
/// what the failure means is found out later.
#[test]
fn a_load_that_lands_with_wrong_bytes_fails() {
    let mut driver = Driver::new(rules(2, 2, Keep::Cached, Sink::Storage));
    driver.lands = true;
    driver.stored.insert(key(1));
    let tasks = [task(Kind::Load, 1, 0, 2), task(Kind::Load, 1, 1, 2)];
    tasks.iter().for_each(|task| driver.load(task, 1));
    driver.end_as(0, Fate::Damaged);
    driver.end_as(0, Fate::Damaged);
    driver.drain();
    assert!(matches!(tasks[0].poll(Stage::Loaded), Progress::Failed(_)));
    assert!(tasks.iter().all(|task| task.is_released()));
    assert!(!driver.parts.is_resident(&key(1)) && !driver.parts.is_busy());
}

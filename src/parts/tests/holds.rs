//! Holds: what they keep, what they cost, and when they end.

use super::*;

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
    driver.take_all(actions);
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

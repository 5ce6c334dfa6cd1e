//! Saves and loads, one event after another.

use std::sync::mpsc;

use super::*;
use crate::io::thread;

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
    driver.take_all(actions);
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

/// Goal: who waits for the first of several tasks that end together is woken when all have: it was woken for each,
/// and went to sleep again in between.
#[test]
fn tasks_that_end_together_wake_their_caller_once() {
    let (first, second) = (task(Kind::Load, 1, 0, 1), task(Kind::Load, 2, 0, 1));
    let (woken, wakes) = mpsc::channel();
    let waiter = {
        let (first, second) = (Arc::clone(&first), Arc::clone(&second));
        std::thread::spawn(move || {
            first.wait(Stage::Loaded, None);
            woken.send(second.poll(Stage::Loaded)).unwrap();
        })
    };
    while first.waiters() == 0 {
        std::thread::yield_now();
    }
    let early = thread::batch(|| {
        first.settle(0, Ok(()));
        let early = wakes.recv_timeout(Duration::from_millis(50));
        second.settle(0, Ok(()));
        early
    });
    assert!(early.is_err(), "woken before the second task ended");
    assert!(matches!(wakes.recv().unwrap(), Progress::Done));
    waiter.join().unwrap();
}

//! What a stream that is to wait for a task has to wait for: copies that are enqueued, and nothing that could still
//! come.

use super::*;
use crate::device::Marker;

fn may_wait(task: &Task) -> bool {
    matches!(task.poll(Stage::Enqueued), Progress::Done)
}

fn error() -> Error {
    Error::new(ErrorKind::Device, "a copy failed")
}

/// Goal: a save that is cancelled between the claim on its memory and the copy's enqueueing is waited for, and by
/// the device; its memory is being read although the task says that it has ended.
#[test]
fn a_cancelled_save_whose_copy_begins_all_the_same_is_waited_for() {
    let (save, marker): (_, Marker) = (task(Kind::Save, 1, 0, 1), Arc::new(1));
    assert!(save.begin(0));
    save.cancel();
    assert!(!may_wait(&save), "its copy may be enqueued any time");
    save.enqueued(0, &marker);
    assert!(may_wait(&save));
    assert!(Arc::ptr_eq(&save.wait_enqueued().unwrap()[0], &marker));
    save.end(0, Ok(()));
    assert_eq!(save.wait_enqueued().unwrap().len(), 1);
}

/// Goal: a save that is cancelled before anybody is at its memory is not waited for, and nobody gets there later.
#[test]
fn a_cancelled_save_that_has_not_begun_is_not_waited_for() {
    let save = task(Kind::Save, 1, 0, 1);
    assert!(!may_wait(&save));
    save.cancel();
    assert!(may_wait(&save) && save.wait_enqueued().unwrap().is_empty());
    assert!(!save.begin(0));
}

/// Goal: a copy that the device did not enqueue, of which some may run, is waited for until it is reported; then its
/// failure is no reason not to use the memory.
#[test]
fn a_save_whose_copy_was_refused_is_waited_for_until_its_end() {
    let save = task(Kind::Save, 1, 0, 1);
    assert!(save.begin(0));
    assert!(!may_wait(&save));
    save.end(0, Err(error()));
    assert!(may_wait(&save) && save.wait_enqueued().unwrap().is_empty());
}

/// Goal: a save whose bytes another task brings, and one that a host device has copied, need no stream.
#[test]
fn a_save_that_is_copied_is_not_waited_for() {
    let (attached, copied) = (task(Kind::Save, 1, 0, 1), task(Kind::Save, 1, 0, 1));
    attached.copied(0);
    assert!(copied.begin(0));
    copied.end(0, Ok(()));
    for save in [attached, copied] {
        assert!(may_wait(&save) && save.wait_enqueued().unwrap().is_empty());
    }
}

/// Goal: a load that fails is told at once and orders nothing, also while its copy may still run, after which
/// alone it says that all is enqueued.
#[test]
fn a_failed_load_is_no_load_to_wait_for() {
    let load = task(Kind::Load, 1, 0, 1);
    assert!(load.begin(0));
    load.cancel();
    assert_eq!(load.wait_enqueued().err().map(|error| error.kind()), Some(ErrorKind::Cancelled));
    assert!(!may_wait(&load));
    load.end(0, Ok(()));
    assert!(may_wait(&load));
    assert!(load.wait_enqueued().is_err());
}

/// Goal: a claim that is given back with the result still to come, as of a load of damaged bytes, is no end.
#[test]
fn a_claim_given_back_is_no_end() {
    let load = task(Kind::Load, 1, 0, 1);
    assert!(load.begin(0));
    load.give_back(0);
    assert!(!may_wait(&load));
    load.settle(0, Err(error()));
    assert!(may_wait(&load));
}

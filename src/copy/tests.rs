//! The pool without a store.

use std::sync::mpsc;

use super::*;
use crate::device::host::Host;

struct Nobody;

impl Owner for Nobody {
    fn copied(&self, _copy: Copy, _result: Option<Result<()>>, _staging: Staging) -> Vec<Job> {
        Vec::new()
    }
    fn poisoned(&self, _error: Error) {}
}

/// Goal: a caller's batch that is small as a whole is done on its thread, in order; a larger one, each job of
/// which is small, keeps nobody who submits.
#[test]
fn small_batches_are_done_by_their_caller() {
    let pool = CopyPool::new();
    let (done, log) = mpsc::channel();
    let job = |number: u64, bytes| {
        let done = done.clone();
        let work = move || {
            done.send((number, std::thread::current().id())).unwrap();
            Vec::new()
        };
        Job::Compute(Urgency::Save, bytes, Box::new(work))
    };
    pool.submit((0..4).map(|number| job(number, CALLER_BYTES / 4)).collect());
    let this = std::thread::current().id();
    assert_eq!(log.try_iter().collect::<Vec<_>>(), [0, 1, 2, 3].map(|number| (number, this)));
    pool.submit((0..5).map(|number| job(number, CALLER_BYTES / 4)).collect());
    assert!(log.try_recv().is_err());
    assert_eq!(pool.shared.queues.lock().saves.len(), 5);
}

/// Goal: a pool that is stopped while a reactor works for it lets go of its owner, and with it of rings and
/// descriptors, when the reactor is through.
#[test]
fn a_pool_stopped_while_a_reactor_works_lets_go_of_its_owner() {
    let owner: Arc<dyn Owner> = Arc::new(Nobody);
    let pool = CopyPool::new();
    pool.start(&Host, 1, &owner).unwrap();
    let (begins, begun) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let work = Box::new(move || {
        begins.send(()).unwrap();
        may_go_on.recv().unwrap();
        Vec::new()
    });
    let reactor = {
        let pool = pool.clone();
        std::thread::spawn(move || pool.run_here(vec![Job::Compute(Urgency::Load, 1, work)]))
    };
    begun.recv().unwrap();
    pool.stop();
    go_on.send(()).unwrap();
    reactor.join().unwrap();
    assert_eq!(Arc::strong_count(&owner), 1);
}

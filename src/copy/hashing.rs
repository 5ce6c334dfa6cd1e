//! Checksums that a device computes for a copy worker: handed over together, learned of as copies are.
//!
//! No thread waits for them in the driver. A worker has two requests at its device at most, so that one is there when
//! the other ends; what comes meanwhile goes with the next, in one launch.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Job, Urgency};
use crate::device::{DeviceStaging, HashRun, Hashing, Wake};
use crate::error::Result;

/// Requests of a worker that its device has.
const REQUESTS_MAX: usize = 2;

/// What is done with checksums, or with the reason why there are none.
pub(crate) type Then = Box<dyn FnOnce(Result<Vec<u64>>) -> Vec<Job> + Send>;

/// Checksums that are wanted of a device's memory.
pub(crate) struct Hash {
    pub urgency: Urgency,
    pub memory: Arc<dyn DeviceStaging>,
    /// At least one.
    pub runs: Vec<HashRun>,
    pub then: Then,
}

/// What the device computes at once, and for whom: how many of its checksums each gets.
struct Request {
    hashing: Box<dyn Hashing>,
    shares: Vec<(usize, Then)>,
}

/// The checksums that a worker has been asked for.
#[derive(Default)]
pub(super) struct Hashes {
    waiting: Vec<Hash>,
    requests: Vec<Request>,
}

impl Hashes {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.requests.is_empty()
    }

    pub(super) fn push(&mut self, hash: Hash) {
        self.waiting.push(hash);
    }

    /// What follows from checksums that are there; gives the device the next.
    pub(super) fn advance(&mut self, wake: &Wake) -> Vec<Job> {
        let mut next = Vec::new();
        let mut at = 0;
        while let Some(request) = self.requests.get_mut(at) {
            match request.hashing.poll() {
                None => at += 1,
                Some(answer) => deal(self.requests.remove(at).shares, answer, &mut next),
            }
        }
        if !self.waiting.is_empty() && self.requests.len() < REQUESTS_MAX {
            self.begin(wake, &mut next);
        }
        next
    }

    /// Hands over all that waits, as one request: a worker's checksums are all of one memory.
    fn begin(&mut self, wake: &Wake, next: &mut Vec<Job>) {
        let (mut runs, mut shares) = (Vec::new(), Vec::new());
        let mut memory = None;
        for hash in self.waiting.drain(..) {
            runs.extend_from_slice(&hash.runs);
            shares.push((hash.runs.len(), hash.then));
            memory.get_or_insert(hash.memory);
        }
        let Some(memory) = memory else { return };
        match memory.hash(&runs, wake) {
            Ok(hashing) => self.requests.push(Request { hashing, shares }),
            Err(error) => deal(shares, Err(error), next),
        }
    }
}

/// Gives everybody their checksums.
fn deal(shares: Vec<(usize, Then)>, answer: Result<Vec<u64>>, next: &mut Vec<Job>) {
    let mut sums = answer.map(Vec::into_iter);
    for (count, then) in shares {
        let share = match &mut sums {
            Ok(sums) => Ok(sums.by_ref().take(count).collect()),
            Err(error) => Err(error.clone()),
        };
        next.append(&mut then(share));
    }
}

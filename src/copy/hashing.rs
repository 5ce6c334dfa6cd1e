//! Checksums that a device computes for a copy worker: handed over together, learned of as copies are.
//!
//! No thread waits for them in the driver. A worker has two requests at its device at most, so that one is there when
//! the other ends; what comes meanwhile goes with the next, in one launch, loads first.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Job, Urgency};
use crate::device::{DeviceStaging, HASH_RUNS_TOGETHER, HashRun, Hashing, Wake};
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
        while !self.waiting.is_empty() && self.requests.len() < REQUESTS_MAX {
            self.begin(wake, &mut next);
        }
        next
    }

    /// Hands over what waits, loads first, as one request: a worker's checksums are all of one memory.
    fn begin(&mut self, wake: &Wake, next: &mut Vec<Job>) {
        self.waiting.sort_by_key(|hash| hash.urgency != Urgency::Load);
        let mut sums = 0;
        let fitting = self.waiting.iter().take_while(|hash| {
            let fits = sums == 0 || sums + hash.runs.len() <= HASH_RUNS_TOGETHER;
            sums += hash.runs.len();
            fits
        });
        let count = fitting.count();
        let (mut runs, mut shares) = (Vec::new(), Vec::new());
        let mut memory = None;
        for hash in self.waiting.drain(..count) {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Tells how many checksums each request is for, and computes them at once: a run's is its seed.
    struct Device(Sender<usize>);

    struct Sums(Vec<u64>);

    impl Hashing for Sums {
        fn poll(&mut self) -> Option<Result<Vec<u64>>> {
            Some(Ok(std::mem::take(&mut self.0)))
        }
    }

    impl DeviceStaging for Device {
        fn base(&self) -> *mut u8 {
            std::ptr::null_mut()
        }
        fn bytes(&self) -> usize {
            0
        }
        fn with_context(&self, _work: &mut dyn FnMut()) -> Result<()> {
            unreachable!()
        }
        fn hash(self: Arc<Self>, runs: &[HashRun], _wake: &Wake) -> Result<Box<dyn Hashing>> {
            self.0.send(runs.len()).unwrap();
            Ok(Box::new(Sums(runs.iter().map(|run| run.seed).collect())))
        }
        fn write(&self, _offset: usize, _bytes: &[u8]) -> Result<()> {
            unreachable!()
        }
        fn read(&self, _offset: usize, _bytes: &mut [u8]) -> Result<()> {
            unreachable!()
        }
    }

    /// A load's checksum was computed with all that waited, after the saves that came before it.
    #[test]
    fn loads_waited_for_the_sums_of_saves() {
        let ((requests, requested), (answer, answers)) = (channel(), channel());
        let memory: Arc<dyn DeviceStaging> = Arc::new(Device(requests));
        let mut hashes = Hashes::default();
        for (urgency, count) in
            [(Urgency::Save, HASH_RUNS_TOGETHER), (Urgency::Save, 90), (Urgency::Load, 1)]
        {
            let seed = count as u64;
            let answer = answer.clone();
            hashes.push(Hash {
                urgency,
                memory: Arc::clone(&memory),
                runs: vec![HashRun { offset: 0, bytes: 4096, seed }; count],
                then: Box::new(move |sums| {
                    assert_eq!(sums.unwrap(), vec![seed; count]);
                    answer.send(count).unwrap();
                    Vec::new()
                }),
            });
        }
        let wake: Wake = Arc::new(|| {});
        while !hashes.is_empty() {
            assert!(hashes.advance(&wake).is_empty());
        }
        // Two at a time, each of what one launch computes, unless it is one save's.
        assert_eq!(requested.try_iter().collect::<Vec<_>>(), [1, HASH_RUNS_TOGETHER, 90]);
        assert_eq!(answers.try_iter().collect::<Vec<_>>(), [1, HASH_RUNS_TOGETHER, 90]);
    }
}

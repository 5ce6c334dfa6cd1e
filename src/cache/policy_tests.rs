//! Tests of the eviction policy: against a naive model, and against LRU on a trace full of scans.

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use super::ghost::Ghost;
use super::policy::S3Fifo;

/// S3-FIFO written with queues that are searched from end to end. Shares only the ghost.
struct Model {
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    key: HashMap<u32, u64>,
    touches: HashMap<u32, u8>,
    target: usize,
    ghost: Ghost,
}

impl Model {
    fn new(slots: u32) -> Self {
        Self {
            small: VecDeque::new(),
            main: VecDeque::new(),
            key: HashMap::new(),
            touches: HashMap::new(),
            target: (slots / 10).max(1) as usize,
            ghost: Ghost::new(slots - slots / 10),
        }
    }

    fn remove(&mut self, slot: u32) {
        self.small.retain(|s| *s != slot);
        self.main.retain(|s| *s != slot);
    }

    fn insert(&mut self, slot: u32, key: u64) {
        self.remove(slot);
        self.key.insert(slot, key);
        self.touches.insert(slot, 0);
        match self.ghost.take(key) {
            true => self.main.push_front(slot),
            false => self.small.push_front(slot),
        }
    }

    fn touch(&mut self, slot: u32) {
        let touches = self.touches.entry(slot).or_default();
        *touches = (*touches + 1).min(3);
    }

    fn evict(&mut self, can_evict: impl Fn(u32) -> bool) -> Option<u32> {
        let mut refused = 0;
        while refused < self.small.len() + self.main.len() {
            if self.small.len() > self.target || self.main.is_empty() {
                let slot = self.small.pop_back()?;
                if self.touches[&slot] > 0 {
                    self.touches.insert(slot, 0);
                    self.main.push_front(slot);
                } else if can_evict(slot) {
                    self.ghost.insert(self.key[&slot]);
                    return Some(slot);
                } else {
                    refused += 1;
                    self.main.push_front(slot);
                }
            } else {
                let slot = self.main.pop_back()?;
                let touches = self.touches[&slot];
                if touches > 0 {
                    self.touches.insert(slot, touches - 1);
                    self.main.push_front(slot);
                } else if can_evict(slot) {
                    return Some(slot);
                } else {
                    refused += 1;
                    self.main.push_front(slot);
                }
            }
        }
        None
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u32, u64),
    Touch(u32),
    Remove(u32),
    /// Evict, while slots of this bit pattern are in use.
    Evict(u64),
}

fn steps(slots: u32) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..slots, 0_u64..200).prop_map(|(slot, key)| Step::Insert(slot, key)),
        4 => (0..slots).prop_map(Step::Touch),
        1 => (0..slots).prop_map(Step::Remove),
        3 => prop_oneof![Just(0), any::<u64>(), Just(u64::MAX)].prop_map(Step::Evict),
    ];
    prop::collection::vec(step, 1..300)
}

proptest! {
    #[test]
    fn the_policy_matches_a_naive_model((slots, steps) in (1_u32..60).prop_flat_map(|n| (Just(n), steps(n)))) {
        // Goal: the linked queues do exactly what plain ones do, also when slots are in use.
        let mut policy = S3Fifo::new(slots);
        let mut model = Model::new(slots);
        for step in steps {
            match step {
                Step::Insert(slot, key) => {
                    policy.insert(slot, key);
                    model.insert(slot, key);
                }
                Step::Touch(slot) => {
                    policy.touch(slot);
                    model.touch(slot);
                }
                Step::Remove(slot) => {
                    policy.remove(slot);
                    model.remove(slot);
                }
                Step::Evict(in_use) => {
                    let can_evict = |slot: u32| in_use >> (slot % 64) & 1 == 0;
                    let evicted = policy.evict(can_evict);
                    prop_assert_eq!(evicted, model.evict(can_evict));
                    if let Some(slot) = evicted {
                        prop_assert!(can_evict(slot) && !policy.contains(slot));
                    }
                }
            }
            prop_assert_eq!(policy.len(), model.small.len() + model.main.len());
        }
    }
}

/// Hits of a cache of `slots` on a trace of keys, under S3-FIFO.
fn hits_s3fifo(slots: u32, trace: &[u64]) -> usize {
    let mut policy = S3Fifo::new(slots);
    let mut slot_of: HashMap<u64, u32> = HashMap::new();
    let mut key_of = vec![None; slots as usize];
    let mut free: Vec<u32> = (0..slots).collect();
    let mut hits = 0;
    for &key in trace {
        if let Some(slot) = slot_of.get(&key) {
            policy.touch(*slot);
            hits += 1;
            continue;
        }
        let slot = free.pop().unwrap_or_else(|| policy.evict(|_| true).unwrap());
        if let Some(evicted) = key_of[slot as usize].replace(key) {
            slot_of.remove(&evicted);
        }
        slot_of.insert(key, slot);
        policy.insert(slot, key);
    }
    hits
}

/// The same under LRU.
fn hits_lru(slots: u32, trace: &[u64]) -> usize {
    let mut order: VecDeque<u64> = VecDeque::new();
    let mut hits = 0;
    for &key in trace {
        if let Some(at) = order.iter().position(|k| *k == key) {
            order.remove(at);
            hits += 1;
        } else if order.len() == slots as usize {
            order.pop_back();
        }
        order.push_front(key);
    }
    hits
}

#[test]
fn a_scan_does_not_push_the_shared_prefixes_out() {
    // Goal: 150 hot blocks (system prompts) between long prompts that are seen once. A cache of 200 keeps
    // the hot ones under S3-FIFO and loses most of them under LRU.
    const SLOTS: u32 = 200;
    const HOT: u64 = 150;
    let mut trace = Vec::new();
    let mut cold = 1_000_000;
    let mut random = 12345_u64;
    for _ in 0..400 {
        for _ in 0..50 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            trace.push((random >> 33) % HOT);
        }
        trace.extend(cold..cold + 150);
        cold += 150;
    }
    let best = trace.iter().filter(|key| **key < HOT).count();
    let (ours, lru) = (hits_s3fifo(SLOTS, &trace), hits_lru(SLOTS, &trace));
    println!("scan-heavy trace: at best {best} hits, S3-FIFO {ours}, LRU {lru}");
    assert!(ours as f64 > 0.9 * best as f64, "{ours} of {best}");
    assert!(ours > 2 * lru, "S3-FIFO {ours}, LRU {lru}");
}

#[test]
fn a_recency_friendly_trace_loses_little_to_lru() {
    // Goal: without scans, on a skewed popularity, the policy is no worse than LRU.
    const SLOTS: u32 = 100;
    let mut random = 99_u64;
    let trace: Vec<u64> = (0..40_000)
        .map(|_| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let uniform = (random >> 11) as f64 / (1_u64 << 53) as f64;
            (1000.0_f64.powf(uniform)) as u64
        })
        .collect();
    let (ours, lru) = (hits_s3fifo(SLOTS, &trace), hits_lru(SLOTS, &trace));
    println!("skewed trace: S3-FIFO {ours}, LRU {lru} of {}", trace.len());
    assert!(ours >= lru, "S3-FIFO {ours}, LRU {lru}");
}

#[test]
fn nothing_in_use_is_evicted_and_asking_ends() {
    // Goal: with every slot in use, eviction gives up after one look at each.
    let mut policy = S3Fifo::new(64);
    (0..64).for_each(|slot| policy.insert(slot, u64::from(slot)));
    let mut asked = 0;
    assert_eq!(
        policy.evict(|_| {
            asked += 1;
            false
        }),
        None
    );
    assert_eq!(asked, 64);
    assert_eq!(policy.evict(|slot| slot == 17), Some(17));
}

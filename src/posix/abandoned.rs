//! Blocks that were promised and will not come, each with the promise that is broken.
//!
//! Owns what is remembered of ABANDONED records, and forgets the oldest of it. Knows nothing of what is present.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::block::{BlockId, Promise};

/// Broken promises of blocks that are remembered at least; twice as many at most.
const REMEMBERED: usize = 1 << 16;

/// Pairs in the order of blocks, so that all promises of one block lie together.
#[derive(Default)]
struct Generations {
    young: BTreeSet<(BlockId, Promise)>,
    old: BTreeSet<(BlockId, Promise)>,
}

/// The broken promises.
#[derive(Default)]
pub struct Abandoned {
    generations: Mutex<Generations>,
    /// How many there are, so that nobody takes the lock while there are none.
    count: AtomicUsize,
}

impl Abandoned {
    /// Remembers that a block will not come.
    pub fn insert(&self, block: BlockId, promise: Promise) {
        let mut generations = self.generations.lock();
        if generations.young.len() >= REMEMBERED {
            generations.old = std::mem::take(&mut generations.young);
        }
        generations.young.insert((block, promise));
        self.recount(&generations);
    }

    /// Whether this promise of the block is broken: by its number, or with all others.
    pub fn contains(&self, block: BlockId, promise: Promise) -> bool {
        if self.is_empty() {
            return false;
        }
        let generations = self.generations.lock();
        [&generations.young, &generations.old].into_iter().any(|set| match promise {
            Promise::ANY => set.range(all_of(block)).next().is_some(),
            _ => set.contains(&(block, promise)) || set.contains(&(block, Promise::ANY)),
        })
    }

    /// The block came after all.
    pub fn forget(&self, block: BlockId) {
        let mut generations = self.generations.lock();
        let Generations { young, old } = &mut *generations;
        for set in [young, old] {
            while let Some(pair) = set.range(all_of(block)).next().copied() {
                set.remove(&pair);
            }
        }
        self.recount(&generations);
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    fn recount(&self, generations: &Generations) {
        self.count.store(generations.young.len() + generations.old.len(), Ordering::Relaxed);
    }
}

fn all_of(block: BlockId) -> std::ops::RangeInclusive<(BlockId, Promise)> {
    (block, Promise(0))..=(block, Promise(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u64) -> BlockId {
        let mut id = BlockId::default();
        id.0[..8].copy_from_slice(&number.to_be_bytes());
        id
    }

    /// Goal: a promise is broken by its own number or by a record without one; and whoever asks for none in
    /// particular hears of any.
    #[test]
    fn promises_are_told_apart() {
        let abandoned = Abandoned::default();
        assert!(abandoned.is_empty() && !abandoned.contains(block(1), Promise::ANY));
        abandoned.insert(block(1), Promise(7));
        abandoned.insert(block(2), Promise::ANY);
        assert!(
            abandoned.contains(block(1), Promise(7)) && abandoned.contains(block(1), Promise::ANY)
        );
        assert!(!abandoned.contains(block(1), Promise(8)));
        assert!(abandoned.contains(block(2), Promise(8)));
        assert!(!abandoned.contains(block(3), Promise::ANY));
        abandoned.insert(block(1), Promise(u64::MAX));
        abandoned.forget(block(1));
        assert!(!abandoned.contains(block(1), Promise::ANY));
        abandoned.forget(block(2));
        assert!(abandoned.is_empty());
    }

    /// Goal: memory is bounded, and what was told last is not what is forgotten.
    #[test]
    fn a_flood_of_them_made_the_newest_forgotten() {
        let abandoned = Abandoned::default();
        let flood = 3 * REMEMBERED as u64 + 1;
        for number in 0..flood {
            abandoned.insert(block(number), Promise(1));
        }
        for number in flood - REMEMBERED as u64..flood {
            assert!(abandoned.contains(block(number), Promise(1)), "{number} of {flood}");
        }
        assert!(abandoned.count.load(Ordering::Relaxed) <= 2 * REMEMBERED);
    }
}

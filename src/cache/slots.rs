//! The free slots of the arena. Owns a set of numbers, no memory; who holds a taken slot is not its business.
//!
//! A prompt's blocks are taken one after another and written to storage one after another. So [`Slots::take`]
//! prefers the slot behind the last one it gave: neighbours in the arena can then go to the drive in one I/O.

#![forbid(unsafe_code)]

const WORD_BITS: u32 = 64;

/// A set of free slots.
///
/// Bits in levels: a bit of a level says that its word in the level below is not zero. Every operation
/// touches one word a level, and 2^32 slots need six levels.
#[derive(Debug)]
pub struct Slots {
    levels: Vec<Vec<u64>>,
    count: u32,
    free: u32,
    /// Where the next search begins: the slot behind the last one taken.
    next: u32,
}

impl Slots {
    /// `count` slots, all free.
    pub fn new(count: u32) -> Self {
        let mut levels = Vec::new();
        let mut bits = count;
        loop {
            let words = bits.div_ceil(WORD_BITS).max(1);
            let mut level = vec![u64::MAX; words as usize];
            let tail = bits % WORD_BITS;
            if tail != 0 || bits == 0 {
                level[words as usize - 1] = (1_u64 << tail) - 1;
            }
            levels.push(level);
            if words == 1 {
                break;
            }
            bits = words;
        }
        Self { levels, count, free: count, next: 0 }
    }

    /// How many slots there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many are free.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Whether this slot is free.
    pub fn is_free(&self, slot: u32) -> bool {
        slot < self.count
            && self.levels[0][(slot / WORD_BITS) as usize] >> (slot % WORD_BITS) & 1 == 1
    }

    /// Takes the slot behind the last one taken, or else the next free one, around the end. `None` where
    /// none is free.
    pub fn take(&mut self) -> Option<u32> {
        let slot = self.first_from(self.next).or_else(|| self.first_from(0))?;
        self.clear(slot);
        self.free -= 1;
        self.next = if slot + 1 == self.count { 0 } else { slot + 1 };
        Some(slot)
    }

    /// Gives a taken slot back.
    ///
    /// # Panics
    /// Where the slot is free already or does not exist: two owners would write over each other.
    pub fn put(&mut self, slot: u32) {
        assert!(slot < self.count, "slot {slot} does not exist");
        assert!(!self.is_free(slot), "slot {slot} is given back twice");
        let mut index = slot;
        for level in &mut self.levels {
            let word = &mut level[(index / WORD_BITS) as usize];
            let was_empty = *word == 0;
            *word |= 1 << (index % WORD_BITS);
            if !was_empty {
                break;
            }
            index /= WORD_BITS;
        }
        self.free += 1;
    }

    fn clear(&mut self, slot: u32) {
        let mut index = slot;
        for level in &mut self.levels {
            let word = &mut level[(index / WORD_BITS) as usize];
            *word &= !(1 << (index % WORD_BITS));
            if *word != 0 {
                break;
            }
            index /= WORD_BITS;
        }
    }

    /// The first free slot at or behind `start`.
    fn first_from(&self, start: u32) -> Option<u32> {
        let mut index = start;
        for level in 0..self.levels.len() {
            let word = self.levels[level].get((index / WORD_BITS) as usize)?;
            let behind = word & (u64::MAX << (index % WORD_BITS));
            if behind != 0 {
                let mut found = index / WORD_BITS * WORD_BITS + behind.trailing_zeros();
                for below in self.levels[..level].iter().rev() {
                    found = found * WORD_BITS + below[found as usize].trailing_zeros();
                }
                return Some(found);
            }
            index = index / WORD_BITS + 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_are_taken_in_a_row() {
        // Goal: slots that are taken one after another lie one after another, also behind a gap.
        let mut slots = Slots::new(1000);
        let taken: Vec<_> = (0..1000).map(|_| slots.take().unwrap()).collect();
        assert!(taken.windows(2).all(|pair| pair[1] == pair[0] + 1));
        assert_eq!(slots.take(), None);
        (100..200).chain(500..510).for_each(|slot| slots.put(slot));
        assert_eq!(slots.take(), Some(100));
        slots.put(100);
        assert_eq!(slots.take(), Some(101));
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_slot_given_back_twice_is_noticed() {
        // Goal: a double free is a panic, not two owners of one slot.
        let mut slots = Slots::new(3);
        let slot = slots.take().unwrap();
        slots.put(slot);
        slots.put(slot);
    }

    proptest! {
        #[test]
        fn slots_match_a_naive_set(
            count in prop_oneof![0_u32..200, 4000_u32..4200],
            takes in prop::collection::vec((any::<bool>(), any::<u32>()), 1..400),
        ) {
            // Goal: against a sorted set: nothing is given twice, nothing is lost, the order is the promised one.
            let mut slots = Slots::new(count);
            let mut free: BTreeSet<u32> = (0..count).collect();
            let mut held = Vec::new();
            let mut next = 0;
            for (take, pick) in takes {
                if take || held.is_empty() {
                    let expected = free.range(next..).next().or(free.iter().next()).copied();
                    prop_assert_eq!(slots.take(), expected);
                    if let Some(slot) = expected {
                        free.remove(&slot);
                        held.push(slot);
                        next = if slot + 1 == count { 0 } else { slot + 1 };
                    }
                } else {
                    let slot = held.swap_remove(pick as usize % held.len());
                    slots.put(slot);
                    free.insert(slot);
                }
                prop_assert_eq!(slots.free() as usize, free.len());
            }
            for slot in 0..count {
                prop_assert_eq!(slots.is_free(slot), free.contains(&slot));
            }
        }
    }
}

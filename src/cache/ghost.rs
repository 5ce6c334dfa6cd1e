//! The memory of what was evicted lately: keys without slots. Owns a fixed table; approximate by design.
//!
//! A queue with a hash index would need both and an allocator. Here an entry carries the number of its
//! insertion instead, and is forgotten when so many later ones have come as the queue would hold
//! (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, section 5).

#![forbid(unsafe_code)]

const WAYS: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    fingerprint: u32,
    /// Number of the insertion; 0: empty.
    inserted: u32,
}

/// A set of the last `capacity` keys, near enough: a full bucket forgets its oldest entry early.
#[derive(Debug)]
pub(super) struct Ghost {
    buckets: Vec<[Entry; WAYS]>,
    capacity: u32,
    insertions: u32,
}

impl Ghost {
    /// Remembers about `capacity` keys.
    pub(super) fn new(capacity: u32) -> Self {
        // Half full at capacity, so that few buckets overflow.
        let buckets = (capacity as usize / (WAYS / 2)).max(1).next_power_of_two();
        Self { buckets: vec![[Entry::default(); WAYS]; buckets], capacity, insertions: 0 }
    }

    /// Remembers a key.
    pub(super) fn insert(&mut self, key: u64) {
        self.insertions = self.insertions.wrapping_add(1).max(1);
        let (now, capacity) = (self.insertions, self.capacity);
        let (bucket, fingerprint) = self.locate(key);
        let age = |entry: &Entry| match entry.inserted {
            0 => u32::MAX,
            inserted => now.wrapping_sub(inserted),
        };
        let entries = &mut self.buckets[bucket];
        let same = |entry: &&mut Entry| entry.inserted != 0 && entry.fingerprint == fingerprint;
        let place = match entries.iter_mut().find(same) {
            Some(entry) => Some(entry),
            None => entries.iter_mut().max_by_key(|entry| age(entry)),
        };
        if let Some(place) = place
            && capacity > 0
        {
            *place = Entry { fingerprint, inserted: now };
        }
    }

    /// Whether the key was evicted lately; forgets it if so.
    pub(super) fn take(&mut self, key: u64) -> bool {
        let (now, capacity) = (self.insertions, self.capacity);
        let (bucket, fingerprint) = self.locate(key);
        let fresh = |entry: &&mut Entry| {
            entry.inserted != 0
                && entry.fingerprint == fingerprint
                && now.wrapping_sub(entry.inserted) < capacity
        };
        match self.buckets[bucket].iter_mut().find(fresh) {
            Some(entry) => {
                *entry = Entry::default();
                true
            }
            None => false,
        }
    }

    fn locate(&self, key: u64) -> (usize, u32) {
        // Fibonacci hashing: callers' hashes may be weak in some bits.
        let mixed = (key ^ (key >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed as usize & (self.buckets.len() - 1), (mixed >> 32) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_remembers_the_last_ones_and_forgets_the_rest() {
        // Goal: of many keys the last `capacity` are known, nearly all, and older ones are not.
        let mut ghost = Ghost::new(1000);
        (0..10_000).for_each(|key| ghost.insert(key));
        let known = (9_000..10_000).filter(|key| ghost.take(*key)).count();
        assert!(known > 930, "{known} of 1000");
        assert_eq!((0..9_000).filter(|key| ghost.take(*key)).count(), 0);
        assert!(!ghost.take(9_999), "taken once, it is forgotten");
    }

    #[test]
    fn nothing_is_remembered_without_capacity() {
        // Goal: a ghost of no capacity answers no.
        let mut ghost = Ghost::new(0);
        ghost.insert(7);
        assert!(!ghost.take(7));
    }
}

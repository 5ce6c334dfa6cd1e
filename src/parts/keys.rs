//! Maps by part: a hash that costs a few multiplications, since every unit of every batch is looked up on the
//! caller's thread.
//!
//! Block ids are hashes themselves, but nothing forces a caller to make them so. Therefore all bits are mixed,
//! and with a seed that nobody outside knows.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::block::PartKey;

/// A map whose keys are parts.
pub(super) type KeyMap<V> = HashMap<PartKey, V, Seed>;

/// What makes the hashes of one map differ from those of another.
#[derive(Clone, Copy)]
pub(super) struct Seed([u64; 2]);

impl Default for Seed {
    fn default() -> Self {
        let random = RandomState::new();
        Self([random.hash_one(0), random.hash_one(1)])
    }
}

impl BuildHasher for Seed {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher { seed: self.0, hash: 0 }
    }
}

/// Takes the 16 bytes of a block id, then the number of a part.
pub(super) struct KeyHasher {
    seed: [u64; 2],
    hash: u64,
}

/// Both halves of a product depend on every bit of the factors; their sum without carry on all of them.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for words in bytes.chunks(16) {
            let mut padded = [0; 16];
            padded[..words.len()].copy_from_slice(words);
            let both = u128::from_le_bytes(padded);
            let [low, high] = [both as u64, (both >> 64) as u64];
            self.hash ^= fold(low ^ self.seed[0], high ^ self.seed[1]);
        }
    }

    fn write_u16(&mut self, part: u16) {
        self.hash = fold(self.hash ^ self.seed[0], self.seed[1] ^ u64::from(part) << 1 | 1);
    }

    /// The length of an array, which is the same for all keys.
    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        self.hash
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::block::BlockId;

    /// Goal: ids that only count, in any of their bytes, and neighbouring parts do not collide: neither in the
    /// low bits, which are the place in a map, nor in the high ones.
    #[test]
    fn counting_ids_spread() {
        let seed = Seed::default();
        let mut keys = HashSet::new();
        for number in 0..4096_u32 {
            for (at, part) in [(0, 0), (4, 1), (8, 2), (12, 3)] {
                let mut id = [0; 16];
                id[at..at + 4].copy_from_slice(&number.to_le_bytes());
                keys.insert(PartKey { block: BlockId(id), part });
            }
        }
        let count = keys.len();
        let hashes: Vec<u64> = keys.iter().map(|key| seed.hash_one(key)).collect();
        assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), count);
        for places in [
            hashes.iter().map(|h| h & 0xffff).collect::<HashSet<_>>(),
            hashes.iter().map(|h| h >> 48).collect(),
        ] {
            // Of n throws into 4 n places, some 11 % meet another; a third would be a bad hash.
            assert!(places.len() * 3 > count * 2, "{} places for {count} keys", places.len());
        }
    }
}

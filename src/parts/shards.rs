//! A set of shard indexes of one part.

/// Bits, and how many are set.
#[derive(Clone, Debug, Default)]
pub(super) struct ShardSet {
    /// The first 64 shards, so that parts of few shards need no allocation.
    low: u64,
    high: Vec<u64>,
    count: u32,
}

impl ShardSet {
    /// An empty set for `shards` shards.
    pub(super) fn new(shards: u32) -> Self {
        let words = (shards as usize).div_ceil(64);
        Self { low: 0, high: vec![0; words.saturating_sub(1)], count: 0 }
    }

    /// Adds a shard; false where it was in.
    pub(super) fn insert(&mut self, shard: u32) -> bool {
        let (word, bit) = self.word(shard);
        let new = *word & bit == 0;
        *word |= bit;
        self.count += u32::from(new);
        new
    }

    /// Takes a shard out.
    pub(super) fn remove(&mut self, shard: u32) {
        let (word, bit) = self.word(shard);
        let was = *word & bit != 0;
        *word &= !bit;
        self.count -= u32::from(was);
    }

    /// Whether a shard is in.
    pub(super) fn contains(&self, shard: u32) -> bool {
        let word = if shard < 64 { self.low } else { self.high[shard as usize / 64 - 1] };
        word & (1 << (shard % 64)) != 0
    }

    /// How many are in.
    pub(super) fn len(&self) -> u32 {
        self.count
    }

    fn word(&mut self, shard: u32) -> (&mut u64, u64) {
        let word = if shard < 64 { &mut self.low } else { &mut self.high[shard as usize / 64 - 1] };
        (word, 1 << (shard % 64))
    }
}

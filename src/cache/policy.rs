//! What is evicted next: S3-FIFO. Owns the order of the slots; knows their keys only as hashes, and who
//! uses a slot only by asking.
//!
//! Why S3-FIFO and not LRU: long prompts that are seen once (a scan) push a whole LRU cache out, and they
//! are most of the traffic. Here newcomers go through a small queue, a tenth of the cache; what is not
//! touched there leaves without ever having displaced the main queue. What was evicted lately and comes
//! back goes to the main queue at once, by the ghost's word. A hit only raises a two-bit counter.
//! (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.)

#![forbid(unsafe_code)]

use super::ghost::Ghost;

/// One in so many slots belongs to the small queue.
const SMALL_SHARE: u32 = 10;
/// Touches are counted up to here.
const TOUCHES_MAX: u8 = 3;
/// Touches after which a newcomer has earned the main queue. One, not the paper's two: a block of KV that
/// is loaded once after it was saved is a prefix that is shared.
const TOUCHES_TO_STAY: u8 = 1;
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    Small,
    Main,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    key: u64,
    newer: u32,
    older: u32,
    touches: u8,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    newest: u32,
    oldest: u32,
    length: u32,
}

impl Queue {
    const EMPTY: Queue = Queue { newest: NONE, oldest: NONE, length: 0 };
}

/// The order in which slots are evicted. Every call is O(1), amortised for [`S3Fifo::evict`]; nothing is
/// allocated after [`S3Fifo::new`].
#[derive(Debug)]
pub struct S3Fifo {
    nodes: Vec<Node>,
    small: Queue,
    main: Queue,
    small_target: u32,
    ghost: Ghost,
}

impl S3Fifo {
    /// For slots 0 to `slots` - 1, none of them inserted.
    pub fn new(slots: u32) -> Self {
        let node = Node { key: 0, newer: NONE, older: NONE, touches: 0, place: Place::Nowhere };
        Self {
            nodes: vec![node; slots as usize],
            small: Queue::EMPTY,
            main: Queue::EMPTY,
            small_target: (slots / SMALL_SHARE).max(1),
            ghost: Ghost::new(slots - slots / SMALL_SHARE),
        }
    }

    /// How many slots are inserted.
    pub fn len(&self) -> usize {
        (self.small.length + self.main.length) as usize
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this slot is inserted.
    pub fn contains(&self, slot: u32) -> bool {
        self.nodes[slot as usize].place != Place::Nowhere
    }

    /// The slot now holds something; `key` is a hash of what. A slot that is inserted already is taken out first.
    pub fn insert(&mut self, slot: u32, key: u64) {
        self.remove(slot);
        let place = if self.ghost.take(key) { Place::Main } else { Place::Small };
        self.nodes[slot as usize].key = key;
        self.nodes[slot as usize].touches = 0;
        self.push_newest(slot, place);
    }

    /// What the slot holds was used. Call it once a use: a layer-wise load of a part is one.
    pub fn touch(&mut self, slot: u32) {
        let node = &mut self.nodes[slot as usize];
        node.touches = (node.touches + 1).min(TOUCHES_MAX);
    }

    /// The slot holds nothing any more, and not by eviction. Nothing happens where it is not inserted.
    pub fn remove(&mut self, slot: u32) {
        if self.contains(slot) {
            self.unlink(slot);
        }
    }

    /// Takes out the slot that is worth least among those that `can_evict` allows; `None` where it allows
    /// none. A slot that is refused counts as new: it is in use. Slots in use are best not inserted at
    /// all, since a call that finds only such asks for every one of them.
    pub fn evict(&mut self, mut can_evict: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut refused = 0;
        while refused < self.len() {
            let from_small = self.small.length > self.small_target || self.main.length == 0;
            let slot = if from_small { self.small.oldest } else { self.main.oldest };
            let node = self.nodes[slot as usize];
            if from_small && node.touches >= TOUCHES_TO_STAY {
                self.unlink(slot);
                self.nodes[slot as usize].touches = 0;
                self.push_newest(slot, Place::Main);
                continue;
            }
            if !from_small && node.touches > 0 {
                self.unlink(slot);
                self.nodes[slot as usize].touches -= 1;
                self.push_newest(slot, Place::Main);
                continue;
            }
            self.unlink(slot);
            if can_evict(slot) {
                if from_small {
                    self.ghost.insert(node.key);
                }
                return Some(slot);
            }
            // In use is the strongest sign of worth, and in the main queue it does not stand in the way of
            // those behind it in the small one.
            refused += 1;
            self.push_newest(slot, Place::Main);
        }
        None
    }

    fn queue(&mut self, place: Place) -> &mut Queue {
        match place {
            Place::Main => &mut self.main,
            _ => &mut self.small,
        }
    }

    fn push_newest(&mut self, slot: u32, place: Place) {
        let queue = self.queue(place);
        let before = queue.newest;
        queue.newest = slot;
        queue.length += 1;
        if before == NONE {
            queue.oldest = slot;
        } else {
            self.nodes[before as usize].newer = slot;
        }
        let node = &mut self.nodes[slot as usize];
        node.place = place;
        node.older = before;
        node.newer = NONE;
    }

    fn unlink(&mut self, slot: u32) {
        let Node { newer, older, place, .. } = self.nodes[slot as usize];
        if newer != NONE {
            self.nodes[newer as usize].older = older;
        }
        if older != NONE {
            self.nodes[older as usize].newer = newer;
        }
        let queue = self.queue(place);
        if queue.newest == slot {
            queue.newest = older;
        }
        if queue.oldest == slot {
            queue.oldest = newer;
        }
        queue.length -= 1;
        self.nodes[slot as usize].place = Place::Nowhere;
    }
}

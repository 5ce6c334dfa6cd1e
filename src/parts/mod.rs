//! The part table: which part is in which slot, what is being done with it, and who waits for it.
//!
//! A pure state machine. Every event (a load or a save arrives, a copy or an I/O ended) changes the table
//! and appends [`Action`]s, which the store carries out after it has let go of the table's lock. It
//! does no I/O, copies nothing, and knows slots only by number.
//!
//! ```text
//!            ┌─► QueuedLoad ─► Reading ──────────────────┐
//!  load ─────┤     (no slot)      (drive -> slot, verify;  ▼
//!            │                     shards hit it as they come)
//!            └──────────────────────────────────────────► Ready ─► evicted
//!  save ─────┬─► QueuedSave ─► Filling ──► Storing ──────┘
//!            │     (no slot)   (gathers)   (seal, write, publish; loads hit it)
//!            └─► Direct (registered caller memory, no slot)
//! ```

#![forbid(unsafe_code)]

mod hold;
mod keys;
mod load;
mod read;
mod save;
mod shards;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::PartKey;
use crate::cache::policy::S3Fifo;
use crate::cache::slots::Slots;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Class;
use crate::posix::{Found, Taken};
use crate::task::{Kind, Task};
use keys::KeyMap;
pub(crate) use load::Accepted;
pub(crate) use read::{Check, Outcome, Piece};
use shards::ShardSet;

/// Index of a part's record while it is in use.
pub(crate) type PartId = u32;

/// One unit of one task.
#[derive(Clone)]
pub(crate) struct Unit {
    pub task: Arc<Task>,
    pub index: u32,
}

impl Unit {
    /// The unit's shard in its part.
    pub(crate) fn shard(&self) -> u32 {
        self.task.unit(self.index).shard
    }

    /// The unit's part.
    pub(crate) fn key(&self) -> PartKey {
        self.task.unit(self.index).key
    }

    fn is_hold(&self) -> bool {
        self.task.kind() == Kind::Hold
    }

    fn is_settled(&self) -> bool {
        self.task.is_settled(self.index)
    }
}

/// What the store has to do after an event.
pub(crate) enum Action {
    /// Copy the unit's shard from caller memory into the slot, then call `gathered`.
    Gather { part: PartId, slot: u32, unit: Unit },
    /// Copy the unit's shard from the slot into caller memory, then call `scattered`.
    Scatter { part: PartId, slot: u32, unit: Unit },
    /// Read the piece into its place in the slot, call `arrived`, verify it, then call `read_ended`.
    Read { piece: Piece, class: Class, expires: Option<Instant> },
    /// Seal the slot, write it and publish it, then call `stored`. The checksums where they were taken already.
    Store { part: PartId, slot: u32, key: PartKey, sums: Option<Taken> },
    /// Read the part straight into the unit's memory.
    DirectLoad { unit: Unit, key: PartKey, found: Found },
    /// Write the part straight from the unit's memory, then call `end_direct`.
    DirectSave { part: PartId, unit: Unit, key: PartKey },
    /// The unit's memory is not needed (any more).
    Copied(Unit),
    /// The unit's end.
    Settle(Unit, Result<()>),
    /// The key is in the DRAM tier from now on: tell the host's lookup-only stores.
    Share(PartKey),
    /// The key has left the DRAM tier.
    Unshare(PartKey),
    /// Call `reclaim_partial` at this time.
    WatchPartial(Instant),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    QueuedLoad,
    Reading,
    QueuedSave,
    Filling,
    Direct,
    Storing,
    Ready,
    /// Failed or superseded: out of the map, waits for its last copy to let go of the slot.
    Doomed,
}

struct Part {
    key: PartKey,
    state: State,
    slot: Option<u32>,
    /// Copies that read or write the slot now.
    pins: u32,
    /// The device may read or write the slot for ever: nobody gets it again.
    lost: bool,
    /// Shards for which a gather is queued, running or done.
    claimed: ShardSet,
    /// Shards that are in the slot.
    filled: ShardSet,
    /// While it is read.
    progress: read::Progress,
    /// Numbers of the tasks that hold the part, or will when its bytes are there.
    holders: Vec<u64>,
    /// Loads and holds that wait for the bytes.
    loads: Vec<Unit>,
    /// Saves whose bytes are in, waiting for PERSISTED.
    saves: Vec<Unit>,
    /// Saves that wait for a slot.
    gathers: Vec<Unit>,
    /// Checksums of the bytes that are in the slot, taken on their way there.
    sums: Option<Taken>,
    /// Why the part is not saved after all: for shards whose copy ends later.
    gave_up: Option<Error>,
    /// Shards handed out since the part was read.
    served: u32,
    /// Another process published the part while this one was saving it.
    superseded: bool,
    found: Option<Found>,
    class: Class,
    /// When it last got a shard; only of parts that fill shard by shard.
    touched: Option<Instant>,
}

/// A part whose save failed or was refused as a whole: its other shards share its fate at once.
struct Refusal {
    claimed: ShardSet,
    error: Error,
    at: Instant,
}

/// Whether parts stay in DRAM once nobody needs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// `Cache|..`: until evicted.
    Cached,
    /// Staging only.
    Staged,
}

/// Where complete parts go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    /// To storage; PERSISTED when published.
    Storage,
    /// Nowhere; PERSISTED when complete.
    Nothing,
}

/// The table's fixed numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub slots: u32,
    pub shards_per_part: u32,
    /// Shards that are read at once where not all of a part are wanted; at least one.
    pub shards_per_piece: u32,
    pub keep: Keep,
    pub sink: Sink,
    /// Parts that may wait for a slot.
    pub queue_max: usize,
    /// How long a part may stay incomplete without a new shard.
    pub partial_timeout: Duration,
}

/// What the table has counted since it was made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    /// Loads that joined a read under way.
    pub shared: u64,
    /// Saves of what was present.
    pub skipped: u64,
    /// Parts given up before they were stored.
    pub dropped: u64,
}

/// The part table.
pub(crate) struct Parts {
    rules: Rules,
    map: KeyMap<PartId>,
    parts: Vec<Part>,
    free: Vec<PartId>,
    by_slot: Vec<PartId>,
    slots: Slots,
    slots_used: u32,
    policy: S3Fifo,
    load_queue: VecDeque<PartId>,
    /// Parts being read that may need another piece. See `flush`.
    to_read: Vec<PartId>,
    save_queue: VecDeque<PartId>,
    /// Slots of parts that need more than one shard and miss some.
    partial: u32,
    /// Parts with holders.
    held: u32,
    watching_partial: bool,
    refusals: KeyMap<Refusal>,
    pub(crate) counts: Counts,
}

impl Parts {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            map: KeyMap::default(),
            parts: Vec::new(),
            free: Vec::new(),
            by_slot: vec![PartId::MAX; rules.slots as usize],
            slots: Slots::new(rules.slots),
            slots_used: 0,
            policy: S3Fifo::new(rules.slots),
            load_queue: VecDeque::new(),
            to_read: Vec::new(),
            save_queue: VecDeque::new(),
            partial: 0,
            held: 0,
            watching_partial: false,
            refusals: KeyMap::default(),
            counts: Counts::default(),
        }
    }

    /// Whether the part's bytes are in DRAM, complete.
    pub(crate) fn is_resident(&self, key: &PartKey) -> bool {
        self.map.get(key).is_some_and(|&id| {
            matches!(self.parts[id as usize].state, State::Ready | State::Storing)
        })
    }

    /// Whether the table knows no part.
    pub(crate) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Whether the part is in DRAM or on its way there.
    pub(crate) fn knows(&self, key: &PartKey) -> bool {
        self.map.contains_key(key)
    }

    /// The device cannot say when it will be done with the part's slot: the slot is never used again.
    pub(crate) fn leak_slot(&mut self, id: PartId) {
        self.parts[id as usize].lost = true;
    }

    /// Whether another batch may wait for slots.
    pub(crate) fn has_room(&self) -> bool {
        self.queued() < self.rules.queue_max
    }

    /// Parts that wait for a slot.
    pub(crate) fn queued(&self) -> usize {
        self.load_queue.len() + self.save_queue.len()
    }

    /// Slots in use, of how many.
    pub(crate) fn slots(&self) -> (u32, u32) {
        (self.slots_used, self.rules.slots)
    }

    /// Slots that a transfer uses now.
    pub(crate) fn busy_slots(&self) -> u32 {
        let busy = |id: &&PartId| {
            let part = &self.parts[**id as usize];
            part.slot.is_some() && (part.state != State::Ready || part.pins > 0)
        };
        self.map.values().filter(busy).count() as u32
    }

    /// Parts of which some shards are in and others awaited.
    pub(crate) fn partial(&self) -> u32 {
        self.partial
    }

    /// Whether a save or a read is under way that ought to end before the store closes.
    pub(crate) fn is_busy(&self) -> bool {
        self.map.values().any(|&id| self.parts[id as usize].state != State::Ready)
            || self.parts.iter().any(|part| part.pins > 0 || part.progress.is_under_way())
    }

    /// Whether a copy to or from a slot is under way.
    pub(crate) fn is_copying(&self) -> bool {
        self.parts.iter().any(|part| part.pins > 0)
    }

    fn is_layerwise(&self) -> bool {
        self.rules.shards_per_part > 1
    }

    fn create(&mut self, key: PartKey, state: State) -> PartId {
        let shards = self.rules.shards_per_part;
        let part = Part {
            key,
            state,
            slot: None,
            pins: 0,
            lost: false,
            claimed: ShardSet::new(shards),
            filled: ShardSet::new(shards),
            progress: read::Progress::new(shards),
            holders: Vec::new(),
            loads: Vec::new(),
            saves: Vec::new(),
            gathers: Vec::new(),
            sums: None,
            gave_up: None,
            served: 0,
            superseded: false,
            found: None,
            class: Class::Load,
            touched: None,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.parts[id as usize] = part;
                id
            }
            None => {
                self.parts.push(part);
                (self.parts.len() - 1) as PartId
            }
        };
        self.map.insert(key, id);
        id
    }

    /// A free slot, or one taken from the part that is worth least.
    fn take_slot(&mut self, actions: &mut Vec<Action>) -> Option<u32> {
        if let Some(slot) = self.slots.take() {
            self.slots_used += 1;
            return Some(slot);
        }
        let (parts, by_slot) = (&self.parts, &self.by_slot);
        let slot = self.policy.evict(|slot| {
            let part = &parts[by_slot[slot as usize] as usize];
            let idle = part.pins == 0 && part.holders.is_empty() && !part.lost;
            part.state == State::Ready && idle
        })?;
        let id = self.by_slot[slot as usize];
        self.counts.evictions += 1;
        self.unmap(id, actions);
        self.parts[id as usize].slot = None;
        self.free.push(id);
        Some(slot)
    }

    fn give_slot(&mut self, id: PartId, slot: u32) {
        self.parts[id as usize].slot = Some(slot);
        self.by_slot[slot as usize] = id;
    }

    /// Takes a part out of the map, so that nobody finds it any more.
    fn unmap(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &self.parts[id as usize];
        if let Entry::Occupied(entry) = self.map.entry(part.key)
            && *entry.get() == id
        {
            entry.remove();
            if matches!(part.state, State::Ready | State::Storing)
                && self.rules.keep == Keep::Cached
            {
                actions.push(Action::Unshare(part.key));
            }
        }
    }

    /// Gives up a part: nobody finds it, and its slot comes back when the last copy has let go.
    fn discard(&mut self, id: PartId, actions: &mut Vec<Action>) {
        self.unmap(id, actions);
        self.forget_holders(id);
        let part = &mut self.parts[id as usize];
        if let (State::Ready, Some(slot)) = (part.state, part.slot) {
            self.policy.remove(slot);
        }
        part.state = State::Doomed;
        if part.pins == 0 {
            if let Some(slot) = part.slot.take().filter(|_| !part.lost) {
                self.slots.put(slot);
                self.slots_used -= 1;
            }
            self.free.push(id);
        }
    }

    /// The part is complete and clean: it stays, or goes when its last reader is done.
    fn settle_in(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &mut self.parts[id as usize];
        part.state = State::Ready;
        let slot = part.slot.expect("a complete part has a slot");
        if part.holders.is_empty() {
            self.policy.insert(slot, ghost_key(&part.key));
        }
        if self.rules.keep == Keep::Cached {
            actions.push(Action::Share(part.key));
        }
    }

    /// Lets go of a staged part that everybody has been served from.
    fn release_if_done(&mut self, id: PartId, actions: &mut Vec<Action>) {
        let part = &self.parts[id as usize];
        if part.pins > 0 {
            return;
        }
        let served = part.served >= self.rules.shards_per_part || !self.is_layerwise();
        match part.state {
            State::Doomed => self.discard(id, actions),
            State::Ready if self.rules.keep == Keep::Staged && served => self.discard(id, actions),
            _ => {}
        }
    }

    /// Gives slots to those who wait, loads first. Called after every event that may free one.
    pub(crate) fn pump(&mut self, actions: &mut Vec<Action>) {
        while let Some(&id) = self.load_queue.front() {
            if self.parts[id as usize].loads.iter().all(Unit::is_settled) {
                self.load_queue.pop_front();
                self.discard(id, actions);
                continue;
            }
            let Some(slot) = self.take_slot(actions) else { return };
            self.load_queue.pop_front();
            self.give_slot(id, slot);
            self.start_read(id);
        }
        while let Some(&id) = self.save_queue.front() {
            if self.parts[id as usize].gathers.iter().all(Unit::is_settled) {
                self.save_queue.pop_front();
                self.end_save(id, &gave_up(), actions);
                continue;
            }
            if self.is_layerwise() && !self.may_start_partial() {
                return;
            }
            let Some(slot) = self.take_slot(actions) else { return };
            self.save_queue.pop_front();
            self.give_slot(id, slot);
            self.start_filling(id, actions);
        }
    }
}

fn gave_up() -> Error {
    Error::new(
        ErrorKind::Timeout,
        "the save was given up before a slot was free; raise cache_buffer_capacity_gb or timeout_ms",
    )
}

/// What the ghost queue of the eviction policy remembers of a key: block ids are hashes already.
fn ghost_key(key: &PartKey) -> u64 {
    let id = u64::from_le_bytes(key.block.0[..8].try_into().expect("eight bytes"));
    id ^ u64::from(key.part).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

//! What befalls operations: faults placed by tests, and chance that follows from the seed.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

/// An operation, as faults name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// A read, by an engine or by `read_at`.
    Read,
    /// A write, by an engine or by `write_at`.
    Write,
    /// `open`, creating or not.
    Open,
    /// `create_dir_all`.
    CreateDir,
    /// `list`.
    List,
    /// `rename`.
    Rename,
    /// `unlink`.
    Unlink,
    /// `metadata`, `file_metadata` and `revalidate_dir`.
    Stat,
    /// `sync_dir`.
    SyncDir,
    /// `sync_data`.
    SyncData,
    /// `allocate`.
    Allocate,
    /// `truncate`.
    Truncate,
}

/// Which of the operations of a kind it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// The nth since the disk was made (the first is 1), once.
    Nth(u64),
    /// Every one.
    Always,
    /// One in so many, by chance.
    OneIn(u64),
    /// Those on files whose path contains the text and that touch the bytes.
    Bytes(String, Range<u64>),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this errno. A write may have happened in part.
    Errno(i32),
    /// It takes that much longer, and then happens.
    Delay(Duration),
}

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What it befalls.
    pub call: Call,
    /// When.
    pub occasion: Occasion,
    /// How.
    pub effect: Effect,
}

/// Decides what befalls each operation.
pub(super) struct Fates {
    seed: u64,
    faults: Vec<Fault>,
    calls: HashMap<Call, u64>,
    seen: HashMap<u64, u64>,
}

/// What was decided for one operation.
pub(super) struct Fate {
    pub(super) errno: Option<i32>,
    pub(super) delay: Duration,
    /// Random, the same for the same operation under the same seed.
    pub(super) dice: Dice,
}

impl Fates {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, faults: Vec::new(), calls: HashMap::new(), seen: HashMap::new() }
    }

    pub(super) fn inject(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    pub(super) fn heal(&mut self) {
        self.faults.clear();
    }

    pub(super) fn calls(&self, call: Call) -> u64 {
        self.calls.get(&call).copied().unwrap_or(0)
    }

    /// The fate of an operation on `bytes` of the file at `path`.
    pub(super) fn decide(&mut self, call: Call, path: &Path, bytes: Range<u64>) -> Fate {
        let count = self.calls.entry(call).or_default();
        *count += 1;
        let mut dice = self.dice_for(call, path, bytes.start);
        let count = self.calls[&call];
        let mut fate = Fate { errno: None, delay: Duration::ZERO, dice: dice.fork() };
        for fault in self.faults.iter().filter(|fault| fault.call == call) {
            let hit = match &fault.occasion {
                Occasion::Nth(nth) => *nth == count,
                Occasion::Always => true,
                Occasion::OneIn(many) => dice.roll(*many) == 0,
                Occasion::Bytes(text, range) => {
                    path.to_string_lossy().contains(text.as_str())
                        && range.start < bytes.end
                        && bytes.start < range.end
                }
            };
            match fault.effect {
                _ if !hit => {}
                Effect::Errno(errno) => fate.errno = Some(errno),
                Effect::Delay(delay) => fate.delay += delay,
            }
        }
        fate
    }

    fn dice_for(&mut self, call: Call, path: &Path, offset: u64) -> Dice {
        let mut hasher = DefaultHasher::new();
        (call, path, offset).hash(&mut hasher);
        let operation = hasher.finish();
        let times = self.seen.entry(operation).or_default();
        *times += 1;
        Dice::new(self.seed ^ operation.rotate_left(17) ^ times.wrapping_mul(0x9e37_79b9))
    }
}

/// A small random generator (splitmix64, Steele and others 2014).
#[derive(Clone)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `sides`; 0 where there are none.
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        if sides == 0 { 0 } else { self.next() % sides }
    }

    pub(super) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

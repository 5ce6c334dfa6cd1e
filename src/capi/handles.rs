//! Handles: tokens that look like pointers and never are. A token names a slot, the slot's generation and
//! the kind of thing, so a stale one is told from a live one and from garbage without touching memory.
//!
//! Knows nothing of what the handles stand for.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use parking_lot::RwLock;

use crate::error::{Error, ErrorKind, Result};

const SLOT_BITS: u32 = 28;
const GENERATION_BITS: u32 = 28;
const SLOT_COUNT_MAX: usize = 1 << SLOT_BITS;
const GENERATION_MAX: u64 = (1 << GENERATION_BITS) - 1;

/// What a handle stands for; its number is the topmost byte of the token, where a user-space address has 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `ucm_options_t`.
    Options = 0xa1,
    /// `ucm_store_t`.
    Store = 0xb2,
    /// `ucm_task_t`.
    Task = 0xc3,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Options => "options handle",
            Self::Store => "store handle",
            Self::Task => "task handle",
        }
    }
}

/// A handle's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Token(u64);

impl Token {
    fn new(kind: Kind, generation: u64, slot: usize) -> Self {
        Self(((kind as u64) << 56) | (generation << SLOT_BITS) | slot as u64)
    }

    /// The token that a caller handed in as a pointer.
    pub(super) fn from_pointer<T>(pointer: *const T) -> Self {
        Self(pointer.addr() as u64)
    }

    /// The pointer to hand to the caller.
    pub(super) fn to_pointer<T>(self) -> *mut T {
        std::ptr::without_provenance_mut(self.0 as usize)
    }

    /// The token as a number, for a field that is given back unchanged.
    pub(super) fn to_number(self) -> u64 {
        self.0
    }

    /// The token of [`Token::to_number`].
    pub(super) fn from_number(number: u64) -> Self {
        Self(number)
    }

    fn kind(self) -> u64 {
        self.0 >> 56
    }

    fn generation(self) -> u64 {
        (self.0 >> SLOT_BITS) & GENERATION_MAX
    }

    fn slot(self) -> usize {
        (self.0 & (SLOT_COUNT_MAX as u64 - 1)) as usize
    }
}

struct Slot<T> {
    /// Of the value in the slot, or of the next one. From 1 on; a slot that reaches the end is not used again.
    generation: u64,
    value: Option<T>,
}

struct Slots<T> {
    slots: Vec<Slot<T>>,
    /// Used in turn, so that generations grow slowly.
    free: VecDeque<u32>,
}

/// All handles of one kind.
pub(super) struct Registry<T> {
    kind: Kind,
    slots: RwLock<Slots<T>>,
}

impl<T: Clone> Registry<T> {
    /// An empty registry.
    pub(super) const fn new(kind: Kind) -> Self {
        Self { kind, slots: RwLock::new(Slots { slots: Vec::new(), free: VecDeque::new() }) }
    }

    /// Makes a handle.
    pub(super) fn insert(&self, value: T) -> Result<Token> {
        let mut slots = self.slots.write();
        let slot = match slots.free.pop_front() {
            Some(slot) => slot as usize,
            None if slots.slots.len() < SLOT_COUNT_MAX => {
                slots.slots.push(Slot { generation: 1, value: None });
                slots.slots.len() - 1
            }
            None => {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("{SLOT_COUNT_MAX} {}s are open; free some", self.kind.name()),
                ));
            }
        };
        slots.slots[slot].value = Some(value);
        Ok(Token::new(self.kind, slots.slots[slot].generation, slot))
    }

    /// What a handle stands for.
    pub(super) fn get(&self, token: Token) -> Result<T> {
        self.with(token, T::clone)
    }

    /// Looks at what a handle stands for.
    pub(super) fn with<R>(&self, token: Token, look: impl FnOnce(&T) -> R) -> Result<R> {
        let slots = self.slots.read();
        match self.slot_of(&slots, token)?.value.as_ref() {
            Some(value) => Ok(look(value)),
            None => Err(self.closed()),
        }
    }

    /// Ends a handle: from now on it is stale.
    pub(super) fn remove(&self, token: Token) -> Result<T> {
        let mut slots = self.slots.write();
        self.slot_of(&slots, token)?;
        slots.take(token.slot()).ok_or_else(|| self.closed())
    }

    /// Ends every handle that `ends` says yes to, and returns what they stood for.
    pub(super) fn remove_all(&self, ends: impl Fn(&T) -> bool) -> Vec<T> {
        let mut slots = self.slots.write();
        (0..slots.slots.len())
            .filter_map(|slot| {
                let chosen = slots.slots[slot].value.as_ref().is_some_and(&ends);
                if chosen { slots.take(slot) } else { None }
            })
            .collect()
    }

    /// The slot of a token of this generation; stale tokens are `Closed`, others `InvalidArgument`.
    fn slot_of<'a>(&self, slots: &'a Slots<T>, token: Token) -> Result<&'a Slot<T>> {
        let garbage = || {
            let name = self.kind.name();
            Error::new(ErrorKind::InvalidArgument, format!("{:#x} is not a {name} of UCM", token.0))
        };
        if token.0 == 0 {
            let name = self.kind.name();
            return Err(Error::new(ErrorKind::InvalidArgument, format!("the {name} is NULL")));
        }
        if token.kind() != self.kind as u64 || token.generation() == 0 {
            return Err(garbage());
        }
        let slot = slots.slots.get(token.slot()).ok_or_else(garbage)?;
        match token.generation().cmp(&slot.generation) {
            std::cmp::Ordering::Less => Err(self.closed()),
            std::cmp::Ordering::Equal => Ok(slot),
            std::cmp::Ordering::Greater => Err(garbage()),
        }
    }

    fn closed(&self) -> Error {
        Error::new(
            ErrorKind::Closed,
            format!("the {} was closed or freed before", self.kind.name()),
        )
    }
}

impl<T> Slots<T> {
    /// Empties a slot and makes its tokens stale.
    fn take(&mut self, slot: usize) -> Option<T> {
        let value = self.slots[slot].value.take()?;
        if self.slots[slot].generation < GENERATION_MAX {
            self.slots[slot].generation += 1;
            self.free.push_back(slot as u32);
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind_of<T>(result: Result<T>) -> Option<ErrorKind> {
        result.err().map(|error| error.kind())
    }

    // Goal: live, stale, null, foreign and invented handles are told apart.
    #[test]
    fn handles_are_live_stale_or_garbage() {
        let tasks = Registry::new(Kind::Task);
        let stores = Registry::new(Kind::Store);
        let token = tasks.insert("a").unwrap();
        assert_eq!(tasks.get(Token::from_pointer(token.to_pointer::<u8>())).unwrap(), "a");
        let foreign = stores.insert("b").unwrap();
        assert_eq!(kind_of(tasks.get(foreign)), Some(ErrorKind::InvalidArgument));
        assert_eq!(tasks.remove(token).unwrap(), "a");
        assert_eq!(kind_of(tasks.get(token)), Some(ErrorKind::Closed));
        assert_eq!(kind_of(tasks.remove(token)), Some(ErrorKind::Closed));
        let again = tasks.insert("c").unwrap();
        assert_ne!(again, token);
        assert_eq!(kind_of(tasks.get(token)), Some(ErrorKind::Closed));
        assert_eq!(tasks.get(again).unwrap(), "c");
        for number in
            [0, 1, 0xdead_beef, u64::MAX, again.0 + 1, again.0 + (1 << SLOT_BITS), 0xc3 << 56]
        {
            let answer = kind_of(tasks.get(Token(number)));
            assert_eq!(answer, Some(ErrorKind::InvalidArgument), "{number:#x}");
        }
    }

    // Goal: a slot whose generations are used up is not used again, so no token ever comes twice.
    #[test]
    fn a_worn_out_slot_is_retired() {
        let tasks = Registry::new(Kind::Task);
        let first = tasks.insert(1).unwrap();
        tasks.remove(first).unwrap();
        tasks.slots.write().slots[0].generation = GENERATION_MAX;
        let last = tasks.insert(2).unwrap();
        assert_eq!(last.slot(), 0);
        tasks.remove(last).unwrap();
        assert_eq!(kind_of(tasks.get(last)), Some(ErrorKind::Closed));
        assert_eq!(tasks.insert(3).unwrap().slot(), 1);
    }

    // Goal: ending the handles of one owner leaves the others alone.
    #[test]
    fn handles_of_one_owner_end_together() {
        let tasks = Registry::new(Kind::Task);
        let tokens: Vec<_> = (0..6).map(|value| tasks.insert(value).unwrap()).collect();
        assert_eq!(tasks.remove_all(|value| value % 2 == 0), [0, 2, 4]);
        assert_eq!(kind_of(tasks.get(tokens[2])), Some(ErrorKind::Closed));
        assert_eq!(tasks.get(tokens[3]).unwrap(), 3);
    }
}

//! Operations in flight: a fixed slab, one slot for each operation the engine may hold.
//!
//! Owns the state of an operation from its first push to its end: what has moved, what is to be
//! continued, what rests before it is tried again. It knows transfers only by their index; their memory
//! and files are kept by `schedule` for as long as a flight names them.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::engine::{Ended, Io, Op, Token};
use super::files::SECTOR_BYTES;
use super::{Class, DmaSlice, File, Operation};

/// A refusal for want of resources (EAGAIN, EBUSY) is tried again that often before it is an error...
const TRIES_MAX: u32 = 100;
/// ...first after this time, then after twice as long each time...
const REST: Duration = Duration::from_millis(1);
/// ...doubled at most that often.
const REST_DOUBLINGS_MAX: u32 = 6;

/// One operation.
pub(super) struct Flight {
    /// The first transfer it serves. More are linked behind it if they were coalesced.
    pub(super) first: usize,
    pub(super) operation: Operation,
    pub(super) class: Class,
    pub(super) offset: u64,
    pub(super) memory: DmaSlice,
    /// Bytes that have moved.
    pub(super) moved: usize,
    tries: u32,
}

impl Flight {
    pub(super) fn new(
        first: usize,
        operation: Operation,
        class: Class,
        offset: u64,
        memory: DmaSlice,
    ) -> Self {
        Self { first, operation, class, offset, memory, moved: 0, tries: 0 }
    }

    /// What has not moved yet.
    fn rest(&self) -> DmaSlice {
        DmaSlice {
            pointer: self.memory.pointer.wrapping_add(self.moved),
            length: self.memory.length - self.moved,
        }
    }
}

/// Why an operation ended without moving all of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// A system call's errno.
    Errno(i32),
    /// The file ends inside the transfer.
    EndOfFile,
}

/// What one end reported by the engine means.
pub(super) enum Settled {
    /// The operation goes on; it is pushed again by [`Flights::push_again`].
    Continues,
    /// It has ended and its slot is free.
    Ended(Flight, Result<(), Failure>),
}

/// The slab.
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<Token>,
    again: VecDeque<Token>,
    resting: Vec<(Instant, Token)>,
    of_class: [u32; Class::COUNT],
    pub(super) continued: u64,
    pub(super) retried: u64,
}

impl Flights {
    pub(super) fn new(depth: u32) -> Self {
        Self {
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            again: VecDeque::new(),
            resting: Vec::new(),
            of_class: [0; Class::COUNT],
            continued: 0,
            retried: 0,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(super) fn of_class(&self, class: Class) -> u32 {
        self.of_class[class.index()]
    }

    /// Pushes a new operation. The slab is not full.
    pub(super) fn begin(&mut self, io: &mut dyn Io, file: &File, flight: Flight) {
        let token = self.free.pop().expect("callers check is_full");
        self.of_class[flight.class.index()] += 1;
        push(io, file, token, &flight);
        self.slots[token as usize] = Some(flight);
    }

    /// Pushes what is to be continued or tried again by now.
    pub(super) fn push_again<'a>(
        &mut self,
        io: &mut dyn Io,
        now: Instant,
        file_of: impl Fn(usize) -> &'a File,
    ) {
        let again = &mut self.again;
        self.resting.retain(|&(until, token)| {
            if until <= now {
                again.push_back(token);
            }
            until > now
        });
        while let Some(token) = self.again.pop_front() {
            let flight = self.slots[token as usize].as_ref().expect("it has not ended");
            push(io, file_of(flight.first), token, flight);
        }
    }

    /// When the first of those that rest is to be tried again.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        self.resting.iter().map(|&(until, _)| until).min()
    }

    /// Takes in one end.
    pub(super) fn settle(&mut self, ended: Ended) -> Settled {
        let slot = &mut self.slots[ended.token as usize];
        let flight = slot.as_mut().expect("the engine ends each operation once");
        let outcome = match ended.result {
            1.. => {
                flight.moved += ended.result as usize;
                assert!(flight.moved <= flight.memory.length, "more moved than was asked for");
                flight.tries = 0;
                if flight.moved < flight.memory.length {
                    self.continued += 1;
                    self.again.push_back(ended.token);
                    return Settled::Continues;
                }
                Ok(())
            }
            0 if flight.operation == Operation::Read => Err(Failure::EndOfFile),
            // A write of nothing without an error would be repeated for ever.
            0 => Err(Failure::Errno(libc::EIO)),
            negative => match self.failed(ended.token, -negative) {
                Some(failure) => Err(failure),
                None => return Settled::Continues,
            },
        };
        let flight = self.take(ended.token);
        Settled::Ended(flight, outcome)
    }

    /// As [`Flights::settle`], but the operation is over whatever its result was.
    pub(super) fn abandon(&mut self, ended: Ended) -> Flight {
        self.take(ended.token)
    }

    /// Gives up those that wait to be pushed again: the engine does not hold them.
    pub(super) fn abandon_idle(&mut self) -> Vec<Flight> {
        let mut tokens: Vec<Token> = self.again.drain(..).collect();
        tokens.extend(self.resting.drain(..).map(|(_, token)| token));
        tokens.into_iter().map(|token| self.take(token)).collect()
    }

    /// Decides on an errno: `None` if the operation is tried again.
    fn failed(&mut self, token: Token, errno: i32) -> Option<Failure> {
        let flight = self.slots[token as usize].as_mut().expect("settle has seen it");
        match errno {
            libc::EINTR => {
                self.retried += 1;
                self.again.push_back(token);
                None
            }
            libc::EAGAIN | libc::EBUSY if flight.tries < TRIES_MAX => {
                let rest = REST * (1 << flight.tries.min(REST_DOUBLINGS_MAX));
                flight.tries += 1;
                self.retried += 1;
                self.resting.push((Instant::now() + rest, token));
                None
            }
            // A direct read that ended inside a sector met the end of the file; going on from there is
            // what the kernel refuses here.
            libc::EINVAL
                if flight.operation == Operation::Read
                    && !flight.moved.is_multiple_of(SECTOR_BYTES) =>
            {
                Some(Failure::EndOfFile)
            }
            errno => Some(Failure::Errno(errno)),
        }
    }

    fn take(&mut self, token: Token) -> Flight {
        let flight =
            self.slots[token as usize].take().expect("the engine ends each operation once");
        self.of_class[flight.class.index()] -= 1;
        self.free.push(token);
        flight
    }
}

fn push(io: &mut dyn Io, file: &File, token: Token, flight: &Flight) {
    io.push(&Op {
        token,
        operation: flight.operation,
        file,
        offset: flight.offset + flight.moved as u64,
        memory: flight.rest(),
        class: flight.class,
    });
}

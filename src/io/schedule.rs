//! What begins when: the requests of one reactor from the moment its thread takes them in until their
//! `done` has been called.
//!
//! Owns the transfers (requests that have not ended) and their order. Loads go before saves, saves before
//! background, but those that wait keep a small share. Neighbours in file and memory become one
//! operation, long requests several. It knows nothing of threads and queues of submitters.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use slab::Slab;

use super::engine::{Ended, Io};
use super::flights::{Failure, Flight, Flights, Settled};
use super::report::Counters;
use super::thread;
use super::transfer::{Transfer, continues, describe};
use super::{Class, DmaSlice, Done, Operation, Request};
use crate::error::{Error, ErrorKind, Result};

/// Operations are cut at multiples of this, as direct I/O wants it.
const PAGE_BYTES: usize = 4096;
/// Largest operation, whatever is configured: `Op` lengths and results fit in 31 bits.
const IO_BYTES_MAX: usize = 1 << 30;
/// An operation may be longer than configured by one part in so many, where it is the last of its transfer: a
/// part of 4 MiB and its trailer page are one write, not a large and a small one (1.05 instead of 0.85 of fio).
const TAIL_SHARE: usize = 16;
/// While more urgent requests wait too, saves begin one byte in so many...
const SAVE_SHARE: i64 = 8;
/// ...and background one in so many.
const BACKGROUND_SHARE: i64 = 16;
/// One slot in so many is kept free of saves, for a load that comes.
const SAVE_RESERVE: u32 = 8;
/// Background takes one slot in so many.
const BACKGROUND_SLOTS: u32 = 4;

/// Bounds of a reactor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Operations in flight.
    pub(super) depth: u32,
    /// Bytes of one.
    pub(super) io_bytes: usize,
}

impl Limits {
    /// The longest operation.
    fn longest(&self) -> usize {
        (self.io_bytes + self.io_bytes / TAIL_SHARE / PAGE_BYTES * PAGE_BYTES).min(IO_BYTES_MAX)
    }
}

/// See the head of this file.
pub(super) struct Schedule {
    limits: Limits,
    /// Shared with submitters: requests that have not begun, by class.
    waiting: [Arc<AtomicUsize>; Class::COUNT],
    transfers: Slab<Transfer>,
    pending: [VecDeque<usize>; Class::COUNT],
    /// A long transfer of which a part has begun.
    cutting: [Option<usize>; Class::COUNT],
    flights: Flights,
    /// Bytes that a waiting class may begin before its turn.
    credit: [i64; Class::COUNT],
    /// No transfer that waits expires earlier. May be too early, never too late.
    earliest_expiry: Option<Instant>,
    ended: Vec<(Done, Result<()>)>,
    counters: Counters,
}

impl Schedule {
    pub(super) fn new(limits: Limits, waiting: [Arc<AtomicUsize>; Class::COUNT]) -> Self {
        let io_bytes = limits.io_bytes.clamp(PAGE_BYTES, IO_BYTES_MAX) / PAGE_BYTES * PAGE_BYTES;
        Self {
            limits: Limits { io_bytes, ..limits },
            waiting,
            transfers: Slab::new(),
            pending: Default::default(),
            cutting: [None; Class::COUNT],
            flights: Flights::new(limits.depth),
            credit: [0; Class::COUNT],
            earliest_expiry: None,
            ended: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Takes a request in.
    pub(super) fn accept(&mut self, request: Request) {
        let Request { operation, file, offset, memory, class, expires, done } = request;
        if memory.length == 0 {
            self.waiting[class.index()].fetch_sub(1, Ordering::Relaxed);
            self.end(done, Ok(()));
            return;
        }
        if let Some(expires) = expires {
            self.earliest_expiry = Some(self.earliest_expiry.map_or(expires, |at| at.min(expires)));
        }
        let index = self.transfers.insert(Transfer {
            operation,
            file,
            offset,
            memory,
            class,
            expires,
            done,
            begun: 0,
            flights: 0,
            next: None,
            alone: false,
            error: None,
        });
        self.pending[class.index()].push_back(index);
    }

    /// Ends with `Timeout` what has waited past its deadline.
    pub(super) fn expire(&mut self) {
        let Some(earliest) = self.earliest_expiry else { return };
        let now = Instant::now();
        if now < earliest {
            return;
        }
        self.earliest_expiry = None;
        for class in Class::ALL {
            let mut kept = std::mem::take(&mut self.pending[class.index()]);
            kept.retain(|&index| {
                let Some(expires) = self.transfers[index].expires else { return true };
                if expires > now {
                    let at = self.earliest_expiry.map_or(expires, |at| at.min(expires));
                    self.earliest_expiry = Some(at);
                    return true;
                }
                self.counters.expired += 1;
                let path = self.transfers[index].file.path();
                let text = "the deadline passed while the transfer waited for its turn; \
                            the storage is slower than what is asked of it, or it hangs";
                let error = Error::new(ErrorKind::Timeout, text).at(path);
                self.end_waiting(index, error);
                false
            });
            self.pending[class.index()] = kept;
        }
    }

    /// Ends everything that has not begun.
    pub(super) fn refuse_waiting(&mut self, error: &Error) {
        for class in Class::ALL {
            for index in std::mem::take(&mut self.pending[class.index()]) {
                self.end_waiting(index, error.clone());
            }
            if let Some(index) = self.cutting[class.index()].take() {
                self.fail(index, error.clone());
            }
        }
    }

    fn end_waiting(&mut self, index: usize, error: Error) {
        let transfer = self.transfers.remove(index);
        if !transfer.alone {
            self.waiting[transfer.class.index()].fetch_sub(1, Ordering::Relaxed);
        }
        self.end(transfer.done, Err(error));
    }

    /// When to look again even if nothing ends: a deadline, or a retry.
    pub(super) fn next_event(&self) -> Option<Instant> {
        match (self.earliest_expiry, self.flights.next_retry()) {
            (Some(left), Some(right)) => Some(left.min(right)),
            (left, right) => left.or(right),
        }
    }

    /// Operations in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.count()
    }

    /// Requests that have not ended.
    pub(super) fn transfers(&self) -> usize {
        self.transfers.len()
    }

    /// Nothing more can begin.
    pub(super) fn is_full(&self) -> bool {
        self.flights.is_full()
    }

    /// No transfer is left.
    pub(super) fn is_empty(&self) -> bool {
        self.transfers.is_empty() && self.ended.is_empty()
    }

    /// Whether a transfer that has not ended uses memory in the range.
    pub(super) fn uses(&self, base: usize, length: usize) -> bool {
        self.transfers.iter().any(|(_, transfer)| {
            let start = transfer.memory.pointer as usize;
            start < base.saturating_add(length) && base < start + transfer.memory.length
        })
    }

    /// What was done so far.
    pub(super) fn counters(&self) -> Counters {
        Counters {
            continued: self.flights.continued,
            retried: self.flights.retried,
            in_flight: self.flights.count() as u64,
            ..self.counters
        }
    }

    /// Begins operations until the engine is full or nothing may begin.
    pub(super) fn fill(&mut self, io: &mut dyn Io) {
        let transfers = &self.transfers;
        self.flights.push_again(io, Instant::now(), |index| &transfers[index].file);
        while !self.flights.is_full() {
            let Some(class) = self.pick() else { break };
            let flight = self.take_next(class);
            self.charge(class, flight.memory.length as i64);
            self.counters.operations += 1;
            let file = &self.transfers[flight.first].file;
            self.flights.begin(io, file, flight);
        }
    }

    fn waits(&self, class: Class) -> bool {
        !self.pending[class.index()].is_empty() || self.cutting[class.index()].is_some()
    }

    fn slots_of(&self, class: Class) -> u32 {
        let depth = self.limits.depth;
        match class {
            Class::Load => depth,
            Class::Save => depth - depth / SAVE_RESERVE,
            Class::Background => (depth / BACKGROUND_SLOTS).max(1),
        }
    }

    /// Whose turn it is: the most urgent class, unless another has earned its share by waiting.
    fn pick(&self) -> Option<Class> {
        let may = |class: &Class| {
            self.waits(*class) && self.flights.of_class(*class) < self.slots_of(*class)
        };
        let first = Class::ALL.into_iter().find(may)?;
        let overdue = Class::ALL
            .into_iter()
            .rev()
            .find(|class| *class != Class::Load && self.credit[class.index()] > 0 && may(class));
        Some(overdue.unwrap_or(first))
    }

    /// Keeps the accounts of who waits while `class` begins `bytes`.
    fn charge(&mut self, class: Class, bytes: i64) {
        for (other, share) in [(Class::Save, SAVE_SHARE), (Class::Background, BACKGROUND_SHARE)] {
            let waits = self.waits(other);
            let credit = &mut self.credit[other.index()];
            if other == class && *credit > 0 {
                *credit -= bytes; // It went out of turn: below zero, it waits for that much longer.
            } else if !waits {
                *credit = (*credit).min(0);
            } else if class.index() < other.index() {
                *credit += bytes / share;
            }
        }
    }

    /// The next operation of a class that waits.
    fn take_next(&mut self, class: Class) -> Flight {
        if let Some(index) = self.cutting[class.index()] {
            return self.cut(index);
        }
        let pending = &mut self.pending[class.index()];
        let first = pending.pop_front().expect("pick saw that it waits");
        self.count_begun(first);
        if self.transfers[first].memory.length > self.limits.longest() {
            self.cutting[class.index()] = Some(first);
            return self.cut(first);
        }
        self.coalesce(first)
    }

    fn count_begun(&mut self, index: usize) {
        let transfer = &self.transfers[index];
        if !transfer.alone {
            self.waiting[transfer.class.index()].fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The next piece of a transfer that is longer than one operation may be.
    fn cut(&mut self, index: usize) -> Flight {
        let transfer = &mut self.transfers[index];
        let start = transfer.begun;
        let left = transfer.memory.length - start;
        let length = if left > self.limits.longest() { self.limits.io_bytes } else { left };
        let memory = DmaSlice { pointer: transfer.memory.pointer.wrapping_add(start), length };
        transfer.begun += length;
        transfer.flights += 1;
        if transfer.begun == transfer.memory.length {
            self.cutting[transfer.class.index()] = None;
        }
        let offset = transfer.offset + start as u64;
        Flight::new(index, transfer.operation, transfer.class, offset, memory)
    }

    /// An operation of `first` and those behind it that continue it in file and memory.
    fn coalesce(&mut self, first: usize) -> Flight {
        let class = self.transfers[first].class;
        let mut last = first;
        let mut length = 0;
        loop {
            let transfer = &mut self.transfers[last];
            length += transfer.memory.length;
            transfer.begun = transfer.memory.length;
            transfer.flights = 1;
            let Some(&next) = self.pending[class.index()].front() else { break };
            if length + self.transfers[next].memory.length > self.limits.io_bytes
                || !continues(&self.transfers[last], &self.transfers[next])
            {
                break;
            }
            self.pending[class.index()].pop_front();
            self.count_begun(next);
            self.transfers[last].next = Some(next);
            self.counters.coalesced += 1;
            last = next;
        }
        let head = &self.transfers[first];
        let memory = DmaSlice { pointer: head.memory.pointer, length };
        Flight::new(first, head.operation, class, head.offset, memory)
    }

    /// Takes in what the engine reports, leaving finished transfers for [`Schedule::call_ended`].
    pub(super) fn settle(&mut self, ended: &mut Vec<Ended>) {
        for end in ended.drain(..) {
            if let Settled::Ended(flight, outcome) = self.flights.settle(end) {
                self.land(&flight, outcome);
            }
        }
    }

    /// As [`Schedule::settle`], when everything is to fail.
    pub(super) fn settle_failed(&mut self, ended: &mut Vec<Ended>, error: &Error) {
        let flights = ended.drain(..).map(|end| self.flights.abandon(end)).collect::<Vec<_>>();
        for flight in flights {
            self.fail_flight(&flight, error);
        }
    }

    /// Fails operations that the engine does not hold.
    pub(super) fn fail_idle(&mut self, error: &Error) {
        for flight in self.flights.abandon_idle() {
            self.fail_flight(&flight, error);
        }
    }

    fn fail_flight(&mut self, flight: &Flight, error: &Error) {
        let mut next = Some(flight.first);
        while let Some(index) = next {
            next = self.transfers[index].next.take();
            self.transfers[index].flights -= 1;
            self.fail(index, error.clone());
        }
    }

    /// An operation has ended: so have the transfers it carried, or their part in it.
    fn land(&mut self, flight: &Flight, outcome: std::result::Result<(), Failure>) {
        let moved = flight.moved as u64;
        match flight.operation {
            Operation::Read => self.counters.bytes_read += moved,
            Operation::Write => self.counters.bytes_written += moved,
        }
        let shared = self.transfers[flight.first].next.is_some();
        let mut next = Some(flight.first);
        let mut end = 0;
        while let Some(index) = next {
            let transfer = &mut self.transfers[index];
            next = transfer.next.take();
            transfer.flights -= 1;
            end += transfer.memory.length;
            match outcome {
                Err(_) if shared && end > flight.moved => self.redo_alone(index),
                Err(failure) if !shared => {
                    let error = describe(failure, flight, &transfer.file);
                    self.fail(index, error);
                }
                _ => self.finish_if_over(index),
            }
        }
    }

    /// Puts a transfer back to begin anew by itself: it has begun, so it expires no more.
    fn redo_alone(&mut self, index: usize) {
        let transfer = &mut self.transfers[index];
        transfer.begun = 0;
        transfer.alone = true;
        transfer.expires = None;
        self.pending[transfer.class.index()].push_front(index);
    }

    fn fail(&mut self, index: usize, error: Error) {
        let transfer = &mut self.transfers[index];
        transfer.error.get_or_insert(error);
        transfer.begun = transfer.memory.length; // What has not begun does not begin any more.
        let cutting = &mut self.cutting[transfer.class.index()];
        if *cutting == Some(index) {
            *cutting = None;
        }
        self.finish_if_over(index);
    }

    fn finish_if_over(&mut self, index: usize) {
        let transfer = &self.transfers[index];
        if transfer.flights > 0 || transfer.begun < transfer.memory.length {
            return;
        }
        let transfer = self.transfers.remove(index);
        self.end(transfer.done, transfer.error.map_or(Ok(()), Err));
    }

    fn end(&mut self, done: Done, result: Result<()>) {
        self.counters.requests += 1;
        self.counters.failed += u64::from(result.is_err());
        self.ended.push((done, result));
    }

    /// Whether there is a `done` to call.
    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Calls the `done` of what has ended, with nothing locked or borrowed. One that panics is an error.
    pub(super) fn call_ended(&mut self) -> Result<()> {
        let ended = &mut self.ended;
        thread::batch(|| {
            let mut outcome = Ok(());
            for (done, result) in ended.drain(..) {
                if catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
                    outcome = Err(Error::new(
                        ErrorKind::Internal,
                        "a callback panicked on an I/O thread; this is a defect in UCM. \
                         Close the store and open it again",
                    ));
                }
            }
            outcome
        })
    }
}

//! What a backend tells of itself: which engine runs, what the platform refused, what that costs, and
//! the exact flag or command that cures it. Shown by stats and `ucm doctor`.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fmt;
use std::sync::OnceLock;

use parking_lot::Mutex;

/// Something the platform refused, and what took its place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fallback {
    /// What was refused, why, and what is used in its place.
    pub what: String,
    /// What that costs.
    pub cost: String,
    /// The command or flag that cures it.
    pub remedy: String,
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; cost: {}; remedy: {}", self.what, self.cost, self.remedy)
    }
}

/// A backend, as seen from outside.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// `io_uring`, `psync`, `cufile` or `sim`.
    pub engine: String,
    /// Features of the engine in use (ring flags and the like).
    pub features: Vec<String>,
    /// Files bypass the page cache.
    pub direct: bool,
    /// The file system is on this machine (no network, no FUSE).
    pub local: bool,
    /// Name of the file system, or its magic number.
    pub file_system: String,
    /// Reactors.
    pub threads: usize,
    /// Operations each may have in flight.
    pub depth: u32,
    /// Bytes of memory registered for fixed-buffer I/O.
    pub registered_bytes: u64,
    /// What was refused.
    pub fallbacks: Vec<Fallback>,
    /// Why the backend takes no more requests, if so.
    pub broken: Option<String>,
    /// What the reactors did.
    pub counters: Counters,
}

/// What the reactors of a backend did since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests that ended, well or not.
    pub requests: u64,
    /// Requests that ended in an error of any kind.
    pub failed: u64,
    /// Requests refused with `Busy` because a queue was full.
    pub refused: u64,
    /// Requests that waited past their deadline.
    pub expired: u64,
    /// Operations handed to the engine; coalescing makes them fewer than requests, splitting more.
    pub operations: u64,
    /// Requests that shared an operation with a neighbour.
    pub coalesced: u64,
    /// Operations that ended short and were continued.
    pub continued: u64,
    /// Operations repeated after EAGAIN, EINTR or EBUSY.
    pub retried: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// System calls that started or awaited operations (io_uring_enter, pread, pwrite).
    pub system_calls: u64,
    /// Times a submitting thread had to wake a parked reactor.
    pub wakes: u64,
    /// Operations in flight now.
    pub in_flight: u64,
    /// Requests that wait now.
    pub queued: u64,
}

impl Counters {
    /// The sum, field by field.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            failed: self.failed + other.failed,
            refused: self.refused + other.refused,
            expired: self.expired + other.expired,
            operations: self.operations + other.operations,
            coalesced: self.coalesced + other.coalesced,
            continued: self.continued + other.continued,
            retried: self.retried + other.retried,
            bytes_read: self.bytes_read + other.bytes_read,
            bytes_written: self.bytes_written + other.bytes_written,
            system_calls: self.system_calls + other.system_calls,
            wakes: self.wakes + other.wakes,
            in_flight: self.in_flight + other.in_flight,
            queued: self.queued + other.queued,
        }
    }
}

/// Tells a fallback on standard error, once in the life of the process.
pub fn tell_once(fallback: &Fallback) {
    static TOLD: OnceLock<Mutex<HashSet<Fallback>>> = OnceLock::new();
    if TOLD.get_or_init(Mutex::default).lock().insert(fallback.clone()) {
        eprintln!("ucm: warning: {fallback}");
    }
}

//! The engine's log: leveled messages to one sink, by default standard error.
//!
//! A sink is installed by [`set_sink`] (the C ABI does that for `ucm_log_callback`). The sink is called on
//! whichever thread has something to say, reactors included, so it must be quick. Knows nothing of who
//! writes and of who listens.
//!
//! ```
//! ucm::log::warning(format_args!("O_DIRECT refused on {}; reads go through the page cache", "/mnt/a"));
//! ```

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};

/// Keys of [`once`] that are remembered; beyond it messages are repeated rather than memory grown.
const ONCE_KEYS_MAX: usize = 4096;

/// How much a message matters. The numbers are those of the C ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Level {
    /// Something that was asked for could not be done.
    Error = 1,
    /// It works, but worse than it could; the message names the remedy.
    Warning = 2,
    /// Once in a while: opened, closed, recovered.
    Info = 3,
    /// For whoever looks for a defect.
    Debug = 4,
}

impl Level {
    /// The level of a number, if it is one.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Error, Self::Warning, Self::Info, Self::Debug]
            .into_iter()
            .find(|level| *level as u32 == number)
    }

    /// The word that begins a line on standard error.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

/// Receives messages.
pub type Sink = Arc<dyn Fn(Level, &str) + Send + Sync>;

/// Messages above this level are not even formatted.
static THRESHOLD: AtomicU32 = AtomicU32::new(Level::Warning as u32);

/// Held for reading while a sink runs, so that [`set_sink`] returns only when the old one is done.
static SINK: RwLock<Option<Sink>> = RwLock::new(None);

static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);

thread_local! {
    /// Whether this thread is inside a sink: what it logs there goes nowhere.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Sends messages of `level` and below to `sink`; `None`: to standard error. The previous sink is not
/// running any more when this returns. From within a sink: `Busy`.
pub fn set_sink(sink: Option<Sink>, level: Option<Level>) -> Result<()> {
    if INSIDE.try_with(Cell::get).unwrap_or(true) {
        return Err(Error::new(
            ErrorKind::Busy,
            "the log callback cannot be changed from within itself; do it from another thread",
        ));
    }
    *SINK.write() = sink;
    THRESHOLD.store(level.map_or(0, |level| level as u32), Ordering::Release);
    Ok(())
}

/// Whether a message of this level goes anywhere: spares the caller costly arguments.
pub fn is_on(level: Level) -> bool {
    level as u32 <= THRESHOLD.load(Ordering::Acquire)
}

/// Says `message` if `level` is on.
pub fn emit(level: Level, message: fmt::Arguments<'_>) {
    if is_on(level) {
        deliver(level, &message.to_string());
    }
}

/// Says something only the first time that `key` comes by in this process.
pub fn once(level: Level, key: &str, message: fmt::Arguments<'_>) {
    if !is_on(level) {
        return;
    }
    {
        let mut said = SAID.lock();
        let said = said.get_or_insert_with(HashSet::new);
        if said.contains(key) {
            return;
        }
        if said.len() < ONCE_KEYS_MAX {
            said.insert(key.to_owned());
        }
    }
    deliver(level, &message.to_string());
}

/// [`emit`] at [`Level::Error`].
pub fn error(message: fmt::Arguments<'_>) {
    emit(Level::Error, message);
}

/// [`emit`] at [`Level::Warning`].
pub fn warning(message: fmt::Arguments<'_>) {
    emit(Level::Warning, message);
}

/// [`emit`] at [`Level::Info`].
pub fn info(message: fmt::Arguments<'_>) {
    emit(Level::Info, message);
}

/// [`emit`] at [`Level::Debug`].
pub fn debug(message: fmt::Arguments<'_>) {
    emit(Level::Debug, message);
}

fn deliver(level: Level, message: &str) {
    // On a thread that is being torn down, and inside a sink, there is nobody to tell.
    if INSIDE.try_with(|inside| inside.replace(true)).unwrap_or(true) {
        return;
    }
    let leave = Leave;
    // Recursive: a writer that waits must not block a sink's thread that is about to log.
    let sink = SINK.read_recursive();
    match sink.as_ref() {
        Some(sink) => sink(level, message),
        // A closed standard error is no reason to fail.
        None => drop(writeln!(std::io::stderr(), "ucm: {}: {message}", level.name())),
    }
    drop(leave);
}

/// Marks the thread as outside again, also when a sink panics.
struct Leave;

impl Drop for Leave {
    fn drop(&mut self) {
        let _ = INSIDE.try_with(|inside| inside.set(false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: one test, because the sink is one for the process: levels filter, `once` says a thing once,
    // logging and re-installing from within a sink neither deadlock nor recurse.
    #[test]
    fn sink_filters_says_once_and_does_not_recurse() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ears = Arc::clone(&heard);
        let nested = Arc::new(Mutex::new(None));
        let answer = Arc::clone(&nested);
        set_sink(
            Some(Arc::new(move |level, message: &str| {
                if message.starts_with("log test") {
                    warning(format_args!("log test: from within"));
                    *answer.lock() = set_sink(None, None).err().map(|error| error.kind());
                    ears.lock().push(format!("{} {message}", level.name()));
                }
            })),
            Some(Level::Info),
        )
        .unwrap();
        info(format_args!("log test 1"));
        debug(format_args!("log test 2"));
        once(Level::Warning, "log-test-key", format_args!("log test 3"));
        once(Level::Warning, "log-test-key", format_args!("log test 4"));
        set_sink(None, Some(Level::Warning)).unwrap();
        assert_eq!(*heard.lock(), ["info log test 1", "warning log test 3"]);
        assert_eq!(*nested.lock(), Some(ErrorKind::Busy));
        assert_eq!(Level::from_number(0), None);
        assert_eq!(Level::from_number(4), Some(Level::Debug));
        assert_eq!(Level::from_number(5), None);
    }
}

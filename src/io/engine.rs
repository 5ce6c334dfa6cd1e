//! `Io`: what a reactor needs of an engine that carries reads and writes.
//!
//! An engine knows descriptors, addresses and errnos. It knows nothing of requests, queues, priorities
//! or retries: those are the reactor's. Exactly one thread, the reactor's, calls an engine, except for
//! its [`Wake`].

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::thread::Stack;
use super::{Class, CloseWatcher, DmaSlice, File, FileId, Operation};
use crate::error::Result;

/// Names an operation in flight: an index into the reactor's fixed slab, below [`Io::depth`].
pub type Token = u32;

/// One read or write for the kernel. May end short, as the system calls do.
pub struct Op<'a> {
    /// Comes back in its [`Ended`].
    pub token: Token,
    /// Read or write.
    pub operation: Operation,
    /// The file.
    pub file: &'a File,
    /// Byte offset in it.
    pub offset: u64,
    /// Where the bytes go or come from; never empty.
    pub memory: DmaSlice,
    /// I/O priority.
    pub class: Class,
}

/// The end of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The operation's.
    pub token: Token,
    /// Bytes moved, or a negative errno.
    pub result: i32,
}

/// How long [`Io::wait`] may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Ends to collect before returning; 0: do not block.
    pub at_least: usize,
    /// After this time one end is enough. An engine that cannot do that collects one only.
    pub gather: Duration,
    /// Return by then in any case; `None`: no limit.
    pub until: Option<Instant>,
}

/// Ends the blocking of [`Io::wait`] from another thread.
pub trait Wake: Send + Sync {
    /// The next wait, or the one going on, returns early.
    fn wake(&self);
}

/// What became of a registration of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registration {
    /// Operations inside the memory use fixed buffers from now on.
    Fixed,
    /// The engine has no such thing; nothing is lost.
    NotUsed,
    /// The system refused; operations work, at the cost that goes with this errno.
    Refused(i32),
}

/// An engine. `push` and `register_memory` are unsafe by nature, see there.
pub trait Io: Send {
    /// `io_uring`, `psync`, `cufile` or `sim`.
    fn name(&self) -> &'static str;

    /// Features in use, for reports.
    fn features(&self) -> Vec<String> {
        Vec::new()
    }

    /// Operations that may be in flight; the reactor never pushes more.
    fn depth(&self) -> u32;

    /// The stack that the thread needs which calls it.
    fn stack(&self) -> Stack {
        Stack::Engine
    }

    /// For other threads.
    fn waker(&self) -> Arc<dyn Wake>;

    /// Called once, first of all, on the thread that makes every later call.
    fn start(&mut self) -> Result<()> {
        Ok(())
    }

    /// Told whom to have called when a file that the engine keeps a reference to is closed.
    fn set_close_watcher(&mut self, _watcher: std::sync::Weak<dyn CloseWatcher>) {}

    /// Queues an operation; it starts with the next [`Io::wait`]. The caller (the reactor alone) keeps the
    /// file open and the memory valid until the operation's end has been handed out by [`Io::wait`].
    fn push(&mut self, op: &Op<'_>);

    /// Starts what was pushed, waits as told, and appends what has ended. An error means that the engine
    /// is broken and will not hand out further ends.
    fn wait(&mut self, patience: Patience, ended: &mut Vec<Ended>) -> Result<()>;

    /// Registers memory that stays valid until [`Io::unregister_memory`] or the engine's drop.
    fn register_memory(&mut self, _memory: DmaSlice) -> Registration {
        Registration::NotUsed
    }

    /// Undoes a registration; no operation uses the memory any more. Whether there was one.
    fn unregister_memory(&mut self, _base: *mut u8) -> bool {
        false
    }

    /// The file is closed: drops what the engine keeps of it.
    fn forget_file(&mut self, _file: FileId) {}

    /// System calls made so far to start or await operations, for stats.
    fn system_calls(&self) -> u64;
}

//! Threads of the I/O rooms: named, with every signal blocked (handlers belong to the host program's own
//! threads), pinned where configured, and known to be reactors where they are.

use std::cell::Cell;
use std::thread::JoinHandle;

use crate::error::{Error, ErrorKind, Result};

/// Stack of an I/O thread. They call shallow code and `done` callbacks; 512 KiB of address space is ample
/// and only touched pages cost memory.
const STACK_BYTES: usize = 512 << 10;

thread_local! {
    static IS_REACTOR: Cell<bool> = const { Cell::new(false) };
}

/// Whether the current thread is a reactor, which must not block.
pub fn is_reactor() -> bool {
    IS_REACTOR.with(Cell::get)
}

/// Marks the current thread as a reactor.
pub fn mark_reactor() {
    IS_REACTOR.with(|mark| mark.set(true));
}

/// Starts a thread called `name` (the kernel keeps 15 bytes of it) with all signals blocked.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let blocked = SignalsBlocked::new();
    let started = std::thread::Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(body);
    drop(blocked);
    started.map_err(|error| {
        Error::new(
            ErrorKind::OutOfMemory,
            format!("cannot start thread {name}: {error}; raise `ulimit -u` or the pids limit of the container"),
        )
    })
}

/// Pins the current thread to one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(Error::new(ErrorKind::InvalidConfig, format!("there is no CPU {cpu}")));
    }
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(|errno| {
        Error::new(
            ErrorKind::InvalidConfig,
            format!("cannot pin an I/O thread to CPU {cpu}: {errno}; fix cpu_affinity_cores"),
        )
    })
}

/// Blocks all signals of this thread while it lives: threads inherit the mask of their maker.
struct SignalsBlocked {
    before: libc::sigset_t,
}

impl SignalsBlocked {
    fn new() -> Self {
        // SAFETY: both sets are plain memory that outlives the calls; sigfillset initialises `all`, and
        // pthread_sigmask, which cannot fail with SIG_SETMASK and valid pointers, initialises `before`.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self { before }
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: `before` was initialised by `new` on this thread (the type is not Send by use).
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

//! Threads of the engine: named, with every signal blocked (handlers belong to the host program's own
//! threads), pinned where configured, and known to be reactors where they are.

use std::cell::{Cell, RefCell};
use std::thread::JoinHandle;

use crate::error::{Error, ErrorKind, Result};

/// What an I/O thread calls, which decides how large its stack is. Only touched pages cost memory, but a stack of 2 MiB
/// may be given one huge page, so that none is larger than it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stack {
    /// Shallow code of the engine and `done` callbacks: 512 KiB are ample.
    Engine,
    /// A vendor's library as well, which was written for what `std` and most programs give their threads: 2 MiB.
    Vendor,
}

impl Stack {
    fn bytes(self) -> usize {
        match self {
            Stack::Engine => 512 << 10,
            Stack::Vendor => 2 << 20,
        }
    }
}

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

/// What is left for the end of a batch.
struct Deferred {
    /// Whom it wakes, where once is enough for all that the batch brings. These come first: others may take
    /// milliseconds.
    key: Option<usize>,
    job: Box<dyn FnOnce()>,
}

thread_local! {
    /// How many batches the current thread is in, one inside the other.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// What it left for their end. Gone before the thread is: a program may close a store in a handler of
    /// `atexit` or in the destructor of a static object.
    static DEFERRED: RefCell<Vec<Deferred>> = const { RefCell::new(Vec::new()) };
}

/// Runs `body`, which does many small things of a kind: the ends of all transfers that a ring brought, the
/// units of a task. What each leaves with [`after_batch`] runs once all are done, so that another thread
/// is woken once and not for each.
pub fn batch<T>(body: impl FnOnce() -> T) -> T {
    /// Ends the batch also when `body` panics.
    struct Batch;
    impl Drop for Batch {
        fn drop(&mut self) {
            let depth = DEPTH.get() - 1;
            DEPTH.set(depth);
            if depth > 0 {
                return;
            }
            loop {
                // Taken out one list at a time: what runs may begin batches of its own.
                let deferred = DEFERRED.take();
                if deferred.is_empty() {
                    return;
                }
                let (wakes, jobs): (Vec<_>, Vec<_>) =
                    deferred.into_iter().partition(|deferred| deferred.key.is_some());
                wakes.into_iter().chain(jobs).for_each(|deferred| (deferred.job)());
            }
        }
    }
    if DEFERRED.try_with(|_| ()).is_err() {
        return body(); // Nothing can be left for later: each thing is done at once.
    }
    DEPTH.set(DEPTH.get() + 1);
    let _batch = Batch;
    body()
}

/// Whether the current thread is in a batch.
pub fn in_batch() -> bool {
    DEPTH.get() > 0
}

/// Runs `job` on this thread when its batch ends; at once where it is in none.
pub fn after_batch(job: impl FnOnce() + 'static) {
    if in_batch() {
        DEFERRED.with_borrow_mut(|all| all.push(Deferred { key: None, job: Box::new(job) }));
    } else {
        job();
    }
}

/// Wakes somebody as the batch of this thread ends, before what it left with [`after_batch`], and once for all calls
/// with the same key: the address of something that `job` keeps alive.
pub fn after_batch_once(key: usize, job: impl FnOnce() + 'static) {
    if !in_batch() {
        return job();
    }
    DEFERRED.with_borrow_mut(|all| {
        if all.iter().all(|other| other.key != Some(key)) {
            all.push(Deferred { key: Some(key), job: Box::new(job) });
        }
    });
}

/// Starts a thread called `name` (the kernel keeps 15 bytes of it) with all signals blocked.
pub fn spawn(
    name: &str,
    stack: Stack,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>> {
    let builder = std::thread::Builder::new().name(name.into()).stack_size(stack.bytes());
    quietly(|| builder.spawn(body)).map_err(|error| {
        Error::new(
            ErrorKind::OutOfMemory,
            format!("cannot start thread {name}: {error}; raise `ulimit -u` or the pids limit of the container"),
        )
    })
}

/// Runs `start`, which starts threads, with all signals blocked on this thread: theirs stay blocked. Every
/// thread of the engine starts here, since a handler of the host program that ran on one of them would find
/// a small stack, and hold up transfers.
pub fn quietly<T>(start: impl FnOnce() -> T) -> T {
    let _blocked = SignalsBlocked::new();
    start()
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
        // SAFETY: `before` was initialised by `new` on this thread: `quietly` keeps the value on its stack.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    /// What is left for the end runs once, after the outermost batch, in order, also after a panic.
    #[test]
    fn deferred_jobs_run_after_the_outermost_batch() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let note = |what: &'static str| {
            let log = Rc::clone(&log);
            move || log.borrow_mut().push(what)
        };
        after_batch(note("at once"));
        batch(|| {
            after_batch(note("first"));
            batch(|| after_batch(note("second")));
            assert_eq!(*log.borrow(), ["at once"]);
        });
        assert_eq!(*log.borrow(), ["at once", "first", "second"]);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            batch(|| {
                after_batch(note("third"));
                panic!("on purpose");
            })
        }));
        assert!(panicked.is_err() && !in_batch());
        assert_eq!(log.borrow().last(), Some(&"third"));
    }

    /// What one wake-up is enough for is done once in a batch, and again in the next.
    #[test]
    fn one_job_of_a_key_runs_for_a_batch() {
        let count = Rc::new(Cell::new(0));
        let add = |key| {
            let count = Rc::clone(&count);
            after_batch_once(key, move || count.set(count.get() + 1));
        };
        batch(|| {
            (0..3).for_each(|_| add(1));
            add(2);
            assert_eq!(count.get(), 0);
        });
        assert_eq!(count.get(), 2);
        batch(|| add(1));
        add(1);
        assert_eq!(count.get(), 4);
    }

    /// Who is to be woken waited for what was left before it, such as the copy of a part of 4 MiB.
    #[test]
    fn wake_ups_go_before_work() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let note = |name| {
            let log = Rc::clone(&log);
            move || log.borrow_mut().push(name)
        };
        batch(|| {
            after_batch(note("work"));
            after_batch_once(1, note("wake-up"));
        });
        assert_eq!(*log.borrow(), ["wake-up", "work"]);
    }
}

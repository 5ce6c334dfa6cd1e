//! The `io_uring` engine: one ring, owned by one thread, kept full and entered once a batch.
//!
//! Owns the ring, its registered buffers and files, and the eventfd that wakes it. Submission and
//! waiting are one system call. It knows nothing of requests: an operation's file and memory are kept
//! valid by the reactor until the operation's completion has been handed out.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};

use super::engine::{Ended, Io, Op, Patience, Registration, Token, Wake};
use super::uring_setup::{FLAG_SETS, build_ring};
use super::uring_tables::{BufferTable, FileChoice, FileTable};
use super::{Class, CloseWatcher, DmaSlice, FileId, Operation};
use crate::error::{Error, ErrorKind, Result};

/// Slots for registered files: segments being read and written, and manifests that are tailed.
const FILE_SLOTS: u32 = 1024;
/// Slots for registered memory, of 1 GiB each (the kernel allows 16384).
const BUFFER_SLOTS: u16 = 4096;
/// `user_data` of the poll on the wake-up eventfd; no token is that large.
const WAKE_DATA: u64 = u64::MAX;
/// Submission slots beside those of operations: the poll.
const SPARE_SLOTS: u32 = 1;
/// Deepest ring: tokens, and the kernel's limit for the doubled completion queue.
pub const DEPTH_MAX: u32 = 4096;
/// While the kernel is out of memory for requests, submission is tried again after this time.
const STARVED_PAUSE: Duration = Duration::from_millis(1);
/// How often in a row, before the ring counts as broken.
const STARVED_TRIES_MAX: u32 = 10_000;
/// Kernel threads that may carry operations which the file system cannot start without blocking (all of
/// them on NFS). The kernel's default, four a CPU, would be the depth of such a mount.
const WORKERS_MAX: u32 = 64;

/// A ring with its tables.
pub struct Uring {
    ring: IoUring,
    depth: u32,
    flags: &'static str,
    waker: Arc<EventWaker>,
    /// Whether the multishot poll on the waker's eventfd is armed.
    wake_armed: bool,
    files: Option<FileTable>,
    /// Told to files that are registered.
    watcher: Option<Weak<dyn CloseWatcher>>,
    /// For each token, the file slot its operation uses.
    file_of_token: Vec<Option<u32>>,
    buffers: Option<BufferTable>,
    in_flight: u32,
    /// Times in a row that the kernel had no memory for what was submitted.
    starved: u32,
    system_calls: u64,
}

/// Wakes a ring through an eventfd that the ring polls: one `write`, and only while the ring is parked.
struct EventWaker(OwnedFd);

impl Wake for EventWaker {
    fn wake(&self) {
        // The counter overflows after 2^64 wakes; EAGAIN would still leave it readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Uring {
    /// Makes a ring for `depth` operations in flight. The error's errno tells why the kernel refuses.
    pub fn new(depth: u32) -> Result<Self> {
        Self::with_flags_from(0, depth)
    }

    /// As [`Uring::new`], without the best flag sets.
    pub(super) fn with_flags_from(skipped: usize, depth: u32) -> Result<Self> {
        let depth = depth.clamp(1, DEPTH_MAX);
        let (ring, flags) = build_ring(&FLAG_SETS[skipped..], depth + SPARE_SLOTS)?;
        let params = ring.params();
        if !(params.is_feature_ext_arg() && params.is_feature_nodrop()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "this kernel's io_uring cannot wait with a timeout; Linux 5.11 or newer is needed",
            ));
        }
        let waker = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::os("eventfd", None, None, errno.raw_os_error()))?;
        let submitter = ring.submitter();
        // Both tables are refinements: without them operations name descriptors and addresses.
        let files = submitter.register_files_sparse(FILE_SLOTS).ok();
        let buffers = submitter.register_buffers_sparse(BUFFER_SLOTS.into()).ok();
        Ok(Self {
            depth,
            flags,
            waker: Arc::new(EventWaker(waker)),
            wake_armed: false,
            files: files.map(|()| FileTable::new(FILE_SLOTS)),
            watcher: None,
            file_of_token: vec![None; depth as usize],
            buffers: buffers.map(|()| BufferTable::new(BUFFER_SLOTS)),
            in_flight: 0,
            starved: 0,
            system_calls: 0,
            ring,
        })
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        // SAFETY: file and memory of an operation stay valid until its completion (contract of
        // `Io::push`); the poll names an eventfd that lives as long as the ring.
        let pushed = unsafe { self.ring.submission().push(entry) };
        // The ring has a slot for each operation that may be in flight, and for the poll.
        pushed.expect("more operations were pushed than the ring's depth allows");
    }

    fn arm_wake(&mut self) {
        if self.wake_armed {
            return;
        }
        let eventfd = Fd(self.waker.0.as_raw_fd());
        let poll = opcode::PollAdd::new(eventfd, libc::POLLIN as u32).multi(true);
        self.push_entry(&poll.build().user_data(WAKE_DATA));
        self.wake_armed = true;
    }

    fn slot_for(&mut self, op: &Op<'_>) -> Option<u32> {
        let files = self.files.as_mut()?;
        match files.choose(op.file.id()) {
            FileChoice::Plain => None,
            FileChoice::Registered(slot) => Some(slot),
            FileChoice::Register(slot) => {
                let raw = [op.file.raw()];
                if self.ring.submitter().register_files_update(slot, &raw).is_err() {
                    files.remove(op.file.id());
                    return None;
                }
                if let Some(watcher) = &self.watcher {
                    op.file.watch(watcher.clone());
                }
                Some(slot)
            }
        }
    }

    /// Moves what has completed to `ended`.
    fn reap(&mut self, ended: &mut Vec<Ended>) {
        let mut completions = self.ring.completion();
        completions.sync();
        for completion in &mut completions {
            if completion.user_data() == WAKE_DATA {
                self.wake_armed &= cqueue::more(completion.flags());
                continue;
            }
            let token = completion.user_data() as Token;
            self.in_flight -= 1;
            if let (Some(slot), Some(files)) =
                (self.file_of_token[token as usize].take(), self.files.as_mut())
            {
                files.release(slot);
            }
            ended.push(Ended { token, result: completion.result() });
        }
    }

    /// One `io_uring_enter`: submits all that is queued and waits.
    fn enter(&mut self, patience: Patience) -> std::io::Result<()> {
        let queued = {
            let mut submission = self.ring.submission();
            submission.sync();
            submission.len()
        };
        let params = self.ring.params();
        let mut flags = EnterFlags::EXT_ARG | EnterFlags::GETEVENTS;
        if self.in_flight == 0 && params.is_feature_no_iowait() {
            // Parked on the wake-up alone: the CPU is idle, not waiting for a drive.
            flags |= EnterFlags::NO_IOWAIT;
        }
        let timeout = patience.until.map(|until| until.saturating_duration_since(Instant::now()));
        let timespec = Timespec::from(timeout.unwrap_or_default());
        let mut arguments = SubmitArgs::new();
        if timeout.is_some() {
            arguments = arguments.timespec(&timespec);
        }
        let mut at_least = patience.at_least;
        if at_least > 1 {
            if params.is_feature_min_timeout() {
                arguments = arguments.min_wait_usec(patience.gather.as_micros() as u32);
            } else {
                at_least = 1;
            }
        }
        self.system_calls += 1;
        let submitter = self.ring.submitter();
        // SAFETY: EXT_ARG announces a `SubmitArgs`, which lives, with the timespec it points at, until the
        // call returns.
        let entered = unsafe {
            submitter.enter(queued as u32, at_least as u32, flags.bits(), Some(&arguments))
        };
        entered.map(drop)
    }
}

/// I/O priority of a class: best effort, level 0 (first) to 7 (last). 0 as a whole would be "none",
/// which counts as level 4 (ioprio_set(2)).
fn priority(class: Class) -> u16 {
    const BEST_EFFORT: u16 = 2 << 13;
    BEST_EFFORT
        | match class {
            Class::Load => 0,
            Class::Save => 4,
            Class::Background => 7,
        }
}

impl Io for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn features(&self) -> Vec<String> {
        let params = self.ring.params();
        let mut features = vec![format!("ring flags {}", self.flags)];
        let mut add = |present: bool, name: &str| {
            if present {
                features.push(name.into());
            }
        };
        add(self.files.is_some(), "registered files");
        add(self.buffers.is_some(), "registered buffers");
        add(params.is_feature_min_timeout(), "batched waits");
        features
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.waker) as Arc<dyn Wake>
    }

    fn start(&mut self) -> Result<()> {
        if self.ring.params().is_setup_single_issuer() {
            self.ring
                .submitter()
                .register_enable_rings()
                .map_err(|error| Error::io("io_uring_register", None, &error))?;
        }
        // Bounded workers; 0 leaves the others as they are. Refused before 5.15, where the default has to do.
        let mut workers = [self.depth.min(WORKERS_MAX), 0];
        let _ = self.ring.submitter().register_iowq_max_workers(&mut workers);
        Ok(())
    }

    fn push(&mut self, op: &Op<'_>) {
        let slot = self.slot_for(op);
        self.file_of_token[op.token as usize] = slot;
        let memory = op.memory;
        let buffer = self.buffers.as_ref().and_then(|buffers| buffers.find(memory));
        // The reactor's operations are at most `io_size_kb` long, far below 4 GiB.
        let length = memory.length as u32;
        let priority = priority(op.class);
        macro_rules! entry {
            ($file:expr) => {
                match (op.operation, buffer) {
                    (Operation::Read, Some(slot)) => {
                        opcode::ReadFixed::new($file, memory.pointer, length, slot)
                            .offset(op.offset)
                            .ioprio(priority)
                            .build()
                    }
                    (Operation::Read, None) => opcode::Read::new($file, memory.pointer, length)
                        .offset(op.offset)
                        .ioprio(priority)
                        .build(),
                    (Operation::Write, Some(slot)) => {
                        opcode::WriteFixed::new($file, memory.pointer, length, slot)
                            .offset(op.offset)
                            .ioprio(priority)
                            .build()
                    }
                    (Operation::Write, None) => opcode::Write::new($file, memory.pointer, length)
                        .offset(op.offset)
                        .ioprio(priority)
                        .build(),
                }
            };
        }
        let entry = match slot {
            Some(slot) => entry!(Fixed(slot)),
            None => entry!(Fd(op.file.raw())),
        };
        self.push_entry(&entry.user_data(u64::from(op.token)));
        self.in_flight += 1;
    }

    fn wait(&mut self, mut patience: Patience, ended: &mut Vec<Ended>) -> Result<()> {
        let before = ended.len();
        self.arm_wake();
        if patience.at_least > 0 && !self.ring.completion().is_empty() {
            patience.at_least = 0;
        }
        let entered = self.enter(patience);
        self.reap(ended);
        match entered.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)) {
            Ok(()) | Err(libc::ETIME | libc::EINTR) => self.starved = 0,
            // EBUSY: completions overflowed and had to be reaped first. EAGAIN: no memory for requests,
            // until some have ended. Either way what is queued stays queued.
            Err(libc::EBUSY | libc::EAGAIN) if ended.len() > before => self.starved = 0,
            Err(errno @ (libc::EBUSY | libc::EAGAIN)) => {
                self.starved += 1;
                if self.starved > STARVED_TRIES_MAX {
                    return Err(Error::os("io_uring_enter", None, None, errno));
                }
                std::thread::sleep(STARVED_PAUSE);
            }
            Err(errno) => return Err(Error::os("io_uring_enter", None, None, errno)),
        }
        Ok(())
    }

    fn register_memory(&mut self, memory: DmaSlice) -> Registration {
        let Some(buffers) = self.buffers.as_mut() else {
            return Registration::Refused(libc::ENOSYS);
        };
        let Some(chunks) = buffers.reserve(memory) else {
            return Registration::Refused(libc::ENOSPC);
        };
        let mut registered = Vec::with_capacity(chunks.len());
        let mut refused = None;
        for &(slot, chunk) in &chunks {
            let vector = libc::iovec { iov_base: chunk.pointer.cast(), iov_len: chunk.length };
            // SAFETY: the memory stays valid until it is unregistered (contract of `register_memory`).
            let update = unsafe {
                self.ring.submitter().register_buffers_update(slot.into(), &[vector], None)
            };
            match update {
                Ok(()) => registered.push(slot),
                Err(error) => {
                    refused = Some(error.raw_os_error().unwrap_or(libc::ENOMEM));
                    break;
                }
            }
        }
        let Some(errno) = refused else {
            buffers.insert(memory, registered);
            return Registration::Fixed;
        };
        // All or nothing: half-registered memory would make costs depend on addresses.
        for slot in registered {
            clear_buffer(&self.ring, slot);
        }
        buffers.give_back(chunks.into_iter().map(|(slot, _)| slot));
        Registration::Refused(errno)
    }

    fn unregister_memory(&mut self, base: *mut u8) -> bool {
        let Some(buffers) = self.buffers.as_mut() else { return false };
        let Some(slots) = buffers.remove(base) else { return false };
        for &slot in &slots {
            clear_buffer(&self.ring, slot);
        }
        buffers.give_back(slots);
        true
    }

    fn forget_file(&mut self, file: FileId) {
        let Some(slot) = self.files.as_mut().and_then(|files| files.remove(file)) else { return };
        // -1 empties a slot; the kernel keeps the file for operations that still use it.
        let _ = self.ring.submitter().register_files_update(slot, &[-1]);
    }

    fn set_close_watcher(&mut self, watcher: Weak<dyn CloseWatcher>) {
        self.watcher = Some(watcher);
    }

    fn system_calls(&self) -> u64 {
        self.system_calls
    }
}

/// Empties a buffer slot; the kernel keeps the pages for operations that still use them.
fn clear_buffer(ring: &IoUring, slot: u16) {
    let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    // SAFETY: an empty vector names no memory.
    let _ = unsafe { ring.submitter().register_buffers_update(slot.into(), &[empty], None) };
}

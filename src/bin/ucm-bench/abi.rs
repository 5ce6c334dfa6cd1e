//! The store as a C program sees it: handles of `ucm.h` with Rust lifetimes around them.
//!
//! Everything that is measured goes through these functions, so queues, tasks and copies are those of a
//! C or C++ caller. Knows no workload.

use std::ffi::{CString, c_char, c_void};
use std::ptr;
use std::time::Duration;

/// The functions of `ucm.h`, flat as a C program sees them.
mod capi {
    pub use ucm::capi::{
        batch::*, completion::*, hash::*, lookup::*, memory::*, options::*, stats::*, status::*,
        store::*, task::*,
    };
}

/// A status other than OK, with the message the library gave for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Number of the status.
    pub status: i32,
    /// The library's message.
    pub message: String,
}

/// `UCM_STATUS_PENDING`.
pub const PENDING: i32 = 1;
/// `UCM_STATUS_BUSY`.
pub const BUSY: i32 = 10;
/// `UCM_STAGE_COPIED`.
pub const COPIED: u32 = 1;
/// `UCM_STAGE_PERSISTED`.
pub const PERSISTED: u32 = 2;
/// `UCM_STAGE_LOADED`.
pub const LOADED: u32 = 3;
/// `UCM_STAGE_RELEASED`.
pub const RELEASED: u32 = 4;

/// Completions that one reap call takes.
const REAPED_AT_ONCE: usize = 64;

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", status_name(self.status), self.message)
    }
}

/// Name of a status, without its prefix.
pub fn status_name(status: i32) -> String {
    // SAFETY: the function returns a static NUL-terminated string for any number.
    let name = unsafe { std::ffi::CStr::from_ptr(capi::ucm_status_name(status)) };
    name.to_string_lossy().trim_start_matches("UCM_STATUS_").to_owned()
}

/// Version text of the library.
pub fn version() -> String {
    // SAFETY: returns a static NUL-terminated string.
    unsafe { std::ffi::CStr::from_ptr(capi::ucm_version()) }.to_string_lossy().into_owned()
}

fn last_error() -> String {
    let mut buffer = vec![0_u8; 1024];
    // SAFETY: the capacity is the buffer's length.
    let length =
        unsafe { capi::ucm_last_error(buffer.as_mut_ptr().cast::<c_char>(), buffer.len()) };
    buffer.truncate(length.min(buffer.len() - 1));
    String::from_utf8_lossy(&buffer).into_owned()
}

fn check(status: i32) -> Result<(), Failure> {
    if status == 0 { Ok(()) } else { Err(Failure { status, message: last_error() }) }
}

/// An open store.
pub struct Store(*mut capi::ucm_store_t);

// SAFETY: every function of the ABI is thread-safe; the handle is a token that is freed once, in drop.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

/// What one submit call transfers. The addresses are `blocks.len()` times slices of a shard, row-major.
pub struct Batch<'a> {
    /// Block ids.
    pub blocks: &'a [[u8; 16]],
    /// Shard of each entry; empty: all 0.
    pub shards: &'a [u32],
    /// Where the slices of each entry lie.
    pub addresses: &'a [*mut c_void],
    /// Whether the end of the task makes the completion descriptor readable.
    pub notify: bool,
}

/// Save or load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `ucm_save`.
    Save,
    /// `ucm_load`.
    Load,
}

impl Store {
    /// No store: for workloads that need none.
    pub fn none() -> Self {
        Self(ptr::null_mut())
    }

    /// Opens a store with these options.
    pub fn open(options: &[(String, String)]) -> Result<Self, Failure> {
        let mut handle = ptr::null_mut();
        // SAFETY: the out pointer is a local.
        check(unsafe { capi::ucm_options_new(&mut handle) })?;
        let opened = Self::open_with(handle, options);
        // SAFETY: the handle came from ucm_options_new and is freed once.
        unsafe { capi::ucm_options_free(handle) };
        opened
    }

    fn open_with(
        handle: *mut capi::ucm_options_t,
        options: &[(String, String)],
    ) -> Result<Self, Failure> {
        let text = |text: &str| {
            CString::new(text)
                .map_err(|_| Failure { status: 2, message: "a NUL in an option".into() })
        };
        for (key, value) in options {
            let (key, value) = (text(key)?, text(value)?);
            // SAFETY: a live handle and NUL-terminated strings.
            check(unsafe { capi::ucm_options_set(handle, key.as_ptr(), value.as_ptr()) })?;
        }
        let mut store = ptr::null_mut();
        // SAFETY: a live handle; the out pointer is a local.
        check(unsafe { capi::ucm_store_open(handle, &mut store) })?;
        Ok(Self(store))
    }

    fn ids(blocks: &[[u8; 16]]) -> *const capi::ucm_block_id_t {
        // The struct is 16 bytes without alignment, as ucm.h declares it.
        blocks.as_ptr().cast()
    }

    /// Presence of each block.
    pub fn lookup(&self, blocks: &[[u8; 16]], found: &mut [u8]) -> Result<(), Failure> {
        assert_eq!(blocks.len(), found.len());
        // SAFETY: both arrays have `blocks.len()` elements.
        check(unsafe {
            capi::ucm_lookup(self.0, Self::ids(blocks), blocks.len(), found.as_mut_ptr())
        })
    }

    /// Length of the longest present prefix.
    pub fn lookup_prefix(&self, blocks: &[[u8; 16]]) -> Result<usize, Failure> {
        let mut hits = 0;
        // SAFETY: the array has `blocks.len()` elements; the out pointer is a local.
        check(unsafe {
            capi::ucm_lookup_prefix(self.0, Self::ids(blocks), blocks.len(), &mut hits)
        })?;
        Ok(hits)
    }

    /// Submits a task.
    ///
    /// # Safety
    /// The addressed memory stays valid, and for loads unread and unwritten, until the task is RELEASED.
    pub unsafe fn submit(&self, direction: Direction, batch: &Batch<'_>) -> Result<Task, Failure> {
        let raw = capi::ucm_batch_t {
            struct_size: size_of::<capi::ucm_batch_t>(),
            blocks: Self::ids(batch.blocks),
            shards: if batch.shards.is_empty() { ptr::null() } else { batch.shards.as_ptr() },
            addresses: batch.addresses.as_ptr(),
            count: batch.blocks.len(),
            wait_event: ptr::null_mut(),
            flags: u32::from(batch.notify),
            user_data: 0,
            timeout_ms: 0,
        };
        let mut task = ptr::null_mut();
        // SAFETY: the arrays have the lengths that `count` and the geometry imply (asserted by the
        // caller that built them); the memory is vouched for by this function's contract.
        check(unsafe {
            match direction {
                Direction::Save => capi::ucm_save(self.0, &raw, &mut task),
                Direction::Load => capi::ucm_load(self.0, &raw, &mut task),
            }
        })?;
        Ok(Task { handle: task, entries: batch.blocks.len() })
    }

    /// Sleeps until a task that asked to be notified has ended, at most this long, and empties the queue of
    /// such tasks.
    pub fn sleep_for_completions(&self, at_most: Duration) -> Result<(), Failure> {
        // SAFETY: a live handle.
        let descriptor = unsafe { capi::ucm_store_completion_fd(self.0) };
        let mut poll = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
        let timeout = libc::timespec {
            tv_sec: at_most.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(at_most.subsec_nanos() as i32),
        };
        // SAFETY: one pollfd and one timespec, both locals; no signal mask.
        if unsafe { libc::ppoll(&mut poll, 1, &timeout, ptr::null()) } <= 0 {
            return Ok(());
        }
        let mut count = REAPED_AT_ONCE;
        while count == REAPED_AT_ONCE {
            // SAFETY: an all-zero completion (null handle, numbers) is a value of the struct.
            let mut reaped: [capi::ucm_completion_t; REAPED_AT_ONCE] =
                unsafe { std::mem::zeroed() };
            // SAFETY: the capacity is the array's length; the out pointer is a local.
            check(unsafe {
                capi::ucm_store_reap(self.0, reaped.as_mut_ptr(), REAPED_AT_ONCE, &mut count)
            })?;
        }
        Ok(())
    }

    /// Brings the index up to date.
    pub fn refresh(&self) -> Result<(), Failure> {
        // SAFETY: a live handle.
        check(unsafe { capi::ucm_store_refresh(self.0, 30_000) })
    }

    /// Registers memory.
    ///
    /// # Safety
    /// The memory stays mapped until `unregister` or the store's drop.
    pub unsafe fn register(&self, base: *mut u8, length: usize) -> Result<(), Failure> {
        // SAFETY: this function's contract.
        check(unsafe { capi::ucm_memory_register(self.0, base.cast(), length) })
    }

    /// Ids of the full blocks of `tokens`.
    pub fn hash(
        &self,
        tokens: &[u32],
        block_tokens: u32,
        ids: &mut [[u8; 16]],
    ) -> Result<usize, Failure> {
        let mut written = 0;
        // SAFETY: the arrays have the lengths that are passed with them; no parent and no extra bytes.
        check(unsafe {
            capi::ucm_hash_tokens(
                self.0,
                tokens.as_ptr(),
                tokens.len(),
                block_tokens,
                ptr::null(),
                ptr::null(),
                0,
                ids.as_mut_ptr().cast(),
                ids.len(),
                &mut written,
            )
        })?;
        Ok(written)
    }

    /// The store's metrics, as Prometheus text.
    pub fn metrics(&self) -> Result<String, Failure> {
        let mut buffer = vec![0_u8; 64 << 10];
        loop {
            let mut length = 0;
            // SAFETY: the capacity is the buffer's length; the out pointer is a local.
            check(unsafe {
                capi::ucm_store_metrics(
                    self.0,
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    &mut length,
                )
            })?;
            if length < buffer.len() {
                buffer.truncate(length);
                return Ok(String::from_utf8_lossy(&buffer).into_owned());
            }
            buffer.resize(length + 1, 0);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle came from ucm_store_open and is closed once; null is allowed.
        unsafe { capi::ucm_store_close(self.0) };
    }
}

/// A submitted task.
pub struct Task {
    handle: *mut capi::ucm_task_t,
    entries: usize,
}

// SAFETY: as for `Store`.
unsafe impl Send for Task {}

impl Task {
    /// Status of a stage now: 0, `PENDING`, or the first error.
    pub fn poll(&self, stage: u32) -> i32 {
        // SAFETY: a live handle.
        unsafe { capi::ucm_task_poll(self.handle, stage) }
    }

    /// Waits at most this long.
    pub fn wait(&self, stage: u32, timeout_ms: i64) -> i32 {
        // SAFETY: a live handle.
        unsafe { capi::ucm_task_wait(self.handle, stage, timeout_ms) }
    }

    /// Status of each entry, once the task is done.
    pub fn statuses(&self) -> Result<Vec<i32>, Failure> {
        let mut statuses = vec![0; self.entries];
        // SAFETY: the array has `entries` elements, the count of the batch.
        check(unsafe {
            capi::ucm_task_statuses(self.handle, statuses.as_mut_ptr(), statuses.len())
        })?;
        Ok(statuses)
    }

    /// Blocks of the batch.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// The task's message.
    pub fn error(&self) -> String {
        let mut buffer = vec![0_u8; 1024];
        // SAFETY: the capacity is the buffer's length.
        let length =
            unsafe { capi::ucm_task_error(self.handle, buffer.as_mut_ptr().cast(), buffer.len()) };
        buffer.truncate(length.min(buffer.len() - 1));
        String::from_utf8_lossy(&buffer).into_owned()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // SAFETY: the handle came from a submit call and is freed once; work goes on without it.
        unsafe { capi::ucm_task_free(self.handle) };
    }
}

//! `ucm_task_t`: poll, wait, statuses, cancel, free.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::boundary::{self, enter, enter_with};
use super::handles::{Kind, Registry, Token};
use super::pointers::{UCM_COUNT_MAX, invalid, slice_mut};
use super::status::{UCM_STATUS_OK, UCM_STATUS_PENDING, status_of, ucm_status_t};
use super::store::store_of;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;
use crate::task::{Progress, Stage, Task};

/// One submitted batch. An opaque handle.
pub struct ucm_task(());

/// @since 0.1
pub type ucm_task_t = ucm_task;

/// Stage of a save: the device memory is free again, and this process finds the blocks.
pub const UCM_STAGE_COPIED: u32 = 1;
/// Stage of a save: any process can load the blocks. With layer-wise shards it comes when all shards of
/// the part are in.
pub const UCM_STAGE_PERSISTED: u32 = 2;
/// Stage of a load: the data is in place and visible to the device. Stage of a hold: every block is read,
/// verified and held.
pub const UCM_STAGE_LOADED: u32 = 3;
/// Stage of every task: engine, kernel and device never touch the batch's memory again. UCM_STATUS_TIMEOUT
/// and UCM_STATUS_CANCELLED do not imply it.
pub const UCM_STAGE_RELEASED: u32 = 4;
/// Stage of a save and of a load: every copy is in a queue of the device, done, or will never be made, so that
/// ucm_task_stream_wait does not block. It says nothing of how entries end.
pub const UCM_STAGE_ENQUEUED: u32 = 5;

/// A task's handle exists before the task, because a completion may be reaped before submit returns. `None`:
/// there will be no task.
type Cell = Arc<OnceLock<Option<Arc<Task>>>>;

#[derive(Clone)]
struct Entry {
    task: Cell,
    store: Token,
}

impl Entry {
    /// The task. A thread that learnt of it by reaping may be here before the thread that submitted it has
    /// come back: it waits for that moment.
    fn wait(&self) -> Result<&Arc<Task>> {
        let none =
            || Error::new(ErrorKind::Closed, "the task handle was closed: its submit failed");
        self.task.wait().as_ref().ok_or_else(none)
    }
}

static TASKS: Registry<Entry> = Registry::new(Kind::Task);

/// A handle whose task is about to be submitted. Dropped unfilled, the handle ends.
pub(super) struct Reserved {
    token: Token,
    task: Option<Cell>,
}

impl Reserved {
    /// Makes the handle.
    pub(super) fn new(store: Token) -> Result<Self> {
        let task = Arc::new(OnceLock::new());
        let token = TASKS.insert(Entry { task: Arc::clone(&task), store })?;
        Ok(Self { token, task: Some(task) })
    }

    /// The handle to be.
    pub(super) fn token(&self) -> Token {
        self.token
    }

    /// Puts the task behind its handle.
    pub(super) fn fill(mut self, task: Arc<Task>) -> Token {
        if let Some(cell) = self.task.take() {
            let _ = cell.set(Some(task));
        }
        self.token
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(cell) = self.task.take() {
            let _ = TASKS.remove(self.token);
            // Who guessed the handle meanwhile waits no longer.
            let _ = cell.set(None);
        }
    }
}

/// The task behind a handle.
fn task_of(handle: *const ucm_task_t) -> Result<Arc<Task>> {
    TASKS.get(Token::from_pointer(handle))?.wait().cloned()
}

/// The store that a task was submitted to.
fn store_of_task(handle: *const ucm_task_t) -> Result<Arc<Store>> {
    store_of(TASKS.get(Token::from_pointer(handle))?.store.to_pointer())
}

/// Ends the handles of all tasks of a store.
pub(super) fn end_tasks_of(store: Token) {
    drop(TASKS.remove_all(|entry| entry.store == store));
}

/// Whether a handle still stands for a task.
pub(super) fn is_live(task: Token) -> bool {
    TASKS.with(task, |_| ()).is_ok()
}

fn stage_of(stage: u32) -> Result<Stage> {
    match stage {
        UCM_STAGE_COPIED => Ok(Stage::Copied),
        UCM_STAGE_PERSISTED => Ok(Stage::Persisted),
        UCM_STAGE_LOADED => Ok(Stage::Loaded),
        UCM_STAGE_RELEASED => Ok(Stage::Released),
        UCM_STAGE_ENQUEUED => Ok(Stage::Enqueued),
        _ => Err(invalid(format!(
            "stage is {stage}; known are UCM_STAGE_COPIED 1, UCM_STAGE_PERSISTED 2, \
             UCM_STAGE_LOADED 3, UCM_STAGE_RELEASED 4 and UCM_STAGE_ENQUEUED 5"
        ))),
    }
}

fn answer(progress: Progress) -> Result<ucm_status_t> {
    match progress {
        Progress::Pending => Ok(UCM_STATUS_PENDING),
        Progress::Done => Ok(UCM_STATUS_OK),
        Progress::Failed(error) => Err(error),
    }
}

/// Tells whether a task has reached a stage.
///
/// Does not block.
///
/// @param task handle
/// @param stage UCM_STAGE_COPIED or UCM_STAGE_PERSISTED (saves), UCM_STAGE_LOADED (loads, holds),
///        UCM_STAGE_ENQUEUED (saves, loads), UCM_STAGE_RELEASED
/// @return UCM_STATUS_OK (every entry reached it), UCM_STATUS_PENDING (not yet), or
///         the first error among the entries, once every entry has reached the stage or failed:
///         UCM_STATUS_NOT_FOUND, UCM_STATUS_CORRUPT, UCM_STATUS_IO, UCM_STATUS_NO_SPACE, UCM_STATUS_TIMEOUT,
///         UCM_STATUS_BUSY, UCM_STATUS_CANCELLED, UCM_STATUS_DEVICE, UCM_STATUS_INTERNAL (ucm_task_statuses
///         tells them apart); at UCM_STAGE_ENQUEUED and UCM_STAGE_RELEASED only UCM_STATUS_OK and
///         UCM_STATUS_PENDING;
///         UCM_STATUS_INVALID_ARGUMENT (not a stage of such a task, no handle),
///         UCM_STATUS_CLOSED (the store was closed, the task freed)
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_task_poll(task: *mut ucm_task_t, stage: u32) -> ucm_status_t {
    enter_with(status_of, || {
        let task = task_of(task)?;
        answer(task.poll(stage_of(stage)?))
    })
}

/// Waits until a task has reached a stage or has failed. Never consumes the task.
///
/// Blocks, timeout_ms at most.
///
/// @param task handle
/// @param stage as in ucm_task_poll
/// @param timeout_ms the longest wait in milliseconds; 0: do not wait; < 0: no limit
/// @return as ucm_task_poll. UCM_STATUS_PENDING: this wait's own time is over.
///         UCM_STATUS_TIMEOUT: the task's deadline has passed
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_task_wait(
    task: *mut ucm_task_t,
    stage: u32,
    timeout_ms: i64,
) -> ucm_status_t {
    enter_with(status_of, || {
        let task = task_of(task)?;
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        answer(task.wait(stage_of(stage)?, timeout))
    })
}

/// Makes a device stream wait for the copies of a task.
///
/// Of a load: what is launched on the stream afterwards sees the data. Blocks the CPU until every entry is
/// verified and its copy enqueued; on the host device until the load is done. Returns the first error without
/// ordering anything.
///
/// Of a save: what is launched on the stream afterwards may overwrite the memory of every entry, while the
/// copies from it may still be under way. UCM_STATUS_OK says so of failed and cancelled entries too (how entries
/// end, ucm_task_poll tells). Blocks the CPU until UCM_STAGE_ENQUEUED: until each entry's copy is in a queue of the
/// device, behind the batch's wait_event, or its entry has ended. That is at once, unless entries wait for
/// room in the store's memory (as long as the task's deadline or ucm_task_cancel lets them), for an old index to be read
/// again, or for a copy to end that the device refused to queue. On the host device it is until UCM_STAGE_COPIED, or
/// until failed entries are no longer read. Any other answer orders nothing that could be relied on: wait for
/// UCM_STAGE_RELEASED then.
///
/// May be called again, for other streams too.
///
/// @param task handle of a load or a save
/// @param stream cudaStream_t or aclrtStream; NULL: the default stream. Ignored by the host device
/// @return UCM_STATUS_OK; of loads the errors of ucm_task_poll; UCM_STATUS_INVALID_ARGUMENT (the task is a
///         hold, the stream is being captured into a graph), UCM_STATUS_DEVICE, UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_task_stream_wait(
    task: *mut ucm_task_t,
    stream: *mut c_void,
) -> ucm_status_t {
    enter(|| {
        let (store, task) = (store_of_task(task)?, task_of(task)?);
        // SAFETY: the caller vouches for the stream.
        unsafe { store.stream_wait(&task, stream) }
    })
}

/// Tells how each entry of a task ended.
///
/// Does not block.
///
/// @param task handle
/// @param statuses receives count statuses, in the order of the batch; untouched unless the answer is UCM_STATUS_OK
/// @param count entries of the batch
/// @return UCM_STATUS_OK, UCM_STATUS_PENDING (entries are still under way), or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, misaligned, count is not the batch's, no handle),
///         UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_task_statuses(
    task: *mut ucm_task_t,
    statuses: *mut ucm_status_t,
    count: usize,
) -> ucm_status_t {
    enter_with(status_of, || {
        let task = task_of(task)?;
        if let Some(closed) = task.closed() {
            return Err(closed);
        }
        let entries = task.entry_count();
        if count != entries {
            return Err(invalid(format!("count is {count}; the batch has {entries} entries")));
        }
        // SAFETY: the caller vouches for the array; statuses are plain numbers.
        let statuses = unsafe { slice_mut("statuses", statuses, count, UCM_COUNT_MAX)? };
        let Some(results) = task.statuses() else {
            return Ok(UCM_STATUS_PENDING);
        };
        for (status, result) in statuses.iter_mut().zip(&results) {
            *status = result.as_ref().map_or_else(status_of, |()| UCM_STATUS_OK);
        }
        Ok(UCM_STATUS_OK)
    })
}

/// The message of a task's first error.
///
/// Does not block.
///
/// @param task handle
/// @param buffer receives the message, cut where it does not fit, always NUL-terminated; may be NULL
/// @param capacity bytes of buffer
/// @return bytes of the whole message without its NUL; 0 where no entry has failed. A handle that is not
///         live gives the message that says so
/// @since 0.1
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucm_task_error(
    task: *mut ucm_task_t,
    buffer: *mut c_char,
    capacity: usize,
) -> usize {
    let message = enter_with(ToString::to_string, || {
        Ok(task_of(task)?.error().map_or_else(String::new, |error| error.to_string()))
    });
    // SAFETY: the caller vouches for the buffer.
    unsafe { boundary::copy_text(&message, buffer, capacity) }
}

/// Cancels what has not begun. Entries that are not done end with UCM_STATUS_CANCELLED; memory that is
/// still in use is the caller's again at stage RELEASED. A save that goes on may still be published.
///
/// Does not block. Cancelling a finished task does nothing.
///
/// @param task handle
/// @return UCM_STATUS_OK, UCM_STATUS_INVALID_ARGUMENT (no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_task_cancel(task: *mut ucm_task_t) -> ucm_status_t {
    enter(|| {
        let task = task_of(task)?;
        if let Some(closed) = task.closed() {
            return Err(closed);
        }
        task.cancel();
        Ok(())
    })
}

/// Frees a handle at any time; what was submitted goes on, and its memory must stay valid as if the
/// handle were still there. Completions of the task that wait to be reaped are dropped. The task of a
/// hold lets go of its blocks (ucm_hold).
///
/// Does not block. NULL and handles freed before are ignored.
///
/// @param task handle, or NULL
/// @since 0.1
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucm_task_free(task: *mut ucm_task_t) {
    if !task.is_null() {
        let _ = enter(|| {
            let entry = TASKS.remove(Token::from_pointer(task))?;
            entry.wait()?.release_handle();
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: whoever uses a handle before its submit has failed is answered, and does not wait for ever.
    #[test]
    fn a_handle_whose_submit_fails_is_closed_for_those_who_wait() {
        let reserved = Reserved::new(Token::from_number(0)).unwrap();
        let token = reserved.token();
        let waiter =
            std::thread::spawn(move || task_of(token.to_pointer()).err().map(|it| it.kind()));
        while Arc::strong_count(reserved.task.as_ref().unwrap()) < 3 {
            std::thread::yield_now(); // The registry, this test and the waiter.
        }
        drop(reserved);
        assert_eq!(waiter.join().unwrap(), Some(ErrorKind::Closed));
    }
}

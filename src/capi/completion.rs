//! `ucm_completion_t`: the descriptor that announces finished tasks, and reap.

use super::boundary::{enter, enter_with};
use super::handles::Token;
use super::pointers::{UCM_COUNT_MAX, check, check_count, put};
use super::status::{UCM_STATUS_OK, status_of, ucm_status_t};
use super::store::{store_of, ucm_store_t};
use super::task::{is_live, ucm_task_t};
use crate::completion::Completion;

/// A task that reached a stage, or failed to.
///
/// @since 0.1
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ucm_completion {
    /// The task; borrowed.
    pub task: *mut ucm_task_t,
    /// The batch's user_data.
    pub user_data: u64,
    /// UCM_STAGE_COPIED, UCM_STAGE_PERSISTED or UCM_STAGE_LOADED.
    pub stage: u32,
    /// UCM_STATUS_OK, or the task's first error.
    pub status: ucm_status_t,
}

/// @since 0.1
pub type ucm_completion_t = ucm_completion;

/// A completion for C; `None` if its task was freed.
fn completion_of(completion: &Completion) -> Option<ucm_completion> {
    let token = Token::from_number(completion.tag);
    is_live(token).then(|| ucm_completion {
        task: token.to_pointer(),
        user_data: completion.user_data,
        stage: completion.stage as u32,
        status: completion.result.as_ref().map_or_else(status_of, |()| UCM_STATUS_OK),
    })
}

/// A descriptor that is readable while completions wait for ucm_store_reap: for poll, epoll, asyncio.
///
/// Does not block. The descriptor stays the store's: do not read, write or close it. It is closed by
/// ucm_store_close: take it out of your event loop before.
///
/// @param store handle
/// @return the descriptor; -1 on failure (ucm_last_error says why)
/// @since 0.1
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucm_store_completion_fd(store: *mut ucm_store_t) -> i32 {
    enter_with(|_| -1, || store_of(store)?.completion_fd())
}

/// Takes completions of tasks that were submitted with a NOTIFY flag, oldest first.
///
/// Does not block. When a wait for a stage has returned, the stage's completion is there. The task handles
/// are borrowed: they are those that ucm_save and ucm_load gave out, and are still to be freed, once each.
/// ucm_task_free takes a task's completions off the queue.
///
/// @param store handle
/// @param completions receives up to capacity completions; may be NULL when capacity is 0
/// @param capacity 0 to UCM_COUNT_MAX
/// @param count receives how many were taken; 0 on failure, and when none waits
/// @return UCM_STATUS_OK (also when none waits), or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, misaligned, capacity too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_store_reap(
    store: *mut ucm_store_t,
    completions: *mut ucm_completion_t,
    capacity: usize,
    count: *mut usize,
) -> ucm_status_t {
    enter(|| {
        check("count", count)?;
        // SAFETY: checked; the caller vouches for it, here and below.
        unsafe { put(count, 0) };
        let store = store_of(store)?;
        check_count("capacity", capacity, UCM_COUNT_MAX)?;
        if capacity == 0 {
            return Ok(());
        }
        check("completions", completions)?;
        let mut taken = 0;
        for completion in store.reap(capacity)?.iter().filter_map(completion_of) {
            // SAFETY: reap returns at most `capacity` items, and the caller vouches for as many.
            unsafe { put(completions.add(taken), completion) };
            taken += 1;
        }
        // SAFETY: as above.
        unsafe { put(count, taken) };
        Ok(())
    })
}

//! The line between C and Rust: the one place where panics end, errors become statuses, the message of
//! the last failure is kept, and a forked child is turned away.
//!
//! Knows no function of the ABI.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use super::status::{UCM_STATUS_OK, status_of, ucm_status_t};
use crate::error::{Error, ErrorKind, Result};

/// Set in a child that was forked from a process with an engine: its threads, rings and locks stayed behind.
static FORKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs the body of a function that returns a status.
pub(super) fn enter(body: impl FnOnce() -> Result<()>) -> ucm_status_t {
    enter_with(status_of, || body().map(|()| UCM_STATUS_OK))
}

/// Runs the body of a function that returns something else: `failed` makes it from the error.
pub(super) fn enter_with<T>(failed: fn(&Error) -> T, body: impl FnOnce() -> Result<T>) -> T {
    let result = if FORKED.load(Ordering::Acquire) {
        Err(Error::new(
            ErrorKind::Closed,
            "this process was forked after a store had been opened, and engine threads do not survive fork; \
             fork before the first ucm_store_open, or start the child with exec (Python: the spawn start method)",
        ))
    } else {
        // Every lock inside is a parking_lot lock, which a panic does not leave half-way.
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
            Err(Error::new(
                ErrorKind::Internal,
                format!("UCM panicked, which is a defect in UCM: {}", describe(payload.as_ref())),
            ))
        })
    };
    result.unwrap_or_else(|error| {
        remember(&error);
        failed(&error)
    })
}

/// Keeps the message for [`last_error`].
pub(super) fn remember(error: &Error) {
    // Without effect on a thread whose locals are gone already: C++ destructors may call at that time.
    let _ = LAST_ERROR.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = error.to_string();
        }
    });
}

/// The message of the last failed call of this thread.
pub(super) fn last_error() -> String {
    LAST_ERROR
        .try_with(|last| last.try_borrow().map(|last| last.clone()).unwrap_or_default())
        .unwrap_or_default()
}

/// From now on, children of this process are turned away. Called before the first engine thread starts.
pub(super) fn watch_forks() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        // SAFETY: the handler is a plain function that stores one atomic, which is allowed between fork and
        // exec; the library is never unloaded (`-z nodelete`), so the pointer stays good.
        let refused = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        if refused != 0 {
            crate::log::warning(format_args!(
                "fork is not watched (errno {refused}): do not use UCM in forked children"
            ));
        }
    });
}

extern "C" fn in_child() {
    FORKED.store(true, Ordering::Release);
}

/// What a panic said.
fn describe(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Copies `text` into a caller's buffer as far as it fits (cut at a character), NUL-terminates it, and
/// returns its full length.
///
/// # Safety
/// `buffer` is null, or valid for writing `capacity` bytes.
pub(super) unsafe fn copy_text(text: &str, buffer: *mut c_char, capacity: usize) -> usize {
    if !buffer.is_null() && capacity > 0 {
        let fits = text.floor_char_boundary(capacity - 1);
        // SAFETY: `fits` + 1 is at most `capacity`, which the caller vouches for; a local string does not
        // overlap the caller's buffer.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast(), fits);
            buffer.add(fits).write(0);
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capi::status::{UCM_STATUS_INTERNAL, UCM_STATUS_NO_SPACE};

    // Goal: a panic becomes INTERNAL with its message, an error its status with its message, and a
    // success leaves the last message alone.
    #[test]
    fn panics_and_errors_become_statuses_with_messages() {
        assert_eq!(enter(|| panic!("seven {}", 7)), UCM_STATUS_INTERNAL);
        assert!(last_error().contains("seven 7"), "{}", last_error());
        let full = || Err(Error::new(ErrorKind::NoSpace, "full"));
        assert_eq!(enter(full), UCM_STATUS_NO_SPACE);
        assert_eq!(last_error(), "full");
        assert_eq!(enter(|| Ok(())), UCM_STATUS_OK);
        assert_eq!(last_error(), "full");
    }

    // Goal: text is cut at a character, always terminated, and its full length returned.
    #[test]
    fn text_is_cut_at_a_character_and_terminated() {
        let mut buffer = [0x55 as c_char; 8];
        // SAFETY: the capacities are within the buffer.
        unsafe {
            assert_eq!(copy_text("aä", buffer.as_mut_ptr(), 3), 3);
            assert_eq!(&buffer[..3], [b'a' as c_char, 0, 0x55]);
            assert_eq!(copy_text("aä", buffer.as_mut_ptr(), 4), 3);
            assert_eq!(buffer[3], 0);
            assert_eq!(copy_text("abc", buffer.as_mut_ptr(), 1), 3);
            assert_eq!(buffer[0], 0);
            assert_eq!(copy_text("abc", buffer.as_mut_ptr(), 0), 3);
            assert_eq!(copy_text("abc", std::ptr::null_mut(), 5), 3);
        }
    }
}

//! The log callback.

use std::ffi::{CString, c_char, c_void};
use std::sync::Arc;

use super::boundary::enter;
use super::pointers::invalid;
use super::status::ucm_status_t;
use crate::log::{self, Level, Sink};

/// ucm_log_callback: no messages at all.
pub const UCM_LOG_OFF: u32 = 0;
/// ucm_log_callback: something that was asked for could not be done.
pub const UCM_LOG_ERROR: u32 = 1;
/// ucm_log_callback: it works, but worse than it could; the message names the remedy.
pub const UCM_LOG_WARNING: u32 = 2;
/// ucm_log_callback: once in a while, such as opened and closed.
pub const UCM_LOG_INFO: u32 = 3;
/// ucm_log_callback: for whoever looks for a defect.
pub const UCM_LOG_DEBUG: u32 = 4;

/// Receives log messages: context as it was given, the message's level, and the NUL-terminated UTF-8
/// message, which is valid during the call only. Called on any thread, several at a time, I/O threads
/// among them: it must be quick, must not throw, and must not call UCM.
///
/// @since 0.1
pub type ucm_log_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, level: u32, message: *const c_char)>;

/// A C callback with its context.
struct Listener {
    function: unsafe extern "C" fn(*mut c_void, u32, *const c_char),
    context: *mut c_void,
}

// SAFETY: the contract of `ucm_log_callback` is that function and context may be used on any thread.
unsafe impl Send for Listener {}
// SAFETY: as above, also at the same time.
unsafe impl Sync for Listener {}

impl Listener {
    fn tell(&self, level: Level, message: &str) {
        // A NUL inside would end the message early: shown as the replacement character.
        let message = CString::new(message).unwrap_or_else(|_| {
            CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default()
        });
        // SAFETY: the caller of `ucm_log_callback` vouches for function and context until it is replaced;
        // the message lives until the call returns.
        unsafe { (self.function)(self.context, level as u32, message.as_ptr()) }
    }
}

/// Sends the log of the process to a function. Without one, warnings and errors go to standard error.
///
/// Blocks until the previous callback, if it is running, has returned; it is not called again after that.
///
/// @param callback the function; NULL: standard error
/// @param context given to the callback; must stay valid until the callback is replaced
/// @param level UCM_LOG_OFF to UCM_LOG_DEBUG: messages of this level and more important ones are told
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (no such level),
///         UCM_STATUS_BUSY (called from within a callback), UCM_STATUS_CLOSED (forked child)
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_log_callback(
    callback: ucm_log_fn,
    context: *mut c_void,
    level: u32,
) -> ucm_status_t {
    enter(|| {
        let threshold = match level {
            UCM_LOG_OFF => None,
            _ => Some(Level::from_number(level).ok_or_else(|| {
                invalid(format!("level is {level}; known are UCM_LOG_OFF 0 to UCM_LOG_DEBUG 4"))
            })?),
        };
        let sink = callback.map(|function| -> Sink {
            let listener = Listener { function, context };
            Arc::new(move |level, message: &str| listener.tell(level, message))
        });
        log::set_sink(sink, threshold)
    })
}

//! Status codes, their names, the version, and the last error's message.

use std::ffi::c_char;

use super::boundary;
use crate::error::{Error, ErrorKind};

/// Result of a call: UCM_STATUS_OK, UCM_STATUS_PENDING, or an error. Numbers are never reused.
///
/// @since 0.1
pub type ucm_status_t = i32;

/// It worked.
pub const UCM_STATUS_OK: ucm_status_t = 0;
/// Not yet: the stage has not been reached. Not an error.
pub const UCM_STATUS_PENDING: ucm_status_t = 1;
/// An argument is null, out of range, or does not fit the store's geometry.
pub const UCM_STATUS_INVALID_ARGUMENT: ucm_status_t = 2;
/// A configuration key or value is unknown, out of range, or contradicts another.
pub const UCM_STATUS_INVALID_CONFIG: ucm_status_t = 3;
/// The block is not there.
pub const UCM_STATUS_NOT_FOUND: ucm_status_t = 4;
/// The stored bytes do not match their checksum.
pub const UCM_STATUS_CORRUPT: ucm_status_t = 5;
/// The drive or the file system failed.
pub const UCM_STATUS_IO: ucm_status_t = 6;
/// The file system is full, or the capacity bound is reached.
pub const UCM_STATUS_NO_SPACE: ucm_status_t = 7;
/// Memory could not be had.
pub const UCM_STATUS_OUT_OF_MEMORY: ucm_status_t = 8;
/// The task's deadline passed. Memory of the batch may still be in use: see UCM_STAGE_RELEASED.
pub const UCM_STATUS_TIMEOUT: ucm_status_t = 9;
/// A queue or every slot is full; try again later.
pub const UCM_STATUS_BUSY: ucm_status_t = 10;
/// ucm_task_cancel ended it. Memory of the batch may still be in use: see UCM_STAGE_RELEASED.
pub const UCM_STATUS_CANCELLED: ucm_status_t = 11;
/// This platform, library or file system does not offer it.
pub const UCM_STATUS_UNSUPPORTED: ucm_status_t = 12;
/// The accelerator or its driver failed.
pub const UCM_STATUS_DEVICE: ucm_status_t = 13;
/// The operating system denied access.
pub const UCM_STATUS_PERMISSION: ucm_status_t = 14;
/// The handle is closed, or this process is a forked child.
pub const UCM_STATUS_CLOSED: ucm_status_t = 15;
/// A defect in UCM.
pub const UCM_STATUS_INTERNAL: ucm_status_t = 16;

/// Major version of the interface that this header describes.
pub const UCM_API_VERSION_MAJOR: u32 = 0;
/// Minor version of the interface that this header describes.
pub const UCM_API_VERSION_MINOR: u32 = 1;
/// Version of the interface that this header describes: (major << 16) | minor. Compare with
/// ucm_api_version(), which tells the library's.
pub const UCM_API_VERSION: u32 = 1;

const _: () = assert!(UCM_API_VERSION == (UCM_API_VERSION_MAJOR << 16) | UCM_API_VERSION_MINOR);

/// The status of a failure.
pub(super) fn status_of(error: &Error) -> ucm_status_t {
    match error.kind() {
        ErrorKind::InvalidArgument => UCM_STATUS_INVALID_ARGUMENT,
        ErrorKind::InvalidConfig => UCM_STATUS_INVALID_CONFIG,
        ErrorKind::NotFound => UCM_STATUS_NOT_FOUND,
        ErrorKind::Corrupt => UCM_STATUS_CORRUPT,
        ErrorKind::Io => UCM_STATUS_IO,
        ErrorKind::NoSpace => UCM_STATUS_NO_SPACE,
        ErrorKind::OutOfMemory => UCM_STATUS_OUT_OF_MEMORY,
        ErrorKind::Timeout => UCM_STATUS_TIMEOUT,
        ErrorKind::Busy => UCM_STATUS_BUSY,
        ErrorKind::Cancelled => UCM_STATUS_CANCELLED,
        ErrorKind::Unsupported => UCM_STATUS_UNSUPPORTED,
        ErrorKind::Device => UCM_STATUS_DEVICE,
        ErrorKind::Permission => UCM_STATUS_PERMISSION,
        ErrorKind::Closed => UCM_STATUS_CLOSED,
        ErrorKind::Internal => UCM_STATUS_INTERNAL,
    }
}

/// The version of the interface that the loaded library offers.
///
/// A program built against a header with the same major number and a minor number that is not higher
/// runs with this library. Never blocks, never fails, works in forked children and signal handlers.
///
/// @return (major << 16) | minor
/// @since 0.1
#[unsafe(no_mangle)]
pub extern "C" fn ucm_api_version() -> u32 {
    UCM_API_VERSION
}

/// The version and the commit of the loaded library, such as "0.1.0 (1a2b3c4d5e)".
///
/// Never blocks, never fails, works in forked children and signal handlers.
///
/// @return a static string; do not free it
/// @since 0.1
#[unsafe(no_mangle)]
pub extern "C" fn ucm_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("UCM_COMMIT"), ")", "\0");
    VERSION.as_ptr().cast()
}

/// The name of a status, such as "UCM_STATUS_NOT_FOUND".
///
/// Never blocks, never fails, works in forked children and signal handlers.
///
/// @param status any number
/// @return a static string, never NULL; "UCM_STATUS_UNKNOWN" for a number that is no status
/// @since 0.1
#[unsafe(no_mangle)]
pub extern "C" fn ucm_status_name(status: ucm_status_t) -> *const c_char {
    let name = match status {
        UCM_STATUS_OK => c"UCM_STATUS_OK",
        UCM_STATUS_PENDING => c"UCM_STATUS_PENDING",
        UCM_STATUS_INVALID_ARGUMENT => c"UCM_STATUS_INVALID_ARGUMENT",
        UCM_STATUS_INVALID_CONFIG => c"UCM_STATUS_INVALID_CONFIG",
        UCM_STATUS_NOT_FOUND => c"UCM_STATUS_NOT_FOUND",
        UCM_STATUS_CORRUPT => c"UCM_STATUS_CORRUPT",
        UCM_STATUS_IO => c"UCM_STATUS_IO",
        UCM_STATUS_NO_SPACE => c"UCM_STATUS_NO_SPACE",
        UCM_STATUS_OUT_OF_MEMORY => c"UCM_STATUS_OUT_OF_MEMORY",
        UCM_STATUS_TIMEOUT => c"UCM_STATUS_TIMEOUT",
        UCM_STATUS_BUSY => c"UCM_STATUS_BUSY",
        UCM_STATUS_CANCELLED => c"UCM_STATUS_CANCELLED",
        UCM_STATUS_UNSUPPORTED => c"UCM_STATUS_UNSUPPORTED",
        UCM_STATUS_DEVICE => c"UCM_STATUS_DEVICE",
        UCM_STATUS_PERMISSION => c"UCM_STATUS_PERMISSION",
        UCM_STATUS_CLOSED => c"UCM_STATUS_CLOSED",
        UCM_STATUS_INTERNAL => c"UCM_STATUS_INTERNAL",
        _ => c"UCM_STATUS_UNKNOWN",
    };
    name.as_ptr()
}

/// The message of the last call that failed on this thread: what failed and what to do about it.
///
/// A call that succeeds leaves the message alone. A task fails on another thread: its message is
/// ucm_task_error's. Never blocks, never fails, works in forked children.
///
/// @param buffer receives the message, cut where it does not fit, always NUL-terminated; may be NULL
/// @param capacity bytes of buffer
/// @return bytes of the whole message without its NUL; 0 when no call has failed on this thread
/// @since 0.1
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucm_last_error(buffer: *mut c_char, capacity: usize) -> usize {
    // SAFETY: the caller vouches for the buffer.
    unsafe { boundary::copy_text(&boundary::last_error(), buffer, capacity) }
}

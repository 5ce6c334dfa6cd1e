//! Memory of the caller that the engine may copy from and to directly.

use std::ffi::c_void;

use super::boundary::enter;
use super::pointers::invalid;
use super::status::ucm_status_t;
use super::store::{store_of, ucm_store_t};

/// Lets the engine copy straight from and to host memory, without a bounce through its arena, where
/// alignment and a local file system allow. A refusal by the system only costs speed; the log tells it.
///
/// Blocks while pages are pinned. The memory must stay mapped until ucm_memory_unregister or
/// ucm_store_close has returned.
///
/// @param store handle
/// @param base first byte, a multiple of 4096
/// @param length bytes, a multiple of 4096
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, 0, not a multiple of 4096, overlaps registered memory, no handle),
///         UCM_STATUS_OUT_OF_MEMORY, UCM_STATUS_UNSUPPORTED, UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_memory_register(
    store: *mut ucm_store_t,
    base: *mut c_void,
    length: usize,
) -> ucm_status_t {
    enter(|| {
        let store = store_of(store)?;
        if base.is_null() {
            return Err(invalid("base is NULL"));
        }
        if length == 0 || base.addr().checked_add(length).is_none() {
            return Err(invalid(format!("length is {length}, which no memory at {base:p} has")));
        }
        // SAFETY: the caller keeps the contract above.
        unsafe { store.register_memory(base, length) }
    })
}

/// Ends ucm_memory_register: the engine forgets the memory.
///
/// Does not wait for tasks that use the memory.
///
/// @param store handle
/// @param base as it was given to ucm_memory_register
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_BUSY (a task that has not reached RELEASED uses the memory),
///         UCM_STATUS_INVALID_ARGUMENT (NULL, not the base of registered memory, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_memory_unregister(
    store: *mut ucm_store_t,
    base: *mut c_void,
) -> ucm_status_t {
    enter(|| {
        let store = store_of(store)?;
        if base.is_null() {
            return Err(invalid("base is NULL"));
        }
        store.unregister_memory(base)
    })
}

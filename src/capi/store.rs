//! `ucm_store_t`: open, close, refresh.

use std::sync::Arc;
use std::time::Duration;

use super::boundary::{enter, watch_forks};
use super::handles::{Kind, Registry, Token};
use super::options::{options_of, ucm_options_t};
use super::pointers::{check, put};
use super::status::ucm_status_t;
use super::task;
use crate::error::Result;
use crate::store::Store;

/// An open store. An opaque handle.
pub struct ucm_store(());

/// @since 0.1
pub type ucm_store_t = ucm_store;

static STORES: Registry<Arc<Store>> = Registry::new(Kind::Store);

/// The store behind a handle.
pub(super) fn store_of(handle: *const ucm_store_t) -> Result<Arc<Store>> {
    STORES.get(Token::from_pointer(handle))
}

/// Opens a store.
///
/// Blocks until the directories are probed, the arena is mapped and the index is read; on a mount that
/// hangs it ends with UCM_STATUS_TIMEOUT after timeout_ms. What the system refuses (io_uring, O_DIRECT,
/// huge pages) is replaced and told once through the log, with its cost and its remedy. A process may
/// open several stores, also on the same directories; each is a writer of its own.
///
/// @param options handle; stays the caller's and may be freed at once
/// @param store receives the handle, or NULL on failure; the caller's, to be closed with ucm_store_close
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_CONFIG (options contradict each other or the machine: the message names the key),
///         UCM_STATUS_INVALID_ARGUMENT (a pointer is NULL or misaligned, options is no handle),
///         UCM_STATUS_PERMISSION, UCM_STATUS_IO, UCM_STATUS_NO_SPACE, UCM_STATUS_TIMEOUT (a directory cannot be used),
///         UCM_STATUS_OUT_OF_MEMORY (the arena does not fit),
///         UCM_STATUS_UNSUPPORTED (something that is set to required is refused),
///         UCM_STATUS_DEVICE (no such device, or its driver fails),
///         UCM_STATUS_CLOSED (options was freed; forked child)
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_store_open(
    options: *const ucm_options_t,
    store: *mut *mut ucm_store_t,
) -> ucm_status_t {
    enter(|| {
        check("store", store)?;
        // SAFETY: checked; the caller vouches for it, here and below.
        unsafe { put(store, std::ptr::null_mut()) };
        let config = options_of(options)?.build()?;
        watch_forks();
        let token = STORES.insert(Store::open(config)?)?;
        // SAFETY: as above.
        unsafe { put(store, token.to_pointer()) };
        Ok(())
    })
}

/// Closes a store: finishes or cancels what is in flight, then frees it.
///
/// Blocks until the work in flight is done or its deadlines have passed, timeout_ms at most. Threads that
/// wait for tasks of the store are woken. Afterwards the handle and those of its tasks answer
/// UCM_STATUS_CLOSED; a program that must know whether memory of a batch is its own again (a drive that
/// hangs may still write to it) waits for UCM_STAGE_RELEASED before it closes. NULL and handles closed
/// before are ignored. Must not be called from a log callback.
///
/// @param store handle, or NULL
/// @since 0.1
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucm_store_close(store: *mut ucm_store_t) {
    if !store.is_null() {
        let _ = enter(|| {
            let token = Token::from_pointer(store);
            let store = STORES.remove(token)?;
            store.close();
            task::end_tasks_of(token);
            Ok(())
        });
    }
}

/// Brings the index up to date with all writers: what was PERSISTED anywhere before the call is found after it.
///
/// Blocks while manifests are read; concurrent callers share one refresh.
///
/// @param store handle
/// @param timeout_ms the longest wait in milliseconds; 0: the store's timeout_ms; < 0: no limit
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_TIMEOUT (the refresh goes on), UCM_STATUS_IO (no directory can be read),
///         UCM_STATUS_INVALID_ARGUMENT (no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_store_refresh(
    store: *mut ucm_store_t,
    timeout_ms: i64,
) -> ucm_status_t {
    enter(|| {
        let store = store_of(store)?;
        let timeout = match timeout_ms {
            0 => Some(store.config().timeout),
            _ => u64::try_from(timeout_ms).ok().map(Duration::from_millis),
        };
        store.refresh(timeout)
    })
}

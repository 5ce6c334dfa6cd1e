//! `ucm_block_id_t` and what can be asked about blocks without touching their bytes: lookup, prefetch, abandon.

use super::boundary::enter;
use super::pointers::{UCM_COUNT_MAX, check, put, slice, slice_mut};
use super::status::ucm_status_t;
use super::store::{store_of, ucm_store_t};
use crate::block::{BlockId, Promise};
use crate::error::Result;

/// The name of a block: the chained hash of its tokens and of everything before them (ucm_hash_tokens).
///
/// @since 0.1
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ucm_block_id {
    /// 16 bytes.
    pub bytes: [u8; 16],
}

/// @since 0.1
pub type ucm_block_id_t = ucm_block_id;

/// Block ids as the engine has them.
///
/// # Safety
/// As [`slice`].
pub(super) unsafe fn block_ids<'a>(
    blocks: *const ucm_block_id_t,
    count: usize,
) -> Result<&'a [BlockId]> {
    // SAFETY: both are 16 plain bytes, `BlockId` is transparent; the caller vouches for the array.
    unsafe { slice("blocks", blocks.cast::<BlockId>(), count, UCM_COUNT_MAX) }
}

/// Tells which blocks are present: all their parts are stored, or are in this host's Cache tier.
///
/// Answers from memory, and does no I/O on this thread. Where the index is older than lookup_refresh_ms it
/// first waits, for a short bounded time, for a refresh that concurrent callers share.
///
/// @param store handle
/// @param blocks count ids; may be NULL when count is 0
/// @param count 0 to UCM_COUNT_MAX
/// @param found receives count bytes: 1 where the block is present, else 0; all 0 on failure
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, count too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_lookup(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
    found: *mut u8,
) -> ucm_status_t {
    enter(|| {
        let store = store_of(store)?;
        // SAFETY: the caller vouches for both arrays; `found` is made of bytes, valid whatever they are.
        let (blocks, found) = unsafe {
            (block_ids(blocks, count)?, slice_mut("found", found, count, UCM_COUNT_MAX)?)
        };
        found.fill(0);
        store.lookup(blocks, found)
    })
}

/// Tells how many blocks from the first on are present: the length of the longest present prefix.
///
/// Blocks as ucm_lookup does.
///
/// @param store handle
/// @param blocks count ids; may be NULL when count is 0
/// @param count 0 to UCM_COUNT_MAX
/// @param hits receives the length; 0 on failure
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, misaligned, count too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_lookup_prefix(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
    hits: *mut usize,
) -> ucm_status_t {
    enter(|| {
        check("hits", hits)?;
        // SAFETY: checked; the caller vouches for it, here and below.
        unsafe { put(hits, 0) };
        let store = store_of(store)?;
        // SAFETY: the caller vouches for the array.
        let prefix = store.lookup_prefix(unsafe { block_ids(blocks, count)? })?;
        // SAFETY: as above.
        unsafe { put(hits, prefix) };
        Ok(())
    })
}

/// A hint: bring blocks into the Cache tier. Never fails for want of room.
///
/// Does not block: the reads go on in the background, after all loads. Without a Cache tier it does nothing.
///
/// @param store handle
/// @param blocks count ids; may be NULL when count is 0
/// @param count 0 to UCM_COUNT_MAX
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, count too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_prefetch(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
) -> ucm_status_t {
    enter(|| {
        let store = store_of(store)?;
        // SAFETY: the caller vouches for the array.
        store.prefetch(unsafe { block_ids(blocks, count)? })
    })
}

/// Tells all readers of the namespace that blocks which were promised to them will not come from here, so
/// that nobody waits for them (ucm_lookup_abandoned). Blocks that are present stay present.
///
/// Does not block: the record is written in the background. Without storage it does nothing.
///
/// @param store handle
/// @param blocks count ids; may be NULL when count is 0
/// @param count 0 to UCM_COUNT_MAX
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, count too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_abandon(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
) -> ucm_status_t {
    // SAFETY: the caller's promise is the same.
    unsafe { ucm_abandon_promise(store, blocks, count, Promise::ANY.0) }
}

/// Like ucm_abandon, but ends only the waits for one promise: blocks that are promised again, under another
/// number, are waited for.
///
/// @param store handle
/// @param blocks count ids; may be NULL when count is 0
/// @param count 0 to UCM_COUNT_MAX
/// @param promise a number that the caller chose for this promise and told with it, for instance a random one; 0: all
///        promises, as ucm_abandon
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, count too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_abandon_promise(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
    promise: u64,
) -> ucm_status_t {
    enter(|| {
        let store = store_of(store)?;
        // SAFETY: the caller vouches for the array.
        store.abandon(unsafe { block_ids(blocks, count)? }, Promise(promise))
    })
}

/// Tells which blocks a writer has abandoned, under whatever promise: whoever waits for one need not wait any
/// longer, unless it was promised again (ucm_lookup_abandoned_promise).
///
/// Blocks as ucm_lookup does.
///
/// @param store handle
/// @param blocks count ids; may be NULL when count is 0
/// @param count 0 to UCM_COUNT_MAX
/// @param found receives count bytes: 1 where the block was abandoned, else 0; all 0 on failure
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, count too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_lookup_abandoned(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
    found: *mut u8,
) -> ucm_status_t {
    // SAFETY: the caller's promise is the same.
    unsafe { ucm_lookup_abandoned_promise(store, blocks, count, Promise::ANY.0, found) }
}

/// Tells which blocks a writer has abandoned under one promise, or under all (ucm_abandon).
///
/// Blocks as ucm_lookup does. Of the broken promises the last 65536, counted by block, are remembered at least.
///
/// @param store handle
/// @param blocks count ids; may be NULL when count is 0
/// @param count 0 to UCM_COUNT_MAX
/// @param promise the number that was told with the promise; 0: any, as ucm_lookup_abandoned
/// @param found receives count bytes: 1 where the block was abandoned, else 0; all 0 on failure
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, count too large, no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_lookup_abandoned_promise(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
    promise: u64,
    found: *mut u8,
) -> ucm_status_t {
    enter(|| {
        let store = store_of(store)?;
        // SAFETY: the caller vouches for both arrays; `found` is made of bytes, valid whatever they are.
        let (blocks, found) = unsafe {
            (block_ids(blocks, count)?, slice_mut("found", found, count, UCM_COUNT_MAX)?)
        };
        found.fill(0);
        store.lookup_abandoned(blocks, Promise(promise), found)
    })
}

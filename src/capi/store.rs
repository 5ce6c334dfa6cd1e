//! `ucm_store_t`: open, close, lookup, prefetch, save, load, refresh, memory registration.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::boundary::{enter, enter_with, watch_forks};
use super::handles::{Kind, Registry, Token};
use super::options::{options_of, ucm_options_t};
use super::pointers::{
    STRUCT_SIZE_MAX, UCM_COUNT_MAX, UCM_ENTRIES_MAX, check, check_count, invalid, put, slice,
    slice_mut,
};
use super::status::ucm_status_t;
use super::task::{self, ucm_completion_t, ucm_task_t};
use crate::block::{BlockId, SliceShape};
use crate::error::Result;
use crate::store::{Batch, Store};
use crate::task::Notify;

/// An open store. An opaque handle.
pub struct ucm_store(());

/// @since 0.1
pub type ucm_store_t = ucm_store;

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

/// ucm_batch.flags: queue the task for ucm_store_reap after its last stage (PERSISTED or LOADED).
pub const UCM_BATCH_NOTIFY: u32 = 1;
/// ucm_batch.flags: queue the task for ucm_store_reap after COPIED too. Without effect on loads.
pub const UCM_BATCH_NOTIFY_COPIED: u32 = 2;

/// What to save or to load: count entries, each one shard of one block.
///
/// Set struct_size to sizeof(ucm_batch_t) and what you do not use to 0. Fields are only ever appended;
/// the library reads a field only if it lies inside struct_size.
///
/// @since 0.1
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ucm_batch {
    /// sizeof(ucm_batch_t).
    pub struct_size: usize,
    /// count block ids.
    pub blocks: *const ucm_block_id_t,
    /// count shard indexes inside this store's part; NULL: all 0.
    pub shards: *const u32,
    /// count x (tensor slices per shard) addresses, row-major: device or host pointers. None is NULL.
    pub addresses: *const *mut c_void,
    /// Entries: 1 to UCM_ENTRIES_MAX, and so many that count x slices is not over UCM_COUNT_MAX.
    pub count: usize,
    /// cudaEvent_t or aclrtEvent that the engine's copies wait for on the device, or NULL. Captured
    /// before the call returns: may then be recorded again or destroyed.
    pub wait_event: *mut c_void,
    /// UCM_BATCH_NOTIFY, UCM_BATCH_NOTIFY_COPIED, or 0.
    pub flags: u32,
    /// Given back by ucm_store_reap.
    pub user_data: u64,
    /// Deadline of this task in milliseconds; 0: the store's timeout_ms; < 0: none.
    pub timeout_ms: i64,
}

/// @since 0.1
pub type ucm_batch_t = ucm_batch;

/// A batch has to reach at least to here.
const BATCH_SIZE_MIN: usize = std::mem::offset_of!(ucm_batch, wait_event);

static STORES: Registry<Arc<Store>> = Registry::new(Kind::Store);

/// The store behind a handle.
pub(super) fn store_of(handle: *const ucm_store_t) -> Result<Arc<Store>> {
    STORES.get(Token::from_pointer(handle))
}

/// Block ids as the engine has them.
///
/// # Safety
/// As [`slice`].
unsafe fn block_ids<'a>(blocks: *const ucm_block_id_t, count: usize) -> Result<&'a [BlockId]> {
    // SAFETY: both are 16 plain bytes, `BlockId` is transparent; the caller vouches for the array.
    unsafe { slice("blocks", blocks.cast::<BlockId>(), count, UCM_COUNT_MAX) }
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
    enter(|| {
        let store = store_of(store)?;
        // SAFETY: the caller vouches for the array.
        store.abandon(unsafe { block_ids(blocks, count)? })
    })
}

/// Tells which blocks a writer has abandoned: whoever waits for one need not wait any longer.
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
    enter(|| {
        let store = store_of(store)?;
        // SAFETY: the caller vouches for both arrays; `found` is made of bytes, valid whatever they are.
        let (blocks, found) = unsafe {
            (block_ids(blocks, count)?, slice_mut("found", found, count, UCM_COUNT_MAX)?)
        };
        found.fill(0);
        store.lookup_abandoned(blocks, found)
    })
}

/// Which way a batch goes.
#[derive(Clone, Copy)]
enum Way {
    Save,
    Load,
}

/// Copies as much of a batch as the caller's version of the struct has.
///
/// # Safety
/// If `batch` is neither null nor misaligned, it is valid for reading `struct_size` bytes.
unsafe fn read_batch(batch: *const ucm_batch_t) -> Result<ucm_batch> {
    check("batch", batch)?;
    // SAFETY: checked; the caller vouches for at least this field.
    let size = unsafe { (&raw const (*batch).struct_size).read() };
    if !(BATCH_SIZE_MIN..=STRUCT_SIZE_MAX).contains(&size) {
        return Err(invalid(format!(
            "batch->struct_size is {size}; set it to sizeof(ucm_batch_t), which is {} here",
            size_of::<ucm_batch>()
        )));
    }
    let mut copy = ucm_batch {
        struct_size: 0,
        blocks: std::ptr::null(),
        shards: std::ptr::null(),
        addresses: std::ptr::null(),
        count: 0,
        wait_event: std::ptr::null_mut(),
        flags: 0,
        user_data: 0,
        timeout_ms: 0,
    };
    // SAFETY: the caller vouches for `size` bytes, the copy has its own size, and they do not overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(
            batch.cast::<u8>(),
            (&raw mut copy).cast::<u8>(),
            size.min(size_of::<ucm_batch>()),
        );
    }
    Ok(copy)
}

/// Fails where an address is null, or so large that its slice would reach beyond the end of all memory.
fn check_spans(addresses: &[*mut c_void], slices: &[SliceShape]) -> Result<()> {
    for (index, address) in addresses.iter().enumerate() {
        let (entry, slice) = (index / slices.len(), index % slices.len());
        if address.is_null() {
            return Err(invalid(format!(
                "addresses[{index}] is NULL (entry {entry}, slice {slice})"
            )));
        }
        let span = slices[slice].span();
        if (address.addr() as u64).checked_add(span).is_none() {
            return Err(invalid(format!(
                "addresses[{index}] is {address:p}, where no slice of {span} bytes can lie (entry {entry}, slice {slice})"
            )));
        }
    }
    Ok(())
}

/// Submits a batch.
///
/// # Safety
/// As the comments of [`ucm_save`] and [`ucm_load`] say.
unsafe fn submit(
    way: Way,
    handle: *mut ucm_store_t,
    batch: *const ucm_batch_t,
    task: *mut *mut ucm_task_t,
) -> Result<()> {
    check("task", task)?;
    // SAFETY: checked; the caller vouches for it, here and below.
    unsafe { put(task, std::ptr::null_mut()) };
    let store = store_of(handle)?;
    // SAFETY: the caller vouches for the struct.
    let batch = unsafe { read_batch(batch)? };
    if batch.count == 0 {
        return Err(invalid("batch->count is 0; a batch has at least one entry"));
    }
    check_count("batch->count", batch.count, UCM_ENTRIES_MAX)?;
    if batch.flags & !(UCM_BATCH_NOTIFY | UCM_BATCH_NOTIFY_COPIED) != 0 {
        return Err(invalid(format!(
            "batch->flags is {:#x}; known are UCM_BATCH_NOTIFY and UCM_BATCH_NOTIFY_COPIED",
            batch.flags
        )));
    }
    let pointers = batch.count * store.config().geometry.slices.len();
    // SAFETY: the caller vouches for the three arrays.
    let (blocks, shards, addresses) = unsafe {
        let blocks = block_ids(batch.blocks, batch.count)?;
        let shards = match batch.shards.is_null() {
            true => None,
            false => Some(slice("batch->shards", batch.shards, batch.count, UCM_COUNT_MAX)?),
        };
        (blocks, shards, slice("batch->addresses", batch.addresses, pointers, UCM_COUNT_MAX)?)
    };
    check_spans(addresses, &store.config().geometry.slices)?;
    let reserved = task::Reserved::new(Token::from_pointer(handle))?;
    let batch = Batch {
        blocks,
        shards,
        addresses,
        wait_event: batch.wait_event,
        notify: Notify {
            last: batch.flags & UCM_BATCH_NOTIFY != 0,
            copied: batch.flags & UCM_BATCH_NOTIFY_COPIED != 0,
        },
        user_data: batch.user_data,
        timeout_ms: batch.timeout_ms,
        tag: reserved.token().to_number(),
    };
    // SAFETY: the caller vouches for the addresses until stage RELEASED, and for the event.
    let submitted = unsafe {
        match way {
            Way::Save => store.save(&batch)?,
            Way::Load => store.load(&batch)?,
        }
    };
    // SAFETY: as above.
    unsafe { put(task, reserved.fill(submitted).to_pointer()) };
    Ok(())
}

/// Saves shards of blocks: starts copying them out of the caller's memory and on to storage.
///
/// Does not block. Blocks that are present already cost no I/O. A part is published when all its shards
/// are in, whichever tasks and threads bring them. The arrays are copied before the call returns. The
/// memory they point at must stay valid and unchanged until stage COPIED is reached without error, or
/// until RELEASED. Exactly one task is made when the answer is UCM_STATUS_OK, else none.
///
/// @param store handle
/// @param batch what to save
/// @param task receives the handle, or NULL on failure; the caller's, to be freed with ucm_task_free
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, misaligned, count 0 or too large, unknown flag, shard out
///         of range, struct_size, no handle),
///         UCM_STATUS_BUSY (the queue is full: drop the save or try again later),
///         UCM_STATUS_UNSUPPORTED (a store with device_id -1 only looks up),
///         UCM_STATUS_DEVICE (the event cannot be captured), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_save(
    store: *mut ucm_store_t,
    batch: *const ucm_batch_t,
    task: *mut *mut ucm_task_t,
) -> ucm_status_t {
    // SAFETY: the caller keeps the contract above.
    enter(|| unsafe { submit(Way::Save, store, batch, task) })
}

/// Loads shards of blocks: starts bringing them from the Cache tier or from storage into the caller's memory.
///
/// Does not block. Every entry has a status of its own: some missing blocks do not keep the others from
/// being loaded. The bytes of an entry that is not UCM_STATUS_OK are undefined. The arrays are copied
/// before the call returns. The memory they point at must stay valid, and be left alone, until stage
/// LOADED is reached without error, or until RELEASED. Exactly one task is made when the answer is
/// UCM_STATUS_OK, else none.
///
/// @param store handle
/// @param batch what to load, and where to
/// @param task receives the handle, or NULL on failure; the caller's, to be freed with ucm_task_free
/// @return UCM_STATUS_OK, or the errors of ucm_save. What happens to entries later (NOT_FOUND, CORRUPT,
///         IO, TIMEOUT) is told by the task
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_load(
    store: *mut ucm_store_t,
    batch: *const ucm_batch_t,
    task: *mut *mut ucm_task_t,
) -> ucm_status_t {
    // SAFETY: the caller keeps the contract above.
    enter(|| unsafe { submit(Way::Load, store, batch, task) })
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
/// Does not block. When a wait for a stage has returned, the stage's completion is there. The task handles are borrowed: they are those that ucm_save and ucm_load gave out, and
/// are still to be freed, once each. ucm_task_free takes a task's completions off the queue.
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
        for completion in store.reap(capacity)?.iter().filter_map(task::completion_of) {
            // SAFETY: reap returns at most `capacity` items, and the caller vouches for as many.
            unsafe { put(completions.add(taken), completion) };
            taken += 1;
        }
        // SAFETY: as above.
        unsafe { put(count, taken) };
        Ok(())
    })
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

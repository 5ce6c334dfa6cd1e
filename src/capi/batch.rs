//! `ucm_batch_t`: save and load; and hold, which needs no batch.

use std::ffi::c_void;

use super::boundary::enter;
use super::handles::Token;
use super::lookup::{block_ids, ucm_block_id_t};
use super::pointers::{
    STRUCT_SIZE_MAX, UCM_COUNT_MAX, UCM_ENTRIES_MAX, check, check_count, invalid, put, slice,
};
use super::status::ucm_status_t;
use super::store::{store_of, ucm_store_t};
use super::task::{Reserved, ucm_task_t};
use crate::error::Result;
use crate::store::Batch;
use crate::task::Notify;

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
    /// before the call returns: may then be recorded again or destroyed. It must have been recorded in the
    /// runtime, not merely queued by a framework: otherwise the copies do not wait for it.
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
    let reserved = Reserved::new(Token::from_pointer(handle))?;
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
/// Does not block; a batch of host memory of at most 128 KiB in all may be copied before the call returns.
/// Blocks that are present already cost no I/O. A part is published when all its shards
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
/// being loaded. Shards that are asked for by several tasks are read in the order of asking, and each is
/// there when it was read, not when its whole part was (docs/architecture.md tells the exceptions). The bytes of an entry that is not UCM_STATUS_OK are undefined. The arrays are copied
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

/// Brings blocks (all parts this store owns) into the Cache tier, verified, and keeps them there until the
/// task is freed or the store is closed: a load of a held block is then a copy from memory that does no I/O
/// and cannot miss.
///
/// Does not block. The task's one stage of interest is UCM_STAGE_LOADED: every entry is read, verified and
/// held. Every entry has a status of its own (ucm_task_statuses); one that failed holds nothing, the others
/// are held all the same. What the Cache tier has already is held at once, without I/O. ucm_task_cancel and
/// the deadline end entries that are not held yet; they let go of none that is. ucm_task_free lets go of
/// everything, at any time: of what is still being read when the read is done. A block may be held by
/// several tasks, and goes when the last of them is freed.
///
/// At most half of the arena's slots are held at a time, so that saves and other loads always find some.
/// Entries that do not fit end with UCM_STATUS_BUSY at once. A task that is never freed holds its slots until
/// the store is closed.
///
/// @param store handle
/// @param blocks count ids; copied before the call returns
/// @param count 1 to UCM_ENTRIES_MAX
/// @param timeout_ms deadline for reading, in milliseconds; 0: the store's timeout_ms; < 0: none
/// @param task receives the handle, or NULL on failure; the caller's, to be freed with ucm_task_free
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, misaligned, count 0 or too large, no handle),
///         UCM_STATUS_UNSUPPORTED (store_pipeline has no Cache tier; a store with device_id -1 only looks up),
///         UCM_STATUS_BUSY (the queue is full), UCM_STATUS_CLOSED. What happens to entries later (NOT_FOUND,
///         CORRUPT, IO, BUSY, TIMEOUT, CANCELLED) is told by the task
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_hold(
    store: *mut ucm_store_t,
    blocks: *const ucm_block_id_t,
    count: usize,
    timeout_ms: i64,
    task: *mut *mut ucm_task_t,
) -> ucm_status_t {
    enter(|| {
        check("task", task)?;
        // SAFETY: checked; the caller vouches for it, here and below.
        unsafe { put(task, std::ptr::null_mut()) };
        let handle = Token::from_pointer(store);
        let store = store_of(store)?;
        if count == 0 {
            return Err(invalid("count is 0; a hold has at least one block"));
        }
        check_count("count", count, UCM_ENTRIES_MAX)?;
        // SAFETY: the caller vouches for the array.
        let blocks = unsafe { block_ids(blocks, count)? };
        let reserved = Reserved::new(handle)?;
        let held = store.hold(blocks, timeout_ms)?;
        // SAFETY: as above.
        unsafe { put(task, reserved.fill(held).to_pointer()) };
        Ok(())
    })
}

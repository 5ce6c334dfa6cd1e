//! The C ABI: `include/ucm.h` is generated from the public items of this room.
//!
//! Nothing here decides anything. A function checks what only a C caller can get wrong (null and
//! misaligned pointers, unknown numbers, sizes, stale handles), converts, calls [`crate::store`] and
//! converts back. Every function goes through [`boundary::enter`], which stops panics and forked children.
//!
//! Item names are those of C. Lines of documentation end up in the header, so they speak to C programmers.

#![allow(non_camel_case_types)]
// The contract of each function's pointers is the comment that becomes its header text.
#![allow(clippy::missing_safety_doc)]

mod boundary;
mod handles;
mod pointers;

pub mod batch;
pub mod completion;
pub mod hash;
pub mod log;
pub mod lookup;
pub mod memory;
pub mod options;
pub mod stats;
pub mod status;
pub mod store;
pub mod task;

/// Sizes and offsets that programs were compiled with: a change here is a change of the ABI. The same
/// numbers are asserted in C by `ffi-tests/abi_layout.c`.
mod layout {
    use super::batch::ucm_batch;
    use super::completion::ucm_completion;
    use super::lookup::ucm_block_id;
    use super::stats::ucm_stats;
    use std::mem::{align_of, offset_of, size_of};

    const _: () = {
        assert!(usize::BITS == 64, "UCM needs a 64-bit platform");
        assert!(size_of::<ucm_block_id>() == 16 && align_of::<ucm_block_id>() == 1);
        assert!(size_of::<ucm_batch>() == 72 && align_of::<ucm_batch>() == 8);
        assert!(offset_of!(ucm_batch, struct_size) == 0);
        assert!(offset_of!(ucm_batch, blocks) == 8);
        assert!(offset_of!(ucm_batch, shards) == 16);
        assert!(offset_of!(ucm_batch, addresses) == 24);
        assert!(offset_of!(ucm_batch, count) == 32);
        assert!(offset_of!(ucm_batch, wait_event) == 40);
        assert!(offset_of!(ucm_batch, flags) == 48);
        assert!(offset_of!(ucm_batch, user_data) == 56);
        assert!(offset_of!(ucm_batch, timeout_ms) == 64);
        assert!(size_of::<ucm_completion>() == 24 && align_of::<ucm_completion>() == 8);
        assert!(offset_of!(ucm_completion, task) == 0);
        assert!(offset_of!(ucm_completion, user_data) == 8);
        assert!(offset_of!(ucm_completion, stage) == 16);
        assert!(offset_of!(ucm_completion, status) == 20);
        assert!(size_of::<ucm_stats>() == 256 && align_of::<ucm_stats>() == 8);
        assert!(offset_of!(ucm_stats, struct_size) == 0);
        assert!(offset_of!(ucm_stats, backends_degraded) == 184);
        assert!(offset_of!(ucm_stats, refreshes) == 248);
    };
}

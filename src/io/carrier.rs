//! Who carries one blocking transfer of the psync engine: system calls, or a library that reaches memory which
//! the kernel does not.

use std::fmt::Debug;

use super::files::transfer_once;
use super::thread::Stack;
use super::{DmaSlice, File, FileId, Operation};
use crate::error::{ErrorKind, Result};

/// Codes of a carrier's own are above those of the kernel's errnos.
pub const OWN_CODES: i32 = 4096;

/// Carries transfers, on whatever thread.
pub trait Carrier: Debug + Send + Sync {
    /// Name of the engine, for reports.
    fn name(&self) -> &'static str;

    /// The stack that threads need which call it, or let go of it.
    fn stack(&self) -> Stack {
        Stack::Engine
    }

    /// What it found, for reports.
    fn features(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether a transfer of this memory makes it keep something of the file, until [`Carrier::forget`].
    fn keeps(&self, _memory: DmaSlice) -> bool {
        false
    }

    /// The file is closed: drops what is kept of it. May block, so no reactor calls it.
    fn forget(&self, _file: FileId) {}

    /// Moves bytes on an open file's first page and back, to see whether it can in this directory.
    fn try_out(&self, _file: &File) -> Result<()> {
        Ok(())
    }

    /// One transfer: bytes moved, possibly fewer than asked for; or a negative errno, or one of its own codes,
    /// negative.
    ///
    /// # Safety
    /// `raw` is the descriptor of `file`, open during the call; `memory` is valid for the transfer.
    unsafe fn transfer(
        &self,
        operation: Operation,
        file: FileId,
        raw: i32,
        offset: u64,
        memory: DmaSlice,
    ) -> isize;
}

/// What a code of a carrier's own means.
pub(super) fn describe(code: i32) -> Option<(ErrorKind, String)> {
    (code > OWN_CODES).then(|| crate::cufile::describe(code))
}

/// `pread` and `pwrite`.
#[derive(Debug)]
pub struct SystemCalls;

impl Carrier for SystemCalls {
    fn name(&self) -> &'static str {
        "psync"
    }

    unsafe fn transfer(
        &self,
        operation: Operation,
        _file: FileId,
        raw: i32,
        offset: u64,
        memory: DmaSlice,
    ) -> isize {
        // SAFETY: passed on from the caller.
        unsafe { transfer_once(operation, raw, offset, memory) }
    }
}

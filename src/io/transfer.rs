//! A transfer: a request from the moment a reactor takes it in until it ends.

#![forbid(unsafe_code)]

use std::time::Instant;

use super::flights::{Failure, Flight};
use super::{Class, DmaSlice, Done, File, Operation, carrier};
use crate::error::{Error, ErrorKind};

/// A request that has not ended.
pub(super) struct Transfer {
    pub(super) operation: Operation,
    pub(super) file: File,
    pub(super) offset: u64,
    pub(super) memory: DmaSlice,
    pub(super) class: Class,
    pub(super) expires: Option<Instant>,
    pub(super) done: Done,
    /// Bytes handed to operations.
    pub(super) begun: usize,
    /// Operations in flight that carry bytes of it.
    pub(super) flights: u32,
    /// The transfer behind it in the same operation.
    pub(super) next: Option<usize>,
    /// Not to be coalesced: an operation it shared has failed, and whose fault that was is to be found out.
    pub(super) alone: bool,
    pub(super) error: Option<Error>,
}

/// Whether `right` begins where `left` ends, in the file and in memory.
pub(super) fn continues(left: &Transfer, right: &Transfer) -> bool {
    !left.alone
        && !right.alone
        && left.operation == right.operation
        && left.offset + left.memory.length as u64 == right.offset
        && left.memory.pointer.wrapping_add(left.memory.length) == right.memory.pointer
        && left.file.id() == right.file.id()
}

/// The error of a transfer whose operation failed.
pub(super) fn describe(failure: Failure, flight: &Flight, file: &File) -> Error {
    let at = flight.offset + flight.moved as u64;
    match failure {
        Failure::Errno(errno) => {
            let operation = match flight.operation {
                Operation::Read => "read",
                Operation::Write => "write",
            };
            match carrier::describe(errno) {
                Some((kind, text)) => {
                    Error::new(kind, format!("{operation} at byte {at}: {text}")).at(file.path())
                }
                None => Error::os(operation, Some(file.path()), Some(at), errno),
            }
        }
        Failure::EndOfFile => Error::new(
            ErrorKind::Corrupt,
            format!(
                "the file ends at byte {at}, inside the {} bytes to read at {}; it was cut by \
                 another process or by a crash",
                flight.memory.length, flight.offset
            ),
        )
        .at(file.path()),
    }
}

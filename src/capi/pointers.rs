//! From C pointers to slices: null, misaligned and impossibly long arguments become errors that name them.

use std::ffi::{CStr, c_char};

use crate::error::{Error, ErrorKind, Result};

/// The most entries of a batch.
pub const UCM_ENTRIES_MAX: usize = 1 << 20;

/// The most blocks, or addresses, in one call.
pub const UCM_COUNT_MAX: usize = 1 << 24;

/// The most tokens in one call of ucm_hash_tokens or ucm_hash_blocks.
pub const UCM_TOKENS_MAX: usize = 1 << 28;

/// The longest text or byte string, in bytes: YAML, option values, extra bytes of a hash.
pub const UCM_BYTES_MAX: usize = 1 << 28;

/// Larger values of a `struct_size` are taken for uninitialised memory.
pub(super) const STRUCT_SIZE_MAX: usize = 4096;

/// An error of kind `InvalidArgument`.
pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

/// Fails when `pointer` cannot be one to `T`.
pub(super) fn check<T>(name: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(invalid(format!("{name} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(invalid(format!(
            "{name} is {pointer:p}, which is not aligned to {} bytes",
            align_of::<T>()
        )));
    }
    Ok(())
}

/// Fails when `count` is over `limit`.
pub(super) fn check_count(name: &str, count: usize, limit: usize) -> Result<()> {
    if count > limit {
        return Err(invalid(format!("{name} is {count}; the most is {limit}")));
    }
    Ok(())
}

/// An input array; any pointer will do when `count` is 0.
///
/// # Safety
/// If `pointer` is neither null nor misaligned, it is valid for reading `count` items for `'a`.
pub(super) unsafe fn slice<'a, T>(
    name: &str,
    pointer: *const T,
    count: usize,
    limit: usize,
) -> Result<&'a [T]> {
    check_count(&format!("the count of {name}"), count, limit)?;
    if count == 0 {
        return Ok(&[]);
    }
    check(name, pointer)?;
    // SAFETY: not null, aligned, and the caller vouches for `count` items; limits are far below isize::MAX.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// An output array; any pointer will do when `count` is 0.
///
/// # Safety
/// If `pointer` is neither null nor misaligned, it is valid for reading and writing `count` items for
/// `'a`, and nothing else touches them meanwhile.
pub(super) unsafe fn slice_mut<'a, T>(
    name: &str,
    pointer: *mut T,
    count: usize,
    limit: usize,
) -> Result<&'a mut [T]> {
    check_count(&format!("the count of {name}"), count, limit)?;
    if count == 0 {
        return Ok(&mut []);
    }
    check(name, pointer)?;
    // SAFETY: not null, aligned, and the caller vouches for `count` items; limits are far below isize::MAX.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

/// A NUL-terminated UTF-8 string.
///
/// # Safety
/// If `pointer` is not null, a NUL ends it, and it stays as it is for `'a`.
pub(super) unsafe fn text<'a>(name: &str, pointer: *const c_char) -> Result<&'a str> {
    check(name, pointer)?;
    // SAFETY: not null, and the caller vouches for the NUL.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|error| invalid(format!("{name} is not UTF-8: {error}")))
}

/// Writes an output through a pointer that has been checked.
///
/// # Safety
/// `pointer` has passed [`check`], and the caller vouches that it is valid for writing.
pub(super) unsafe fn put<T>(pointer: *mut T, value: T) {
    // SAFETY: checked for null and alignment; the caller vouches for the rest.
    unsafe { pointer.write(value) }
}

//! `ucm_options_t`: a configuration in the making.

use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::boundary::enter;
use super::handles::{Kind, Registry, Token};
use super::pointers::{UCM_BYTES_MAX, check, invalid, put, slice, text};
use super::status::ucm_status_t;
use crate::config::Options;
use crate::error::Result;

/// Options of a store: keys and values as in a YAML file. An opaque handle.
///
/// May be changed and used again after ucm_store_open, and by several threads.
pub struct ucm_options(());

/// @since 0.1
pub type ucm_options_t = ucm_options;

static OPTIONS: Registry<Arc<Mutex<Options>>> = Registry::new(Kind::Options);

/// A copy of the options behind a handle.
pub(super) fn options_of(handle: *const ucm_options_t) -> Result<Options> {
    Ok(OPTIONS.get(Token::from_pointer(handle))?.lock().clone())
}

/// Stores the handle of new options in `*options`.
///
/// # Safety
/// `options` is null, misaligned, or valid for writing.
unsafe fn hand_out(
    options: *mut *mut ucm_options_t,
    make: impl FnOnce() -> Result<Options>,
) -> Result<()> {
    check("options", options)?;
    // SAFETY: checked; the caller vouches for it.
    unsafe { put(options, std::ptr::null_mut()) };
    let token = OPTIONS.insert(Arc::new(Mutex::new(make()?)))?;
    // SAFETY: as above.
    unsafe { put(options, token.to_pointer()) };
    Ok(())
}

/// Makes options in which every key has its default.
///
/// Does not block.
///
/// @param options receives the handle, or NULL on failure; the caller's, to be freed with ucm_options_free
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (options is NULL or misaligned),
///         UCM_STATUS_CLOSED (forked child)
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_options_new(options: *mut *mut ucm_options_t) -> ucm_status_t {
    // SAFETY: the caller vouches for the pointer.
    enter(|| unsafe { hand_out(options, || Ok(Options::new())) })
}

/// Reads options from a YAML file: a whole UCM file (with ucm_connectors), or the inner mapping alone.
///
/// Blocks while the file is read.
///
/// @param path NUL-terminated path
/// @param options receives the handle, or NULL on failure; the caller's, to be freed with ucm_options_free
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_CONFIG (not YAML, unknown key, value out of range: the message names the
///         key, the value, what is allowed and the nearest known key),
///         UCM_STATUS_NOT_FOUND, UCM_STATUS_PERMISSION, UCM_STATUS_IO (the file cannot be read),
///         UCM_STATUS_INVALID_ARGUMENT (a pointer is NULL or misaligned),
///         UCM_STATUS_CLOSED (forked child)
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_options_from_yaml_file(
    path: *const c_char,
    options: *mut *mut ucm_options_t,
) -> ucm_status_t {
    enter(|| {
        check("path", path)?;
        // SAFETY: the caller vouches for the pointers, and for the NUL at the end of the path.
        unsafe {
            hand_out(options, || {
                let path = Path::new(OsStr::from_bytes(CStr::from_ptr(path).to_bytes()));
                Options::from_yaml_file(path)
            })
        }
    })
}

/// Reads options from YAML text: a whole UCM file (with ucm_connectors), or the inner mapping alone.
///
/// Does not block.
///
/// @param text UTF-8, need not be NUL-terminated
/// @param length bytes of text
/// @param options receives the handle, or NULL on failure; the caller's, to be freed with ucm_options_free
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_CONFIG (not UTF-8, not YAML, unknown key, value out of range),
///         UCM_STATUS_INVALID_ARGUMENT (a pointer is NULL or misaligned, length over UCM_BYTES_MAX),
///         UCM_STATUS_CLOSED (forked child)
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_options_from_yaml(
    text: *const c_char,
    length: usize,
    options: *mut *mut ucm_options_t,
) -> ucm_status_t {
    enter(|| {
        check("text", text)?;
        // SAFETY: the caller vouches for the pointers and the length.
        unsafe {
            let bytes = slice("text", text.cast::<u8>(), length, UCM_BYTES_MAX)?;
            hand_out(options, || {
                let text = std::str::from_utf8(bytes).map_err(|error| {
                    let message = format!("the configuration is not UTF-8: {error}");
                    crate::error::Error::new(crate::error::ErrorKind::InvalidConfig, message)
                })?;
                Options::from_yaml(text)
            })
        }
    })
}

/// Sets one key. The keys are those of the YAML file (docs/configuration.md); the last value stands.
///
/// Does not block. On failure the options stay as they were.
///
/// @param options handle
/// @param key NUL-terminated UTF-8
/// @param value NUL-terminated UTF-8; a list is YAML flow text such as [1, 2], directories also a:b
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_CONFIG (unknown key, value out of range: the message names the key, the
///         value, what is allowed and the nearest known key),
///         UCM_STATUS_INVALID_ARGUMENT (a pointer is NULL, a string is not UTF-8, options is no handle),
///         UCM_STATUS_CLOSED (options was freed; forked child)
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_options_set(
    options: *mut ucm_options_t,
    key: *const c_char,
    value: *const c_char,
) -> ucm_status_t {
    enter(|| {
        let options = OPTIONS.get(Token::from_pointer(options))?;
        // SAFETY: the caller vouches for the strings.
        let (key, value) = unsafe { (text("key", key)?, text("value", value)?) };
        if key.is_empty() {
            return Err(invalid("key is empty"));
        }
        options.lock().set(key, value)
    })
}

/// Frees options. Stores that were opened with them are not affected.
///
/// Does not block. NULL and handles freed before are ignored.
///
/// @param options handle, or NULL
/// @since 0.1
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucm_options_free(options: *mut ucm_options_t) {
    if !options.is_null() {
        let _ = enter(|| OPTIONS.remove(Token::from_pointer(options)).map(drop));
    }
}

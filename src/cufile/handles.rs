//! Files as cuFile knows them: registered when first used, until the file is closed.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;

use super::api::{self, HANDLE_DESCRIPTOR, SUCCESS};
use super::driver::Driver;
use crate::io::FileId;

/// A registered file. It has a descriptor of its own: cuFile wants one that stays open until the file is
/// deregistered, and others close theirs first.
pub(super) struct Handle {
    raw: api::Handle,
    driver: Arc<Driver>,
    _descriptor: OwnedFd,
}

// SAFETY: cuFile allows any thread to use a handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Registers the open file; an errno or a status of cuFile where it is refused.
    fn register(driver: &Arc<Driver>, raw: i32) -> Result<Self, i32> {
        // SAFETY: the caller's file is open during the call.
        let given = unsafe { BorrowedFd::borrow_raw(raw) };
        let descriptor = rustix::io::fcntl_dupfd_cloexec(given, libc::STDERR_FILENO + 1)
            .map_err(|errno| errno.raw_os_error())?;
        let mut description = api::Description {
            kind: HANDLE_DESCRIPTOR,
            descriptor: descriptor.as_raw_fd().into(),
            operations: std::ptr::null(),
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: both places are valid; the descriptor is open and stays so until the handle is deregistered.
        let status =
            unsafe { (driver.api().functions.handle_register)(&mut handle, &mut description) };
        match status.code {
            SUCCESS => {
                Ok(Self { raw: handle, driver: Arc::clone(driver), _descriptor: descriptor })
            }
            code => Err(code),
        }
    }

    pub(super) fn raw(&self) -> api::Handle {
        self.raw
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: registered by `register`; every transfer of it holds the handle, so none is in flight.
        unsafe { (self.driver.api().functions.handle_deregister)(self.raw) };
    }
}

/// The registered files.
pub(super) struct Handles {
    driver: Arc<Driver>,
    files: Mutex<HashMap<FileId, Arc<Handle>>>,
}

impl Handles {
    pub(super) fn new(driver: Arc<Driver>) -> Self {
        Self { driver, files: Mutex::default() }
    }

    /// The handle of an open file. Registering may wait for the mount, so no lock is held then; of two that
    /// registered the same file at once one is given up.
    pub(super) fn get(&self, file: FileId, raw: i32) -> Result<Arc<Handle>, i32> {
        if let Some(handle) = self.files.lock().get(&file) {
            return Ok(Arc::clone(handle));
        }
        let new = Arc::new(Handle::register(&self.driver, raw)?);
        let mut files = self.files.lock();
        let kept = Arc::clone(files.entry(file).or_insert_with(|| Arc::clone(&new)));
        // Given up after the lock, which all directories share: that may wait for the mount as well.
        drop(files);
        drop(new);
        Ok(kept)
    }

    /// The file is closed. May wait for the mount.
    pub(super) fn forget(&self, file: FileId) {
        let handle = self.files.lock().remove(&file);
        drop(handle);
    }
}

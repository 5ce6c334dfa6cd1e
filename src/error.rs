//! One error type for the whole engine: a kind, a sentence, and where it happened.
//!
//! Errors are cheap to clone, because one failed read may end many tasks. The text names the thing
//! that failed and the remedy; it never repeats its source.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What every fallible function of the engine returns.
pub type Result<T> = std::result::Result<T, Error>;

/// The class of a failure. The C ABI maps each to one status, number for number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// An argument is outside what the function allows.
    InvalidArgument,
    /// A configuration key or value is unknown or out of range.
    InvalidConfig,
    /// The block, file or name does not exist.
    NotFound,
    /// Bytes do not match their checksum or format.
    Corrupt,
    /// The drive or file system failed.
    Io,
    /// No space is left on the file system, or the capacity bound is reached.
    NoSpace,
    /// Memory could not be had.
    OutOfMemory,
    /// A deadline passed.
    Timeout,
    /// A queue or all slots are full; try again later.
    Busy,
    /// The caller cancelled the task.
    Cancelled,
    /// The platform, library or file system does not offer this.
    Unsupported,
    /// The accelerator or its driver failed.
    Device,
    /// The operating system denied access.
    Permission,
    /// The handle is closed, or this is a forked child.
    Closed,
    /// A defect in UCM itself.
    Internal,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    errno: Option<i32>,
}

/// A failure with its context.
#[derive(Clone, Debug)]
pub struct Error(Arc<Inner>);

impl Error {
    /// A failure described by one sentence.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            message: message.into(),
            path: None,
            offset: None,
            errno: None,
        }))
    }

    /// A failed system call: the kind, the sentence and the remedy come from `errno`.
    pub fn os(operation: &str, path: Option<&Path>, offset: Option<u64>, errno: i32) -> Self {
        let (kind, sentence) = describe_errno(errno);
        Self(Arc::new(Inner {
            kind,
            message: format!("{operation}: {sentence}"),
            path: path.map(Path::to_path_buf),
            offset,
            errno: Some(errno),
        }))
    }

    /// As [`Error::os`], from a `std::io::Error`.
    pub fn io(operation: &str, path: Option<&Path>, source: &std::io::Error) -> Self {
        match source.raw_os_error() {
            Some(errno) => Self::os(operation, path, None, errno),
            None => Self(Arc::new(Inner {
                kind: ErrorKind::Io,
                message: format!("{operation}: {source}"),
                path: path.map(Path::to_path_buf),
                offset: None,
                errno: None,
            })),
        }
    }

    /// A panic on an engine thread, as the failure of everything that thread was to do.
    pub fn panicked(thread: &str, panic: &(dyn std::any::Any + Send)) -> Self {
        let said = panic.downcast_ref::<&str>().copied();
        let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        let said = said.unwrap_or("no message");
        let text = format!("{thread} panicked: {said}; this is a defect in UCM; reopen the store");
        Self::new(ErrorKind::Internal, text)
    }

    /// The same failure with the file it concerns.
    #[must_use]
    pub fn at(self, path: &Path) -> Self {
        let inner = &self.0;
        Self(Arc::new(Inner {
            kind: inner.kind,
            message: inner.message.clone(),
            path: Some(path.to_path_buf()),
            offset: inner.offset,
            errno: inner.errno,
        }))
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno of the system call that failed, if one did.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(path) = &self.0.path {
            write!(f, " ({}", path.display())?;
            if let Some(offset) = self.0.offset {
                write!(f, " at byte {offset}")?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// The kind of an errno, and one sentence that says what happened and what to do about it.
fn describe_errno(errno: i32) -> (ErrorKind, String) {
    let (kind, text) = match errno {
        libc::ENOENT => {
            (ErrorKind::NotFound, "no such file; another process may have reclaimed it")
        }
        libc::EACCES | libc::EPERM => (
            ErrorKind::Permission,
            "permission denied; run as the owner of the directory, or fix its mode (UCM creates 0700)",
        ),
        libc::EROFS => {
            (ErrorKind::Permission, "the file system is read-only; remount it read-write")
        }
        libc::ENOSPC => (
            ErrorKind::NoSpace,
            "no space left on the file system; free some, or lower posix_capacity_gb",
        ),
        libc::EDQUOT => {
            (ErrorKind::NoSpace, "the disk quota is used up; raise it, or lower posix_capacity_gb")
        }
        libc::EFBIG => (
            ErrorKind::NoSpace,
            "the file is larger than the file system or the ulimit -f allows; lower segment_size_mb",
        ),
        libc::ENOMEM => (
            ErrorKind::OutOfMemory,
            "the kernel is out of memory or the memlock limit is reached; raise `ulimit -l` or lower cache_buffer_capacity_gb",
        ),
        libc::EMFILE | libc::ENFILE => {
            (ErrorKind::Io, "no file descriptor is left; raise `ulimit -n` or segment_size_mb")
        }
        libc::EIO => (ErrorKind::Io, "the drive reported an error; check the kernel log"),
        libc::ESTALE => (
            ErrorKind::Io,
            "the network file handle is stale; the server restarted or removed the file",
        ),
        libc::EINVAL => (
            ErrorKind::Io,
            "the kernel refused the arguments; if the file system lacks O_DIRECT set io_direct: false",
        ),
        libc::EOPNOTSUPP | libc::ENOSYS => {
            (ErrorKind::Unsupported, "not supported by this kernel or file system")
        }
        libc::ETIMEDOUT => {
            (ErrorKind::Timeout, "the storage did not answer in time; check the mount")
        }
        libc::ENODEV | libc::ENXIO => (ErrorKind::Io, "the device is gone; check the mount"),
        libc::ENOTDIR => (
            ErrorKind::InvalidConfig,
            "a component of the path is not a directory; fix storage_backends",
        ),
        libc::EISDIR => (ErrorKind::InvalidConfig, "the path is a directory"),
        libc::EEXIST => (ErrorKind::Io, "the file exists already"),
        libc::ENAMETOOLONG => {
            (ErrorKind::InvalidConfig, "the path is too long; shorten storage_backends")
        }
        libc::ELOOP => (ErrorKind::InvalidConfig, "too many symbolic links in the path"),
        libc::EBUSY => (ErrorKind::Busy, "the resource is busy; try again"),
        libc::ECANCELED => (ErrorKind::Cancelled, "the operation was cancelled"),
        libc::EAGAIN => (ErrorKind::Busy, "the resource is temporarily unavailable; try again"),
        libc::EINTR => (ErrorKind::Io, "a signal interrupted the call"),
        libc::EBADF => (ErrorKind::Internal, "the descriptor is not open; this is a defect in UCM"),
        libc::EFAULT => (
            ErrorKind::Internal,
            "an address is outside the process's memory; check the addresses of the batch",
        ),
        libc::ESHUTDOWN | libc::ENOTCONN => {
            (ErrorKind::Io, "the storage connection is down; check the mount")
        }
        _ => {
            return (
                ErrorKind::Io,
                format!(
                    "{}; check the mount and the kernel log",
                    std::io::Error::from_raw_os_error(errno)
                ),
            );
        }
    };
    (kind, format!("{text} (errno {errno})"))
}

//! I/O: files, rings and the reactors that drive them, one set for each storage backend.
//!
//! The rest of the engine sees three things: [`Files`] (path operations, blocking, called on a backend's
//! path pool only), [`Request`]s (reads and writes handed to a reactor, completed by a callback on its
//! thread), and [`backend::Backend`], which owns both for one directory. Which engine carries the
//! requests (io_uring, psync, sim) is decided by a probe at open and visible in stats.

pub mod backend;
pub mod carrier;
#[cfg(test)]
mod carrier_tests;
#[cfg(test)]
mod conformance;
pub mod engine;
#[cfg(test)]
mod fault_tests;
pub mod files;
#[cfg(test)]
mod files_tests;
mod flights;
mod mailbox;
#[cfg(test)]
mod measure;
pub mod pool;
pub mod probe;
#[cfg(test)]
mod probe_tests;
pub mod psync;
pub mod reactor;
pub mod report;
mod schedule;
#[cfg(test)]
mod seccomp;
pub mod sim;
pub mod thread;
mod transfer;
pub mod uring;
mod uring_setup;
mod uring_tables;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

pub use self::backend::{Backend, BackendConfig};
pub use self::files::OsFiles;
pub use self::reactor::Drained;
pub use self::report::{Fallback, Report};
pub use crate::config::{DirectIo, IoEngine};
use crate::error::Result;

/// Memory that a read or a write moves bytes of. Never a Rust reference: the kernel may write it at any time.
///
/// Whoever builds a [`Request`] vouches that the memory stays valid until the request's `done` has been
/// called or leaked; `done` usually owns the slot.
#[derive(Clone, Copy, Debug)]
pub struct DmaSlice {
    /// First byte; page aligned for direct I/O.
    pub pointer: *mut u8,
    /// Length in bytes; a multiple of the page for direct I/O.
    pub length: usize,
}

// SAFETY: a plain address; who may touch it and when is the contract of `Request`.
unsafe impl Send for DmaSlice {}
// SAFETY: as above.
unsafe impl Sync for DmaSlice {}

/// Read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// File to memory.
    Read,
    /// Memory to file.
    Write,
}

/// Who waits for a request: loads go before saves everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody's first token waits.
    Load,
    /// A save, or the manifest record of one.
    Save,
    /// Prefetch, scrub, reclaim.
    Background,
}

impl Class {
    /// How many there are.
    pub const COUNT: usize = 3;
    /// All, the most urgent first.
    pub const ALL: [Self; Self::COUNT] = [Self::Load, Self::Save, Self::Background];

    /// Position in [`Class::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

/// Called once, on a reactor's thread, when a request has ended: it must not block. Dropped uncalled only
/// when a reactor that cannot be drained is leaked together with it.
pub type Done = Box<dyn FnOnce(Result<()>) + Send>;

/// One read or write. Short transfers are continued, EINTR and EAGAIN retried, and transfers above
/// `io_size_kb` split by the reactor; a read past the end of the file is an error of kind `Corrupt`.
pub struct Request {
    /// Read or write.
    pub operation: Operation,
    /// Kept open until the request has ended.
    pub file: File,
    /// Byte offset in the file.
    pub offset: u64,
    /// Where the bytes go or come from.
    pub memory: DmaSlice,
    /// Its queue.
    pub class: Class,
    /// If it has not begun by then it ends with `Timeout`. Once begun it runs to its end.
    pub expires: Option<Instant>,
    /// Its end.
    pub done: Done,
}

/// An open file; closed when the last clone is dropped.
#[derive(Clone)]
pub struct File(Arc<FileInner>);

struct FileInner {
    raw: i32,
    id: FileId,
    path: PathBuf,
    files: Arc<dyn Files>,
    watchers: Mutex<Vec<Weak<dyn CloseWatcher>>>,
}

/// Names one open of a file for ever: unlike a descriptor it is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(u64);

impl FileId {
    /// A number that spreads files evenly.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// Whoever keeps a second reference to an open file (a ring's table of registered files) is told when
/// the file is closed, because an unlinked file keeps its space until the last reference is gone.
pub trait CloseWatcher: Send + Sync {
    /// The file will not be used any more. Called on the thread that drops it: must not block.
    fn closed(&self, file: FileId);
}

impl File {
    /// Wraps a raw descriptor that `files` made and will close; `path` is for messages.
    pub fn new(raw: i32, path: &Path, files: Arc<dyn Files>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = FileId(NEXT.fetch_add(1, Ordering::Relaxed));
        let watchers = Mutex::new(Vec::new());
        Self(Arc::new(FileInner { raw, id, path: path.to_path_buf(), files, watchers }))
    }

    /// The descriptor (for `sim`: the number of the open file).
    pub fn raw(&self) -> i32 {
        self.0.raw
    }

    /// This open of the file.
    pub fn id(&self) -> FileId {
        self.0.id
    }

    /// The path it was opened by; it may have been renamed since.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Has `watcher` told when the file is closed.
    pub fn watch(&self, watcher: Weak<dyn CloseWatcher>) {
        let mut watchers = self.0.watchers.lock();
        if !watchers.iter().any(|known| known.ptr_eq(&watcher)) {
            watchers.push(watcher);
        }
    }
}

impl Drop for FileInner {
    fn drop(&mut self) {
        for watcher in self.watchers.get_mut().drain(..) {
            if let Some(watcher) = watcher.upgrade() {
                watcher.closed(self.id);
            }
        }
        self.files.close(self.raw);
    }
}

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenHow {
    /// For reading only, or for both.
    pub access: Access,
    /// What to do if it is not there, or is.
    pub create: Create,
    /// Past the page cache or through it.
    pub direct: bool,
}

/// Access of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// O_RDONLY.
    Read,
    /// O_RDWR.
    ReadWrite,
}

/// Creation of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// It must exist.
    No,
    /// It must not exist (O_EXCL); mode 0600.
    New,
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Length in bytes.
    pub length: u64,
    /// Bytes allocated on storage.
    pub allocated: u64,
    /// Device and inode: the identity of the file behind a name.
    pub identity: (u64, u64),
}

/// Room on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes in all.
    pub total: u64,
    /// Bytes an unprivileged process may still use.
    pub available: u64,
}

/// Path operations and small blocking transfers. Called on path pools (and at open), never on a reactor.
pub trait Files: Send + Sync {
    /// Creates a directory and its parents, mode 0700.
    fn create_dir_all(&self, directory: &Path) -> Result<()>;
    /// Opens a file.
    fn open(&self, path: &Path, how: OpenHow) -> Result<File>;
    /// Closes a raw descriptor; called by [`File`]'s drop only.
    fn close(&self, raw: i32);
    /// Names in a directory, from a fresh `opendir` (which on NFS sees new files); order undefined.
    fn list(&self, directory: &Path) -> Result<Vec<OsString>>;
    /// Renames; fails with EEXIST where the target exists (RENAME_NOREPLACE, or an equal).
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
    /// Removes a name.
    fn unlink(&self, path: &Path) -> Result<()>;
    /// `stat` by name.
    fn metadata(&self, path: &Path) -> Result<Metadata>;
    /// `fstat`.
    fn file_metadata(&self, file: &File) -> Result<Metadata>;
    /// Drops what the file system cached about the names in a directory (`statx` with FORCE_SYNC).
    fn revalidate_dir(&self, directory: &Path) -> Result<()>;
    /// Flushes a directory's entries.
    fn sync_dir(&self, directory: &Path) -> Result<()>;
    /// Reserves space up to `length` and extends the file to it, without writing (`fallocate`; where the
    /// file system lacks it, `ftruncate`).
    fn allocate(&self, file: &File, length: u64) -> Result<()>;
    /// Cuts or extends to `length`.
    fn truncate(&self, file: &File, length: u64) -> Result<()>;
    /// `fdatasync`.
    fn sync_data(&self, file: &File) -> Result<()>;
    /// Reads until `memory` is full or the file ends; returns the bytes read. The file may be direct: offset,
    /// address and length are page multiples.
    ///
    /// # Safety
    /// `memory` is valid for writing during the call.
    unsafe fn read_at(&self, file: &File, offset: u64, memory: DmaSlice) -> Result<usize>;
    /// Writes all of `memory`.
    ///
    /// # Safety
    /// `memory` is valid for reading during the call.
    unsafe fn write_at(&self, file: &File, offset: u64, memory: DmaSlice) -> Result<()>;
    /// Room of the file system that holds `directory`.
    fn space(&self, directory: &Path) -> Result<Space>;
}

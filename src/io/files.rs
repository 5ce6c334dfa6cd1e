//! `OsFiles`: path operations and small blocking transfers on a real file system.
//!
//! Every failure names the operation, the path and the remedy. Calls are repeated when a signal
//! interrupts them, short transfers are continued, and what a file system lacks (`RENAME_NOREPLACE` on
//! NFS, `fallocate` on FUSE) is replaced by calls of the same meaning. It knows nothing of rings.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, StatxFlags, fallocate, fdatasync,
    fstat, fsync, ftruncate, linkat, openat, renameat, renameat_with, stat, statvfs, statx,
    unlinkat,
};
use rustix::io::Errno;

use super::pool::Pool;
use super::{Access, Create, DmaSlice, File, Files, Metadata, OpenHow, Operation, Space, thread};
use crate::error::{Error, Result};

/// Mode of files: KV is as private as the prompts it was computed from.
const FILE_MODE: Mode = Mode::from_raw_mode(0o600);
/// Mode of directories.
const DIRECTORY_MODE: u32 = 0o700;
/// The smallest sector of a drive. A direct transfer that ends inside one has met the end of the file.
pub const SECTOR_BYTES: usize = 512;
/// Linux moves at most this much in one call (read(2), NOTES), rounded down to a page here.
const CALL_BYTES_MAX: usize = 0x7fff_f000;

/// The operating system's files.
pub struct OsFiles {
    /// Handed to each file, which closes itself through it.
    this: Weak<Self>,
    /// Where descriptors dropped on a reactor are closed, because close may flush (NFS) and so block.
    closer: OnceLock<Pool>,
}

impl OsFiles {
    /// Files of this process.
    pub fn new() -> Arc<Self> {
        Arc::new_cyclic(|this| Self { this: this.clone(), closer: OnceLock::new() })
    }

    /// Has descriptors that are dropped on a reactor closed by `pool`.
    pub fn close_on(&self, pool: Pool) {
        let _ = self.closer.set(pool);
    }

    /// `link` and `unlink`, which together are a rename that replaces nothing (NFS has no other).
    fn rename_by_link(&self, from: &Path, to: &Path) -> rustix::io::Result<()> {
        match retry(|| linkat(CWD, from, CWD, to, AtFlags::empty())) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return self.rename_by_claim(from, to);
            }
            Err(errno) => return Err(errno),
        }
        match retry(|| unlinkat(CWD, from, AtFlags::empty())) {
            // Two renamed the same file at once: the one whose unlink came first has won.
            Err(Errno::NOENT) => {
                let _ = unlinkat(CWD, to, AtFlags::empty());
                Err(Errno::NOENT)
            }
            other => other,
        }
    }

    /// Where there are no hard links either: an exclusive create claims the target's name, and a rename
    /// replaces what was just created.
    fn rename_by_claim(&self, from: &Path, to: &Path) -> rustix::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        drop(retry(|| openat(CWD, to, flags, FILE_MODE))?);
        retry(|| renameat(CWD, from, CWD, to)).inspect_err(|_| {
            let _ = unlinkat(CWD, to, AtFlags::empty());
        })
    }
}

/// Repeats a call that a signal interrupted.
pub(super) fn retry<T>(call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    rustix::io::retry_on_intr(call)
}

/// Makes an [`Error`] of an errno.
pub(super) fn failed(operation: &str, path: &Path) -> impl Fn(Errno) -> Error {
    move |errno| Error::os(operation, Some(path), None, errno.raw_os_error())
}

/// The descriptor of an open file, for one call.
pub(super) fn descriptor(file: &File) -> BorrowedFd<'_> {
    // SAFETY: `File` keeps its descriptor open while it lives, and the borrow is bound to it.
    unsafe { BorrowedFd::borrow_raw(file.raw()) }
}

/// A program that has closed its standard descriptors, as daemons do, still prints: into whichever file got
/// such a number. None of ours keeps one.
fn above_standard(opened: OwnedFd) -> rustix::io::Result<OwnedFd> {
    if opened.as_raw_fd() > libc::STDERR_FILENO {
        return Ok(opened);
    }
    rustix::io::fcntl_dupfd_cloexec(&opened, libc::STDERR_FILENO + 1)
}

fn metadata_of(stat: &rustix::fs::Stat) -> Metadata {
    /// `st_blocks` counts these, whatever the file system's block is (stat(2)).
    const STAT_BLOCK_BYTES: u64 = 512;
    Metadata {
        length: stat.st_size as u64,
        allocated: stat.st_blocks as u64 * STAT_BLOCK_BYTES,
        identity: (stat.st_dev, stat.st_ino),
    }
}

impl Files for OsFiles {
    fn create_dir_all(&self, directory: &Path) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(directory)
            .map_err(|error| Error::io("create directory", Some(directory), &error))
    }

    fn open(&self, path: &Path, how: OpenHow) -> Result<File> {
        let mut flags = OFlags::CLOEXEC;
        flags |= match how.access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        if how.create == Create::New {
            flags |= OFlags::CREATE | OFlags::EXCL;
        }
        if how.direct {
            flags |= OFlags::DIRECT;
        }
        let opened = retry(|| openat(CWD, path, flags, FILE_MODE)).map_err(failed("open", path))?;
        let opened = above_standard(opened).map_err(failed("open", path))?;
        let this = self.this.upgrade().expect("a method runs, so the object lives");
        Ok(File::new(opened.into_raw_fd(), path, this))
    }

    fn close(&self, raw: i32) {
        // SAFETY: `File`'s drop, the only caller, gives up its descriptor exactly once.
        let close = move || unsafe { rustix::io::close(raw) };
        match self.closer.get() {
            Some(pool) if thread::is_reactor() => {
                if pool.run(Box::new(close)).is_err() {
                    close();
                }
            }
            _ => close(),
        }
    }

    fn list(&self, directory: &Path) -> Result<Vec<OsString>> {
        let failed = |error: &std::io::Error| Error::io("list directory", Some(directory), error);
        std::fs::read_dir(directory)
            .map_err(|error| failed(&error))?
            .map(|entry| entry.map(|entry| entry.file_name()).map_err(|error| failed(&error)))
            .collect()
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        match retry(|| renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.rename_by_link(from, to),
            other => other,
        }
        .map_err(failed("rename", from))
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        retry(|| unlinkat(CWD, path, AtFlags::empty())).map_err(failed("unlink", path))
    }

    fn metadata(&self, path: &Path) -> Result<Metadata> {
        retry(|| stat(path)).map(|stat| metadata_of(&stat)).map_err(failed("stat", path))
    }

    fn file_metadata(&self, file: &File) -> Result<Metadata> {
        retry(|| fstat(descriptor(file)))
            .map(|stat| metadata_of(&stat))
            .map_err(failed("fstat", file.path()))
    }

    fn revalidate_dir(&self, directory: &Path) -> Result<()> {
        let flags = AtFlags::STATX_FORCE_SYNC;
        match retry(|| statx(CWD, directory, flags, StatxFlags::BASIC_STATS)) {
            // Seccomp profiles older than statx (2017) refuse it; a fresh opendir is what remains.
            Err(Errno::NOSYS | Errno::PERM) => self.list(directory).map(drop),
            other => other.map(drop).map_err(failed("statx", directory)),
        }
    }

    fn sync_dir(&self, directory: &Path) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = retry(|| openat(CWD, directory, flags, Mode::empty()))
            .map_err(failed("open directory", directory))?;
        match retry(|| fsync(&opened)) {
            // Some network file systems have no fsync of directories: their servers write through.
            Err(Errno::INVAL) => Ok(()),
            other => other.map_err(failed("flush directory", directory)),
        }
    }

    fn allocate(&self, file: &File, length: u64) -> Result<()> {
        let call = || fallocate(descriptor(file), FallocateFlags::empty(), 0, length);
        match retry(call) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let present = self.file_metadata(file)?.length;
                if present < length { self.truncate(file, length) } else { Ok(()) }
            }
            other => other.map_err(failed("allocate", file.path())),
        }
    }

    fn truncate(&self, file: &File, length: u64) -> Result<()> {
        retry(|| ftruncate(descriptor(file), length)).map_err(failed("truncate", file.path()))
    }

    fn sync_data(&self, file: &File) -> Result<()> {
        // EIO is reported once and the pages are then clean (fsyncgate): never repeated here.
        retry(|| fdatasync(descriptor(file))).map_err(failed("fdatasync", file.path()))
    }

    unsafe fn read_at(&self, file: &File, offset: u64, memory: DmaSlice) -> Result<usize> {
        let mut moved = 0;
        while moved < memory.length {
            // SAFETY: the caller vouches for `memory`, and `moved` is below its length.
            match unsafe { transfer(Operation::Read, file, offset, memory, moved) } {
                Ok(0) => break,
                Ok(count) => moved += count,
                Err(libc::EINVAL) if !moved.is_multiple_of(SECTOR_BYTES) => break,
                Err(errno) => {
                    let at = offset + moved as u64;
                    return Err(Error::os("read", Some(file.path()), Some(at), errno));
                }
            }
        }
        Ok(moved)
    }

    unsafe fn write_at(&self, file: &File, offset: u64, memory: DmaSlice) -> Result<()> {
        let mut moved = 0;
        while moved < memory.length {
            let at = Some(offset + moved as u64);
            // SAFETY: the caller vouches for `memory`, and `moved` is below its length.
            match unsafe { transfer(Operation::Write, file, offset, memory, moved) } {
                // A write of nothing without an error would be repeated for ever.
                Ok(0) => return Err(Error::os("write", Some(file.path()), at, libc::EIO)),
                Ok(count) => moved += count,
                Err(errno) => return Err(Error::os("write", Some(file.path()), at, errno)),
            }
        }
        Ok(())
    }

    fn space(&self, directory: &Path) -> Result<Space> {
        let room = retry(|| statvfs(directory)).map_err(failed("statvfs", directory))?;
        Ok(Space { total: room.f_blocks * room.f_frsize, available: room.f_bavail * room.f_frsize })
    }
}

/// One `pread` or `pwrite` of what lies behind `moved`: bytes moved, or an errno.
///
/// # Safety
/// `memory` is valid for the transfer, and `moved` is below its length.
unsafe fn transfer(
    operation: Operation,
    file: &File,
    offset: u64,
    memory: DmaSlice,
    moved: usize,
) -> std::result::Result<usize, i32> {
    // SAFETY: `moved` lies within the memory that the caller vouches for, so the rest does too.
    let result = unsafe {
        let rest = DmaSlice { pointer: memory.pointer.add(moved), length: memory.length - moved };
        transfer_once(operation, file.raw(), offset + moved as u64, rest)
    };
    usize::try_from(result).map_err(|_| -result as i32)
}

/// One `pread` or `pwrite` on raw memory: bytes moved, or a negative errno. Repeated when a signal
/// interrupts it before anything has moved.
///
/// # Safety
/// `memory` is valid for the transfer.
pub(super) unsafe fn transfer_once(
    operation: Operation,
    raw: i32,
    offset: u64,
    memory: DmaSlice,
) -> isize {
    let (pointer, length) = (memory.pointer, memory.length.min(CALL_BYTES_MAX));
    loop {
        // SAFETY: the kernel touches at most `length` bytes at `pointer`, which the caller vouches for;
        // a descriptor that is not open is an error, not a fault.
        let result = unsafe {
            match operation {
                Operation::Read => libc::pread64(raw, pointer.cast(), length, offset as i64),
                Operation::Write => libc::pwrite64(raw, pointer.cast(), length, offset as i64),
            }
        };
        if result >= 0 {
            return result;
        }
        match last_errno() {
            libc::EINTR => continue,
            errno => return -(errno as isize),
        }
    }
}

fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

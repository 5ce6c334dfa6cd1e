//! The side that writes: one table for one transferring store. Owns the file's name and removes it at the
//! end; removes what dead writers left behind.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::block::PartKey;
use crate::error::{Error, ErrorKind, Result};

use super::process::{self, Process};
use super::reader::open_table;
use super::table::{Access, MAGIC, Table, WAYS, Words, bytes_of};
use super::{DIRECTORY, SharedScope, user_prefix};

/// Most keys of a table, 8 GiB of it; a larger cache is one that nobody has.
const KEYS_MAX: u32 = 1 << 27;
/// Tells the stores of one process apart.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// The table of what is in this store's DRAM.
#[derive(Debug)]
pub struct SharedTable {
    table: Table,
    /// Held as long as the process runs this program.
    _held: File,
    path: PathBuf,
    keys: u32,
    keys_max: u32,
    closed: bool,
}

impl SharedTable {
    /// A table in shared memory for at most `keys_max` keys, the number of slots. Removes tables of dead
    /// writers of this user first.
    ///
    /// # Errors
    /// Where the directory takes no file of that size: the store works without, and lookup-only stores of
    /// the host see only what is on storage.
    pub fn create(scope: &SharedScope, keys_max: u32) -> Result<Self> {
        Self::create_in(Path::new(DIRECTORY), scope, keys_max)
    }

    /// As [`SharedTable::create`], in another directory.
    pub(super) fn create_in(directory: &Path, scope: &SharedScope, keys_max: u32) -> Result<Self> {
        if keys_max > KEYS_MAX {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("a shared cache table of {keys_max} keys; at most {KEYS_MAX}"),
            ));
        }
        let process = Process::current()?;
        remove_dead(directory, &process);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{:x}-{serial}", scope.prefix(), process.pid, process.start);
        let path = directory.join(name);
        // Half full at most, so that few keys pass a bucket.
        let buckets = (keys_max as usize * 2 / WAYS).max(1).next_power_of_two();
        let (table, held) = Self::map_new(&path, buckets).inspect_err(|_| {
            // Best effort: what cannot be removed is removed as a dead writer's later.
            let _ = fs::remove_file(&path);
        })?;
        let header = table.header();
        header.buckets.store(buckets as u64, Ordering::Relaxed);
        header.pid.store(u64::from(process.pid), Ordering::Relaxed);
        header.start.store(process.start, Ordering::Relaxed);
        header.boot.store(process.boot, Ordering::Relaxed);
        header.pid_namespace.store(process.namespace, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok(Self { table, _held: held, path, keys: 0, keys_max, closed: false })
    }

    fn map_new(path: &Path, buckets: usize) -> Result<(Table, File)> {
        let attempt = || -> std::io::Result<_> {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(path)?;
            process::hold(&file)?;
            reserve(&file, bytes_of(buckets))?;
            Ok((Table::map(&file, buckets, Access::Write)?, file))
        };
        attempt().map_err(|error| Error::io("creating the shared cache table", Some(path), &error))
    }

    /// The part can be loaded from this store's DRAM from now on. A key that is there already stays; one
    /// more than the table holds is left out.
    pub fn insert(&mut self, key: &PartKey) {
        let words = Words::of(key);
        if self.closed || self.keys >= self.keys_max || self.locate(words).is_some() {
            return;
        }
        let buckets = self.table.buckets();
        let home = words.home(buckets);
        let full =
            |distance: &usize| self.table.bucket((home + distance) & (buckets - 1)).is_full();
        let Some(distance) = (0..buckets).find(|distance| !full(distance)) else { return };
        // First the way, then the key: a reader that sees the key absent has lost nothing.
        for passed in 0..distance {
            self.table.bucket((home + passed) & (buckets - 1)).pass(1);
        }
        if self.table.bucket((home + distance) & (buckets - 1)).put(words) {
            self.keys += 1;
        }
    }

    /// The part leaves DRAM. To be called before its slot is given to another.
    pub fn remove(&mut self, key: &PartKey) {
        let words = Words::of(key);
        if self.closed {
            return;
        }
        let Some((distance, way)) = self.locate(words) else { return };
        let buckets = self.table.buckets();
        let home = words.home(buckets);
        self.table.bucket((home + distance) & (buckets - 1)).clear(way);
        for passed in 0..distance {
            self.table.bucket((home + passed) & (buckets - 1)).pass(-1);
        }
        self.keys -= 1;
    }

    /// The DRAM of this store is gone: readers believe nothing of the table from now on, and the file goes.
    pub fn close(&mut self) {
        // A forked child has neither the mapping nor a right to the file.
        if !self.closed && self.table.is_own() {
            self.table.header().closed.store(1, Ordering::Release);
            // Best effort: a name that stays is removed as a dead writer's by the next one.
            let _ = fs::remove_file(&self.path);
        }
        self.closed = true;
    }

    /// How many keys the table holds.
    pub fn len(&self) -> usize {
        self.keys as usize
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.keys == 0
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How far from home the key lies, and as which key of that bucket.
    fn locate(&self, words: Words) -> Option<(usize, usize)> {
        let buckets = self.table.buckets();
        let home = words.home(buckets);
        for distance in 0..buckets {
            let bucket = self.table.bucket((home + distance) & (buckets - 1));
            if let Some(way) = bucket.find(words) {
                return Some((distance, way));
            }
            if !bucket.is_passed() {
                return None;
            }
        }
        None
    }
}

impl Drop for SharedTable {
    fn drop(&mut self) {
        self.close();
    }
}

/// Gives the file its size and its memory: a full `/dev/shm` is an error here, not a SIGBUS later.
fn reserve(file: &File, bytes: usize) -> std::io::Result<()> {
    // SAFETY: the descriptor is open; the call touches no memory of this process.
    let errno = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) };
    match errno {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno)),
    }
}

/// Removes the tables of this user whose writers are certainly gone, or that are no tables.
fn remove_dead(directory: &Path, here: &Process) {
    let prefix = user_prefix();
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix));
        if !ours {
            continue;
        }
        // One that cannot be opened may be another's that is being made right now: its name tells.
        let gone = match open_table(&entry.path()) {
            Some((table, file)) => {
                table.is_closed() || table.writer().is_gone(here) || !process::is_held(&file)
            }
            None => named_writer(&entry.file_name().to_string_lossy())
                .is_some_and(|(pid, start)| Process { pid, start, ..*here }.is_gone(here)),
        };
        if gone {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// PID and start time in the name of a table.
fn named_writer(name: &str) -> Option<(u32, u64)> {
    let mut fields = name.rsplit('-').skip(1);
    let start = u64::from_str_radix(fields.next()?, 16).ok()?;
    Some((fields.next()?.parse().ok()?, start))
}

//! The side that reads: all tables of one scope. Finds new ones when told to scan; believes none whose
//! writer is dead or closed.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::RwLock;

use crate::block::{PAGE, PartKey};
use crate::error::Result;

use super::SharedScope;
use super::process::{self, Process};
use super::table::{Access, MAGIC, Table, Words, bytes_of};

/// Most tables of one scope: ranks of one host.
const TABLES_MAX: usize = 256;
/// Anything with more buckets is no table of ours.
const BUCKETS_MAX: u64 = 1 << 28;

#[derive(Debug)]
struct Open {
    path: PathBuf,
    table: Table,
    writer: Process,
    /// Readable when the writer ends; without one its life is looked up in `/proc`.
    watch: Option<OwnedFd>,
}

/// What is in the DRAM of the transferring stores of a scope.
#[derive(Debug)]
pub struct SharedReader {
    directory: PathBuf,
    prefix: String,
    here: Process,
    tables: RwLock<Arc<Vec<Arc<Open>>>>,
}

impl SharedReader {
    /// The tables that are there now; later ones are found by [`SharedReader::scan`].
    ///
    /// # Errors
    /// Where `/proc` does not say who this process is.
    pub fn open(directory: &Path, scope: &SharedScope) -> Result<Self> {
        let reader = Self {
            directory: directory.to_path_buf(),
            prefix: scope.prefix(),
            here: Process::current()?,
            tables: RwLock::default(),
        };
        reader.scan();
        Ok(reader)
    }

    /// Looks for new tables and lets go of dead ones. Reads a directory: not for the lookup path.
    pub fn scan(&self) {
        let known = self.tables.read().clone();
        let mut tables: Vec<_> = living(&known, &self.here);
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let wanted = name.to_str().is_some_and(|name| name.starts_with(&self.prefix));
            let path = entry.path();
            if !wanted || tables.len() >= TABLES_MAX || tables.iter().any(|open| open.path == path)
            {
                continue;
            }
            if let Some(open) = self.open_living(path) {
                tables.push(Arc::new(open));
            }
        }
        *self.tables.write() = Arc::new(tables);
    }

    fn open_living(&self, path: PathBuf) -> Option<Open> {
        let table = open_table(&path)?;
        let writer = table.writer();
        if table.is_closed() || !writer.is_visible_from(&self.here) || writer.is_gone(&self.here) {
            return None;
        }
        let watch = writer.watch();
        Some(Open { path, table, writer, watch })
    }

    /// What the living writers hold, for a batch of questions. One system call, however many tables.
    pub fn view(&self) -> View {
        let tables = self.tables.read().clone();
        View { tables: living(&tables, &self.here) }
    }

    /// How many tables are mapped.
    pub fn len(&self) -> usize {
        self.tables.read().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The tables whose writers lived when it was made. For one batch, not to be kept.
#[derive(Debug)]
pub struct View {
    tables: Vec<Arc<Open>>,
}

impl View {
    /// Whether a living store has this part in DRAM.
    pub fn contains(&self, key: &PartKey) -> bool {
        let words = Words::of(key);
        self.tables.iter().any(|open| open.table.contains(words))
    }
}

/// Those whose writer runs and has not closed.
fn living(tables: &[Arc<Open>], here: &Process) -> Vec<Arc<Open>> {
    let running = process::running(tables.iter().filter_map(|open| open.watch.as_ref()));
    let mut running = running.into_iter();
    let mut lives = |open: &Open| match open.watch {
        Some(_) => running.next().unwrap_or(false),
        None => !open.writer.is_gone(here),
    };
    tables.iter().filter(|open| lives(open) && !open.table.is_closed()).cloned().collect()
}

/// Maps a table for reading; `None` where the file is not a finished table of this user alone.
pub(super) fn open_table(path: &Path) -> Option<Table> {
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let file: File = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    // SAFETY: geteuid has no preconditions and cannot fail.
    let user = unsafe { libc::geteuid() };
    let own = metadata.uid() == user;
    if !metadata.is_file() || !own || metadata.mode() & 0o077 != 0 || metadata.len() < PAGE as u64 {
        return None;
    }
    // The number of buckets is read through a mapping of the header alone, and must fit the file.
    let head = Table::map(&file, 0, Access::Read).ok()?;
    if head.header().magic.load(Ordering::Acquire) != MAGIC {
        return None;
    }
    let buckets = head.header().buckets.load(Ordering::Relaxed);
    if !buckets.is_power_of_two()
        || buckets > BUCKETS_MAX
        || bytes_of(buckets as usize) as u64 != metadata.len()
    {
        return None;
    }
    Table::map(&file, buckets as usize, Access::Read).ok()
}

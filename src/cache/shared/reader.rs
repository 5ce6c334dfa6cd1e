//! The side that reads: all tables of one scope. Finds new ones as time goes by; believes none whose writer
//! is dead or has closed.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use crate::block::{PAGE, PartKey};

use super::process::{self, Process};
use super::table::{Access, MAGIC, Table, Words, bytes_of};
use super::{DIRECTORY, SharedScope};

/// Most tables of one scope: ranks of one host.
const TABLES_MAX: usize = 256;
/// How often new tables are looked for, and whether writers run what they ran, while somebody asks.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);
/// How old the knowledge of the writers' lives may be for a single question.
const CHECK_INTERVAL: Duration = Duration::from_millis(1);
/// Anything with more buckets is no table of ours.
const BUCKETS_MAX: u64 = 1 << 28;

#[derive(Debug)]
struct Open {
    path: PathBuf,
    table: Table,
    /// The writer holds it as long as it runs the program that made the table.
    file: File,
    writer: Process,
    /// Readable when the writer ends; without one its life is looked up in `/proc`.
    watch: Option<OwnedFd>,
}

impl Open {
    fn holds(&self, words: Words) -> bool {
        self.table.contains(words) && !self.table.is_closed()
    }
}

/// What is in the DRAM of the transferring stores of a scope.
#[derive(Debug)]
pub struct SharedReaders {
    directory: PathBuf,
    prefix: String,
    /// `None` where `/proc` does not say who this process is: then no table is believed.
    here: Option<Process>,
    tables: RwLock<Arc<Vec<Arc<Open>>>>,
    opened: Instant,
    /// Nanoseconds from `opened` to the last look at the writers' lives, and for new tables.
    checked: AtomicU64,
    scanned: AtomicU64,
}

impl SharedReaders {
    /// The tables that are there now; later ones are found as time goes by.
    pub fn new(scope: &SharedScope) -> Self {
        Self::new_in(Path::new(DIRECTORY), scope)
    }

    /// As [`SharedReaders::new`], in another directory.
    pub(super) fn new_in(directory: &Path, scope: &SharedScope) -> Self {
        let readers = Self {
            directory: directory.to_path_buf(),
            prefix: scope.prefix(),
            here: Process::current().ok(),
            tables: RwLock::default(),
            opened: Instant::now(),
            checked: AtomicU64::new(0),
            scanned: AtomicU64::new(0),
        };
        readers.scan();
        readers
    }

    /// Whether a store that lived a millisecond ago has this part in DRAM. For many keys at a time a
    /// [`View`] is cheaper and sharper.
    pub fn contains(&self, key: &PartKey) -> bool {
        self.scan_in_time();
        if is_due(&self.checked, self.opened, CHECK_INTERVAL)
            && let Some(here) = &self.here
        {
            let known = self.tables.read().clone();
            let left = living(&known, here);
            if left.len() < known.len() {
                *self.tables.write() = Arc::new(left);
            }
        }
        let words = Words::of(key);
        self.tables.read().iter().any(|open| open.holds(words))
    }

    /// What the living writers hold, for a batch of questions. One system call, however many tables.
    pub fn view(&self) -> View {
        self.scan_in_time();
        let known = self.tables.read().clone();
        View { tables: self.here.map_or_else(Vec::new, |here| living(&known, &here)) }
    }

    /// How many tables are mapped.
    pub fn len(&self) -> usize {
        self.tables.read().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Looks for new tables where the last look is a while ago. Shared memory is memory: reading its
    /// directory takes microseconds, no I/O.
    fn scan_in_time(&self) {
        if is_due(&self.scanned, self.opened, SCAN_INTERVAL) {
            self.scan();
        }
    }

    /// Looks for new tables now, and lets go of dead ones.
    pub fn scan(&self) {
        let Some(here) = self.here else { return };
        let known = self.tables.read().clone();
        let mut tables = living(&known, &here);
        tables.retain(|open| process::is_held(&open.file));
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let wanted = name.to_str().is_some_and(|name| name.starts_with(&self.prefix));
            let path = entry.path();
            if !wanted || tables.len() >= TABLES_MAX || tables.iter().any(|open| open.path == path)
            {
                continue;
            }
            if let Some(open) = open_living(path, &here) {
                tables.push(Arc::new(open));
            }
        }
        *self.tables.write() = Arc::new(tables);
    }
}

/// Whether `interval` has passed since the last time somebody was told so; tells one caller.
fn is_due(last: &AtomicU64, opened: Instant, interval: Duration) -> bool {
    let now = opened.elapsed().as_nanos() as u64;
    let before = last.load(Ordering::Relaxed);
    now.saturating_sub(before) >= interval.as_nanos() as u64
        && last.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

fn open_living(path: PathBuf, here: &Process) -> Option<Open> {
    let (table, file) = open_table(&path)?;
    let writer = table.writer();
    let gone = writer.is_gone(here) || !process::is_held(&file);
    if table.is_closed() || !writer.is_visible_from(here) || gone {
        return None;
    }
    let watch = writer.watch();
    Some(Open { path, table, file, writer, watch })
}

/// The tables whose writers lived when it was made. For one batch, not to be kept.
#[derive(Debug)]
pub struct View {
    tables: Vec<Arc<Open>>,
}

impl View {
    /// Whether no living store has a table.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Whether a living store has this part in DRAM.
    pub fn contains(&self, key: &PartKey) -> bool {
        let words = Words::of(key);
        self.tables.iter().any(|open| open.holds(words))
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
pub(super) fn open_table(path: &Path) -> Option<(Table, File)> {
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
    let table = Table::map(&file, buckets as usize, Access::Read).ok()?;
    Some((table, file))
}

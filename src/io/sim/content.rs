//! What is on a simulated disk: names, files as runs of pages, what of both is flushed, and what a crash
//! leaves of it.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::faults::Dice;

/// A page, the unit that is stored.
const PAGE_BYTES: u64 = 4096;
/// A sector, the unit that is never torn.
const SECTOR_BYTES: usize = 512;
/// Descriptors are numbers no process has, so that one that reaches a real system call is EBADF.
const FIRST_DESCRIPTOR: i32 = 1 << 24;

type Page = [u8; PAGE_BYTES as usize];
type Pages = BTreeMap<u64, Arc<Page>>;

/// What a crash leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// The process died: everything that was done is there.
    ProcessDeath,
    /// The power went: what was flushed is there, and of the rest any pages or sectors of pages; of the
    /// changes of names, the first so many, as a journal keeps them.
    PowerLoss,
}

#[derive(Clone, Default)]
struct Inode {
    pages: Pages,
    length: u64,
    /// Bytes set aside by `allocate`.
    reserved: u64,
    /// As of the last flush.
    flushed: Pages,
    flushed_length: u64,
    /// Changes since, in order.
    unflushed: Vec<Change>,
    opens: usize,
    names: usize,
}

#[derive(Clone)]
enum Change {
    Page(u64, Arc<Page>),
    Length(u64),
}

#[derive(Clone)]
enum NameChange {
    Add(PathBuf, u64),
    Remove(PathBuf),
}

/// See the head of this file.
#[derive(Clone, Default)]
pub(super) struct Content {
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    directories: BTreeSet<PathBuf>,
    names: BTreeMap<PathBuf, u64>,
    flushed_names: BTreeMap<PathBuf, u64>,
    unflushed_names: Vec<NameChange>,
    open: BTreeMap<i32, Open>,
    next_descriptor: i32,
}

/// An open file.
#[derive(Clone, Copy)]
pub(super) struct Open {
    pub(super) inode: u64,
    pub(super) writable: bool,
    pub(super) direct: bool,
}

type Outcome<T> = Result<T, i32>;

impl Content {
    pub(super) fn create_dir_all(&mut self, directory: &Path) {
        self.directories.extend(directory.ancestors().map(Path::to_path_buf));
    }

    pub(super) fn list(&self, directory: &Path) -> Outcome<Vec<PathBuf>> {
        if !self.directories.contains(directory) {
            return Err(libc::ENOENT);
        }
        let names = self.names.keys().chain(&self.directories);
        Ok(names.filter(|path| path.parent() == Some(directory)).cloned().collect())
    }

    pub(super) fn create(&mut self, path: &Path) -> Outcome<()> {
        if self.names.contains_key(path) || self.directories.contains(path) {
            return Err(libc::EEXIST);
        }
        if !path.parent().is_some_and(|parent| self.directories.contains(parent)) {
            return Err(libc::ENOENT);
        }
        self.next_inode += 1;
        self.inodes.insert(self.next_inode, Inode::default());
        self.add_name(path.to_path_buf(), self.next_inode);
        Ok(())
    }

    pub(super) fn open(&mut self, path: &Path, writable: bool, direct: bool) -> Outcome<i32> {
        if self.directories.contains(path) {
            return Err(libc::EISDIR);
        }
        let inode = *self.names.get(path).ok_or(libc::ENOENT)?;
        self.next_descriptor += 1;
        let raw = FIRST_DESCRIPTOR + self.next_descriptor;
        self.open.insert(raw, Open { inode, writable, direct });
        self.inode(inode).opens += 1;
        Ok(raw)
    }

    /// # Panics
    /// If the descriptor is not open: the engine's users must not close a file in use.
    pub(super) fn close(&mut self, raw: i32) {
        let open = self.open.remove(&raw).expect("closed once");
        self.inode(open.inode).opens -= 1;
        self.forget_if_unused(open.inode);
    }

    pub(super) fn opened(&self, raw: i32) -> Outcome<Open> {
        self.open.get(&raw).copied().ok_or(libc::EBADF)
    }

    pub(super) fn open_files(&self) -> usize {
        self.open.len()
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> Outcome<()> {
        let inode = *self.names.get(from).ok_or(libc::ENOENT)?;
        if self.names.contains_key(to) {
            return Err(libc::EEXIST);
        }
        // One journal entry in truth; as two, a crash between them leaves both names, as `link` and
        // `unlink` would.
        self.add_name(to.to_path_buf(), inode);
        self.remove_name(from)
    }

    pub(super) fn remove_name(&mut self, path: &Path) -> Outcome<()> {
        let inode = self.names.remove(path).ok_or(libc::ENOENT)?;
        self.unflushed_names.push(NameChange::Remove(path.to_path_buf()));
        self.inode(inode).names -= 1;
        self.forget_if_unused(inode);
        Ok(())
    }

    fn add_name(&mut self, path: PathBuf, inode: u64) {
        self.inode(inode).names += 1;
        self.names.insert(path.clone(), inode);
        self.unflushed_names.push(NameChange::Add(path, inode));
    }

    pub(super) fn sync_names(&mut self) {
        for change in std::mem::take(&mut self.unflushed_names) {
            change.apply(&mut self.flushed_names);
        }
        let unused: Vec<u64> = self.inodes.keys().copied().collect();
        unused.into_iter().for_each(|inode| self.forget_if_unused(inode));
    }

    /// Frees a file without names that nobody holds open, unless a crash could bring its name back.
    fn forget_if_unused(&mut self, number: u64) {
        let inode = self.inode(number);
        let unused = inode.names == 0 && inode.opens == 0;
        let comes_back = self.flushed_names.values().any(|kept| *kept == number)
            || self.unflushed_names.iter().any(|change| change.names(number));
        if unused && !comes_back {
            self.inodes.remove(&number);
        }
    }

    fn inode(&mut self, number: u64) -> &mut Inode {
        self.inodes.get_mut(&number).expect("a name or a descriptor leads to it")
    }

    pub(super) fn number_of(&self, path: &Path) -> Outcome<u64> {
        self.names.get(path).copied().ok_or(libc::ENOENT)
    }

    /// Length and allocated bytes.
    pub(super) fn size(&self, number: u64) -> (u64, u64) {
        let inode = &self.inodes[&number];
        (inode.length, inode.allocated())
    }

    /// Bytes of all files that a process could see or holds open.
    pub(super) fn allocated(&self) -> u64 {
        let seen = self.inodes.values().filter(|inode| inode.names > 0 || inode.opens > 0);
        seen.map(Inode::allocated).sum()
    }

    pub(super) fn allocate(&mut self, number: u64, length: u64, space: u64) -> Outcome<()> {
        let others = self.allocated() - self.inodes[&number].allocated();
        if others + length > space {
            return Err(libc::ENOSPC);
        }
        let inode = self.inode(number);
        inode.reserved = inode.reserved.max(length);
        let length = inode.length.max(length);
        inode.set_length(length);
        Ok(())
    }

    pub(super) fn set_length(&mut self, number: u64, length: u64) {
        let inode = self.inode(number);
        inode.reserved = inode.reserved.min(length);
        inode.set_length(length);
    }

    pub(super) fn sync(&mut self, number: u64) {
        let inode = self.inode(number);
        inode.flushed = inode.pages.clone();
        inode.flushed_length = inode.length;
        inode.unflushed.clear();
    }

    /// Copies out of a file; bytes past its end are not there.
    pub(super) fn read(&self, number: u64, offset: u64, length: usize) -> Vec<u8> {
        let inode = &self.inodes[&number];
        let end = (offset + length as u64).min(inode.length);
        let mut bytes = Vec::new();
        let mut at = offset;
        while at < end {
            let start = (at % PAGE_BYTES) as usize;
            let count = (PAGE_BYTES as usize - start).min((end - at) as usize);
            match inode.pages.get(&(at / PAGE_BYTES)) {
                Some(page) => bytes.extend_from_slice(&page[start..start + count]),
                None => bytes.resize(bytes.len() + count, 0),
            }
            at += count as u64;
        }
        bytes
    }

    pub(super) fn write(
        &mut self,
        number: u64,
        offset: u64,
        bytes: &[u8],
        space: u64,
    ) -> Outcome<()> {
        let end = offset + bytes.len() as u64;
        let room = space.saturating_sub(self.allocated());
        let inode = self.inode(number);
        let first = offset / PAGE_BYTES;
        let last = end.div_ceil(PAGE_BYTES);
        let fresh = (first..last).filter(|page| !inode.has_room_for(*page)).count() as u64;
        if fresh * PAGE_BYTES > room {
            return Err(libc::ENOSPC);
        }
        let mut at = offset;
        while at < end {
            let start = (at % PAGE_BYTES) as usize;
            let count = (PAGE_BYTES as usize - start).min((end - at) as usize);
            let number = at / PAGE_BYTES;
            let mut page = inode.pages.get(&number).map_or([0; PAGE_BYTES as usize], |page| **page);
            let from = (at - offset) as usize;
            page[start..start + count].copy_from_slice(&bytes[from..from + count]);
            let page = Arc::new(page);
            inode.unflushed.push(Change::Page(number, Arc::clone(&page)));
            inode.pages.insert(number, page);
            at += count as u64;
        }
        if end > inode.length {
            inode.set_length(end);
        }
        Ok(())
    }

    pub(super) fn peek(&self, path: &Path) -> Option<Vec<u8>> {
        let number = *self.names.get(path)?;
        Some(self.read(number, 0, self.inodes[&number].length as usize))
    }

    pub(super) fn poke(&mut self, path: &Path, offset: u64, bytes: &[u8]) {
        let number = self.names[path];
        self.write(number, offset, bytes, u64::MAX).expect("there is no end of space here");
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.names.keys().cloned().collect()
    }

    /// What may be found after a crash.
    pub(super) fn after_crash(&self, survival: Survival, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let mut after = self.clone();
        after.open.clear();
        if survival == Survival::PowerLoss {
            let kept = dice.roll(self.unflushed_names.len() as u64 + 1) as usize;
            after.names = self.flushed_names.clone();
            for change in &self.unflushed_names[..kept] {
                change.clone().apply(&mut after.names);
            }
            for inode in after.inodes.values_mut() {
                inode.lose_power(&mut dice);
            }
        }
        after.settle_after_crash();
        after
    }

    /// Everything that is there now is flushed, and what has no name is gone.
    fn settle_after_crash(&mut self) {
        self.flushed_names = self.names.clone();
        self.unflushed_names.clear();
        let names = &self.names;
        self.inodes.retain(|number, inode| {
            inode.opens = 0;
            inode.names = names.values().filter(|named| *named == number).count();
            inode.flushed = inode.pages.clone();
            inode.flushed_length = inode.length;
            inode.unflushed.clear();
            inode.names > 0
        });
    }
}

impl NameChange {
    fn apply(self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Add(path, inode) => drop(names.insert(path, inode)),
            Self::Remove(path) => drop(names.remove(&path)),
        }
    }

    fn names(&self, number: u64) -> bool {
        matches!(self, Self::Add(_, inode) if *inode == number)
    }
}

impl Inode {
    fn allocated(&self) -> u64 {
        let first_beyond = self.reserved.div_ceil(PAGE_BYTES);
        let beyond = self.pages.range(first_beyond..).count() as u64;
        (first_beyond + beyond) * PAGE_BYTES
    }

    fn has_room_for(&self, page: u64) -> bool {
        page < self.reserved / PAGE_BYTES || self.pages.contains_key(&page)
    }

    fn set_length(&mut self, length: u64) {
        if length < self.length {
            cut(&mut self.pages, length);
        }
        self.length = length;
        self.unflushed.push(Change::Length(length));
    }

    /// Keeps the flushed state and, of each change since, nothing, all, or some of its sectors.
    fn lose_power(&mut self, dice: &mut Dice) {
        let mut pages = std::mem::take(&mut self.flushed);
        let mut length = self.flushed_length;
        for change in std::mem::take(&mut self.unflushed) {
            match (change, dice.roll(3)) {
                (_, 0) => {}
                (Change::Page(number, page), 1) => drop(pages.insert(number, page)),
                (Change::Page(number, page), _) => {
                    let mut torn = pages.get(&number).map_or([0; PAGE_BYTES as usize], |old| **old);
                    for (old, new) in torn.chunks_mut(SECTOR_BYTES).zip(page.chunks(SECTOR_BYTES)) {
                        if dice.roll(2) == 0 {
                            old.copy_from_slice(new);
                        }
                    }
                    pages.insert(number, Arc::new(torn));
                }
                (Change::Length(new), _) => {
                    if new < length {
                        cut(&mut pages, new);
                    }
                    length = new;
                }
            }
        }
        cut(&mut pages, length);
        self.pages = pages;
        self.length = length;
        self.reserved = self.reserved.min(length);
    }
}

/// Drops what lies past `length`; the rest of a page that is cut reads as zeros.
fn cut(pages: &mut Pages, length: u64) {
    drop(pages.split_off(&length.div_ceil(PAGE_BYTES)));
    let within = (length % PAGE_BYTES) as usize;
    if within > 0
        && let Some(page) = pages.get_mut(&(length / PAGE_BYTES))
    {
        Arc::make_mut(page)[within..].fill(0);
    }
}

//! Path operations and blocking transfers on a simulated disk.

use std::ffi::OsString;
use std::path::Path;

use super::content::Open;
use super::faults::{Call, Dice};
use super::{SimDisk, State, Step};
use crate::error::{Error, Result};
use crate::io::{
    Access, Create, DmaSlice, File, Files, Metadata, OpenHow, Operation, Space, files,
};

/// What all simulated files have as their device number.
const DEVICE: u64 = 0x51;

type Outcome<T> = std::result::Result<T, i32>;

impl SimDisk {
    /// Lets fate decide, waits as it says (nothing locked), then does `act`.
    fn perform<T>(
        &self,
        call: Call,
        path: &Path,
        act: impl FnOnce(&mut State) -> Outcome<T>,
    ) -> Result<T> {
        let failed = |errno| Error::os(call.name(), Some(path), None, errno);
        let fate = self.state.lock().fates.decide(call, path, 0..u64::MAX);
        if !fate.delay.is_zero() {
            std::thread::sleep(fate.delay);
        }
        let mut state = self.state.lock();
        state.lit().map_err(failed)?;
        match fate.errno {
            Some(errno) => Err(failed(errno)),
            None => act(&mut state).map_err(failed),
        }
    }
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Open => "open",
            Self::CreateDir => "create directory",
            Self::List => "list directory",
            Self::Rename => "rename",
            Self::Unlink => "unlink",
            Self::Stat => "stat",
            Self::SyncDir => "flush directory",
            Self::SyncData => "fdatasync",
            Self::Allocate => "allocate",
            Self::Truncate => "truncate",
        }
    }
}

impl State {
    /// A step that either happens or, if the power goes in it, may have happened: the caller is told EIO.
    fn change(
        &mut self,
        dice_seed: u64,
        act: impl FnOnce(&mut Self) -> Outcome<()>,
    ) -> Outcome<()> {
        match self.step()? {
            Step::Whole => act(self),
            Step::Torn => {
                if Dice::new(self.config.seed ^ dice_seed).roll(2) == 0 {
                    let _ = act(self);
                }
                Err(libc::EIO)
            }
        }
    }

    fn metadata(&self, inode: u64) -> Metadata {
        let (length, allocated) = self.content.size(inode);
        Metadata { length, allocated, identity: (DEVICE, inode) }
    }

    /// One transfer, which may end short, fail, or be torn by a crash. Called when it ends, so that memory
    /// given back too early is read or written too late, as a real drive would.
    ///
    /// # Safety
    /// `memory` is valid for the transfer.
    pub(super) unsafe fn transfer(
        &mut self,
        operation: Operation,
        open: Open,
        offset: u64,
        memory: DmaSlice,
        errno: Option<i32>,
        mut dice: Dice,
    ) -> Outcome<usize> {
        self.lit()?;
        if open.direct && !is_aligned(offset, memory) {
            return Err(libc::EINVAL);
        }
        let short = self.config.short.is_some_and(|one_in| dice.roll(one_in) == 0);
        let length = if short { some_of(memory.length, &mut dice) } else { memory.length };
        match operation {
            Operation::Read => {
                if let Some(errno) = errno {
                    return Err(errno);
                }
                let bytes = self.content.read(open.inode, offset, length);
                // SAFETY: at most `memory.length` bytes into memory that the caller vouches for.
                unsafe { memory.pointer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
                Ok(bytes.len())
            }
            Operation::Write => {
                if !open.writable {
                    return Err(libc::EBADF);
                }
                // SAFETY: initialised memory that the caller vouches for, copied before anything else.
                let bytes = unsafe { std::slice::from_raw_parts(memory.pointer, length) }.to_vec();
                self.write(open.inode, offset, &bytes, errno, dice)
            }
        }
    }

    fn write(
        &mut self,
        inode: u64,
        offset: u64,
        bytes: &[u8],
        errno: Option<i32>,
        mut dice: Dice,
    ) -> Outcome<usize> {
        let space = self.config.space_bytes;
        let torn = self.step()? == Step::Torn;
        if torn || errno.is_some() {
            // Some of it is on the disk, and nobody can tell how much.
            let part = some_of(bytes.len(), &mut dice);
            let _ = self.content.write(inode, offset, &bytes[..part], space);
            return Err(errno.unwrap_or(libc::EIO));
        }
        self.content.write(inode, offset, bytes, space)?;
        Ok(bytes.len())
    }
}

/// A part of a transfer: whole sectors if there are several, else bytes; never nothing.
fn some_of(length: usize, dice: &mut Dice) -> usize {
    let unit = if length >= files::SECTOR_BYTES { files::SECTOR_BYTES } else { 1 };
    let units = (length / unit) as u64;
    (1 + dice.roll(units.max(1)) as usize * unit).next_multiple_of(unit).min(length)
}

fn is_aligned(offset: u64, memory: DmaSlice) -> bool {
    let sector = files::SECTOR_BYTES;
    offset.is_multiple_of(sector as u64)
        && memory.length.is_multiple_of(sector)
        && (memory.pointer as usize).is_multiple_of(sector)
}

impl Files for SimDisk {
    fn create_dir_all(&self, directory: &Path) -> Result<()> {
        self.perform(Call::CreateDir, directory, |state| {
            state.content.create_dir_all(directory);
            Ok(())
        })
    }

    fn open(&self, path: &Path, how: OpenHow) -> Result<File> {
        let raw = self.perform(Call::Open, path, |state| {
            if how.create == Create::New {
                state.change(1, |state| state.content.create(path))?;
            }
            state.content.open(path, how.access == Access::ReadWrite, how.direct)
        })?;
        Ok(self.file(raw, path))
    }

    fn close(&self, raw: i32) {
        self.state.lock().content.close(raw);
    }

    fn list(&self, directory: &Path) -> Result<Vec<OsString>> {
        let paths = self.perform(Call::List, directory, |state| state.content.list(directory))?;
        Ok(paths.iter().filter_map(|path| path.file_name()).map(Into::into).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.perform(Call::Rename, from, |state| {
            state.change(2, |state| state.content.rename(from, to))
        })
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        self.perform(Call::Unlink, path, |state| {
            state.change(3, |state| state.content.remove_name(path))
        })
    }

    fn metadata(&self, path: &Path) -> Result<Metadata> {
        self.perform(Call::Stat, path, |state| {
            let inode = state.content.number_of(path)?;
            Ok(state.metadata(inode))
        })
    }

    fn file_metadata(&self, file: &File) -> Result<Metadata> {
        self.perform(Call::Stat, file.path(), |state| {
            let open = state.content.opened(file.raw())?;
            Ok(state.metadata(open.inode))
        })
    }

    fn revalidate_dir(&self, directory: &Path) -> Result<()> {
        self.perform(Call::Stat, directory, |state| state.content.list(directory).map(drop))
    }

    fn sync_dir(&self, directory: &Path) -> Result<()> {
        self.perform(Call::SyncDir, directory, |state| {
            state.change(4, |state| {
                state.content.sync_names();
                Ok(())
            })
        })
    }

    fn allocate(&self, file: &File, length: u64) -> Result<()> {
        self.perform(Call::Allocate, file.path(), |state| {
            let open = state.content.opened(file.raw())?;
            let space = state.config.space_bytes;
            state.change(5, |state| state.content.allocate(open.inode, length, space))
        })
    }

    fn truncate(&self, file: &File, length: u64) -> Result<()> {
        self.perform(Call::Truncate, file.path(), |state| {
            let open = state.content.opened(file.raw())?;
            state.change(6, |state| {
                state.content.set_length(open.inode, length);
                Ok(())
            })
        })
    }

    fn sync_data(&self, file: &File) -> Result<()> {
        self.perform(Call::SyncData, file.path(), |state| {
            let open = state.content.opened(file.raw())?;
            state.change(7, |state| {
                state.content.sync(open.inode);
                Ok(())
            })
        })
    }

    unsafe fn read_at(&self, file: &File, offset: u64, memory: DmaSlice) -> Result<usize> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.transfer_all(Operation::Read, file, offset, memory) }
    }

    unsafe fn write_at(&self, file: &File, offset: u64, memory: DmaSlice) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.transfer_all(Operation::Write, file, offset, memory) }.map(drop)
    }

    fn space(&self, directory: &Path) -> Result<Space> {
        self.perform(Call::Stat, directory, |state| {
            let total = state.config.space_bytes;
            Ok(Space { total, available: total.saturating_sub(state.content.allocated()) })
        })
    }
}

impl SimDisk {
    /// Blocking transfer of all of `memory`, short ones continued; ends early at the end of the file.
    ///
    /// # Safety
    /// `memory` is valid for the transfer.
    unsafe fn transfer_all(
        &self,
        operation: Operation,
        file: &File,
        offset: u64,
        memory: DmaSlice,
    ) -> Result<usize> {
        let call = if operation == Operation::Read { Call::Read } else { Call::Write };
        let mut moved = 0;
        while moved < memory.length {
            let at = offset + moved as u64;
            let rest = DmaSlice {
                pointer: memory.pointer.wrapping_add(moved),
                length: memory.length - moved,
            };
            let bytes = at..at + rest.length as u64;
            let fate = self.state.lock().fates.decide(call, file.path(), bytes);
            if !fate.delay.is_zero() {
                std::thread::sleep(fate.delay);
            }
            let mut state = self.state.lock();
            let outcome = state.content.opened(file.raw()).and_then(|open| {
                // SAFETY: a part of the memory that the caller vouches for.
                unsafe { state.transfer(operation, open, at, rest, fate.errno, fate.dice) }
            });
            match outcome {
                Ok(0) => break,
                Ok(count) => moved += count,
                Err(errno) => {
                    return Err(Error::os(call.name(), Some(file.path()), Some(at), errno));
                }
            }
        }
        Ok(moved)
    }
}

//! A segment that this process fills: extents handed out front to back, and taken back when unused.
//!
//! Owns the file and which extents are out. Knows nothing of records and of what the extents hold.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::block::PAGE;
use crate::config::Durability;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Access, Create, File, Files, OpenHow};
use crate::posix::format::SegmentHeader;
use crate::posix::home::Home;
use crate::posix::host::wall_ms;
use crate::posix::names::SegmentName;
use crate::posix::pages::Pages;

/// Generation of a new file.
pub const GENERATION_FIRST: u32 = 0;

struct Fill {
    /// Extents handed out so far, from the front.
    next: u32,
    /// Extents handed out and brought back unused.
    free: Vec<u32>,
    /// Extents that are out: reserved, or being written.
    out: u32,
    /// No more are handed out.
    closed: bool,
    sealed: bool,
    /// Why its data cannot be flushed any more.
    lost: Option<Error>,
}

/// A segment of this process.
pub struct OwnSegment {
    /// Its name.
    pub name: SegmentName,
    /// Its handle in the catalog.
    pub handle: u32,
    /// The open file.
    pub file: File,
    /// Where it is.
    pub path: PathBuf,
    extents: u32,
    extent_pages: u32,
    fill: Mutex<Fill>,
}

/// What follows from bringing an extent back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// Nothing.
    Open,
    /// The last one out came back to a closed segment: it has this many pages and can be sealed.
    Seal(u32),
}

impl OwnSegment {
    /// Creates and preallocates a segment; where there is too little space for the size wanted, a smaller
    /// one. Blocks; on a path pool only.
    pub fn create(
        home: &Home,
        writer: u64,
        number: u32,
        intern: impl FnOnce(SegmentName) -> u32,
    ) -> Result<Arc<Self>> {
        let mut extents = home.layout.extents_of(number);
        loop {
            match Self::try_create(home, writer, number, extents) {
                Ok((name, path, file)) => {
                    return Ok(Arc::new(Self {
                        name,
                        handle: intern(name),
                        file,
                        path,
                        extents,
                        extent_pages: home.layout.extent_pages(),
                        fill: Mutex::new(Fill {
                            next: 0,
                            free: Vec::new(),
                            out: 0,
                            closed: false,
                            sealed: false,
                            lost: None,
                        }),
                    }));
                }
                Err(error) if error.kind() == ErrorKind::NoSpace && extents > 1 => extents /= 4,
                Err(error) => return Err(error),
            }
            extents = extents.max(1);
        }
    }

    fn try_create(
        home: &Home,
        writer: u64,
        number: u32,
        extents: u32,
    ) -> Result<(SegmentName, PathBuf, File)> {
        let files = home.backend.files();
        let name = SegmentName { writer, number, generation: GENERATION_FIRST };
        let path = home.segments.join(name.to_string());
        let how =
            OpenHow { access: Access::ReadWrite, create: Create::New, direct: home.is_direct() };
        let file = files.open(&path, how)?;
        let bytes = PAGE as u64 + u64::from(extents) * home.layout.extent_bytes();
        let created = files
            .allocate(&file, bytes)
            .and_then(|()| write_header(home, &file, name, bytes))
            .and_then(|()| match home.layout.config.durability {
                Durability::Durable => files.sync_dir(&home.segments),
                Durability::None | Durability::Ordered => Ok(()),
            });
        match created {
            Ok(()) => Ok((name, path, file)),
            Err(error) => {
                // Truncated first: on NFS an unlinked file that is open still holds its space.
                let _ = files.truncate(&file, 0);
                let _ = files.unlink(&path);
                Err(error.at(&path))
            }
        }
    }

    /// Hands out the page of an extent, or `None` where the segment is full or closed.
    pub fn take(&self) -> Option<u32> {
        let mut fill = self.fill.lock();
        if fill.closed {
            return None;
        }
        let extent = match fill.free.pop() {
            Some(extent) => extent,
            None if fill.next < self.extents => {
                fill.next += 1;
                fill.next - 1
            }
            None => return None,
        };
        fill.out += 1;
        Some(1 + extent * self.extent_pages)
    }

    /// Whether `take` would hand one out, and whether at most half are left.
    pub fn room(&self) -> Room {
        let fill = self.fill.lock();
        let left = self.extents - fill.next + fill.free.len() as u32;
        match left {
            _ if fill.closed => Room::None,
            0 => Room::None,
            left if left * 2 <= self.extents => Room::Half,
            _ => Room::Plenty,
        }
    }

    /// An extent was written; whether its record counts does not matter here.
    pub fn written(&self) -> Closing {
        let mut fill = self.fill.lock();
        fill.out -= 1;
        self.closing(&mut fill)
    }

    /// An extent comes back that nothing was written to.
    pub fn give_back(&self, page: u32) -> Closing {
        let mut fill = self.fill.lock();
        fill.out -= 1;
        fill.free.push((page - 1) / self.extent_pages);
        self.closing(&mut fill)
    }

    /// Hands out no more.
    pub fn close(&self) -> Closing {
        let mut fill = self.fill.lock();
        fill.closed = true;
        self.closing(&mut fill)
    }

    fn closing(&self, fill: &mut Fill) -> Closing {
        if !fill.closed || fill.out > 0 || fill.sealed {
            return Closing::Open;
        }
        fill.sealed = true;
        Closing::Seal(1 + fill.next * self.extent_pages)
    }

    /// Flushes what was written. After one failure every later flush fails: the system forgets what it could
    /// not write, so that the next flush would succeed without it.
    pub fn flush(&self, files: &dyn Files) -> Result<()> {
        if let Some(error) = &self.fill.lock().lost {
            return Err(error.clone());
        }
        files.sync_data(&self.file).inspect_err(|error| {
            self.fill.lock().lost = Some(error.clone());
        })
    }

    /// Whether a flush of it has failed.
    pub fn is_lost(&self) -> bool {
        self.fill.lock().lost.is_some()
    }

    /// Bytes up to the end of the last extent that was ever handed out.
    pub fn used_bytes(&self) -> u64 {
        u64::from(1 + self.fill.lock().next * self.extent_pages) * PAGE as u64
    }

    /// Bytes that were preallocated.
    pub fn bytes(&self) -> u64 {
        u64::from(1 + self.extents * self.extent_pages) * PAGE as u64
    }

    /// Whether no extent was ever handed out.
    pub fn is_untouched(&self) -> bool {
        self.fill.lock().next == 0
    }
}

/// Room of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Nothing is left.
    None,
    /// At most half is left: the next segment should be made.
    Half,
    /// More than half is left.
    Plenty,
}

/// Writes the first page.
pub fn write_header(home: &Home, file: &File, name: SegmentName, bytes: u64) -> Result<()> {
    let mut page = Pages::new(1);
    SegmentHeader {
        fingerprint: home.layout.fingerprint,
        writer: name.writer,
        number: name.number,
        generation: name.generation,
        segment_bytes: bytes,
        part_bytes: home.layout.part_bytes,
        created_ms: wall_ms(),
    }
    .encode(page.bytes_mut());
    page.write_to(&**home.backend.files(), file, 0, 0, 1)
}

/// Why a save finds no room.
pub fn over_capacity(limit: u64) -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!(
            "the namespace holds its {limit} bytes; raise posix_capacity_gb, or let posix_gc reclaim"
        ),
    )
}

//! The bytes of a table: a page of header, then buckets of one cache line. Owns a mapping; the same layout
//! is written by one process and read by many, so every word is an atomic.
//!
//! A bucket holds three keys and a sequence number that is odd while the writer changes it. A key that finds
//! its bucket full goes to the next one, and each bucket it passed counts it; so a search ends at the first
//! bucket that nobody passed. Entries never move, hence a reader needs no view of more than one bucket.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::block::{PAGE, PartKey};

use super::process::Process;

/// "ucmDRAM" and the version of the layout.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"ucmDRAM\x02");
/// Keys in a bucket.
pub(super) const WAYS: usize = 3;
/// A reader that finds a bucket in change so often stops waiting for the writer, which the scheduler may have
/// stopped inside a change for milliseconds.
const RETRIES_MAX: u32 = 100;

/// The first page.
#[repr(C)]
pub(super) struct Header {
    /// [`MAGIC`], written last: a table without it is not ready.
    pub(super) magic: AtomicU64,
    pub(super) buckets: AtomicU64,
    pub(super) pid: AtomicU64,
    pub(super) start: AtomicU64,
    pub(super) boot: AtomicU64,
    pub(super) pid_namespace: AtomicU64,
    /// 1: the writer has closed the table.
    pub(super) closed: AtomicU32,
}

/// One cache line.
#[repr(C, align(64))]
pub(super) struct Bucket {
    sequence: AtomicU32,
    /// Bit n: key n is there.
    occupied: AtomicU32,
    /// Keys that belong here or before and lie behind.
    passed: AtomicU32,
    spare: AtomicU32,
    keys: [[AtomicU64; 2]; WAYS],
}

const _: () = assert!(size_of::<Bucket>() == 64 && size_of::<Header>() <= PAGE);

/// What a bucket says at one moment.
pub(super) struct Snapshot {
    pub(super) holds: bool,
    pub(super) passed: bool,
}

/// A key as the table holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Words(pub(super) [u64; 2]);

impl Words {
    pub(super) fn of(key: &PartKey) -> Self {
        let (low, high) = key.block.0.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        // Block ids are hashes, so parts are told apart by any constant; an odd one loses no bit.
        let part = u64::from(key.part).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self([word(low), word(high) ^ part])
    }

    pub(super) fn home(self, buckets: usize) -> usize {
        let mixed = (self.0[0] ^ self.0[1].rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed >> 32) as usize & (buckets - 1)
    }
}

/// Bytes of a table.
pub(super) fn bytes_of(buckets: usize) -> usize {
    PAGE + buckets * size_of::<Bucket>()
}

/// What may be done through a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// A mapped table.
#[derive(Debug)]
pub(super) struct Table {
    base: NonNull<u8>,
    buckets: usize,
    owner: u32,
}

// SAFETY: everything in the mapping is an atomic, and the mapping lives as long as the table.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    /// Maps a file that has [`bytes_of`] `buckets` bytes, a power of two of them.
    pub(super) fn map(file: &File, buckets: usize, access: Access) -> std::io::Result<Self> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        let length = bytes_of(buckets);
        // SAFETY: a new shared mapping of a descriptor that is open, at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let base: NonNull<u8> = NonNull::new(base.cast()).ok_or(std::io::ErrorKind::InvalidData)?;
        if access == Access::Write {
            // A forked child must not write beside its parent.
            // SAFETY: the range is the new mapping.
            unsafe { libc::madvise(base.as_ptr().cast(), length, libc::MADV_DONTFORK) };
        }
        Ok(Self { base, buckets, owner: std::process::id() })
    }

    pub(super) fn buckets(&self) -> usize {
        self.buckets
    }

    /// Whether this process made the mapping, and is no forked child of the one that did.
    pub(super) fn is_own(&self) -> bool {
        self.owner == std::process::id()
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: the first page of the mapping holds a Header, is aligned to a page, and lives as long as
        // self; all fields are atomics, for which any bytes are valid, so that the writer in another process
        // is no data race.
        unsafe { self.base.cast::<Header>().as_ref() }
    }

    pub(super) fn bucket(&self, index: usize) -> &Bucket {
        assert!(index < self.buckets);
        // SAFETY: the mapping has bytes_of(self.buckets) bytes and index is below that; a page and 64 bytes a
        // bucket keep the alignment; all fields are atomics.
        unsafe { self.base.add(PAGE).cast::<Bucket>().add(index).as_ref() }
    }

    pub(super) fn writer(&self) -> Process {
        let header = self.header();
        Process {
            pid: header.pid.load(Ordering::Relaxed) as u32,
            start: header.start.load(Ordering::Relaxed),
            boot: header.boot.load(Ordering::Relaxed),
            namespace: header.pid_namespace.load(Ordering::Relaxed),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.header().closed.load(Ordering::Acquire) != 0
    }

    /// Whether the key is there. Any number of readers, beside the one writer.
    pub(super) fn contains(&self, key: Words) -> bool {
        let home = key.home(self.buckets);
        for distance in 0..self.buckets {
            let found = self.bucket((home + distance) & (self.buckets - 1)).look(key);
            if found.holds || !found.passed {
                return found.holds;
            }
        }
        false
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // A forked child does not have a writer's mapping; something else may lie there.
        if self.is_own() {
            // SAFETY: the mapping is this table's own, and references into it borrow from the table.
            unsafe { libc::munmap(self.base.as_ptr().cast(), bytes_of(self.buckets)) };
        }
    }
}

impl Bucket {
    /// What it says of this key, as of one moment between two changes.
    fn look(&self, key: Words) -> Snapshot {
        for _ in 0..RETRIES_MAX {
            let before = self.sequence.load(Ordering::Acquire);
            if before & 1 == 0 {
                let snapshot = self.peek(key);
                fence(Ordering::Acquire);
                if self.sequence.load(Ordering::Relaxed) == before {
                    return snapshot;
                }
            }
            std::hint::spin_loop();
        }
        // A change touches one key or the count, so what it says of every other key holds. The key in change
        // may come out either way, as it may a moment later; half of one and half of another would have to
        // be a third block's hash to deceive.
        self.peek(key)
    }

    fn peek(&self, key: Words) -> Snapshot {
        let holds = self.find(key).is_some();
        Snapshot { holds, passed: self.passed.load(Ordering::Relaxed) > 0 }
    }

    /// Which of the keys this is.
    pub(super) fn find(&self, key: Words) -> Option<usize> {
        let occupied = self.occupied.load(Ordering::Relaxed);
        (0..WAYS).find(|way| {
            occupied >> way & 1 == 1
                && self.keys[*way][0].load(Ordering::Relaxed) == key.0[0]
                && self.keys[*way][1].load(Ordering::Relaxed) == key.0[1]
        })
    }

    /// Whether no key fits. Writer only.
    pub(super) fn is_full(&self) -> bool {
        self.occupied.load(Ordering::Relaxed).count_ones() as usize == WAYS
    }

    /// Whether a key lies behind that belongs here or before. Writer only.
    pub(super) fn is_passed(&self) -> bool {
        self.passed.load(Ordering::Relaxed) > 0
    }

    /// Takes a key in, where there is room. Writer only.
    pub(super) fn put(&self, key: Words) -> bool {
        let occupied = self.occupied.load(Ordering::Relaxed);
        let Some(way) = (0..WAYS).find(|way| occupied >> way & 1 == 0) else { return false };
        self.change(|| {
            self.keys[way][0].store(key.0[0], Ordering::Relaxed);
            self.keys[way][1].store(key.0[1], Ordering::Relaxed);
            self.occupied.store(occupied | 1 << way, Ordering::Relaxed);
        });
        true
    }

    /// Drops key number `way`. Writer only.
    pub(super) fn clear(&self, way: usize) {
        let occupied = self.occupied.load(Ordering::Relaxed);
        self.change(|| self.occupied.store(occupied & !(1 << way), Ordering::Relaxed));
    }

    /// Counts a key that passes (1) or no longer does (-1). Writer only.
    pub(super) fn pass(&self, difference: i32) {
        let passed = self.passed.load(Ordering::Relaxed).wrapping_add_signed(difference);
        self.change(|| self.passed.store(passed, Ordering::Relaxed));
    }

    fn change(&self, write: impl FnOnce()) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        write();
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }
}

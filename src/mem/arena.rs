//! The arena: one private mapping that stages and caches. Owns the mapping; who uses which bytes of it is
//! decided by whoever owns the slots.
//!
//! Huge pages, because the first touch of a GiB costs 56 ms with them and 527 ms without, because 1 MiB of
//! small pages is more segments than a drive takes in one request, and because registering the arena with
//! io_uring costs a twentieth. Not inherited by forked children (MADV_DONTFORK), because a fork of
//! registered memory copies it: seconds for 2 GiB.

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use crate::config::Facility;
use crate::error::{Error, ErrorKind, Result};
use crate::io::thread::quietly;

use super::huge::{HUGE_PAGE, HugePages, transparent_within};
use super::{limits, numa};

/// Threads that touch the pages before use: the kernel zeroes about 5 GiB/s on one.
const PREFAULT_THREADS_MAX: usize = 4;
/// Work of one thread at a time.
const PREFAULT_CHUNK: usize = 64 << 20;
/// The smallest base page there is: each is touched, at worst sixteen times.
const SMALL_PAGE: usize = 4096;

/// The pages an arena lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// 2 MiB pages from the pool that the administrator reserved.
    Pool,
    /// Transparent huge pages, for at least half of the bytes.
    Transparent,
    /// The base pages of the machine.
    Small,
}

/// What an arena should be like.
#[derive(Clone, Copy, Debug)]
pub struct ArenaRequest {
    /// Bytes, rounded up to whole huge pages.
    pub bytes: usize,
    /// The NUMA node it should lie on.
    pub numa_node: Option<u32>,
    /// Whether huge pages are wanted.
    pub huge_pages: Facility,
    /// Processes of this host that map as much: the memory limit is shared among them.
    pub ranks: u32,
}

/// Memory of the process that no forked child inherits.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    length: usize,
    pages: PageKind,
    owner: u32,
    notes: Vec<String>,
}

// SAFETY: the arena owns its mapping and hands out only its address; whoever reads or writes through that
// owns the slot, on whatever thread.
unsafe impl Send for Arena {}
// SAFETY: as above; no method changes the arena.
unsafe impl Sync for Arena {}

impl Arena {
    /// An arena of `bytes`, near `numa_node`, in huge pages where there are any.
    pub fn map(bytes: usize, numa_node: Option<u32>) -> Result<Arena> {
        let huge_pages = Facility::Auto;
        Self::open(&ArenaRequest { bytes, numa_node, huge_pages, ranks: 1 })
    }

    /// Maps an arena and touches all of its pages, so that no transfer waits for the kernel to zero one.
    ///
    /// # Errors
    /// `OutOfMemory` where it does not fit under the limits of the process, before anything is touched; the
    /// text names `cache_buffer_capacity_gb` and what would fit. `Unsupported` where huge pages are
    /// required and not to be had.
    pub fn open(request: &ArenaRequest) -> Result<Arena> {
        if request.bytes == 0 {
            return Err(Error::new(ErrorKind::InvalidArgument, "an arena of 0 bytes"));
        }
        let length = request.bytes.checked_next_multiple_of(HUGE_PAGE).ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfMemory,
                "cache_buffer_capacity_gb: more than the address space",
            )
        })?;
        if request.huge_pages != Facility::Off
            && let Some(arena) = Self::from_pool(length, request)?
        {
            return Ok(arena);
        }
        limits::check(length as u64, request.ranks)?;
        Self::from_anonymous(length, request)
    }

    /// Address of the first byte; a multiple of 2 MiB.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never: an arena has at least one page.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// What it lies in.
    pub fn pages(&self) -> PageKind {
        self.pages
    }

    /// What was asked for and could not be had, with its cost and the remedy.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// From the reserved pool, whose pages no memory limit counts; `None` where it is too small.
    fn from_pool(length: usize, request: &ArenaRequest) -> Result<Option<Arena>> {
        if HugePages::here().pool_free * (HUGE_PAGE as u64) < length as u64 {
            return Ok(None);
        }
        let flags =
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        let Ok(base) = mmap(length, flags) else { return Ok(None) };
        let mut arena = Arena::own(base, length, PageKind::Pool);
        arena.prepare(request)?;
        // A control group may grant fewer pool pages than there are: found here, as an error, not as SIGBUS.
        match arena.prefault() {
            Ok(()) => Ok(Some(arena)),
            Err(_) => Ok(None),
        }
    }

    fn from_anonymous(length: usize, request: &ArenaRequest) -> Result<Arena> {
        let base = mmap_aligned(length).map_err(|errno| {
            Error::os("mapping the arena (cache_buffer_capacity_gb)", None, None, errno)
        })?;
        let mut arena = Arena::own(base, length, PageKind::Small);
        arena.prepare(request)?;
        let wanted = request.huge_pages != Facility::Off;
        let advised = wanted && arena.advise(libc::MADV_HUGEPAGE).is_ok();
        arena.prefault().map_err(|errno| {
            Error::os("touching the arena (cache_buffer_capacity_gb)", None, None, errno)
        })?;
        let huge = if advised { transparent_within(arena.base() as usize, length) } else { 0 };
        if huge * 2 >= length as u64 {
            arena.pages = PageKind::Transparent;
        } else if request.huge_pages == Facility::Required {
            return Err(Error::new(ErrorKind::Unsupported, small_pages_note(length, huge)));
        } else if wanted {
            arena.notes.push(small_pages_note(length, huge));
        }
        Ok(arena)
    }

    fn own(base: NonNull<u8>, length: usize, pages: PageKind) -> Arena {
        Arena { base, length, pages, owner: std::process::id(), notes: Vec::new() }
    }

    /// What must be said of the mapping before its pages are touched.
    fn prepare(&mut self, request: &ArenaRequest) -> Result<()> {
        self.advise(libc::MADV_DONTFORK).map_err(|errno| {
            Error::os("keeping the arena from forked children", None, None, errno)
        })?;
        if let Some(node) = request.numa_node
            && let Err(errno) = numa::prefer_node(self.base(), self.length, node)
        {
            self.notes.push(format!(
                "the arena is not bound to NUMA node {node} ({}); copies may cross nodes; check numa_node, and that the container may call mbind",
                std::io::Error::from_raw_os_error(errno)
            ));
        }
        Ok(())
    }

    fn advise(&self, advice: libc::c_int) -> std::result::Result<(), i32> {
        // SAFETY: the range is this arena's own mapping, and the advice given here changes no byte of it.
        let status = unsafe { libc::madvise(self.base().cast(), self.length, advice) };
        errno_of(status)
    }

    /// Touches every page, on a few threads.
    fn prefault(&self) -> std::result::Result<(), i32> {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let chunks = self.length.div_ceil(PREFAULT_CHUNK);
        let threads = threads.min(PREFAULT_THREADS_MAX).min(chunks);
        let (next, failed) = (std::sync::atomic::AtomicUsize::new(0), AtomicI32::new(0));
        let work = || {
            while failed.load(Ordering::Relaxed) == 0 {
                let start = next.fetch_add(1, Ordering::Relaxed) * PREFAULT_CHUNK;
                if start >= self.length {
                    return;
                }
                if let Err(errno) = self.populate(start, PREFAULT_CHUNK.min(self.length - start)) {
                    failed.store(errno, Ordering::Relaxed);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                let builder = thread::Builder::new().name("ucm-prefault".into());
                // A thread that cannot be had is a slower start, no error.
                let _ = quietly(|| builder.spawn_scoped(scope, work));
            }
            work();
        });
        match failed.into_inner() {
            0 => Ok(()),
            errno => Err(errno),
        }
    }

    fn populate(&self, start: usize, length: usize) -> std::result::Result<(), i32> {
        // SAFETY: start and length lie inside the mapping (the caller cuts [0, self.length) into chunks).
        let status = unsafe {
            libc::madvise(self.base().add(start).cast(), length, libc::MADV_POPULATE_WRITE)
        };
        match errno_of(status) {
            // Linux before 5.14 does not know the advice.
            Err(libc::EINVAL) if self.pages != PageKind::Pool => {
                for page in (start..start + length).step_by(SMALL_PAGE) {
                    // SAFETY: the byte lies inside the mapping, nobody else has its address yet, and a new
                    // anonymous page is zero, so that writing zero changes nothing.
                    unsafe { self.base().add(page).write_volatile(0) };
                }
                Ok(())
            }
            other => other,
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // A forked child does not have the mapping; something else may lie there.
        if self.owner == std::process::id() {
            // SAFETY: base and length are of a mapping that this arena alone owns; users of its bytes keep
            // the arena alive.
            unsafe { libc::munmap(self.base().cast(), self.length) };
        }
    }
}

fn errno_of(status: libc::c_int) -> std::result::Result<(), i32> {
    match status {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
    }
}

fn mmap(length: usize, flags: libc::c_int) -> std::result::Result<NonNull<u8>, i32> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
    let base = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM));
    }
    NonNull::new(base.cast()).ok_or(libc::ENOMEM)
}

/// A mapping that begins at a multiple of the huge page: one that is larger by a page, cut at both ends.
fn mmap_aligned(length: usize) -> std::result::Result<NonNull<u8>, i32> {
    let padded = length.checked_add(HUGE_PAGE).ok_or(libc::ENOMEM)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let raw = mmap(padded, flags)?;
    let before = raw.as_ptr().align_offset(HUGE_PAGE);
    let behind = HUGE_PAGE - before;
    // SAFETY: `before` is less than HUGE_PAGE, so that all three pieces lie in the new mapping, which has
    // length + HUGE_PAGE bytes; the two that are unmapped are used by nobody.
    unsafe {
        let base = raw.as_ptr().add(before);
        if before > 0 {
            libc::munmap(raw.as_ptr().cast(), before);
        }
        if behind > 0 {
            libc::munmap(base.add(length).cast(), behind);
        }
        Ok(NonNull::new_unchecked(base))
    }
}

fn small_pages_note(length: usize, huge: u64) -> String {
    format!(
        "huge_pages: {} of {} MiB of the arena lie in huge pages; transfers cost more CPU; {}",
        huge >> 20,
        length >> 20,
        HugePages::here().remedy(length as u64)
    )
}

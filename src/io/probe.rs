//! What the platform offers in one directory, found out by doing it: a direct write and read, a ring
//! that carries them, the kind of file system.
//!
//! Each refusal becomes a [`Fallback`] that says what it costs and what cures it, or an error where the
//! configuration requires the thing. Runs on the backend's path pool, because the directory may hang.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::backend::BackendConfig;
use super::carrier::Carrier;
use super::engine::{Io, Op, Patience};
use super::files::OsFiles;
use super::psync::Psync;
use super::report::Fallback;
use super::uring::Uring;
use super::{Access, Class, Create, DirectIo, DmaSlice, File, Files, IoEngine, OpenHow, Operation};
use crate::error::{Error, ErrorKind, Result};

/// Bytes written and read back, and the alignment of everything in segments and manifests.
const PAGE_BYTES: usize = 4096;
/// Depth of the ring that is tried out.
const TRIAL_DEPTH: u32 = 4;
/// A transfer of one page that takes longer has found a mount that hangs.
const TRIAL_PATIENCE: Duration = Duration::from_secs(10);

/// What was found.
pub struct Findings {
    /// Open files with O_DIRECT.
    pub direct: bool,
    /// The file system keeps its data on this machine.
    pub local: bool,
    /// Its name.
    pub file_system: String,
    /// An engine for each reactor.
    pub engines: Vec<Box<dyn Io>>,
    /// What was refused.
    pub fallbacks: Vec<Fallback>,
}

/// Finds out. Creates `directory` if it is missing.
pub fn probe(directory: &Path, config: &BackendConfig, files: &Arc<OsFiles>) -> Result<Findings> {
    files.create_dir_all(directory)?;
    let (file_system, local) = identify(directory)?;
    let mut fallbacks = Vec::new();
    let trial = Trial::create(directory, config.direct, &file_system, files, &mut fallbacks)?;
    let place = (directory, file_system.as_str());
    let engines = choose_engines(config, place, trial.file.as_ref(), &mut fallbacks)?;
    Ok(Findings { direct: trial.direct, local, file_system, engines, fallbacks })
}

/// Name of the file system that holds `directory`, and whether it is on this machine. FUSE counts as
/// away: a daemon that anything may hide behind answers its reads.
fn identify(directory: &Path) -> Result<(String, bool)> {
    /// Magic numbers from statfs(2) and linux/magic.h.
    const KNOWN: [(u32, &str, bool); 20] = [
        (0xef53, "ext4", true),
        (0x5846_5342, "xfs", true),
        (0x9123_683e, "btrfs", true),
        (0x0102_1994, "tmpfs", true),
        (0x794c_7630, "overlay", true),
        (0x2fc1_2fc1, "zfs", true),
        (0xf2f5_2010, "f2fs", true),
        (0xca45_1a4e, "bcachefs", true),
        (0x8584_58f6, "ramfs", true),
        (0x6969, "nfs", false),
        (0xff53_4d42, "cifs", false),
        (0xfe53_4d42, "smb2", false),
        (0x517b, "smb", false),
        (0x6573_5546, "fuse", false),
        (0x00c3_6400, "ceph", false),
        (0x0102_1997, "9p", false),
        (0x0bd0_0bd0, "lustre", false),
        (0x4750_4653, "gpfs", false),
        (0x7461_636f, "ocfs2", false),
        (0x1983_0326, "beegfs", false),
    ];
    let magic = super::files::retry(|| rustix::fs::statfs(directory))
        .map_err(super::files::failed("statfs", directory))?
        .f_type as u32;
    let known = KNOWN.iter().find(|(number, ..)| *number == magic);
    Ok(match known {
        Some(&(_, name, local)) => (name.into(), local),
        None => (format!("unknown ({magic:#x})"), false),
    })
}

/// A file of one page, written and read back; removed when dropped.
struct Trial {
    direct: bool,
    /// Not there where the directory cannot be written, which a store that only reads may do without.
    file: Option<File>,
    path: PathBuf,
    files: Arc<OsFiles>,
}

impl Trial {
    fn create(
        directory: &Path,
        wanted: DirectIo,
        file_system: &str,
        files: &Arc<OsFiles>,
        fallbacks: &mut Vec<Fallback>,
    ) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!(".ucm-probe-{}-{}-{number}", host_name(), std::process::id());
        let mut trial =
            Self { direct: false, file: None, path: directory.join(name), files: files.clone() };
        if wanted == DirectIo::Off {
            trial.try_mode(false)?;
            return Ok(trial);
        }
        match trial.try_mode(true) {
            Ok(()) => {
                trial.direct = true;
                return Ok(trial);
            }
            Err(error) if error.kind() == ErrorKind::Timeout => return Err(error),
            Err(error) if wanted == DirectIo::Required => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "io_direct is required, but {file_system} refuses it: {error}. Set io_direct: auto, \
                         or move storage_backends to ext4, xfs or nfs"
                    ),
                )
                .at(directory));
            }
            Err(error) => fallbacks.push(Fallback {
                what: format!(
                    "O_DIRECT is refused by {file_system} in {} ({error}); files go through the page cache",
                    directory.display()
                ),
                cost: "every byte is copied once more (about 0.1 CPU s per GB), and the page cache \
                       grows beside the arena"
                    .into(),
                remedy: "move storage_backends to a directory on ext4, xfs or nfs (in a container: a volume, \
                         `-v /mnt/nvme:/mnt/nvme`), or set io_direct: false to accept it"
                    .into(),
            }),
        }
        trial.try_mode(false)?;
        Ok(trial)
    }

    /// Writes and reads a page. A directory that cannot be written is judged by `statx` alone.
    fn try_mode(&mut self, direct: bool) -> Result<()> {
        drop(self.file.take());
        let _ = self.files.unlink(&self.path);
        let how = OpenHow { access: Access::ReadWrite, create: Create::New, direct };
        let file = match self.files.open(&self.path, how) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::Permission => {
                return self.judge_unwritable(direct);
            }
            Err(error) => return Err(error),
        };
        let page = Page::patterned();
        // SAFETY: the page lives until the end of this function, and the calls block.
        match unsafe { self.files.write_at(&file, 0, page.slice()) } {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                return self.judge_unwritable(direct);
            }
            other => other?,
        }
        let back = Page::zeroed();
        // SAFETY: as above.
        let read = unsafe { self.files.read_at(&file, 0, back.slice()) }?;
        if read != PAGE_BYTES || back.bytes() != page.bytes() {
            let text = format!("{read} of {PAGE_BYTES} bytes came back as written");
            return Err(Error::new(ErrorKind::Corrupt, text).at(&self.path));
        }
        self.file = Some(file);
        Ok(())
    }

    fn judge_unwritable(&self, direct: bool) -> Result<()> {
        let directory = self.path.parent().expect("it was joined");
        if !direct || direct_alignment(directory).is_some_and(|bytes| bytes as usize <= PAGE_BYTES)
        {
            return Ok(());
        }
        let text =
            "the directory cannot be written, and statx does not tell whether O_DIRECT works there";
        Err(Error::new(ErrorKind::Unsupported, text).at(directory))
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = self.files.unlink(&self.path);
        }
    }
}

/// Names a probe file so that two machines on one file system never choose the same.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().replace('/', "_")
}

/// The alignment that `statx` asks of direct transfers, where it tells (Linux 6.1; not on tmpfs or NFS).
fn direct_alignment(path: &Path) -> Option<u32> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    /// Not named by rustix 1.1 (linux/stat.h).
    const STATX_DIOALIGN: u32 = 0x2000;
    let mask = StatxFlags::from_bits_retain(STATX_DIOALIGN);
    let found = statx(CWD, path, AtFlags::empty(), mask).ok()?;
    let told = found.stx_mask & STATX_DIOALIGN != 0 && found.stx_dio_offset_align > 0;
    told.then(|| found.stx_dio_offset_align.max(found.stx_dio_mem_align))
}

fn choose_engines(
    config: &BackendConfig,
    place: (&Path, &str),
    file: Option<&File>,
    fallbacks: &mut Vec<Fallback>,
) -> Result<Vec<Box<dyn Io>>> {
    let threads = config.threads.max(1);
    if let Some(carrier) = &config.carrier {
        try_carrier(carrier, file, place)?;
        let engine = || Box::new(Psync::carried_by(Arc::clone(carrier), config.depth));
        return Ok((0..threads).map(|_| engine() as Box<dyn Io>).collect());
    }
    if config.engine != IoEngine::Psync {
        match rings(threads, config.depth, file) {
            Ok(rings) => return Ok(rings),
            Err(error) if error.kind() == ErrorKind::Timeout => return Err(error),
            Err(error) if config.engine == IoEngine::IoUring => {
                let text = format!(
                    "io_engine: io_uring is required, but {}. Remedy: {}; or set io_engine: auto",
                    ring_reason(&error),
                    ring_remedy(&error)
                );
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            Err(error) => fallbacks.push(Fallback {
                what: format!(
                    "io_uring is refused: {}; psync threads carry the I/O",
                    ring_reason(&error)
                ),
                cost: "1.6 to 4.6 times the CPU per GB, and a thread for each transfer in flight"
                    .into(),
                remedy: ring_remedy(&error),
            }),
        }
    }
    Ok((0..threads).map(|_| Box::new(Psync::new(config.depth)) as Box<dyn Io>).collect())
}

/// Has the carrier move a page of the trial file.
fn try_carrier(
    carrier: &Arc<dyn Carrier>,
    file: Option<&File>,
    (directory, file_system): (&Path, &str),
) -> Result<()> {
    let tried = match file {
        Some(file) => carrier.try_out(file).map_err(|error| error.to_string()),
        None => Err("the directory cannot be written, so that nothing tells".to_owned()),
    };
    tried.map_err(|why| {
        let text = format!("{} does not work on {file_system}: {why}", carrier.name());
        Error::new(ErrorKind::Unsupported, text).at(directory)
    })
}

/// Tries a ring out on the file, then makes the real ones.
fn rings(threads: usize, depth: u32, file: Option<&File>) -> Result<Vec<Box<dyn Io>>> {
    let mut trial = Uring::new(TRIAL_DEPTH)?;
    trial.start()?;
    if let Some(file) = file {
        try_ring(trial, file)?;
    }
    (0..threads).map(|_| Uring::new(depth).map(|ring| Box::new(ring) as Box<dyn Io>)).collect()
}

/// Reads the page of the trial file through a ring: seccomp may allow the set-up and refuse the rest.
fn try_ring(mut ring: Uring, file: &File) -> Result<()> {
    let page = Page::zeroed();
    ring.push(&Op {
        token: 0,
        operation: Operation::Read,
        file,
        offset: 0,
        memory: page.slice(),
        class: Class::Load,
    });
    let until = Instant::now() + TRIAL_PATIENCE;
    let patience = Patience { at_least: 1, gather: Duration::ZERO, until: Some(until) };
    let mut ended = Vec::new();
    while ended.is_empty() && Instant::now() < until {
        if let Err(error) = ring.wait(patience, &mut ended) {
            // Whether the kernel took the operation is unknown: it may yet write the page.
            std::mem::forget(page);
            return Err(error);
        }
    }
    let Some(end) = ended.first() else {
        std::mem::forget((page, file.clone(), ring));
        let text = "a read of one page through io_uring has not ended in 10 s; check the mount";
        return Err(Error::new(ErrorKind::Timeout, text).at(file.path()));
    };
    if end.result < 0 {
        return Err(Error::os("read through io_uring", Some(file.path()), Some(0), -end.result));
    }
    if end.result as usize != PAGE_BYTES || page.bytes() != Page::patterned().bytes() {
        let text = "a read through io_uring did not bring back what was written";
        return Err(Error::new(ErrorKind::Corrupt, text).at(file.path()));
    }
    Ok(())
}

/// Why io_uring does not work. The sentences of [`Error::os`] speak of files.
fn ring_reason(error: &Error) -> String {
    match error.errno() {
        Some(libc::EPERM | libc::EACCES) => {
            "a seccomp profile or kernel.io_uring_disabled forbids io_uring (EPERM)".into()
        }
        Some(libc::ENOSYS) => "this kernel or sandbox lacks io_uring (ENOSYS)".into(),
        Some(libc::ENOMEM) => "the memlock limit is too low for its rings (ENOMEM)".into(),
        Some(libc::EINVAL) => "this kernel is too old for the rings (EINVAL)".into(),
        _ => error.to_string(),
    }
}

/// The command or flag that makes io_uring work.
fn ring_remedy(error: &Error) -> String {
    let switch = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    match error.errno() {
        Some(libc::EPERM | libc::EACCES) => match switch.as_deref().map(str::trim) {
            Ok("1" | "2") => "`sysctl -w kernel.io_uring_disabled=0` on the host".into(),
            _ => "start the container with `--security-opt seccomp=unconfined`, or with a seccomp profile \
                  that allows io_uring_setup, io_uring_enter and io_uring_register"
                .into(),
        },
        Some(libc::ENOMEM) => memlock_remedy(),
        Some(libc::EMFILE | libc::ENFILE) => "`ulimit -n 65536`".into(),
        _ => "run on Linux 5.19 or newer, outside sandboxes that lack io_uring (gVisor)".into(),
    }
}

/// The command or flag that lifts the limit on locked memory.
pub(super) fn memlock_remedy() -> String {
    "`ulimit -l unlimited` (docker run --ulimit memlock=-1:-1; systemd: LimitMEMLOCK=infinity)"
        .into()
}

/// One page-aligned page.
struct Page(*mut u8);

impl Page {
    const LAYOUT: Layout = match Layout::from_size_align(PAGE_BYTES, PAGE_BYTES) {
        Ok(layout) => layout,
        Err(_) => unreachable!(),
    };

    fn zeroed() -> Self {
        // SAFETY: the layout is not empty.
        let pointer = unsafe { alloc_zeroed(Self::LAYOUT) };
        assert!(!pointer.is_null(), "no memory for one page");
        Self(pointer)
    }

    fn patterned() -> Self {
        let page = Self::zeroed();
        for index in 0..PAGE_BYTES {
            // SAFETY: within the page. 251 is prime, so no two sectors are alike.
            unsafe { page.0.add(index).write((index % 251) as u8) };
        }
        page
    }

    fn slice(&self) -> DmaSlice {
        DmaSlice { pointer: self.0, length: PAGE_BYTES }
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the page is initialised, and no transfer is in flight when this is called.
        unsafe { std::slice::from_raw_parts(self.0, PAGE_BYTES) }.to_vec()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: allocated by `zeroed` with this layout; users that cannot end a transfer forget the page.
        unsafe { dealloc(self.0, Self::LAYOUT) };
    }
}

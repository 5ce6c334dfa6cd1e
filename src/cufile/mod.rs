//! GPUDirect Storage: the drive reads and writes device memory, through NVIDIA's cuFile.
//!
//! The one room that knows both descriptors and device memory. It carries transfers for the blocking I/O engine
//! ([`Carrier`]): those of its staging memory by cuFile, those of host memory (manifests, trailers) by system
//! calls. It knows nothing of parts, and computes no checksum.
//!
//! cuFile has a compatibility mode, in which bytes go through host memory all the same. It is forbidden before
//! cuFile is opened, looked for afterwards, and each directory is tried out with a real transfer.

mod api;
mod driver;
mod handles;

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::block::PAGE;
use crate::device::DeviceStaging;
use crate::error::{Error, ErrorKind, Result};
use crate::io::carrier::{Carrier, SystemCalls};
use crate::io::thread::Stack;
use crate::io::{DmaSlice, File, FileId, Operation};
use api::{CUDA_DRIVER_ERROR, MEMORY_NOT_REGISTERED};
use driver::Driver;
use handles::Handles;

pub(crate) use api::describe;

/// The library that would be used, and its version; nothing of it is opened.
///
/// # Errors
/// `Device` or `Unsupported`: it does not load, or lacks a function.
pub fn library() -> Result<String> {
    api::Api::load().map(|api| api.name)
}

/// Bytes of staging memory that [`CuFile::open`] needs behind the slots, for so many directories to be tried out.
/// A trial's memory is used for nothing else: on a mount that hangs it may be written long after it was given up.
pub fn trial_bytes(directories: usize) -> usize {
    directories * TRIAL_BYTES
}

/// One page to write from, one to read into.
const TRIAL_BYTES: usize = 2 * PAGE;

/// cuFile with one staging memory registered.
pub struct CuFile {
    // Handles go before the memory, the memory before cuFile.
    handles: Handles,
    registration: Registration,
    /// Where the memory for trials begins.
    trials_from: usize,
    trials: AtomicUsize,
}

/// The staging memory, registered with cuFile while this lives.
struct Registration {
    memory: Arc<dyn DeviceStaging>,
    driver: Arc<Driver>,
}

impl CuFile {
    /// Opens cuFile and registers `memory`, of which [`trial_bytes`] from `trials_from` on are for trials.
    ///
    /// # Errors
    /// What is missing, and the remedy: the library, its kernel module, a setting, memory that cannot be pinned.
    pub fn open(memory: Arc<dyn DeviceStaging>, trials_from: usize) -> Result<Arc<Self>> {
        let driver = Arc::new(Driver::open()?);
        let mut status = None;
        memory.with_context(&mut || {
            let register = driver.api().functions.buffer_register;
            // SAFETY: the range is the allocation of `memory`, which the registration keeps.
            status = Some(unsafe { register(memory.base().cast(), memory.bytes(), 0) });
        })?;
        if let Some(status) = status {
            driver.api().check("cuFileBufRegister", status)?;
        }
        Ok(Arc::new(Self {
            handles: Handles::new(Arc::clone(&driver)),
            registration: Registration { memory, driver },
            trials_from,
            trials: AtomicUsize::new(0),
        }))
    }

    /// Where a transfer's memory begins in the staging memory; `None` for other memory.
    fn offset_of(&self, memory: DmaSlice) -> Option<usize> {
        let staging = &self.registration.memory;
        let offset = memory.pointer.addr().checked_sub(staging.base().addr())?;
        (offset < staging.bytes()).then_some(offset)
    }

    /// One transfer of staging memory: bytes moved, a negative errno or a negative status of cuFile.
    fn carry(
        &self,
        operation: Operation,
        file: FileId,
        raw: i32,
        at: u64,
        (from, bytes): (usize, usize),
    ) -> isize {
        let staging = &self.registration.memory;
        // Memory that only begins in the staging memory is nobody's transfer.
        if from + bytes > staging.bytes() {
            return -(MEMORY_NOT_REGISTERED as isize);
        }
        let mut result = -(CUDA_DRIVER_ERROR as isize);
        let entered = staging.with_context(&mut || {
            let handle = match self.handles.get(file, raw) {
                Ok(handle) => handle,
                Err(code) => return result = -(code as isize),
            };
            let functions = &self.registration.driver.api().functions;
            let call = match operation {
                Operation::Read => functions.read,
                Operation::Write => functions.write,
            };
            let base = staging.base().cast::<c_void>();
            // SAFETY: the handle is registered while `handle` lives; the range lies in the registered memory,
            // as was checked above.
            let moved = unsafe { call(handle.raw(), base, bytes, at as i64, from as i64) };
            result = match moved {
                -1 => -(last_errno() as isize),
                moved => moved,
            };
        });
        match entered {
            Ok(()) => result,
            Err(_) => -(CUDA_DRIVER_ERROR as isize),
        }
    }

    /// Moves a page to the file and back, and compares.
    fn try_pages(&self, file: &File) -> Result<()> {
        let staging = &self.registration.memory;
        let number = self.trials.fetch_add(1, Ordering::Relaxed);
        let from = self.trials_from + trial_bytes(number);
        if from + TRIAL_BYTES > staging.bytes() {
            return Err(Error::new(ErrorKind::Internal, "more trials than directories"));
        }
        let pattern: Vec<u8> = (0..PAGE).map(|at| ((at + number) % 251) as u8).collect();
        staging.write(from, &pattern)?;
        staging.write(from + PAGE, &[0; PAGE])?;
        for (operation, from) in [(Operation::Write, from), (Operation::Read, from + PAGE)] {
            let moved = self.carry(operation, file.id(), file.raw(), 0, (from, PAGE));
            if moved != PAGE as isize {
                return Err(self.refused(operation, moved, file));
            }
        }
        let mut back = vec![0; PAGE];
        staging.read(from + PAGE, &mut back)?;
        if back != pattern {
            let text = format!(
                "{} did not bring back what it had written",
                self.registration.driver.api().name
            );
            return Err(Error::new(ErrorKind::Corrupt, text).at(file.path()));
        }
        Ok(())
    }

    fn refused(&self, operation: Operation, moved: isize, file: &File) -> Error {
        let name = &self.registration.driver.api().name;
        let call = match operation {
            Operation::Read => "cuFileRead",
            Operation::Write => "cuFileWrite",
        };
        let code = i32::try_from(-moved).unwrap_or(0);
        if moved >= 0 {
            let text = format!("{call} of {name} moved {moved} of {PAGE} bytes");
            return Error::new(ErrorKind::Io, text).at(file.path());
        }
        if code <= crate::io::carrier::OWN_CODES {
            return Error::os(&format!("{call} of {name}"), Some(file.path()), Some(0), code);
        }
        let (kind, text) = describe(code);
        Error::new(kind, format!("{call} of {name}: {text}")).at(file.path())
    }
}

impl fmt::Debug for CuFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CuFile({} bytes)", self.registration.memory.bytes())
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut forget = || {
            let deregister = self.driver.api().functions.buffer_deregister;
            // SAFETY: registered by `open`; no transfer is in flight, since each holds the `CuFile`.
            let _ = unsafe { deregister(self.memory.base().cast_const().cast()) };
        };
        // Entering may fail for want of memory; twice in a row is a dead context. Then nothing tells whether the
        // drive still has a way to the memory: it is never given back.
        let memory = &self.memory;
        if memory.with_context(&mut forget).or_else(|_| memory.with_context(&mut forget)).is_err() {
            std::mem::forget(Arc::clone(memory));
        }
    }
}

impl Carrier for CuFile {
    fn name(&self) -> &'static str {
        "cufile"
    }

    fn stack(&self) -> Stack {
        Stack::Vendor
    }

    fn features(&self) -> Vec<String> {
        self.registration.driver.features().to_vec()
    }

    fn keeps(&self, memory: DmaSlice) -> bool {
        self.offset_of(memory).is_some()
    }

    fn forget(&self, file: FileId) {
        self.handles.forget(file);
    }

    fn try_out(&self, file: &File) -> Result<()> {
        let tried = self.try_pages(file);
        self.handles.forget(file.id());
        tried
    }

    unsafe fn transfer(
        &self,
        operation: Operation,
        file: FileId,
        raw: i32,
        offset: u64,
        memory: DmaSlice,
    ) -> isize {
        match self.offset_of(memory) {
            Some(from) => self.carry(operation, file, raw, offset, (from, memory.length)),
            // SAFETY: passed on from the caller.
            None => unsafe { SystemCalls.transfer(operation, file, raw, offset, memory) },
        }
    }
}

fn last_errno() -> i32 {
    match std::io::Error::last_os_error().raw_os_error() {
        None | Some(0) => libc::EIO,
        Some(errno) => errno,
    }
}

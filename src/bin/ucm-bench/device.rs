//! Memory of an accelerator for the bench's blocks: allocated through the driver, loaded at run time.
//!
//! The store moves the bytes of a run; this only allocates, fills and reads back.

use std::ffi::{CStr, c_int, c_void};

use libloading::Library;

/// Memory of a device.
pub trait DeviceMemory: Send + Sync {
    /// Device address of the first byte.
    fn base(&self) -> *mut u8;
    /// Bytes.
    fn len(&self) -> usize;
    /// Copies from the host to offset `at`.
    fn write(&self, at: usize, bytes: &[u8]);
    /// Copies from offset `at` to the host.
    fn read(&self, at: usize, bytes: &mut [u8]);
}

/// How to get memory of one device.
pub type Allocate = Box<dyn Fn(usize) -> Result<Box<dyn DeviceMemory>, String> + Send + Sync>;

/// The allocator of a device by name; none for the host.
pub fn allocator(name: &str, ordinal: u32) -> Result<Option<Allocate>, String> {
    match name {
        "host" => Ok(None),
        "cuda" => {
            let driver = &*Box::leak(Box::new(Cuda::open(ordinal)?));
            Ok(Some(Box::new(move |length| Ok(Box::new(driver.allocate(length)?) as _))))
        }
        "ascend" => {
            let driver = &*Box::leak(Box::new(Ascend::open(ordinal)?));
            Ok(Some(Box::new(move |length| Ok(Box::new(driver.allocate(length)?) as _))))
        }
        _ => Err(format!("device={name}: host, cuda or ascend")),
    }
}

/// Opens a driver: the file that the variable names, as the store does, else the one of this name.
pub fn library(name: &str, variable: &str, remedy: &str) -> Result<Library, String> {
    let path = std::env::var(variable).ok().filter(|path| !path.is_empty());
    // SAFETY: a vendor's driver library; its initialisers are the vendor's word.
    unsafe { Library::new(path.as_deref().unwrap_or(name)) }
        .map_err(|error| format!("{error}; {remedy}"))
}

/// The function of this name.
pub fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, String> {
    // SAFETY: the callers state the type that the vendor's header declares for this name.
    unsafe { library.get::<T>(name.to_bytes_with_nul()) }.map(|symbol| *symbol).map_err(|_| {
        format!("the driver library has no {}; install a newer driver", name.to_string_lossy())
    })
}

/// Turns a driver's status into a result.
pub fn ok(call: &str, code: c_int) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call} failed with {code}")) }
}

type Code = c_int;

struct Cuda {
    _library: Library,
    context: *mut c_void,
    set_current: unsafe extern "C" fn(*mut c_void) -> Code,
    allocate: unsafe extern "C" fn(*mut u64, usize) -> Code,
    free: unsafe extern "C" fn(u64) -> Code,
    to_device: unsafe extern "C" fn(u64, *const c_void, usize) -> Code,
    to_host: unsafe extern "C" fn(*mut c_void, u64, usize) -> Code,
}

// SAFETY: the driver API is thread-safe; the context is made current on each thread before use.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

impl Cuda {
    fn open(ordinal: u32) -> Result<Self, String> {
        let library = library(
            "libcuda.so.1",
            "UCM_CUDA_LIBRARY",
            "install the NVIDIA driver, or use --device=host",
        )?;
        let init: unsafe extern "C" fn(u32) -> Code = symbol(&library, c"cuInit")?;
        let get: unsafe extern "C" fn(*mut c_int, c_int) -> Code =
            symbol(&library, c"cuDeviceGet")?;
        let retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> Code =
            symbol(&library, c"cuDevicePrimaryCtxRetain")?;
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        // SAFETY: cuInit takes 0; the out pointers are locals.
        unsafe {
            ok("cuInit", init(0))?;
            ok("cuDeviceGet", get(&mut device, ordinal as c_int))?;
            ok("cuDevicePrimaryCtxRetain", retain(&mut context, device))?;
        }
        Ok(Self {
            context,
            set_current: symbol(&library, c"cuCtxSetCurrent")?,
            allocate: symbol(&library, c"cuMemAlloc_v2")?,
            free: symbol(&library, c"cuMemFree_v2")?,
            to_device: symbol(&library, c"cuMemcpyHtoD_v2")?,
            to_host: symbol(&library, c"cuMemcpyDtoH_v2")?,
            _library: library,
        })
    }

    fn enter(&self) {
        // SAFETY: the primary context, retained for the life of the process.
        unsafe { (self.set_current)(self.context) };
    }

    fn allocate(&'static self, length: usize) -> Result<CudaMemory, String> {
        self.enter();
        let mut base = 0;
        // SAFETY: the out pointer is a local; the context is current.
        ok("cuMemAlloc", unsafe { (self.allocate)(&mut base, length) })?;
        Ok(CudaMemory { driver: self, base, length })
    }
}

struct CudaMemory {
    driver: &'static Cuda,
    base: u64,
    length: usize,
}

impl DeviceMemory for CudaMemory {
    fn base(&self) -> *mut u8 {
        self.base as *mut u8
    }

    fn len(&self) -> usize {
        self.length
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.length);
        self.driver.enter();
        // SAFETY: the range lies inside the allocation (asserted), the source is a slice.
        let code = unsafe {
            (self.driver.to_device)(self.base + at as u64, bytes.as_ptr().cast(), bytes.len())
        };
        assert_eq!(code, 0, "cuMemcpyHtoD failed");
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.length);
        self.driver.enter();
        // SAFETY: as in `write`.
        let code = unsafe {
            (self.driver.to_host)(bytes.as_mut_ptr().cast(), self.base + at as u64, bytes.len())
        };
        assert_eq!(code, 0, "cuMemcpyDtoH failed");
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        self.driver.enter();
        // SAFETY: allocated by `allocate`, freed once; the store that used it is closed before.
        unsafe { (self.driver.free)(self.base) };
    }
}

/// `ACL_MEMCPY_HOST_TO_DEVICE` and `ACL_MEMCPY_DEVICE_TO_HOST` of acl_rt.h.
const ACL_TO_DEVICE: c_int = 1;
const ACL_TO_HOST: c_int = 2;
/// `ACL_MEM_MALLOC_HUGE_FIRST`.
const ACL_HUGE_FIRST: c_int = 0;

struct Ascend {
    _library: Library,
    ordinal: i32,
    set_device: unsafe extern "C" fn(i32) -> Code,
    allocate: unsafe extern "C" fn(*mut *mut c_void, usize, c_int) -> Code,
    free: unsafe extern "C" fn(*mut c_void) -> Code,
    copy: unsafe extern "C" fn(*mut c_void, usize, *const c_void, usize, c_int) -> Code,
}

impl Ascend {
    fn open(ordinal: u32) -> Result<Self, String> {
        let library = library(
            "libascendcl.so",
            "UCM_ASCENDCL_LIBRARY",
            "source the CANN toolkit's set_env.sh, or use --device=host",
        )?;
        let init: unsafe extern "C" fn(*const i8) -> Code = symbol(&library, c"aclInit")?;
        // SAFETY: no configuration file. A process that is initialised already answers with a repeat code.
        unsafe { init(std::ptr::null()) };
        Ok(Self {
            ordinal: ordinal as i32,
            set_device: symbol(&library, c"aclrtSetDevice")?,
            allocate: symbol(&library, c"aclrtMalloc")?,
            free: symbol(&library, c"aclrtFree")?,
            copy: symbol(&library, c"aclrtMemcpy")?,
            _library: library,
        })
    }

    fn enter(&self) {
        // SAFETY: an ordinal; binds the device's default context to this thread.
        unsafe { (self.set_device)(self.ordinal) };
    }

    fn allocate(&'static self, length: usize) -> Result<AscendMemory, String> {
        self.enter();
        let mut base = std::ptr::null_mut();
        // SAFETY: the out pointer is a local.
        ok("aclrtMalloc", unsafe { (self.allocate)(&mut base, length, ACL_HUGE_FIRST) })?;
        Ok(AscendMemory { driver: self, base: base as usize, length })
    }
}

struct AscendMemory {
    driver: &'static Ascend,
    base: usize,
    length: usize,
}

impl DeviceMemory for AscendMemory {
    fn base(&self) -> *mut u8 {
        self.base as *mut u8
    }

    fn len(&self) -> usize {
        self.length
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.length);
        self.driver.enter();
        let (to, length) = ((self.base + at) as *mut c_void, bytes.len());
        // SAFETY: the range lies inside the allocation (asserted), the source is a slice.
        let code =
            unsafe { (self.driver.copy)(to, length, bytes.as_ptr().cast(), length, ACL_TO_DEVICE) };
        assert_eq!(code, 0, "aclrtMemcpy failed");
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.length);
        self.driver.enter();
        let (from, length) = ((self.base + at) as *const c_void, bytes.len());
        // SAFETY: as in `write`.
        let code = unsafe {
            (self.driver.copy)(bytes.as_mut_ptr().cast(), length, from, length, ACL_TO_HOST)
        };
        assert_eq!(code, 0, "aclrtMemcpy failed");
    }
}

impl Drop for AscendMemory {
    fn drop(&mut self) {
        self.driver.enter();
        // SAFETY: allocated by `allocate`, freed once; the store that used it is closed before.
        unsafe { (self.driver.free)(self.base as *mut c_void) };
    }
}

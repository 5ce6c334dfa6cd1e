//! The functions of `libcuda.so.1` that UCM calls, each in the version whose signature stands here, and
//! what their statuses mean. Written after the driver API's public reference; no toolkit is needed.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use crate::device::engine::{ContextState, Fault};
use crate::device::loader::{Library, Source, function_table};
use crate::error::{Error, ErrorKind, Result};

/// A device address (`CUdeviceptr`).
pub(super) type Address = u64;

/// Where the driver is found.
static SOURCE: Source = Source {
    soname: "libcuda.so.1",
    variable: "UCM_CUDA_LIBRARY",
    remedy: "install the NVIDIA driver (R520 or newer; in a container pass the GPU through)",
};

pub(super) const SUCCESS: c_int = 0;
const ERROR_OUT_OF_MEMORY: c_int = 2;
const ERROR_STUB_LIBRARY: c_int = 34;
const ERROR_NO_DEVICE: c_int = 100;
pub(super) const ERROR_NOT_READY: c_int = 600;
pub(super) const ERROR_CONTEXT_IS_DESTROYED: c_int = 709;
pub(super) const ERROR_HOST_MEMORY_ALREADY_REGISTERED: c_int = 712;
pub(super) const ERROR_HOST_MEMORY_NOT_REGISTERED: c_int = 713;

pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;
pub(super) const HOST_PORTABLE: c_uint = 1;
pub(super) const HOST_DEVICEMAP: c_uint = 2;
pub(super) const CAPTURE_MODE_RELAXED: c_int = 2;
pub(super) const CAPTURE_STATUS_NONE: c_int = 0;
pub(super) const MEMORY_TYPE_UNIFIED: c_uint = 4;
pub(super) const SRC_ACCESS_ORDER_STREAM: c_int = 1;
pub(super) const ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int = 16;
pub(super) const POINTER_DEVICE_ORDINAL: c_int = 9;
/// The longest pitch of a two-dimensional copy (`CU_DEVICE_ATTRIBUTE_MAX_PITCH` of every GPU so far).
pub(super) const PITCH_MAX: u64 = i32::MAX as u64;
const PROC_LEGACY_STREAM: u64 = 1;

/// The API version whose signatures this file declares: `cuMemcpyBatchAsync` changed in 13.0.
const API_VERSION: c_int = 12080;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub(super) struct Memcpy2D {
    pub(super) src_x_bytes: usize,
    pub(super) src_y: usize,
    pub(super) src_type: c_uint,
    pub(super) src_host: *const c_void,
    pub(super) src_device: Address,
    pub(super) src_array: *mut c_void,
    pub(super) src_pitch: usize,
    pub(super) dst_x_bytes: usize,
    pub(super) dst_y: usize,
    pub(super) dst_type: c_uint,
    pub(super) dst_host: *mut c_void,
    pub(super) dst_device: Address,
    pub(super) dst_array: *mut c_void,
    pub(super) dst_pitch: usize,
    pub(super) width_bytes: usize,
    pub(super) height: usize,
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Location {
    pub(super) kind: c_int,
    pub(super) id: c_int,
}

/// `CUmemcpyAttributes`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct CopyAttributes {
    pub(super) src_access_order: c_int,
    pub(super) src_location: Location,
    pub(super) dst_location: Location,
    pub(super) flags: c_uint,
}

function_table! {
    /// The driver API.
    Functions;
    required {
        cuInit: fn(c_uint);
        cuDeviceGetCount: fn(*mut c_int);
        cuDeviceGet: fn(*mut c_int, c_int);
        cuDeviceGetName: fn(*mut c_char, c_int, c_int);
        cuDeviceGetAttribute: fn(*mut c_int, c_int, c_int);
        cuDeviceGetPCIBusId: fn(*mut c_char, c_int, c_int);
        cuDevicePrimaryCtxRetain: fn(*mut *mut c_void, c_int);
        cuDevicePrimaryCtxRelease: fn(c_int);
        cuDevicePrimaryCtxGetState: fn(c_int, *mut c_uint, *mut c_int);
        cuCtxPushCurrent: fn(*mut c_void);
        cuCtxPopCurrent: fn(*mut *mut c_void);
        cuThreadExchangeStreamCaptureMode: fn(*mut c_int);
        cuStreamCreateWithPriority: fn(*mut *mut c_void, c_uint, c_int);
        cuStreamDestroy: fn(*mut c_void);
        cuStreamQuery: fn(*mut c_void);
        cuStreamSynchronize: fn(*mut c_void);
        cuStreamWaitEvent: fn(*mut c_void, *mut c_void, c_uint);
        cuStreamIsCapturing: fn(*mut c_void, *mut c_int);
        cuEventCreate: fn(*mut *mut c_void, c_uint);
        cuEventDestroy: fn(*mut c_void);
        cuEventRecord: fn(*mut c_void, *mut c_void);
        cuEventQuery: fn(*mut c_void);
        cuLaunchHostFunc: fn(*mut c_void, unsafe extern "C" fn(*mut c_void), *mut c_void);
        cuMemHostRegister: fn(*mut c_void, usize, c_uint);
        cuMemHostUnregister: fn(*mut c_void);
        cuMemHostGetDevicePointer: fn(*mut Address, *mut c_void, c_uint);
        cuMemHostAlloc: fn(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost: fn(*mut c_void);
        cuMemAlloc: fn(*mut Address, usize);
        cuMemFree: fn(Address);
        cuMemGetAddressRange: fn(*mut Address, *mut usize, Address);
        cuMemcpyAsync: fn(Address, Address, usize, *mut c_void);
        cuMemcpy2DAsync: fn(*const Memcpy2D, *mut c_void);
        cuGetErrorName: fn(c_int, *mut *const c_char);
        cuGetErrorString: fn(c_int, *mut *const c_char);
    }
    optional {
        cuCtxGetId: fn(*mut c_void, *mut u64);
        cuPointerGetAttribute: fn(*mut c_void, c_int, Address);
        cuModuleLoadData: fn(*mut *mut c_void, *const c_void);
        cuModuleUnload: fn(*mut c_void);
        cuModuleGetFunction: fn(*mut *mut c_void, *mut c_void, *const c_char);
        cuLaunchKernel: fn(*mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint,
            *mut c_void, *mut *mut c_void, *mut *mut c_void);
        cuMemcpyBatchAsync: fn(*mut Address, *mut Address, *mut usize, usize, *mut CopyAttributes,
            *mut usize, usize, *mut usize, *mut c_void);
    }
}

/// The exported names of functions whose signature changed once, for drivers without
/// `cuGetProcAddress`.
const SUFFIXED: &[(&str, &CStr)] = &[
    ("cuDevicePrimaryCtxRelease", c"cuDevicePrimaryCtxRelease_v2"),
    ("cuCtxPushCurrent", c"cuCtxPushCurrent_v2"),
    ("cuCtxPopCurrent", c"cuCtxPopCurrent_v2"),
    ("cuStreamDestroy", c"cuStreamDestroy_v2"),
    ("cuEventDestroy", c"cuEventDestroy_v2"),
    ("cuMemHostRegister", c"cuMemHostRegister_v2"),
    ("cuMemHostGetDevicePointer", c"cuMemHostGetDevicePointer_v2"),
    ("cuMemAlloc", c"cuMemAlloc_v2"),
    ("cuMemFree", c"cuMemFree_v2"),
    ("cuMemGetAddressRange", c"cuMemGetAddressRange_v2"),
    ("cuMemcpy2DAsync", c"cuMemcpy2DAsync_v2"),
];

type GetProcAddress =
    unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_int) -> c_int;

/// The loaded and initialised driver.
pub(super) struct Api {
    pub(super) functions: Functions,
    /// `major * 1000 + minor * 10`.
    pub(super) version: c_int,
    path: String,
}

impl Api {
    /// Loads and initialises the driver.
    pub(super) fn load() -> Result<Self> {
        let library = Library::open(&SOURCE)?;
        let version = driver_version(&library)?;
        let proc = library.find("cuGetProcAddress_v2");
        let find = |name: &'static str| resolve(&library, proc, name);
        let text = version_text(version);
        // SAFETY: `resolve` asks for API_VERSION, whose signatures the table declares, and falls back to
        // the exported names that have had these signatures since they exist.
        let functions = unsafe { Functions::fill(find, |name| library.missing(name, &text)) }?;
        let api = Self { functions, version, path: library.path().to_owned() };
        // SAFETY: flags must be 0.
        api.check("cuInit", unsafe { (api.functions.cuInit)(0) }).map_err(|fault| fault.error)?;
        Ok(api)
    }

    /// `12.8`.
    pub(super) fn version_text(&self) -> String {
        version_text(self.version)
    }

    /// Turns a status into a result.
    pub(super) fn check(&self, call: &str, status: c_int) -> std::result::Result<(), Fault> {
        if status == SUCCESS { Ok(()) } else { Err(self.fault(call, status)) }
    }

    /// What a failed call means.
    pub(super) fn fault(&self, call: &str, status: c_int) -> Fault {
        let remedy = match status {
            ERROR_OUT_OF_MEMORY => {
                "; the device or the pinned-memory limit is full: lower the model's memory fraction or \
                 cache_buffer_capacity_gb"
            }
            ERROR_STUB_LIBRARY => "; this is a toolkit stub, not the driver: fix the library path",
            ERROR_NO_DEVICE => "; pass the GPU through, or set device: host",
            ERROR_CONTEXT_IS_DESTROYED => "; something has reset the device in this process",
            _ => "",
        };
        let name = self.text(self.functions.cuGetErrorName, status);
        let sentence = self.text(self.functions.cuGetErrorString, status);
        let text = format!(
            "{call} of {} (CUDA {}) failed with {name} ({status}): {sentence}{remedy}",
            self.path,
            self.version_text()
        );
        let context = if status == ERROR_CONTEXT_IS_DESTROYED {
            ContextState::Destroyed
        } else {
            ContextState::Unknown
        };
        Fault { error: Error::new(ErrorKind::Device, text), context }
    }

    fn text(
        &self,
        describe: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
        status: c_int,
    ) -> String {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: `text` is a valid place for the pointer to a static string.
        let described = unsafe { describe(status, &mut text) };
        if described != SUCCESS || text.is_null() {
            return "unknown error".to_owned();
        }
        // SAFETY: the driver gave a NUL-terminated static string.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

fn version_text(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn driver_version(library: &Library) -> Result<c_int> {
    let address = library
        .find("cuDriverGetVersion")
        .ok_or_else(|| library.missing("cuDriverGetVersion", "unknown"))?;
    // SAFETY: the symbol has had this signature since CUDA 2.2.
    let get = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int) -> c_int>(address)
    };
    let mut version = 0;
    // SAFETY: `version` is a valid place; the call works before cuInit.
    let status = unsafe { get(&mut version) };
    if status != SUCCESS {
        return Err(Error::new(
            ErrorKind::Device,
            format!("{}: cuDriverGetVersion failed with status {status}", library.path()),
        ));
    }
    Ok(version)
}

/// Address of `name` in API version [`API_VERSION`] with the legacy default stream.
fn resolve(
    library: &Library,
    proc: Option<*mut c_void>,
    name: &'static str,
) -> Option<*mut c_void> {
    if let Some(proc) = proc {
        // SAFETY: cuGetProcAddress_v2 has this signature (CUDA 12.0).
        let get = unsafe { std::mem::transmute::<*mut c_void, GetProcAddress>(proc) };
        let symbol = std::ffi::CString::new(name).ok()?;
        let (mut address, mut found) = (std::ptr::null_mut(), 0);
        // SAFETY: the name is NUL-terminated, the other pointers are valid places.
        let status = unsafe {
            get(symbol.as_ptr(), &mut address, API_VERSION, PROC_LEGACY_STREAM, &mut found)
        };
        if status == SUCCESS && !address.is_null() {
            return Some(address);
        }
    }
    let exported = SUFFIXED.iter().find(|(base, _)| *base == name);
    library.find(exported.map_or(name, |(_, exported)| exported.to_str().unwrap_or(name)))
}

//! The functions of `libascendcl.so` that UCM calls, and what their statuses mean. Written after the
//! public CANN documentation (AscendCL, 8.x and 9.x); not yet run on Ascend hardware.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::device::engine::{ContextState, Fault};
use crate::device::loader::{Library, Source, function_table};
use crate::error::{Error, ErrorKind, Result};

/// Where the runtime is found.
static SOURCE: Source = Source {
    soname: "libascendcl.so",
    variable: "UCM_ASCENDCL_LIBRARY",
    remedy: "install CANN 8.0 or newer and source its set_env.sh",
};

pub(super) const SUCCESS: c_int = 0;
const ERROR_REPEAT_INITIALIZE: c_int = 100_002;
pub(super) const ERROR_FEATURE_NOT_SUPPORTED: c_int = 207_000;
const ERROR_MEMORY_ALLOCATION: c_int = 207_001;

/// `ACL_EVENT_SYNC`: streams can wait for the event.
pub(super) const EVENT_SYNC: u32 = 1;
pub(super) const EVENT_STATUS_COMPLETE: c_int = 1;
pub(super) const STREAM_STATUS_COMPLETE: c_int = 0;
pub(super) const CAPTURE_MODE_RELAXED: c_int = 2;
pub(super) const CAPTURE_STATUS_NONE: c_int = 0;
pub(super) const MEMCPY_HOST_TO_DEVICE: c_int = 1;
pub(super) const MEMCPY_DEVICE_TO_HOST: c_int = 2;
/// Of `aclrtMemLocationType`: host memory that AscendCL knows.
pub(super) const LOCATION_HOST: c_int = 0;
pub(super) const LOCATION_DEVICE: c_int = 1;
/// Memory that AscendCL does not know: what `malloc` gave.
pub(super) const LOCATION_UNREGISTERED: c_int = 2;
/// Host memory of one NUMA node.
pub(super) const LOCATION_HOST_NUMA: c_int = 4;
/// `ACL_MEM_MALLOC_HUGE_FIRST`.
pub(super) const MALLOC_HUGE_FIRST: c_int = 0;
/// `ACL_HOST_REG_PINNED`: the pages are locked, so that asynchronous copies may use them.
pub(super) const REGISTER_PINNED: u32 = 0x1000_0000;

/// `aclrtMemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Location {
    pub(super) id: u32,
    pub(super) kind: c_int,
}

/// `aclrtMemcpyBatchAttr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct BatchAttributes {
    pub(super) to: Location,
    pub(super) from: Location,
    pub(super) reserved: [u8; 16],
}

/// `aclrtPtrAttributes`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct PointerAttributes {
    pub(super) location: Location,
    pub(super) page_size: u32,
    pub(super) reserved: [u32; 4],
}

function_table! {
    /// The runtime.
    Functions;
    required {
        aclInit: fn(*const c_char);
        aclrtGetDeviceCount: fn(*mut u32);
        aclrtSetDevice: fn(c_int);
        aclrtGetCurrentContext: fn(*mut *mut c_void);
        aclrtSetCurrentContext: fn(*mut c_void);
        aclrtCreateStream: fn(*mut *mut c_void);
        aclrtDestroyStream: fn(*mut c_void);
        aclrtStreamQuery: fn(*mut c_void, *mut c_int);
        aclrtSynchronizeStream: fn(*mut c_void);
        aclrtStreamWaitEvent: fn(*mut c_void, *mut c_void);
        aclrtCreateEventExWithFlag: fn(*mut *mut c_void, u32);
        aclrtDestroyEvent: fn(*mut c_void);
        aclrtRecordEvent: fn(*mut c_void, *mut c_void);
        aclrtQueryEventStatus: fn(*mut c_void, *mut c_int);
        aclrtMallocHost: fn(*mut *mut c_void, usize);
        aclrtFreeHost: fn(*mut c_void);
        aclrtMalloc: fn(*mut *mut c_void, usize, c_int);
        aclrtFree: fn(*mut c_void);
        aclrtMemcpyAsync: fn(*mut c_void, usize, *const c_void, usize, c_int, *mut c_void);
    }
    optional {
        aclrtLaunchHostFunc: fn(*mut c_void, unsafe extern "C" fn(*mut c_void), *mut c_void);
        aclrtHostRegisterV2: fn(*mut c_void, u64, u32);
        aclrtHostUnregister: fn(*mut c_void);
        aclrtMemcpy2dAsync: fn(*mut c_void, usize, *const c_void, usize, usize, usize, c_int,
            *mut c_void);
        aclrtMemcpyBatchAsync: fn(*mut *mut c_void, *mut usize, *mut *mut c_void, *mut usize, usize,
            *mut BatchAttributes, *mut usize, usize, *mut usize, *mut c_void);
        aclrtPointerGetAttributes: fn(*const c_void, *mut PointerAttributes);
        aclmdlRICaptureThreadExchangeMode: fn(*mut c_int);
        aclmdlRICaptureGetInfo: fn(*mut c_void, *mut c_int, *mut *mut c_void);
    }
}

/// The loaded and initialised runtime.
pub(super) struct Api {
    pub(super) functions: Functions,
    recent_message: Option<unsafe extern "C" fn() -> *const c_char>,
    soc_name: Option<unsafe extern "C" fn() -> *const c_char>,
    version: String,
    path: String,
}

impl Api {
    /// Loads and initialises the runtime. It is never finalised: other users of it live in the process.
    pub(super) fn load() -> Result<Self> {
        let library = Library::open(&SOURCE)?;
        let version = version_of(&library);
        // SAFETY: these are the signatures of the public documentation, unchanged since CANN 8.0 or since
        // the function appeared.
        let functions = unsafe {
            Functions::fill(|name| library.find(name), |name| library.missing(name, &version))
        }?;
        let text = |name| {
            library.find(name).map(|address| {
                // SAFETY: both functions take nothing and give a static or thread-owned string.
                unsafe {
                    std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *const c_char>(
                        address,
                    )
                }
            })
        };
        let api = Self {
            functions,
            recent_message: text("aclGetRecentErrMsg"),
            soc_name: text("aclrtGetSocName"),
            version,
            path: library.path().to_owned(),
        };
        // SAFETY: a null path means the default configuration.
        let status = unsafe { (api.functions.aclInit)(std::ptr::null()) };
        if status != ERROR_REPEAT_INITIALIZE {
            api.check("aclInit", status).map_err(|fault| fault.error)?;
        }
        Ok(api)
    }

    /// The version of the runtime's interface, as it tells it.
    pub(super) fn version_text(&self) -> &str {
        &self.version
    }

    /// The name of the chip, once a device is set.
    pub(super) fn soc_name(&self) -> String {
        read(self.soc_name).unwrap_or_else(|| "Ascend".to_owned())
    }

    /// Turns a status into a result.
    pub(super) fn check(&self, call: &str, status: c_int) -> std::result::Result<(), Fault> {
        if status == SUCCESS { Ok(()) } else { Err(self.fault(call, status)) }
    }

    /// What a failed call means. Nothing that the runtime says proves that work has ended.
    pub(super) fn fault(&self, call: &str, status: c_int) -> Fault {
        let remedy = match status {
            ERROR_MEMORY_ALLOCATION => {
                "; memory is short: lower the model's memory fraction or cache_buffer_capacity_gb"
            }
            ERROR_FEATURE_NOT_SUPPORTED => "; this chip or CANN version does not offer it",
            _ => "; the log under ~/ascend/log has the details",
        };
        let detail = read(self.recent_message).map(|text| format!(": {text}")).unwrap_or_default();
        let text = format!(
            "{call} of {} (version {}) failed with status {status}{detail}{remedy}",
            self.path, self.version
        );
        Fault { error: Error::new(ErrorKind::Device, text), context: ContextState::Unknown }
    }
}

fn read(get: Option<unsafe extern "C" fn() -> *const c_char>) -> Option<String> {
    // SAFETY: the function takes nothing.
    let text = unsafe { get?() };
    if text.is_null() {
        return None;
    }
    // SAFETY: the runtime gave a NUL-terminated string that lives until this thread's next call.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned())
        .filter(|text| !text.is_empty())
}

fn version_of(library: &Library) -> String {
    let Some(address) = library.find("aclrtGetVersion") else { return "unknown".to_owned() };
    // SAFETY: the symbol has had this signature since it appeared.
    let get = unsafe {
        std::mem::transmute::<
            *mut c_void,
            unsafe extern "C" fn(*mut c_int, *mut c_int, *mut c_int) -> c_int,
        >(address)
    };
    let (mut major, mut minor, mut patch) = (0, 0, 0);
    // SAFETY: the places are valid; the call works before aclInit.
    let status = unsafe { get(&mut major, &mut minor, &mut patch) };
    if status == SUCCESS { format!("{major}.{minor}.{patch}") } else { "unknown".to_owned() }
}

//! The functions of `libcufile.so.0` that UCM calls, and what their statuses mean. Written after the public API
//! reference and the header of CUDA 13; nothing of a toolkit is needed.

use std::ffi::{c_int, c_long, c_uint, c_void};

use crate::device::loader::{Library, Source};
use crate::error::{Error, ErrorKind, Result};

/// Where the library is found.
pub(super) static SOURCE: Source = Source {
    soname: "libcufile.so.0",
    variable: "UCM_CUFILE_LIBRARY",
    remedy: "install GPUDirect Storage (it comes with CUDA, or as nvidia-cufile from PyPI)",
};

/// `CUfileError_t`: a status of cuFile, and the driver's where that one is CUDA_DRIVER_ERROR.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) code: c_int,
    pub(super) cuda: c_int,
}

/// `CUfileDescr_t` of a Linux descriptor.
#[repr(C)]
pub(super) struct Description {
    pub(super) kind: c_int,
    /// A union with a pointer, so padded to one.
    pub(super) descriptor: c_long,
    pub(super) operations: *const c_void,
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
pub(super) const HANDLE_DESCRIPTOR: c_int = 1;

/// `CUfileDrvProps_t`, with room behind it for what later versions append.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Properties {
    pub(super) driver_major: c_uint,
    pub(super) driver_minor: c_uint,
    poll_threshold: usize,
    max_direct_io: usize,
    status_flags: c_uint,
    pub(super) control_flags: c_uint,
    rest: [c_uint; 32],
}

const _: () = assert!(size_of::<Description>() == 24);
const _: () = assert!(std::mem::offset_of!(Properties, control_flags) == 28);

/// A setting of ways through host memory, under the number that it has in the header of the library.
pub(super) struct Setting {
    /// First version whose header has it, as [`Api::version`] tells versions. What a number means to an older
    /// library nobody has said, so there it is neither set nor looked at.
    pub(super) since: c_int,
    pub(super) number: u32,
    pub(super) name: &'static str,
}

const fn setting(since: c_int, number: u32, name: &'static str) -> Setting {
    Setting { since, number, name }
}

/// Bits of `control_flags` (`CUfileDriverControlFlags_t`). Looked up in `cufile.h` of the packages nvidia-cufile-cu12
/// 1.14 and nvidia-cufile 1.15 to 1.20: the header ends with bit 1 before 1.17.
pub(super) const INDIRECT_FLAGS: &[Setting] = &[
    setting(0, 1, "properties.allow_compat_mode"),
    setting(1170, 2, "properties.posix_io_mode (vanilla_posix_io_mode from 1.19 on)"),
    setting(1170, 4, "properties.gds_fallback_io"),
];

/// Parameters (`CUFileBoolConfigParameter_t`) that allow those ways. From the same headers: the enumeration ends with
/// number 11 before 1.19.
pub(super) const INDIRECT_PARAMETERS: &[Setting] = &[
    setting(0, 1, "CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE"),
    setting(0, 2, "CUFILE_PARAM_FORCE_COMPAT_MODE"),
    setting(1190, 12, "CUFILE_PARAM_PROPERTIES_POSIX_IO_MODE"),
    setting(1190, 13, "CUFILE_PARAM_GDS_FALLBACK_IO"),
];

/// Those that a version has.
pub(super) fn known(
    settings: &'static [Setting],
    version: c_int,
) -> impl Iterator<Item = &'static Setting> {
    settings.iter().filter(move |setting| setting.since <= version)
}

pub(super) const SUCCESS: c_int = 0;
pub(super) const CUDA_DRIVER_ERROR: c_int = 5011;
pub(super) const MEMORY_NOT_REGISTERED: c_int = 5024;
pub(super) const DRIVER_ALREADY_OPEN: c_int = 5026;

/// A file as cuFile knows it (`CUfileHandle_t`).
pub(super) type Handle = *mut c_void;

type Plain = unsafe extern "C" fn() -> Status;
type GetProperties = unsafe extern "C" fn(*mut Properties) -> Status;
type HandleRegister = unsafe extern "C" fn(*mut Handle, *mut Description) -> Status;
type HandleDeregister = unsafe extern "C" fn(Handle);
type BufferRegister = unsafe extern "C" fn(*const c_void, usize, c_int) -> Status;
type BufferDeregister = unsafe extern "C" fn(*const c_void) -> Status;
type SetBool = unsafe extern "C" fn(c_int, bool) -> Status;
type Transfer = unsafe extern "C" fn(Handle, *mut c_void, usize, i64, i64) -> isize;

/// The functions; what is `None` came with CUDA 12.8.
pub(super) struct Functions {
    pub(super) driver_open: Plain,
    pub(super) properties: GetProperties,
    pub(super) handle_register: HandleRegister,
    pub(super) handle_deregister: HandleDeregister,
    pub(super) buffer_register: BufferRegister,
    pub(super) buffer_deregister: BufferDeregister,
    pub(super) read: Transfer,
    pub(super) write: Transfer,
    pub(super) set_bool: Option<SetBool>,
}

/// The loaded library.
pub(super) struct Api {
    pub(super) functions: Functions,
    /// The file, and the version that it tells.
    pub(super) name: String,
    /// 1140 for 1.14; 0 where the library does not tell.
    pub(super) version: c_int,
}

impl Api {
    /// Loads it. Nothing of it is initialised.
    pub(super) fn load() -> Result<Self> {
        let library = Library::open(&SOURCE)?;
        let version = version(&library);
        let told = match version {
            0 => "of unknown version".into(),
            version => format!("{}.{}", version / 1000, version % 1000 / 10),
        };
        let name = format!("{} {told}", library.path());
        let find =
            |symbol: &str| library.find(symbol).ok_or_else(|| library.missing(symbol, &told));
        use std::mem::transmute as typed;
        // SAFETY: each symbol is given the type under which the library's header declares it, the same in all
        // versions; the addresses are not null.
        let functions = unsafe {
            Functions {
                driver_open: typed::<*mut c_void, Plain>(find("cuFileDriverOpen")?),
                properties: typed::<*mut c_void, GetProperties>(find("cuFileDriverGetProperties")?),
                handle_register: typed::<*mut c_void, HandleRegister>(find(
                    "cuFileHandleRegister",
                )?),
                handle_deregister: typed::<*mut c_void, HandleDeregister>(find(
                    "cuFileHandleDeregister",
                )?),
                buffer_register: typed::<*mut c_void, BufferRegister>(find("cuFileBufRegister")?),
                buffer_deregister: typed::<*mut c_void, BufferDeregister>(find(
                    "cuFileBufDeregister",
                )?),
                read: typed::<*mut c_void, Transfer>(find("cuFileRead")?),
                write: typed::<*mut c_void, Transfer>(find("cuFileWrite")?),
                set_bool: library
                    .find("cuFileSetParameterBool")
                    .map(|address| typed::<*mut c_void, SetBool>(address)),
            }
        };
        Ok(Self { functions, name, version })
    }

    /// Turns a status into a result.
    pub(super) fn check(&self, call: &str, status: Status) -> Result<()> {
        if status.code == SUCCESS {
            return Ok(());
        }
        let (kind, text) = describe(status.code);
        let cuda = match status.code {
            CUDA_DRIVER_ERROR => format!(" (CUDA status {})", status.cuda),
            _ => String::new(),
        };
        Err(Error::new(kind, format!("{call} of {}: {text}{cuda}", self.name)))
    }
}

/// 1000 for each major and 10 for each minor version; 0 where the library does not tell.
fn version(library: &Library) -> c_int {
    let Some(address) = library.find("cuFileGetVersion") else { return 0 };
    // SAFETY: the symbol has this signature in all versions that have it.
    let get = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int) -> Status>(address)
    };
    let mut version = 0;
    // SAFETY: `version` is a valid place; the call works before the driver is open.
    match unsafe { get(&mut version) }.code {
        SUCCESS => version,
        _ => 0,
    }
}

/// What a status of cuFile means, and what to do about it.
pub(crate) fn describe(code: c_int) -> (ErrorKind, String) {
    let (kind, text) = match code {
        5001 => (
            ErrorKind::Unsupported,
            "the nvidia-fs kernel module is not loaded; `modprobe nvidia-fs` on the host",
        ),
        5004 | 5005 => (
            ErrorKind::Unsupported,
            "the nvidia-fs kernel module does not fit this libcufile; install both from one CUDA version",
        ),
        5007 => (ErrorKind::Unsupported, "this platform has no GPUDirect Storage"),
        5008 => (
            ErrorKind::Unsupported,
            "this file system or its drive has no GPUDirect Storage; see `gdscheck -p`",
        ),
        5009 => (ErrorKind::Unsupported, "this GPU has no GPUDirect Storage"),
        5010 | 5048 => (ErrorKind::Io, "the nvidia-fs kernel module failed; see the kernel log"),
        CUDA_DRIVER_ERROR => (ErrorKind::Device, "the CUDA driver failed"),
        5012..=5015 | 5047 => {
            (ErrorKind::Device, "the device memory or its context is not valid any more")
        }
        5016 | 5017 | 5036 | 5045 => (
            ErrorKind::Device,
            "the device memory could not be pinned; lower cache_buffer_capacity_gb, or raise \
             properties.max_device_pinned_mem_size_kb in cufile.json (the GPU's BAR1 is a limit too)",
        ),
        5018..=5020 => (ErrorKind::Unsupported, "the file cannot be opened past the page cache"),
        5022 => (ErrorKind::Internal, "cuFile refused the arguments; this is a defect in UCM"),
        5023 | MEMORY_NOT_REGISTERED | 5027 | 5028 => {
            (ErrorKind::Internal, "cuFile's registrations are not as expected; a defect in UCM")
        }
        5025 => (
            ErrorKind::Permission,
            "permission denied; /dev/nvidia-fs* and /run/udev must be readable (docker run -v /run/udev:/run/udev:ro)",
        ),
        5033 => (
            ErrorKind::Unsupported,
            "cuFile could not be initialised; cufile.log in the current directory says why",
        ),
        5034 => (ErrorKind::Unsupported, "cufile.json disables GPUDirect Storage for this file"),
        5044 => (ErrorKind::Io, "the drive reported an error; check the kernel log"),
        _ => {
            let text = format!("cuFile failed with status {code}; see cufile.log");
            return (ErrorKind::Io, text);
        }
    };
    (kind, format!("{text} (cuFile status {code})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every status has a sentence that tells its number, and what a machine lacks is UNSUPPORTED.
    #[test]
    fn every_status_has_a_sentence() {
        for code in 5001..5060 {
            let (_, text) = describe(code);
            assert!(text.contains(&code.to_string()) && text.len() > 30, "{code}: {text}");
        }
        for code in [5001, 5004, 5007, 5008, 5009, 5020, 5033, 5034] {
            assert_eq!(describe(code).0, ErrorKind::Unsupported, "{code}");
        }
        assert_eq!(describe(CUDA_DRIVER_ERROR).0, ErrorKind::Device);
        assert!(describe(5001).1.contains("modprobe nvidia-fs"));
    }
}

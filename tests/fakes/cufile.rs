//! The fake libcufile, steered from tests. It moves bytes with the CUDA driver that `UCM_CUDA_LIBRARY` names, fake
//! or real.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint};
use std::path::Path;

use libloading::Library;

/// cuFile of this process; whoever has it also has the device, so that there is one at a time.
pub struct CuFake {
    library: Library,
}

macro_rules! call {
    ($self:ident, $name:literal, fn($($type:ty),*) $(-> $result:ty)?, $($argument:expr),*) => {{
        // SAFETY: the fake exports the symbol with this signature (cufile.c).
        unsafe {
            let function = $self
                .library
                .get::<unsafe extern "C" fn($($type),*) $(-> $result)?>($name)
                .unwrap();
            function($($argument),*)
        }
    }};
}

impl CuFake {
    /// Points the engine at the library, below [`super::folder`].
    pub fn take(file: &str) -> Self {
        let path = super::folder().join(file);
        // SAFETY: tests of fakes run one at a time, by the lock of whoever made the device.
        unsafe { std::env::set_var("UCM_CUFILE_LIBRARY", &path) };
        Self::load(&path)
    }

    fn load(path: &Path) -> Self {
        // SAFETY: the library was built from this repository and has no constructors.
        let fake = Self { library: unsafe { Library::new(path) }.unwrap() };
        fake.reset();
        fake
    }

    pub fn reset(&self) {
        call!(self, b"ucm_cufile_reset", fn(),);
    }

    /// The nth call from now fails, with a status of cuFile or, below 5000, an errno.
    pub fn fail(&self, nth: i64, code: i32) {
        call!(self, b"ucm_cufile_fail", fn(c_long, c_int), nth, code);
    }

    pub fn fail_call(&self, name: &str, nth: i64, code: i32) {
        let name = CString::new(name).unwrap();
        call!(
            self,
            b"ucm_cufile_fail_call",
            fn(*const c_char, c_long, c_int),
            name.as_ptr(),
            nth,
            code
        );
    }

    /// The call that failed on request.
    pub fn failed(&self) -> Option<String> {
        let name = call!(self, b"ucm_cufile_failed", fn() -> *const c_char,);
        // SAFETY: a NUL-terminated string that lives as long as the library.
        (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }

    pub fn calls(&self) -> i64 {
        call!(self, b"ucm_cufile_calls", fn() -> c_long,)
    }

    /// Transfers move so many bytes at most.
    pub fn short(&self, bytes: usize) {
        call!(self, b"ucm_cufile_short", fn(usize), bytes);
    }

    pub fn delay(&self, micros: u32) {
        call!(self, b"ucm_cufile_delay", fn(c_uint), micros);
    }

    pub fn hold(&self, hold: bool) {
        call!(self, b"ucm_cufile_hold", fn(c_int), i32::from(hold));
    }

    /// Files are on a file system that cuFile does not know.
    pub fn unsupported(&self, on: bool) {
        call!(self, b"ucm_cufile_unsupported", fn(c_int), i32::from(on));
    }

    /// Reads say that they have moved bytes and have not.
    pub fn lie(&self, on: bool) {
        call!(self, b"ucm_cufile_lie", fn(c_int), i32::from(on));
    }

    /// Somebody else has opened cuFile, with compatibility mode.
    pub fn open_by_others(&self, on: bool) {
        call!(self, b"ucm_cufile_of_others", fn(c_int), i32::from(on));
    }

    /// Another version (1200 is 1.20), with a `cufile.json` that allows all its ways through host memory.
    pub fn version(&self, number: i32) {
        call!(self, b"ucm_cufile_version", fn(c_int), number);
    }

    /// Whether cuFile is open, as it then is until the process ends.
    pub fn is_open(&self) -> bool {
        call!(self, b"ucm_cufile_live", fn(*const c_char) -> c_long, c"opens".as_ptr()) == 1
    }

    /// Registered files, registered buffers.
    pub fn live(&self) -> [i64; 2] {
        [c"files", c"buffers"]
            .map(|what| call!(self, b"ucm_cufile_live", fn(*const c_char) -> c_long, what.as_ptr()))
    }
}

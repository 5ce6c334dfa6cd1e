//! The fake libcufile, steered from tests. It moves bytes with the CUDA driver that `UCM_CUDA_LIBRARY` names, fake
//! or real.

use std::ffi::{c_char, c_int, c_long};
use std::path::Path;

use libloading::Library;

use super::Steering;

/// cuFile of this process; whoever has it also has the device, so that there is one at a time.
pub struct CuFake {
    library: Library,
}

impl Steering for CuFake {
    const PREFIX: &'static str = "ucm_cufile";

    fn library(&self) -> &Library {
        &self.library
    }
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

    /// The nth call from now fails, with a status of cuFile or, below 5000, an errno.
    pub fn fail(&self, nth: i64, code: i32) {
        call!(self, b"ucm_cufile_fail", fn(c_long, c_int), nth, code);
    }

    /// Transfers move so many bytes at most.
    pub fn short(&self, bytes: usize) {
        call!(self, b"ucm_cufile_short", fn(usize), bytes);
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

//! A model in miniature on a real GPU: memory, streams, events and kernels through the driver API, as a
//! framework would use them.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use libloading::Library;

/// The driver, with the primary context of device 0 current on this thread.
pub struct Gpu {
    library: Library,
    context: *mut c_void,
    fill: *mut c_void,
    fault: *mut c_void,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

macro_rules! cuda {
    ($self:ident, $name:literal, fn($($type:ty),* $(,)?), $($argument:expr),* $(,)?) => {{
        // SAFETY: the driver exports the symbol with this signature; arguments as the caller made them.
        let status = unsafe {
            let function = $self
                .library
                .get::<unsafe extern "C" fn($($type),*) -> c_int>($name.as_bytes())
                .unwrap();
            function($($argument),*)
        };
        assert_eq!(status, 0, "{}", $name);
    }};
}

impl Gpu {
    pub fn new() -> Self {
        // SAFETY: the platform's driver.
        let library = unsafe { Library::new("libcuda.so.1") }
            .expect("GPU tests need a machine with an NVIDIA driver");
        let mut gpu = Self {
            library,
            context: std::ptr::null_mut(),
            fill: std::ptr::null_mut(),
            fault: std::ptr::null_mut(),
        };
        let (mut context, mut module) = (std::ptr::null_mut(), std::ptr::null_mut());
        cuda!(gpu, "cuInit", fn(c_uint), 0);
        cuda!(gpu, "cuDevicePrimaryCtxRetain", fn(*mut *mut c_void, c_int), &mut context, 0);
        gpu.context = context;
        gpu.enter();
        let image = CString::new(include_str!("model.ptx")).unwrap();
        cuda!(
            gpu,
            "cuModuleLoadData",
            fn(*mut *mut c_void, *const c_char),
            &mut module,
            image.as_ptr()
        );
        for (name, at) in [(c"slow_fill", 0), (c"fault", 1)] {
            let mut function = std::ptr::null_mut();
            cuda!(
                gpu,
                "cuModuleGetFunction",
                fn(*mut *mut c_void, *mut c_void, *const c_char),
                &mut function,
                module,
                name.as_ptr()
            );
            if at == 0 { gpu.fill = function } else { gpu.fault = function }
        }
        gpu
    }

    /// Makes the context current on this thread.
    pub fn enter(&self) {
        cuda!(self, "cuCtxSetCurrent", fn(*mut c_void), self.context);
    }

    pub fn alloc(&self, bytes: usize) -> u64 {
        let mut address = 0;
        cuda!(self, "cuMemAlloc_v2", fn(*mut u64, usize), &mut address, bytes);
        address
    }

    pub fn free(&self, address: u64) {
        cuda!(self, "cuMemFree_v2", fn(u64), address);
    }

    pub fn write(&self, to: u64, bytes: &[u8]) {
        let from = bytes.as_ptr().cast();
        cuda!(self, "cuMemcpyHtoD_v2", fn(u64, *const c_void, usize), to, from, bytes.len());
        self.sync();
    }

    pub fn read(&self, from: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0u8; bytes];
        let to = out.as_mut_ptr().cast();
        cuda!(self, "cuMemcpyDtoH_v2", fn(*mut c_void, u64, usize), to, from, bytes);
        out
    }

    pub fn sync(&self) {
        cuda!(self, "cuCtxSynchronize", fn(),);
    }

    /// A stream that does not wait for the default stream.
    pub fn stream(&self) -> *mut c_void {
        let mut stream = std::ptr::null_mut();
        cuda!(self, "cuStreamCreate", fn(*mut *mut c_void, c_uint), &mut stream, 1);
        stream
    }

    pub fn event(&self) -> *mut c_void {
        let mut event = std::ptr::null_mut();
        cuda!(self, "cuEventCreate", fn(*mut *mut c_void, c_uint), &mut event, 2);
        event
    }

    pub fn record(&self, event: *mut c_void, stream: *mut c_void) {
        cuda!(self, "cuEventRecord", fn(*mut c_void, *mut c_void), event, stream);
    }

    pub fn destroy_event(&self, event: *mut c_void) {
        cuda!(self, "cuEventDestroy_v2", fn(*mut c_void), event);
    }

    pub fn copy(&self, to: u64, from: u64, bytes: usize, stream: *mut c_void) {
        cuda!(self, "cuMemcpyAsync", fn(u64, u64, usize, *mut c_void), to, from, bytes, stream);
    }

    pub fn sync_stream(&self, stream: *mut c_void) {
        cuda!(self, "cuStreamSynchronize", fn(*mut c_void), stream);
    }

    pub fn begin_capture(&self, stream: *mut c_void) {
        // 0: global mode, the strictest.
        cuda!(self, "cuStreamBeginCapture_v2", fn(*mut c_void, c_int), stream, 0);
    }

    pub fn end_capture(&self, stream: *mut c_void) {
        let mut graph = std::ptr::null_mut();
        cuda!(self, "cuStreamEndCapture", fn(*mut c_void, *mut *mut c_void), stream, &mut graph);
        assert!(!graph.is_null());
        cuda!(self, "cuGraphDestroy", fn(*mut c_void), graph);
    }

    pub fn reset_device(&self) {
        cuda!(self, "cuDevicePrimaryCtxReset_v2", fn(c_int), 0);
    }

    /// Fills `words` after `cycles` clock ticks.
    pub fn slow_fill(&self, stream: *mut c_void, to: u64, words: u32, seed: u32, cycles: u64) {
        let (mut to, mut words, mut seed, mut cycles) = (to, words, seed, cycles);
        let mut arguments: [*mut c_void; 4] = [
            (&raw mut to).cast(),
            (&raw mut words).cast(),
            (&raw mut seed).cast(),
            (&raw mut cycles).cast(),
        ];
        self.launch(self.fill, 32, 256, stream, &mut arguments);
    }

    /// Breaks the context.
    pub fn fault(&self, stream: *mut c_void) {
        let mut nowhere = 0x10u64;
        let mut arguments: [*mut c_void; 1] = [(&raw mut nowhere).cast()];
        self.launch(self.fault, 1, 1, stream, &mut arguments);
    }

    fn launch(
        &self,
        function: *mut c_void,
        blocks: c_uint,
        threads: c_uint,
        stream: *mut c_void,
        arguments: &mut [*mut c_void],
    ) {
        cuda!(
            self,
            "cuLaunchKernel",
            fn(
                *mut c_void,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                *mut c_void,
                *mut *mut c_void,
                *mut *mut c_void,
            ),
            function,
            blocks,
            1,
            1,
            threads,
            1,
            1,
            0,
            stream,
            arguments.as_mut_ptr(),
            std::ptr::null_mut()
        );
    }
}

/// What `slow_fill` writes.
pub fn filled(words: usize, seed: u32) -> Vec<u8> {
    (0..words as u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(seed).to_le_bytes())
        .collect()
}

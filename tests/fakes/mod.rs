//! The fake drivers of `ffi-tests/stub`, built and steered from tests.
//!
//! A process has one machine per library, and the engine finds the library through an environment
//! variable, so tests that use fakes hold the [`Fake`] they got: one at a time.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ffi::{CString, c_char, c_int, c_long, c_uint, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use libloading::Library;

pub use steering::Steering;

macro_rules! call {
    ($self:ident, $name:literal, fn($($type:ty),*) $(-> $result:ty)?, $($argument:expr),*) => {{
        // SAFETY: the fake exports the symbol with this signature (machine.h, cufile.c).
        unsafe {
            let function = $self
                .library
                .get::<unsafe extern "C" fn($($type),*) $(-> $result)?>($name)
                .unwrap();
            function($($argument),*)
        }
    }};
}

pub mod cufile;
mod steering;

/// A driver library, new or old, and a way of copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub file: &'static str,
    pub device: &'static str,
    pub library_variable: &'static str,
    pub strategy_variable: &'static str,
    pub strategy: &'static str,
}

const fn cuda(file: &'static str, strategy: &'static str) -> Kind {
    Kind {
        file,
        device: "cuda",
        library_variable: "UCM_CUDA_LIBRARY",
        strategy_variable: "UCM_CUDA_COPY",
        strategy,
    }
}

const fn ascend(file: &'static str, strategy: &'static str) -> Kind {
    Kind {
        file,
        device: "ascend",
        library_variable: "UCM_ASCENDCL_LIBRARY",
        strategy_variable: "UCM_ASCEND_COPY",
        strategy,
    }
}

/// Every driver with every way of copying; an empty strategy calibrates.
pub const ALL: &[Kind] = &[
    cuda("libcuda.so.1", "plain"),
    cuda("libcuda.so.1", "batch"),
    cuda("libcuda.so.1", "bounce"),
    cuda("libcuda.so.1", "kernel"),
    cuda("libcuda.so.1", ""),
    cuda("libcuda-old.so.1", "plain"),
    ascend("libascendcl.so", "plain"),
    ascend("libascendcl.so", "batch"),
    ascend("libascendcl.so", ""),
    ascend("libascendcl-old.so", "plain"),
];

/// One of each driver.
pub const EACH_DRIVER: &[Kind] = &[ALL[0], ALL[6]];

/// Names a folder with the libraries, for machines without sources and compiler (`make -C ffi-tests/stub OUT=DIR`).
const BUILT_FAKES: &str = "UCM_TEST_FAKES";

/// Where the libraries are, built once for each state of their sources: building them takes longer than
/// most tests.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        if let Some(built) = std::env::var_os(BUILT_FAKES) {
            return PathBuf::from(built);
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = root.join("ffi-tests/stub");
        let mut text = Vec::new();
        for file in ["copy_args.h", "hash_args.h"] {
            text.extend(std::fs::read(root.join("src/device/cuda").join(file)).unwrap());
        }
        let files = std::fs::read_dir(&source).unwrap().map(|file| file.unwrap().path());
        let mut files: Vec<PathBuf> = files.collect();
        files.sort();
        files.iter().for_each(|file| text.extend(std::fs::read(file).unwrap()));
        let mut hasher = std::hash::DefaultHasher::new();
        text.hash(&mut hasher);
        let built = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("fakes-{:016x}", hasher.finish()));
        if built.exists() {
            return built;
        }
        // Built aside and renamed, so that nobody finds half of them.
        let folder = built.with_extension(std::process::id().to_string());
        std::fs::create_dir_all(&folder).unwrap();
        let status = Command::new("make")
            .args(["--silent", "-C"])
            .arg(&source)
            .arg(format!("OUT={}", folder.display()))
            .status()
            .unwrap_or_else(|error| panic!("make: {error}; make and a C compiler are needed"));
        assert!(status.success(), "the fake drivers do not build");
        // Another process may have been first: its libraries are as good.
        let _ = std::fs::rename(&folder, &built);
        built
    })
}

/// How long threads may take to end on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A machine that this test owns.
pub struct Fake {
    library: Library,
    kind: Kind,
    before: Vec<i64>,
    _turn: MutexGuard<'static, ()>,
}

const KINDS_OF_OBJECTS: [&str; 5] = ["streams", "events", "device", "pinned", "registered"];

impl Steering for Fake {
    const PREFIX: &'static str = "ucm_stub";

    fn library(&self) -> &Library {
        &self.library
    }
}

impl Fake {
    /// Takes the machine and points the engine at it.
    pub fn take(kind: Kind) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let path = folder().join(kind.file);
        // SAFETY: the environment is changed and read under the lock that `turn` holds.
        unsafe {
            std::env::set_var("UCM_CUDA_LIBRARY", "/nonexistent/libcuda.so.1");
            std::env::set_var("UCM_ASCENDCL_LIBRARY", "/nonexistent/libascendcl.so");
            std::env::set_var(kind.library_variable, &path);
            std::env::remove_var(kind.strategy_variable);
            if !kind.strategy.is_empty() {
                std::env::set_var(kind.strategy_variable, kind.strategy);
            }
        }
        // SAFETY: the library was built from this repository and has no constructors.
        let library = unsafe { Library::new(&path) }.unwrap();
        let mut fake = Self { library, kind, before: Vec::new(), _turn: turn };
        fake.reset();
        fake.before = fake.live();
        fake
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn is_cuda(&self) -> bool {
        self.kind.device == "cuda"
    }

    pub fn is_old(&self) -> bool {
        self.kind.file.contains("old")
    }

    /// Live streams, events, device memory, pinned memory, registered ranges.
    pub fn live(&self) -> Vec<i64> {
        KINDS_OF_OBJECTS
            .iter()
            .map(|what| {
                let what = CString::new(*what).unwrap();
                call!(self, b"ucm_stub_live", fn(*const c_char) -> c_long, what.as_ptr())
            })
            .collect()
    }

    /// Whether nothing made since `take` is there.
    pub fn is_clean(&self) -> bool {
        self.live() == self.before
    }

    /// Fails if anything made since `take` is still there after a while: a thread that ends may be the last to
    /// let go of a store.
    pub fn assert_no_leak(&self) {
        let begin = Instant::now();
        while self.live() != self.before && begin.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        let (kind, failed) = (self.kind, self.failed());
        let what = format!("leaked, of {KINDS_OF_OBJECTS:?}: {kind:?}, failed: {failed:?}");
        assert_eq!(self.live(), self.before, "{what}");
    }

    pub fn fail(&self, nth: i64, status: i32, sticky: bool) {
        call!(self, b"ucm_stub_fail", fn(c_long, c_int, c_int), nth, status, i32::from(sticky));
    }

    pub fn calls_of(&self, name: &str) -> i64 {
        let name = CString::new(name).unwrap();
        call!(self, b"ucm_stub_calls_of", fn(*const c_char) -> c_long, name.as_ptr())
    }

    /// The device computes wrong hashes of so many bytes and more; 0: none (CUDA only).
    pub fn falsify(&self, bytes: usize) {
        call!(self, b"ucm_stub_falsify", fn(usize), bytes);
    }

    /// Streams that are held now.
    pub fn stopped(&self) -> i32 {
        call!(self, b"ucm_stub_stopped", fn() -> c_int,)
    }

    /// Hash kernels wait, nothing else does.
    pub fn hold_hashes(&self, hold: bool) {
        call!(self, b"ucm_stub_hold", fn(c_int), if hold { 2 } else { 0 });
    }

    pub fn capture(&self, on: bool) {
        call!(self, b"ucm_stub_capture", fn(c_int), i32::from(on));
    }

    /// Somebody resets the device.
    pub fn reset_device(&self) {
        call!(self, b"ucm_stub_reset_device", fn(),);
    }

    /// Says that this memory is another device's (CUDA), or managed (Ascend).
    pub fn foreign(&self, memory: &Memory<'_>) {
        call!(self, b"ucm_stub_foreign", fn(*mut c_void), memory.base.cast());
    }

    /// Undoes `reset_device` for the next test.
    pub fn revive(&self) {
        call!(self, b"ucm_stub_revive", fn(),);
    }

    /// Contexts on this thread's stack (CUDA only).
    pub fn depth(&self) -> i32 {
        call!(self, b"ucm_stub_depth", fn() -> c_int,)
    }

    pub fn alloc(&self, bytes: usize) -> Memory<'_> {
        let base = call!(self, b"ucm_stub_device_alloc", fn(usize) -> *mut c_void, bytes);
        Memory { fake: self, base: base.cast(), bytes }
    }

    pub fn stream(&self) -> ModelStream<'_> {
        let stream = call!(self, b"ucm_stub_stream_new", fn() -> *mut c_void,);
        ModelStream { fake: self, stream }
    }

    pub fn event(&self) -> ModelEvent<'_> {
        let event = call!(self, b"ucm_stub_event_new", fn() -> *mut c_void,);
        ModelEvent { fake: self, event }
    }
}

/// Device memory of the model.
pub struct Memory<'a> {
    fake: &'a Fake,
    pub base: *mut u8,
    pub bytes: usize,
}

impl Memory<'_> {
    pub fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes];
        let fake = self.fake;
        call!(
            fake,
            b"ucm_stub_peek",
            fn(*mut c_void, *const c_void, usize),
            bytes.as_mut_ptr().cast(),
            self.base.cast(),
            self.bytes
        );
        bytes
    }

    pub fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes);
        let fake = self.fake;
        call!(
            fake,
            b"ucm_stub_poke",
            fn(*mut c_void, *const c_void, usize),
            self.base.cast(),
            bytes.as_ptr().cast(),
            bytes.len()
        );
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        let fake = self.fake;
        call!(fake, b"ucm_stub_device_free", fn(*mut c_void), self.base.cast());
    }
}

/// A stream of the model.
pub struct ModelStream<'a> {
    fake: &'a Fake,
    pub stream: *mut c_void,
}

impl ModelStream<'_> {
    /// A kernel that takes `micros` and then has written `bytes`.
    pub fn write(&self, to: *mut u8, bytes: &[u8], micros: u32) {
        let fake = self.fake;
        call!(
            fake,
            b"ucm_stub_model_write",
            fn(*mut c_void, *mut c_void, *const c_void, usize, c_uint),
            self.stream,
            to.cast(),
            bytes.as_ptr().cast(),
            bytes.len(),
            micros
        );
    }

    /// A kernel that writes `bytes` over memory which is something else's from then on: who copies from it or to it
    /// once the kernel has begun ends the process.
    pub fn take(&self, to: *mut u8, bytes: &[u8]) {
        let fake = self.fake;
        call!(
            fake,
            b"ucm_stub_model_take",
            fn(*mut c_void, *mut c_void, *const c_void, usize),
            self.stream,
            to.cast(),
            bytes.as_ptr().cast(),
            bytes.len()
        );
    }

    /// A kernel that reads into `into`, which must live until `sync`.
    pub fn read(&self, into: &mut [u8], from: *const u8) {
        let fake = self.fake;
        call!(
            fake,
            b"ucm_stub_model_read",
            fn(*mut c_void, *mut c_void, *const c_void, usize),
            self.stream,
            into.as_mut_ptr().cast(),
            from.cast(),
            into.len()
        );
    }

    pub fn sync(&self) {
        let fake = self.fake;
        call!(fake, b"ucm_stub_stream_sync", fn(*mut c_void), self.stream);
    }
}

impl Drop for ModelStream<'_> {
    fn drop(&mut self) {
        let fake = self.fake;
        call!(fake, b"ucm_stub_stream_destroy", fn(*mut c_void), self.stream);
    }
}

/// An event of the model.
pub struct ModelEvent<'a> {
    fake: &'a Fake,
    pub event: *mut c_void,
}

impl ModelEvent<'_> {
    pub fn record(&self, stream: &ModelStream<'_>) {
        let fake = self.fake;
        let (event, stream) = (self.event, stream.stream);
        call!(fake, b"ucm_stub_event_record", fn(*mut c_void, *mut c_void), event, stream);
    }
}

impl Drop for ModelEvent<'_> {
    fn drop(&mut self) {
        let fake = self.fake;
        call!(fake, b"ucm_stub_event_destroy", fn(*mut c_void), self.event);
    }
}

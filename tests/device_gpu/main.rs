//! The CUDA device on a real GPU: bytes, order, captures, failures, and what the copies reach. Run by
//! `cargo xtask gpu-test`; ignored elsewhere.

mod copies;
mod failures;
#[path = "../gpu/mod.rs"]
mod gpu;
mod order;
#[path = "../shards/mod.rs"]
mod shards;
mod throughput;

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::process::Command;
use std::sync::Arc;

use shards::{Pages, Worker};
use ucm::config::DeviceKind;
use ucm::device::{CapturedEvent, Device, open};

const STRATEGIES: [&str; 5] = ["plain", "batch", "bounce", "kernel", ""];

/// Some tens of milliseconds on any GPU.
const SLOW_CYCLES: u64 = 60_000_000;

/// Opens device 0 with a way of copying; the empty one calibrates. Tests run one at a time.
fn open_with(strategy: &str) -> Arc<dyn Device> {
    // SAFETY: `cargo xtask gpu-test` runs one test at a time, and no other thread reads the environment.
    unsafe {
        match strategy {
            "" => std::env::remove_var("UCM_CUDA_COPY"),
            _ => std::env::set_var("UCM_CUDA_COPY", strategy),
        }
    }
    open(DeviceKind::Cuda, 0).unwrap()
}

fn pin(device: &dyn Device, arena: &Pages) {
    // SAFETY: every test unpins before the pages go.
    unsafe { device.pin(arena.base, arena.bytes) }.unwrap();
}

/// A device with a pinned arena and a copy worker; closes as a store does.
struct Rig {
    worker: Worker,
    device: Arc<dyn Device>,
    arena: ManuallyDrop<Pages>,
}

impl Rig {
    fn new(strategy: &str, arena_bytes: usize) -> Self {
        Self::on(open_with(strategy), arena_bytes)
    }

    fn on(device: Arc<dyn Device>, arena_bytes: usize) -> Self {
        let arena = ManuallyDrop::new(Pages::new(arena_bytes));
        pin(&*device, &arena);
        Self { worker: Worker::new(&*device).unwrap(), device, arena }
    }

    /// The first byte of the arena.
    fn staging(&self) -> *mut u8 {
        self.arena.base
    }

    /// Captures what an event stands for now.
    fn capture(&self, event: *mut c_void) -> CapturedEvent {
        // SAFETY: the tests' events live until they have been captured.
        unsafe { self.device.capture_event(event) }.unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.worker.close();
        self.device.unpin(self.arena.base);
        // The arena of a lost device may be written to for ever; those of a test are few.
    }
}

/// Runs one test in a process of its own: it breaks the process's context.
fn in_a_process(name: &str, part: impl FnOnce()) {
    const VARIABLE: &str = "UCM_TEST_BREAKS_CONTEXT";
    if std::env::var_os(VARIABLE).is_some() {
        return part();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(VARIABLE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}{text}", String::from_utf8_lossy(&output.stdout));
}

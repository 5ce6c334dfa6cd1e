//! Which device is opened, and what is told of it.

use ucm::config::DeviceKind;
use ucm::device::open;
use ucm::error::ErrorKind;

use crate::fakes::{ALL, EACH_DRIVER, Fake, Steering};
use crate::rig::device_kind;

/// Goal: `auto` takes the driver that is there, and host memory where there is none; an ordinal that is
/// not there and a library that is not there are errors that name the remedy.
#[test]
fn the_right_device_is_opened() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        assert_eq!(open(DeviceKind::Auto, 0).unwrap().name(), kind.device);
        let error = open(device_kind(kind), 7).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("device_id 7"), "{error}");
        assert_eq!(open(device_kind(kind), -1).unwrap().name(), "host");
        let other = if fake.is_cuda() { DeviceKind::Ascend } else { DeviceKind::Cuda };
        let error = open(other, 0).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("cannot be loaded"), "{error}");
        // SAFETY: under the fake's turn.
        unsafe { std::env::set_var(kind.library_variable, "/nonexistent/library.so") };
        assert_eq!(open(DeviceKind::Auto, 0).unwrap().name(), "host");
    }
}

/// Goal: what an old driver lacks is told with the version that has it, and copies still work.
#[test]
fn old_drivers_are_told_about() {
    for kind in [ALL[5], ALL[9]] {
        let _fake = Fake::take(kind);
        let report = open(device_kind(kind), 0).unwrap().report();
        let batch =
            if kind.device == "cuda" { "cuMemcpyBatchAsync" } else { "aclrtMemcpyBatchAsync" };
        assert!(report.fallbacks.iter().any(|text| text.contains(batch)), "{report:?}");
        assert_eq!(report.kind, kind.device);
    }
}

/// Goal: an open that fails in the middle leaves no stream, no event and no thread behind.
#[test]
fn a_failed_open_leaves_nothing() {
    // Those of the device: whoever has the fake is the only one to have such threads.
    let watches = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        names.filter(|name| name.as_ref().is_ok_and(|name| name.contains("-watc"))).count()
    };
    for &kind in EACH_DRIVER {
        let (stream, event) = match kind.device {
            "cuda" => ("cuStreamCreateWithPriority", "cuEventCreate"),
            _ => ("aclrtCreateStream", "aclrtCreateEventExWithFlag"),
        };
        for (call, nth) in [(stream, 1), (stream, 3), (event, 1), (event, 9)] {
            let fake = Fake::take(kind);
            fake.fail_call(call, nth, 2);
            let error = open(device_kind(kind), 0).err().unwrap();
            assert!(error.to_string().contains(call), "{error}");
            fake.assert_no_leak();
            assert_eq!(watches(), 0, "a thread is left behind");
        }
    }
}

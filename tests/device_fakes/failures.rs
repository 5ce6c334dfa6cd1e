//! The device dies, is reset, or goes with the process.

use ucm::device::Staging;
use ucm::error::ErrorKind;

use crate::fakes::{ALL, EACH_DRIVER, Fake, Steering};
use crate::rig::Rig;
use crate::shards::Slices;
use crate::{child, child_kind};

/// Goal: a device that dies in the middle fails every job with DEVICE, gives back no staging memory that
/// it might still touch, and lets everything close.
#[test]
fn a_dying_device_keeps_its_staging() {
    const STATUS: i32 = 700;
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 1 << 20);
        let memory = fake.alloc(1 << 20);
        fake.hold(true);
        let (slices, staging) = (Slices::one(memory.base, 1 << 20), rig.staging());
        rig.worker.enqueue(&[slices.gather(1, staging)]);
        fake.fail(1, STATUS, true);
        let finished = rig.worker.finish(1);
        assert_eq!(finished[0].result.as_ref().unwrap_err().kind(), ErrorKind::Device);
        assert_eq!(finished[0].staging, Staging::Lost);
        rig.worker.enqueue(&[slices.gather(2, staging)]);
        let finished = rig.worker.finish(1);
        assert_eq!(finished[0].result.as_ref().unwrap_err().kind(), ErrorKind::Device);
        assert_eq!(finished[0].staging, Staging::Free, "nothing of it was enqueued");
        // SAFETY: a null event is none.
        let capture = unsafe { rig.device.capture_event(std::ptr::null_mut()) };
        assert!(capture.err().unwrap().to_string().contains("restart"));
        drop(rig);
        fake.reset();
        // What the device may still touch is leaked.
        std::mem::forget(memory);
    }
}

/// Goal: when somebody resets the device under us, jobs fail with DEVICE. Where the driver says that the
/// context is gone, staging is free, because a reset ends all work; where it says nothing, it is lost.
#[test]
fn a_reset_device_fails_its_jobs() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 1 << 20);
        let memory = fake.alloc(1 << 20);
        let (slices, staging) = (Slices::one(memory.base, 1 << 20), rig.staging());
        rig.worker.enqueue(&[slices.scatter(1, staging)]);
        fake.reset_device();
        let finished = rig.worker.finish(1);
        assert_eq!(finished[0].result.as_ref().unwrap_err().kind(), ErrorKind::Device);
        let expected = if fake.is_cuda() { Staging::Free } else { Staging::Lost };
        assert_eq!(finished[0].staging, expected, "{kind:?}");
        drop(rig);
        fake.revive();
    }
}

/// Goal: the process may end while copies run and workers wait for them: the driver goes first, and
/// nothing hangs or faults.
#[test]
fn a_process_may_end_while_copies_run() {
    if let Some(kind) = child_kind() {
        // They outlive the thread that the end of the process meets.
        let fake: &'static Fake = Box::leak(Box::new(Fake::take(kind)));
        let memory = std::mem::ManuallyDrop::new(fake.alloc(1 << 20));
        fake.hold(true);
        let (begun, begins) = std::sync::mpsc::channel();
        let base = memory.base as usize;
        std::thread::spawn(move || {
            let mut rig = Rig::new(fake, 1 << 20);
            let (slices, staging) = (Slices::one(base as *mut u8, 1 << 20), rig.staging());
            rig.worker.enqueue(&[slices.gather(1, staging)]);
            begun.send(()).unwrap();
            // The driver is gone before this ends; then it is a failed job like any other.
            let finished = rig.worker.finish(1);
            assert!(finished[0].result.is_err());
        });
        begins.recv().unwrap();
        std::process::exit(7);
    }
    for index in [0, 3, 6] {
        let output = child("failures::a_process_may_end_while_copies_run", index, &[]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "{:?}: {text}", ALL[index]);
    }
}

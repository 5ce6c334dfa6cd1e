//! The context breaks, or is reset by somebody else.

use ucm::device::Staging;
use ucm::error::ErrorKind;

use crate::gpu::Gpu;
use crate::shards::{Slices, behind};
use crate::{Rig, SLOW_CYCLES, in_a_process};

/// Goal: when a kernel of the model faults, copies end with DEVICE, their staging is kept, later ones are
/// refused, and everything closes.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn a_broken_context_is_survived() {
    in_a_process("failures::a_broken_context_is_survived", || {
        let gpu = Gpu::new();
        let mut rig = Rig::new("", 64 << 20);
        let (memory, stream, event) = (gpu.alloc(64 << 20), gpu.stream(), gpu.event());
        gpu.slow_fill(stream, memory, 1000, 1, SLOW_CYCLES);
        gpu.fault(stream);
        gpu.record(event, stream);
        let wait = rig.capture(event);
        let slices = Slices::one(memory as *mut u8, 64 << 20);
        let staging = rig.staging();
        let job = |ticket| behind(&wait, slices.gather(ticket, staging));
        rig.worker.enqueue(&[job(1)]);
        let finished = rig.worker.finish(1).remove(0);
        let error = finished.result.unwrap_err();
        println!("a fault: {error}");
        assert_eq!(error.kind(), ErrorKind::Device);
        assert_eq!(finished.staging, Staging::Lost);
        rig.worker.enqueue(&[job(2)]);
        assert_eq!(rig.worker.finish(1)[0].staging, Staging::Free);
    });
}

/// Goal: when somebody resets the device, copies end with DEVICE, and everything closes.
#[test]
#[ignore = "needs an NVIDIA GPU; run `cargo xtask gpu-test`"]
fn a_reset_device_is_survived() {
    in_a_process("failures::a_reset_device_is_survived", || {
        let gpu = Gpu::new();
        let mut rig = Rig::new("", 64 << 20);
        let memory = gpu.alloc(64 << 20);
        let slices = Slices::one(memory as *mut u8, 64 << 20);
        let staging = rig.staging();
        let job = |ticket| slices.gather(ticket, staging);
        rig.worker.enqueue(&[job(1)]);
        gpu.reset_device();
        let finished = rig.worker.finish(1).remove(0);
        println!("a reset: {:?}, {:?}", finished.result, finished.staging);
        rig.worker.enqueue(&[job(2)]);
        let finished = rig.worker.finish(1).remove(0);
        println!("after it: {:?}, {:?}", finished.result, finished.staging);
        assert!(finished.result.is_err());
    });
}

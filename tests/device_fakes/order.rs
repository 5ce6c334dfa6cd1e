//! What waits for what: events of the caller, streams of the caller, workers, captures.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ucm::block::SliceShape;
use ucm::device::open;
use ucm::error::ErrorKind;

use crate::fakes::{ALL, EACH_DRIVER, Fake, Steering};
use crate::rig::{Rig, device_kind};
use crate::shards::{Slices, behind, pattern};
use crate::{child, child_kind};

/// Goal: the fakes catch wrong order: the same save without the wait ends the process, and so does a load
/// over what a kernel still writes.
#[test]
fn a_copy_that_overtakes_its_event_is_caught() {
    const DIRECTION: &str = "UCM_TEST_OVERTAKING";
    if let Some(kind) = child_kind() {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 1 << 20);
        let (memory, stream) = (fake.alloc(1 << 20), fake.stream());
        stream.write(memory.base, &pattern(1 << 20, 1), 500_000);
        let (slices, staging) = (Slices::one(memory.base, 1 << 20), rig.staging());
        let loads = std::env::var(DIRECTION).unwrap() == "load";
        let job = if loads { slices.scatter(1, staging) } else { slices.gather(1, staging) };
        let _ = rig.worker.run(job);
        return;
    }
    for (index, kind) in ALL.iter().enumerate() {
        for direction in ["save", "load"] {
            let name = "order::a_copy_that_overtakes_its_event_is_caught";
            let output = child(name, index, &[(DIRECTION, direction)]);
            let text = String::from_utf8_lossy(&output.stderr);
            let caught = !output.status.success() && text.contains("overtook its event");
            assert!(caught, "{kind:?}, {direction}: {text}");
        }
    }
}

/// Goal: an event captured is the event as it was: recording it again behind other work, or destroying
/// it, neither delays nor hurries the copy.
#[test]
fn captured_events_do_not_change() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 4096);
        let memory = fake.alloc(4096);
        let (quick, slow) = (fake.stream(), fake.stream());
        let other = fake.alloc(4096);
        let event = fake.event();
        let bytes = pattern(4096, 3);
        quick.write(memory.base, &bytes, 20_000);
        event.record(&quick);
        let wait = rig.capture(&event).unwrap();
        slow.write(other.base, &bytes, 1_500_000);
        event.record(&slow);
        drop(event);
        let begin = Instant::now();
        let (slices, staging) = (Slices::one(memory.base, 4096), rig.staging());
        rig.worker.enqueue(&[behind(&wait, slices.gather(1, staging))]);
        drop(wait);
        assert!(rig.worker.finish(1)[0].result.is_ok());
        assert!(begin.elapsed() < Duration::from_millis(1200), "waited for the second recording");
        assert_eq!(rig.arena().read(), bytes);
        slow.sync();
    }
}

/// Goal: what is not an event is DEVICE and names the field; a null event is no event.
#[test]
fn an_invalid_event_is_told() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let device = open(device_kind(kind), 0).unwrap();
        // SAFETY: the fakes look the handle up before they touch it.
        let error = unsafe { device.capture_event(std::ptr::dangling_mut()) }.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("wait_event"), "{error}");
        // SAFETY: null is none.
        assert!(unsafe { device.capture_event(std::ptr::null_mut()) }.is_ok());
        drop(device);
        fake.assert_no_leak();
    }
}

/// Goal: a compute stream made to wait reads what the load has copied, though it was asked to read
/// before the copy began; and nothing on the CPU waited.
#[test]
fn a_stream_waits_on_the_device() {
    for &kind in ALL.iter().filter(|kind| !kind.file.contains("ascendcl-old")) {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 1 << 16);
        let memory = fake.alloc(1 << 16);
        let stream = fake.stream();
        let bytes = pattern(1 << 16, 9);
        rig.arena().write(&bytes);
        fake.hold(true);
        let half = SliceShape::contiguous(1 << 15);
        let slices = Slices::at(memory.base, &[0, 1 << 15], &[half.clone(), half]);
        let staging = rig.staging();
        let marker = rig.worker.enqueue(&[slices.scatter(1, staging)]);
        // SAFETY: the stream lives.
        unsafe { rig.device.stream_wait(stream.stream, &[marker.unwrap()]) }.unwrap();
        let mut seen = vec![0; 1 << 16];
        stream.read(&mut seen, memory.base);
        assert!(rig.worker.poll().is_empty(), "{kind:?}: done while the device is held");
        fake.hold(false);
        stream.sync();
        assert!(seen == bytes, "{kind:?}: the stream did not wait");
        rig.worker.finish(1);
    }
}

/// Goal: a stream is not sent on when a load's copy has failed: neither for a job that was refused nor for
/// one whose copy the driver refused, while its neighbours in the same call are waited for.
#[test]
fn streams_do_not_wait_for_failed_copies() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 1 << 16);
        let memory = fake.alloc(1 << 16);
        let good = Slices::one(memory.base, 4096);
        let null = Slices::one(std::ptr::null_mut(), 4096);
        let staging = rig.staging();
        let marker = rig.worker.enqueue(&[good.scatter(0, staging), null.scatter(1, staging)]);
        assert!(marker.is_some());
        assert_eq!(rig.worker.failed(), [1]);
        rig.worker.finish(2);
        fake.fail_call(if fake.is_cuda() { "cuMemcpyAsync" } else { "aclrtMemcpyAsync" }, 1, 2);
        rig.worker.enqueue(&[good.scatter(2, staging)]);
        assert_eq!(rig.worker.failed(), [2]);
        rig.worker.finish(1);
        rig.worker.enqueue(&[good.scatter(3, staging)]);
        assert!(rig.worker.failed().is_empty());
        rig.worker.finish(1);
    }
}

/// Goal: the worker sleeps until copies have ended, and is woken a few times a run, not continuously;
/// also when the driver refuses to call back.
#[test]
fn workers_park_until_woken() {
    for &kind in EACH_DRIVER {
        for refused in [false, true] {
            let fake = Fake::take(kind);
            let mut rig = Rig::new(&fake, 1 << 16);
            let memory = fake.alloc(1 << 16);
            if refused {
                let name = if fake.is_cuda() { "cuLaunchHostFunc" } else { "aclrtLaunchHostFunc" };
                fake.fail_call(name, 1, 2);
            }
            fake.hold(true);
            let (slices, staging) = (Slices::one(memory.base, 1 << 16), rig.staging());
            rig.worker.enqueue(&[slices.gather(1, staging)]);
            let before = fake.calls();
            std::thread::sleep(Duration::from_millis(120));
            assert_eq!(fake.calls(), before, "{kind:?}: the driver is asked while nothing happens");
            let wakes = rig.worker.wakes.load(Ordering::SeqCst);
            assert!(wakes <= 6, "{kind:?}: {wakes} wake-ups in 120 ms");
            fake.hold(false);
            assert!(rig.worker.finish(1)[0].result.is_ok());
        }
    }
}

/// Goal: while a graph is captured anywhere in the process, saves and loads go on and break nothing.
#[test]
fn captures_are_not_broken() {
    for &kind in ALL {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 1 << 16);
        fake.capture(true);
        let memory = fake.alloc(1 << 16);
        let event = fake.event();
        let stream = fake.stream();
        stream.write(memory.base, &pattern(1 << 16, 2), 5000);
        event.record(&stream);
        let wait = rig.capture(&event).unwrap();
        let (slices, staging) = (Slices::one(memory.base, 1 << 16), rig.staging());
        rig.worker.run(behind(&wait, slices.gather(1, staging))).unwrap();
        fake.capture(false);
    }
}

/// Goal: a thousand saves with events make no more events and memory than the first did.
#[test]
fn nothing_grows() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 4096);
        let memory = fake.alloc(4096);
        let (event, stream) = (fake.event(), fake.stream());
        let (slices, staging) = (Slices::one(memory.base, 4096), rig.staging());
        let mut before = Vec::new();
        for round in 0..1000 {
            stream.write(memory.base, &[round as u8], 1);
            event.record(&stream);
            let wait = rig.capture(&event).unwrap();
            rig.worker.run(behind(&wait, slices.gather(round, staging))).unwrap();
            if round == 0 {
                before = fake.live();
            }
        }
        assert_eq!(fake.live(), before);
    }
}

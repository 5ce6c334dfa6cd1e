//! Devices against the fake drivers: order, arguments, failures, leaks. The fakes abort on misuse, so
//! that a test passes only if nothing was touched too early, too late or after its end.

mod fakes;
mod shards;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fakes::{ALL, EACH_DRIVER, Fake, Kind, Memory};
use shards::{
    Pages, Worker, few_shapes, gathered, layout, pattern, scattered, shapes, shard_bytes,
};
use ucm::block::SliceShape;
use ucm::config::DeviceKind;
use ucm::device::{CapturedEvent, CopyJob, Device, Direction, Staging, open};
use ucm::error::{ErrorKind, Result};

fn device_kind(kind: Kind) -> DeviceKind {
    if kind.device == "cuda" { DeviceKind::Cuda } else { DeviceKind::Ascend }
}

fn addresses(memory: &Memory<'_>, offsets: &[usize]) -> Vec<*mut std::ffi::c_void> {
    offsets.iter().map(|offset| memory.base.wrapping_add(*offset).cast()).collect()
}

/// Opens the device on its fake, with the arena pinned where the driver can.
fn open_pinned(fake: &Fake, arena: &Pages) -> Result<Arc<dyn Device>> {
    let device = open(device_kind(fake.kind()), 0)?;
    // SAFETY: tests unpin before the pages go.
    let pinned = unsafe { device.pin(arena.base, arena.bytes) };
    assert!(pinned.is_ok() || fake.failed().is_some() || (fake.is_old() && !fake.is_cuda()));
    Ok(device)
}

/// Saves a shard of these slices and loads it elsewhere, twice in one call; false when any job failed.
/// Jobs that are reported as done must have moved the right bytes, and a load for which a stream was made
/// to wait without an error must be there when the stream has waited.
fn round_trip(
    fake: &Fake,
    shapes: &[SliceShape],
    seed: usize,
    delay_micros: u32,
    kernel_micros: u32,
) -> Result<bool> {
    let (offsets, span) = layout(shapes);
    let shard = shard_bytes(shapes);
    let slot = shard.next_multiple_of(4096);
    let registered = fake.live()[4];
    let arena = Pages::new(4 * slot);
    let device = open_pinned(fake, &arena)?;
    fake.delay(delay_micros);
    let mut worker = match Worker::new(&*device) {
        Ok(worker) => worker,
        Err(error) => {
            device.unpin(arena.base);
            return Err(error);
        }
    };
    let result = (|| {
        let (source, target) = (fake.alloc(span), fake.alloc(span));
        let stream = fake.stream();
        let event = fake.event();
        let bytes = pattern(span, seed);
        stream.write(source.base, &bytes, kernel_micros);
        event.record(&stream);
        // SAFETY: the event lives.
        let wait = unsafe { device.capture_event(event.event) };
        drop(event);
        let wait = match wait {
            Ok(wait) => wait,
            Err(error) => {
                stream.sync();
                return Err(error);
            }
        };
        let from = addresses(&source, &offsets);
        let job = |ticket, slot_index: usize, direction, addresses| CopyJob {
            ticket,
            direction,
            staging: arena.base.wrapping_add(slot_index * slot),
            addresses,
            slices: shapes,
            wait: None,
        };
        let saves = [
            CopyJob { wait: Some(&wait), ..job(1, 0, Direction::Gather, &from) },
            CopyJob { wait: Some(&wait), ..job(2, 1, Direction::Gather, &from) },
        ];
        worker.enqueue(&saves);
        let finished = worker.finish(2);
        stream.sync();
        assert!(finished.iter().all(|f| f.staging == Staging::Free));
        let expected = gathered(&bytes, &offsets, shapes);
        for done in finished.iter().filter(|f| f.result.is_ok()) {
            let at = (done.ticket as usize - 1) * slot;
            assert!(arena.read()[at..at + shard] == expected, "{:?}: wrong bytes", fake.kind());
        }
        let saved = finished.iter().all(|f| f.result.is_ok());

        let fresh = pattern(shard, seed + 1);
        // SAFETY: the slot is ours, and no copy is in flight.
        unsafe {
            let staging = arena.base.wrapping_add(2 * slot);
            std::ptr::copy_nonoverlapping(fresh.as_ptr(), staging, shard);
        }
        target.write(&bytes);
        let to = addresses(&target, &offsets);
        let marker = worker.enqueue(&[job(3, 2, Direction::Scatter, &to)]);
        let failed = !worker.failed().is_empty();
        let mut expected = bytes.clone();
        scattered(&mut expected, &fresh, &offsets, shapes);
        // What a compute stream sees that goes on when the engine says that it may.
        let mut seen = vec![0; span];
        // SAFETY: the stream lives.
        let waited =
            marker.filter(|_| !failed).map(|m| unsafe { device.stream_wait(stream.stream, &[m]) });
        if matches!(waited, Some(Ok(()))) {
            stream.read(&mut seen, target.base);
            stream.sync();
            assert!(seen == expected, "{:?}: the stream saw wrong bytes", fake.kind());
        }
        let finished = worker.finish(1);
        assert_eq!(finished[0].staging, Staging::Free);
        let loaded = finished[0].result.is_ok();
        assert_ne!(loaded, failed, "{:?}: a copy's failure is known at once", fake.kind());
        if loaded {
            assert!(target.read() == expected, "{:?}: wrong bytes loaded", fake.kind());
        }
        Ok(saved && loaded && waited.is_none_or(|waited| waited.is_ok()))
    })();
    drop(worker);
    device.unpin(arena.base);
    if fake.live()[4] != registered {
        // The driver refused to unpin: the pages stay pinned, so they must stay mapped.
        std::mem::forget(arena);
    }
    result
}

/// Goal: saves and loads of every form of slice are byte-exact on every driver and in every way of
/// copying, while the source is still being written when the save is submitted; nothing is leaked.
#[test]
fn round_trips_are_exact() {
    for &kind in ALL {
        let fake = Fake::take(kind);
        assert!(round_trip(&fake, &shapes(), 7, 300, 1000).unwrap(), "{kind:?}");
        fake.assert_no_leak();
        if fake.is_cuda() {
            assert_eq!(fake.depth(), 0, "a context was left on the caller's stack");
        }
    }
}

/// Goal: whichever single call of the driver fails, jobs are reported once, none as done with wrong
/// bytes, the failure is an error and no hang, and closing works.
#[test]
fn each_call_fails_once() {
    const STATUS: i32 = 2;
    let shapes = few_shapes();
    // Calibration makes thousands of like calls: it is left out.
    for &kind in ALL.iter().filter(|kind| !kind.strategy.is_empty()) {
        let mut failures = 0;
        for nth in 1.. {
            let fake = Fake::take(kind);
            fake.fail(nth, STATUS, false);
            let result = round_trip(&fake, &shapes, nth as usize, 0, 100);
            let Some(call) = fake.failed() else {
                assert!(result.unwrap(), "{kind:?}: fails without a failure");
                break;
            };
            failures += 1;
            if let Err(error) = result {
                assert_eq!(error.kind(), ErrorKind::Device, "{kind:?}: {call}: {error}");
                assert!(error.to_string().contains(&call), "{call} is not named: {error}");
            }
            if fake.is_cuda() {
                assert_eq!(fake.depth(), 0, "{call}: a context was left on the caller's stack");
            }
        }
        println!("{kind:?}: each of {failures} calls was failed");
        assert!(failures > 0, "{kind:?}: no call was failed");
    }
}

/// Goal: a device that dies in the middle fails every job with DEVICE, gives back no staging memory that
/// it might still touch, and lets everything close.
#[test]
fn a_dying_device_keeps_its_staging() {
    const STATUS: i32 = 700;
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let arena = Pages::new(1 << 20);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(1 << 20);
        fake.hold(true);
        let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(1 << 20)]);
        let job = |ticket| CopyJob {
            ticket,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: None,
        };
        worker.enqueue(&[job(1)]);
        fake.fail(1, STATUS, true);
        let finished = worker.finish(1);
        assert_eq!(finished[0].result.as_ref().unwrap_err().kind(), ErrorKind::Device);
        assert_eq!(finished[0].staging, Staging::Lost);
        worker.enqueue(&[job(2)]);
        let finished = worker.finish(1);
        assert_eq!(finished[0].result.as_ref().unwrap_err().kind(), ErrorKind::Device);
        assert_eq!(finished[0].staging, Staging::Free, "nothing of it was enqueued");
        // SAFETY: a null event is none.
        let capture = unsafe { device.capture_event(std::ptr::null_mut()) };
        assert!(capture.err().unwrap().to_string().contains("restart"));
        drop(worker);
        device.unpin(arena.base);
        drop(device);
        fake.reset();
        // What the device may still touch is leaked, so the pages stay registered: they must stay mapped.
        std::mem::forget(arena);
        std::mem::forget(memory);
    }
}

/// Goal: when somebody resets the device under us, jobs fail with DEVICE and staging is free, because a
/// reset ends all work.
#[test]
fn a_reset_device_frees_its_staging() {
    let fake = Fake::take(ALL[0]);
    let arena = Pages::new(1 << 20);
    let device = open_pinned(&fake, &arena).unwrap();
    let mut worker = Worker::new(&*device).unwrap();
    let memory = fake.alloc(1 << 20);
    let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(1 << 20)]);
    let job = CopyJob {
        ticket: 1,
        direction: Direction::Scatter,
        staging: arena.base,
        addresses: &addresses,
        slices: &slices,
        wait: None,
    };
    worker.enqueue(&[job]);
    fake.reset_device();
    let finished = worker.finish(1);
    assert_eq!(finished[0].result.as_ref().unwrap_err().kind(), ErrorKind::Device);
    assert_eq!(finished[0].staging, Staging::Free);
    drop(worker);
    device.unpin(arena.base);
    drop(device);
    fake.revive();
    std::mem::forget(arena);
}

/// Goal: the fakes catch wrong order: the same save without the wait ends the process.
#[test]
fn a_save_without_its_event_is_caught() {
    const VARIABLE: &str = "UCM_TEST_OVERTAKE";
    if let Ok(index) = std::env::var(VARIABLE) {
        let fake = Fake::take(ALL[index.parse::<usize>().unwrap()]);
        let arena = Pages::new(1 << 20);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let (memory, stream) = (fake.alloc(1 << 20), fake.stream());
        stream.write(memory.base, &pattern(1 << 20, 1), 500_000);
        let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(1 << 20)]);
        worker.enqueue(&[CopyJob {
            ticket: 1,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: None,
        }]);
        worker.finish(1);
        return;
    }
    for (index, kind) in ALL.iter().enumerate() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_save_without_its_event_is_caught", "--nocapture"])
            .env(VARIABLE, index.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains("overtook its event"),
            "{kind:?}: {text}"
        );
    }
}

/// Goal: an event captured is the event as it was: recording it again behind other work, or destroying
/// it, neither delays nor hurries the copy.
#[test]
fn captured_events_do_not_change() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let arena = Pages::new(4096);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(4096);
        let (quick, slow) = (fake.stream(), fake.stream());
        let other = fake.alloc(4096);
        let event = fake.event();
        let bytes = pattern(4096, 3);
        quick.write(memory.base, &bytes, 20_000);
        event.record(&quick);
        // SAFETY: the event lives.
        let wait: CapturedEvent = unsafe { device.capture_event(event.event) }.unwrap();
        slow.write(other.base, &bytes, 1_500_000);
        event.record(&slow);
        drop(event);
        let begin = Instant::now();
        let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(4096)]);
        worker.enqueue(&[CopyJob {
            ticket: 1,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: Some(&wait),
        }]);
        drop(wait);
        assert!(worker.finish(1)[0].result.is_ok());
        assert!(begin.elapsed() < Duration::from_millis(1200), "waited for the second recording");
        assert_eq!(arena.read(), bytes);
        slow.sync();
        drop(worker);
        device.unpin(arena.base);
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
        let arena = Pages::new(1 << 16);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(1 << 16);
        let stream = fake.stream();
        let bytes = pattern(1 << 16, 9);
        arena.write(&bytes);
        fake.hold(true);
        let half = 1 << 15;
        let addresses = [memory.base.cast(), memory.base.wrapping_add(half).cast()];
        let slices = vec![SliceShape::contiguous(half as u64); 2];
        let marker = worker.enqueue(&[CopyJob {
            ticket: 1,
            direction: Direction::Scatter,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: None,
        }]);
        // SAFETY: the stream lives.
        unsafe { device.stream_wait(stream.stream, &[marker.unwrap()]) }.unwrap();
        let mut seen = vec![0; 1 << 16];
        stream.read(&mut seen, memory.base);
        assert!(worker.poll().is_empty(), "{kind:?}: done while the device is held");
        fake.hold(false);
        stream.sync();
        assert!(seen == bytes, "{kind:?}: the stream did not wait");
        worker.finish(1);
        drop(worker);
        device.unpin(arena.base);
    }
}

/// Goal: the worker sleeps until copies have ended, and is woken a few times a run, not continuously;
/// also when the driver refuses to call back.
#[test]
fn workers_park_until_woken() {
    for &kind in EACH_DRIVER {
        for refused in [false, true] {
            let fake = Fake::take(kind);
            let arena = Pages::new(1 << 16);
            let device = open_pinned(&fake, &arena).unwrap();
            let mut worker = Worker::new(&*device).unwrap();
            let memory = fake.alloc(1 << 16);
            let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(1 << 16)]);
            if refused {
                let name = if fake.is_cuda() { "cuLaunchHostFunc" } else { "aclrtLaunchHostFunc" };
                fake.fail_call(name, 1, 2);
            }
            fake.hold(true);
            worker.enqueue(&[CopyJob {
                ticket: 1,
                direction: Direction::Gather,
                staging: arena.base,
                addresses: &addresses,
                slices: &slices,
                wait: None,
            }]);
            let before = fake.calls();
            std::thread::sleep(Duration::from_millis(120));
            assert_eq!(fake.calls(), before, "{kind:?}: the driver is asked while nothing happens");
            let wakes = worker.wakes.load(Ordering::SeqCst);
            assert!(wakes <= 6, "{kind:?}: {wakes} wake-ups in 120 ms");
            fake.hold(false);
            assert!(worker.finish(1)[0].result.is_ok());
            drop(worker);
            device.unpin(arena.base);
        }
    }
}

/// Goal: while a graph is captured anywhere in the process, saves and loads go on and break nothing.
#[test]
fn captures_are_not_broken() {
    for &kind in ALL {
        let fake = Fake::take(kind);
        let arena = Pages::new(1 << 16);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        fake.capture(true);
        let memory = fake.alloc(1 << 16);
        let event = fake.event();
        let stream = fake.stream();
        stream.write(memory.base, &pattern(1 << 16, 2), 5000);
        event.record(&stream);
        // SAFETY: the event lives.
        let wait = unsafe { device.capture_event(event.event) }.unwrap();
        let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(1 << 16)]);
        worker.enqueue(&[CopyJob {
            ticket: 1,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: Some(&wait),
        }]);
        assert!(worker.finish(1)[0].result.is_ok());
        fake.capture(false);
        drop(worker);
        device.unpin(arena.base);
    }
}

/// Goal: a thousand saves with events make no more events and memory than the first did.
#[test]
fn nothing_grows() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let arena = Pages::new(4096);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(4096);
        let (event, stream) = (fake.event(), fake.stream());
        let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(4096)]);
        let mut before = Vec::new();
        for round in 0..1000 {
            stream.write(memory.base, &[round as u8], 1);
            event.record(&stream);
            // SAFETY: the event lives.
            let wait = unsafe { device.capture_event(event.event) }.unwrap();
            worker.enqueue(&[CopyJob {
                ticket: round,
                direction: Direction::Gather,
                staging: arena.base,
                addresses: &addresses,
                slices: &slices,
                wait: Some(&wait),
            }]);
            assert!(worker.finish(1)[0].result.is_ok());
            if round == 0 {
                before = fake.live();
            }
        }
        assert_eq!(fake.live(), before);
        drop(worker);
        device.unpin(arena.base);
    }
}

/// Goal: a slice that ends behind its allocation fails alone, with its address; its neighbours in the
/// same call succeed.
#[test]
fn one_bad_address_fails_alone() {
    let fake = Fake::take(ALL[4]);
    let arena = Pages::new(1 << 16);
    let device = open_pinned(&fake, &arena).unwrap();
    let mut worker = Worker::new(&*device).unwrap();
    let memory = fake.alloc(8192);
    let good = [memory.base.cast()];
    let bad = [memory.base.wrapping_add(4097).cast()];
    let null = [std::ptr::null_mut()];
    let slices = [SliceShape::contiguous(4096)];
    let job = |ticket, addresses| CopyJob {
        ticket,
        direction: Direction::Gather,
        staging: arena.base.wrapping_add(ticket as usize * 4096),
        addresses,
        slices: &slices,
        wait: None,
    };
    worker.enqueue(&[job(0, &good), job(1, &bad), job(2, &null), job(3, &good)]);
    for done in worker.finish(4) {
        match done.ticket {
            0 | 3 => assert!(done.result.is_ok()),
            _ => {
                let error = done.result.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument);
                assert_eq!(done.staging, Staging::Free);
            }
        }
    }
    drop(worker);
    device.unpin(arena.base);
}

/// Goal: on CUDA, plain host memory is copied too; on Ascend it is refused with the remedy.
#[test]
fn host_addresses_are_understood() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let arena = Pages::new(4096);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = Pages::new(4096);
        memory.write(&pattern(4096, 5));
        let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(4096)]);
        worker.enqueue(&[CopyJob {
            ticket: 1,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: None,
        }]);
        let result = worker.finish(1).remove(0).result;
        if fake.is_cuda() {
            assert!(result.is_ok());
            assert_eq!(arena.read(), memory.read());
        } else {
            assert!(result.unwrap_err().to_string().contains("device: host"));
        }
        drop(worker);
        device.unpin(arena.base);
    }
}

/// Goal: staging that could not be pinned is slower and told, and still right.
#[test]
fn unpinned_staging_works() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let arena = Pages::new(1 << 16);
        let device = open(device_kind(kind), 0).unwrap();
        let name = if fake.is_cuda() { "cuMemHostRegister" } else { "aclrtHostRegisterV2" };
        fake.fail_call(name, 1, 2);
        // SAFETY: the pages live until the end of the test.
        assert!(unsafe { device.pin(arena.base, arena.bytes) }.is_err());
        assert!(device.report().fallbacks.iter().any(|text| text.contains("not pinned")));
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(1 << 16);
        let bytes = pattern(1 << 16, 4);
        memory.write(&bytes);
        let (addresses, slices) = ([memory.base.cast()], [SliceShape::contiguous(1 << 16)]);
        worker.enqueue(&[CopyJob {
            ticket: 1,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: None,
        }]);
        assert!(worker.finish(1)[0].result.is_ok());
        assert_eq!(arena.read(), bytes);
    }
}

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

/// Goal: a stream is not sent on when a load's copy has failed: neither for a job that was refused nor for
/// one whose copy the driver refused, while its neighbours in the same call are waited for.
#[test]
fn streams_do_not_wait_for_failed_copies() {
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let arena = Pages::new(1 << 16);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(1 << 16);
        let (good, null) = ([memory.base.cast()], [std::ptr::null_mut()]);
        let slices = [SliceShape::contiguous(4096)];
        let job = |ticket, addresses| CopyJob {
            ticket,
            direction: Direction::Scatter,
            staging: arena.base,
            addresses,
            slices: &slices,
            wait: None,
        };
        let marker = worker.enqueue(&[job(0, &good), job(1, &null)]);
        assert!(marker.is_some());
        assert_eq!(worker.failed(), [1]);
        worker.finish(2);
        fake.fail_call(if fake.is_cuda() { "cuMemcpyAsync" } else { "aclrtMemcpyAsync" }, 1, 2);
        worker.enqueue(&[job(2, &good)]);
        assert_eq!(worker.failed(), [2]);
        worker.finish(1);
        worker.enqueue(&[job(3, &good)]);
        assert!(worker.failed().is_empty());
        worker.finish(1);
        drop(worker);
        device.unpin(arena.base);
    }
}

/// Goal: pages that somebody else had pinned before stay pinned when the store is done with them.
#[test]
fn foreign_registrations_are_left_alone() {
    let fake = Fake::take(ALL[0]);
    let arena = Pages::new(1 << 16);
    let first = open_pinned(&fake, &arena).unwrap();
    let registered = fake.live();
    let second = open_pinned(&fake, &arena).unwrap();
    second.unpin(arena.base);
    drop(second);
    assert_eq!(fake.live(), registered);
    first.unpin(arena.base);
    drop(first);
    fake.assert_no_leak();
}

/// Goal: what is known of a caller's memory is asked again after a refused call, because the caller may
/// have freed it.
#[test]
fn a_refused_call_leaves_nothing_known() {
    let fake = Fake::take(ALL[3]);
    let arena = Pages::new(1 << 16);
    let device = open_pinned(&fake, &arena).unwrap();
    let mut worker = Worker::new(&*device).unwrap();
    let memory = fake.alloc(8192);
    let slices = vec![SliceShape::contiguous(4096); 2];
    let (bad, good) = (
        [memory.base.cast(), std::ptr::null_mut()],
        [memory.base.wrapping_add(4096).cast(), memory.base.cast()],
    );
    let job = |addresses| CopyJob {
        ticket: 0,
        direction: Direction::Gather,
        staging: arena.base,
        addresses,
        slices: &slices,
        wait: None,
    };
    worker.enqueue(&[job(&bad)]);
    assert!(worker.finish(1)[0].result.is_err());
    let asked = fake.calls_of("cuMemGetAddressRange");
    worker.enqueue(&[job(&good)]);
    assert!(worker.finish(1)[0].result.is_ok());
    assert!(fake.calls_of("cuMemGetAddressRange") > asked);
    drop(worker);
    device.unpin(arena.base);
}

/// Goal: memory of another GPU is copied by the driver, never by a kernel, which would break the context.
#[test]
fn memory_of_another_device_is_not_touched_by_kernels() {
    for kind in [ALL[2], ALL[3]] {
        let fake = Fake::take(kind);
        let arena = Pages::new(1 << 16);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(1 << 16);
        fake.foreign(&memory);
        let bytes = pattern(1 << 16, 6);
        memory.write(&bytes);
        let slices = vec![SliceShape::contiguous(1 << 12); 16];
        let addresses: Vec<_> =
            (0..16).rev().map(|at| memory.base.wrapping_add(at << 12).cast()).collect();
        worker.enqueue(&[CopyJob {
            ticket: 1,
            direction: Direction::Gather,
            staging: arena.base,
            addresses: &addresses,
            slices: &slices,
            wait: None,
        }]);
        assert!(worker.finish(1)[0].result.is_ok());
        let expected: Vec<u8> = bytes.chunks(1 << 12).rev().flatten().copied().collect();
        assert!(arena.read() == expected);
        drop(worker);
        device.unpin(arena.base);
    }
}

/// Goal: rows that lie further apart than a two-dimensional copy can say are copied one by one: K and V of
/// one large tensor.
#[test]
fn rows_far_apart_are_copied() {
    const APART: u64 = (2 << 30) + 4096;
    for kind in ALL.iter().filter(|kind| kind.device == "cuda") {
        let fake = Fake::take(*kind);
        let arena = Pages::new(8192);
        let device = open_pinned(&fake, &arena).unwrap();
        let mut worker = Worker::new(&*device).unwrap();
        let memory = fake.alloc(APART as usize + 4096);
        let shape = SliceShape { run_bytes: 4096, dimensions: vec![(2, APART)] };
        let bytes = pattern(8192, 8);
        for direction in [Direction::Scatter, Direction::Gather] {
            arena.write(if direction == Direction::Scatter { &bytes } else { &[0; 8192] });
            worker.enqueue(&[CopyJob {
                ticket: 1,
                direction,
                staging: arena.base,
                addresses: &[memory.base.cast()],
                slices: std::slice::from_ref(&shape),
                wait: None,
            }]);
            worker.finish(1).remove(0).result.unwrap();
        }
        assert!(arena.read() == bytes, "{kind:?}");
        drop(worker);
        device.unpin(arena.base);
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

/// Goal: the process may end while copies run and workers wait for them: the driver goes first, and
/// nothing hangs or faults.
#[test]
fn a_process_may_end_while_copies_run() {
    const VARIABLE: &str = "UCM_TEST_EXIT";
    if let Ok(index) = std::env::var(VARIABLE) {
        let fake = Fake::take(ALL[index.parse::<usize>().unwrap()]);
        let arena = Pages::new(1 << 20);
        let device = open_pinned(&fake, &arena).unwrap();
        let memory = fake.alloc(1 << 20);
        fake.hold(true);
        let (begun, begins) = std::sync::mpsc::channel();
        let (address, staging) = (memory.base as usize, arena.base as usize);
        std::thread::spawn(move || {
            let mut worker = Worker::new(&*device).unwrap();
            worker.enqueue(&[CopyJob {
                ticket: 1,
                direction: Direction::Gather,
                staging: staging as *mut u8,
                addresses: &[address as *mut std::ffi::c_void],
                slices: &[SliceShape::contiguous(1 << 20)],
                wait: None,
            }]);
            begun.send(()).unwrap();
            // The driver is gone before this ends; then it is a failed job like any other.
            let finished = worker.finish(1);
            assert!(finished[0].result.is_err());
        });
        begins.recv().unwrap();
        std::process::exit(7);
    }
    for index in [0, 3, 6] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_process_may_end_while_copies_run", "--nocapture"])
            .env(VARIABLE, index.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "{:?}: {text}", ALL[index]);
    }
}

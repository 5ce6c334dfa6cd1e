//! One save and one load of every form of slice, as they are and with every call failed once.

use ucm::block::SliceShape;
use ucm::device::Staging;
use ucm::error::{ErrorKind, Result};

use crate::fakes::{ALL, EACH_DRIVER, Fake, Kind, Memory, Steering};
use crate::rig::Rig;
use crate::shards::{
    Slices, behind, few_shapes, gathered, layout, pattern, scattered, shapes, shard_bytes,
};

/// What goes to and fro.
struct Shard<'a> {
    shapes: &'a [SliceShape],
    offsets: Vec<usize>,
    /// Bytes of memory from the first slice to the end of the last.
    span: usize,
    /// Bytes of staging.
    bytes: usize,
    /// The same, in pages.
    slot: usize,
}

impl<'a> Shard<'a> {
    fn new(shapes: &'a [SliceShape]) -> Self {
        let ((offsets, span), bytes) = (layout(shapes), shard_bytes(shapes));
        Self { shapes, offsets, span, bytes, slot: bytes.next_multiple_of(4096) }
    }

    fn slices(&self, memory: &Memory<'_>) -> Slices {
        Slices::at(memory.base, &self.offsets, self.shapes)
    }
}

/// Saves the shard twice in one call while a kernel is still writing it. False when a job failed; what is
/// reported as done must have moved the right bytes.
fn save(
    fake: &Fake,
    rig: &mut Rig<'_>,
    shard: &Shard<'_>,
    bytes: &[u8],
    kernel_micros: u32,
) -> Result<bool> {
    let (source, stream, event) = (fake.alloc(shard.span), fake.stream(), fake.event());
    stream.write(source.base, bytes, kernel_micros);
    event.record(&stream);
    let wait = rig.capture(&event);
    drop(event);
    if wait.is_err() {
        stream.sync();
    }
    let (wait, slices) = (wait?, shard.slices(&source));
    let places = [rig.staging(), rig.staging().wrapping_add(shard.slot)];
    let job = |at: usize| behind(&wait, slices.gather(at as u64, places[at]));
    rig.worker.enqueue(&[job(0), job(1)]);
    let finished = rig.worker.finish(2);
    stream.sync();
    assert!(finished.iter().all(|job| job.staging == Staging::Free));
    let (expected, arena) = (gathered(bytes, &shard.offsets, shard.shapes), rig.arena().read());
    for done in finished.iter().filter(|job| job.result.is_ok()) {
        let at = done.ticket as usize * shard.slot;
        assert!(arena[at..at + shard.bytes] == expected, "{:?}: wrong bytes", fake.kind());
    }
    Ok(finished.iter().all(|job| job.result.is_ok()))
}

/// Loads other bytes over the shard. False when the job or the wait failed; a stream that was made to wait
/// without an error must see the bytes when it has waited.
fn load(fake: &Fake, rig: &mut Rig<'_>, shard: &Shard<'_>, before: &[u8], seed: usize) -> bool {
    let (target, stream) = (fake.alloc(shard.span), fake.stream());
    let fresh = pattern(shard.bytes, seed);
    // The first slot is free again.
    rig.arena().write(&fresh);
    target.write(before);
    let slices = shard.slices(&target);
    let staging = rig.staging();
    let marker = rig.worker.enqueue(&[slices.scatter(3, staging)]);
    let failed = !rig.worker.failed().is_empty();
    let mut expected = before.to_vec();
    scattered(&mut expected, &fresh, &shard.offsets, shard.shapes);
    // What a compute stream sees that goes on when the engine says that it may.
    let mut seen = vec![0; shard.span];
    // SAFETY: the stream lives.
    let wait = |marker| unsafe { rig.device.stream_wait(stream.stream, &[marker]) };
    let waited = marker.filter(|_| !failed).map(wait);
    if matches!(waited, Some(Ok(()))) {
        stream.read(&mut seen, target.base);
        stream.sync();
        assert!(seen == expected, "{:?}: the stream saw wrong bytes", fake.kind());
    }
    let finished = rig.worker.finish(1);
    assert_eq!(finished[0].staging, Staging::Free);
    let loaded = finished[0].result.is_ok();
    assert_ne!(loaded, failed, "{:?}: a copy's failure is known at once", fake.kind());
    if loaded {
        assert!(target.read() == expected, "{:?}: wrong bytes loaded", fake.kind());
    }
    loaded && waited.is_none_or(|waited| waited.is_ok())
}

/// Goal: saves and loads of every form of slice are byte-exact on every driver and in every way of
/// copying, while the source is still being written when the save is submitted; nothing is leaked.
#[test]
fn round_trips_are_exact() {
    for &kind in ALL {
        let (fake, forms) = (Fake::take(kind), shapes());
        let shard = Shard::new(&forms);
        let bytes = pattern(shard.span, 7);
        let mut rig = Rig::new(&fake, 2 * shard.slot);
        fake.delay(300);
        assert!(save(&fake, &mut rig, &shard, &bytes, 1000).unwrap(), "{kind:?}");
        assert!(load(&fake, &mut rig, &shard, &bytes, 8), "{kind:?}");
        drop(rig);
        fake.assert_no_leak();
        if fake.is_cuda() {
            assert_eq!(fake.depth(), 0, "a context was left on the caller's stack");
        }
    }
}

/// Goal: two devices in one process keep to their own contexts: the fakes abort where a stream or an event of the
/// one is used under the context of the other.
#[test]
fn a_second_device_has_its_own_context() {
    let shapes = few_shapes();
    for &kind in EACH_DRIVER {
        let (fake, shard) = (Fake::take(kind), Shard::new(&shapes));
        let bytes = pattern(shard.span, 9);
        let open = |device_id| Rig::open_on(&fake, device_id, 2 * shard.slot).unwrap();
        let mut rigs = [open(0), open(1)];
        for (seed, rig) in rigs.iter_mut().enumerate() {
            assert!(save(&fake, rig, &shard, &bytes, 100).unwrap(), "{kind:?}");
            assert!(load(&fake, rig, &shard, &bytes, 10 + seed), "{kind:?}");
        }
        drop(rigs);
        fake.assert_no_leak();
    }
}

/// A round trip in which the nth call fails. Gives the name of the call; `None`: there were not so many.
fn failed_round_trip(kind: Kind, nth: i64, shapes: &[SliceShape]) -> Option<String> {
    const STATUS: i32 = 2;
    let (fake, shard) = (Fake::take(kind), Shard::new(shapes));
    let bytes = pattern(shard.span, nth as usize);
    fake.fail(nth, STATUS, false);
    let result = Rig::open(&fake, 2 * shard.slot).and_then(|mut rig| {
        let saved = save(&fake, &mut rig, &shard, &bytes, 100)?;
        Ok(load(&fake, &mut rig, &shard, &bytes, nth as usize + 1) && saved)
    });
    let call = fake.failed();
    if let Err(error) = &result {
        let call = call.as_ref().expect("a round trip fails without a failure");
        assert_eq!(error.kind(), ErrorKind::Device, "{kind:?}: {call}: {error}");
        assert!(error.to_string().contains(call), "{call} is not named: {error}");
    }
    assert!(call.is_some() || result.unwrap(), "{kind:?}: fails without a failure");
    if fake.is_cuda() {
        assert_eq!(fake.depth(), 0, "{call:?}: a context was left on the caller's stack");
    }
    call
}

/// Goal: whichever single call of the driver fails, jobs are reported once, none as done with wrong
/// bytes, the failure is an error and no hang, and closing works.
#[test]
fn each_call_fails_once() {
    let shapes = few_shapes();
    // Calibration makes thousands of like calls: it is left out.
    for &kind in ALL.iter().filter(|kind| !kind.strategy.is_empty()) {
        let failures = (1..).take_while(|nth| failed_round_trip(kind, *nth, &shapes).is_some());
        let failures = failures.count();
        println!("{kind:?}: each of {failures} calls was failed");
        assert!(failures > 0, "{kind:?}: no call was failed");
    }
}

//! Which addresses and which staging memory are copied, and how.

use ucm::block::SliceShape;
use ucm::device::{Direction, Staging, open};
use ucm::error::ErrorKind;

use crate::fakes::{ALL, EACH_DRIVER, Fake, Steering};
use crate::rig::{Rig, device_kind};
use crate::shards::{Pages, Slices, Worker, behind, pattern};

/// Goal: a slice that ends behind its allocation fails alone, with its address; its neighbours in the
/// same call succeed.
#[test]
fn one_bad_address_fails_alone() {
    let fake = Fake::take(ALL[4]);
    let mut rig = Rig::new(&fake, 1 << 16);
    let memory = fake.alloc(8192);
    let good = Slices::one(memory.base, 4096);
    let bad = Slices::one(memory.base.wrapping_add(4097), 4096);
    let null = Slices::one(std::ptr::null_mut(), 4096);
    let jobs: Vec<_> = [&good, &bad, &null, &good].into_iter().enumerate().collect();
    let place = |at: usize| rig.staging().wrapping_add(at * 4096);
    let jobs: Vec<_> =
        jobs.into_iter().map(|(at, slices)| slices.gather(at as u64, place(at))).collect();
    rig.worker.enqueue(&jobs);
    for done in rig.worker.finish(4) {
        match done.ticket {
            0 | 3 => assert!(done.result.is_ok()),
            _ => {
                let error = done.result.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument);
                assert_eq!(done.staging, Staging::Free);
            }
        }
    }
}

/// Goal: plain host memory is copied too, alone and beside device memory in one job, contiguous and strided, after
/// the event that the job waits for, which a slow kernel of the model comes before.
#[test]
fn host_addresses_are_understood() {
    const SLICE: usize = 4096;
    // Where nothing tells of addresses, all are taken for the device's.
    for &kind in ALL.iter().filter(|kind| !kind.file.contains("ascendcl-old")) {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 3 * SLICE);
        let (host, device) = (Pages::new(3 * SLICE), fake.alloc(SLICE));
        let rows = SliceShape { run_bytes: 1024, dimensions: vec![(4, 2048)] };
        let slices = Slices {
            addresses: vec![
                host.base.cast(),
                device.base.cast(),
                host.base.wrapping_add(SLICE).cast(),
            ],
            shapes: vec![
                SliceShape::contiguous(SLICE as u64),
                SliceShape::contiguous(SLICE as u64),
                rows,
            ],
        };
        let every_other = |bytes: &[u8]| -> Vec<u8> {
            bytes.chunks(2048).flat_map(|row| row[..1024].to_vec()).collect()
        };
        let (stream, event) = (fake.stream(), fake.event());
        let (saved, of_device) = (pattern(3 * SLICE, 5), pattern(SLICE, 6));
        device.write(&of_device);
        stream.write(host.base, &saved, 20_000);
        event.record(&stream);
        let wait = rig.capture(&event).unwrap();
        let staging = rig.staging();
        rig.worker.run(behind(&wait, slices.gather(1, staging))).unwrap();
        let expected = [&saved[..SLICE], &of_device, &every_other(&saved[SLICE..])].concat();
        assert!(rig.arena().read() == expected, "{kind:?}: a save");
        let loaded = pattern(3 * SLICE, 7);
        rig.arena().write(&loaded);
        rig.worker.run(slices.scatter(2, staging)).unwrap();
        assert!(host.read()[..SLICE] == loaded[..SLICE], "{kind:?}: a load");
        assert!(device.read() == loaded[SLICE..2 * SLICE], "{kind:?}: a load of device memory");
        assert!(every_other(&host.read()[SLICE..]) == loaded[2 * SLICE..], "{kind:?}: rows");
    }
}

/// Goal: memory of a kind that nobody can copy is refused by name, its neighbours are not; where the runtime cannot
/// say what an address is, it is the runtime that copies it, and never the CPU, which would fault.
#[test]
fn memory_that_is_neither_hosts_nor_devices_is_refused() {
    let fake = Fake::take(ALL[6]);
    let mut rig = Rig::new(&fake, 8192);
    let (managed, plain) = (fake.alloc(4096), fake.alloc(4096));
    fake.foreign(&managed);
    let staging = rig.staging();
    let error = rig.worker.run(Slices::one(managed.base, 4096).gather(1, staging)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("type 3"), "{error}");
    plain.write(&pattern(4096, 2));
    fake.fail_call("aclrtPointerGetAttributes", 1, 2);
    rig.worker.run(Slices::one(plain.base, 4096).gather(2, staging)).unwrap();
    assert!(fake.failed().is_some());
    assert!(rig.arena().read()[..4096] == pattern(4096, 2));
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
        let slices = Slices::one(memory.base, 1 << 16);
        worker.run(slices.gather(1, arena.base)).unwrap();
        assert_eq!(arena.read(), bytes);
        arena.write(&pattern(1 << 16, 5));
        worker.run(slices.scatter(1, arena.base)).unwrap();
        assert_eq!(memory.read(), pattern(1 << 16, 5));
    }
}

/// Goal: pages that somebody else had pinned before stay pinned when the store is done with them.
#[test]
fn foreign_registrations_are_left_alone() {
    let fake = Fake::take(ALL[0]);
    let rig = Rig::new(&fake, 1 << 16);
    let registered = fake.live();
    let second = open(device_kind(fake.kind()), 0).unwrap();
    // SAFETY: unpinned before the rig goes.
    unsafe { second.pin(rig.staging(), 1 << 16) }.unwrap();
    second.unpin(rig.staging());
    drop(second);
    assert_eq!(fake.live(), registered);
    drop(rig);
    fake.assert_no_leak();
}

/// Goal: what is known of a caller's memory is asked again after a refused call, because the caller may
/// have freed it.
#[test]
fn a_refused_call_leaves_nothing_known() {
    let fake = Fake::take(ALL[3]);
    let mut rig = Rig::new(&fake, 1 << 16);
    let memory = fake.alloc(8192);
    let shapes = vec![SliceShape::contiguous(4096); 2];
    let good = Slices::at(memory.base, &[4096, 0], &shapes);
    let mut bad = Slices::at(memory.base, &[0, 0], &shapes);
    bad.addresses[1] = std::ptr::null_mut();
    let staging = rig.staging();
    assert!(rig.worker.run(bad.gather(0, staging)).is_err());
    let asked = fake.calls_of("cuMemGetAddressRange");
    rig.worker.run(good.gather(0, staging)).unwrap();
    assert!(fake.calls_of("cuMemGetAddressRange") > asked);
}

/// Goal: memory of another GPU is copied by the driver, never by a kernel, which would break the context.
#[test]
fn memory_of_another_device_is_not_touched_by_kernels() {
    for kind in [ALL[2], ALL[3]] {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 1 << 16);
        let memory = fake.alloc(1 << 16);
        fake.foreign(&memory);
        let bytes = pattern(1 << 16, 6);
        memory.write(&bytes);
        let offsets: Vec<_> = (0..16).rev().map(|at| at << 12).collect();
        let slices = Slices::at(memory.base, &offsets, &vec![SliceShape::contiguous(1 << 12); 16]);
        let staging = rig.staging();
        rig.worker.run(slices.gather(1, staging)).unwrap();
        let expected: Vec<u8> = bytes.chunks(1 << 12).rev().flatten().copied().collect();
        assert!(rig.arena().read() == expected);
    }
}

/// Goal: rows that lie further apart than a two-dimensional copy can say are copied one by one: K and V of
/// one large tensor.
#[test]
fn rows_far_apart_are_copied() {
    const APART: u64 = (2 << 30) + 4096;
    for &kind in ALL.iter().filter(|kind| kind.device == "cuda") {
        let fake = Fake::take(kind);
        let mut rig = Rig::new(&fake, 8192);
        let memory = fake.alloc(APART as usize + 4096);
        let shape = SliceShape { run_bytes: 4096, dimensions: vec![(2, APART)] };
        let (slices, bytes) = (Slices::at(memory.base, &[0], &[shape]), pattern(8192, 8));
        for direction in [Direction::Scatter, Direction::Gather] {
            rig.arena().write(if direction == Direction::Scatter { &bytes } else { &[0; 8192] });
            let staging = rig.staging();
            rig.worker.run(slices.job(direction, 1, staging)).unwrap();
        }
        assert!(rig.arena().read() == bytes, "{kind:?}");
    }
}

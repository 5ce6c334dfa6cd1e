//! Faults, on a simulated disk: what an engine or a drive may do wrong, and what a request must see of it.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::conformance::{Memory, PATIENCE, open_sim, slow};
use super::sim::{Call, Effect, Fault, Occasion, SimConfig};
use super::*;
use crate::error::{Error, ErrorKind};

/// Goal: an operation owns its file and its memory until its end, however long after the deadline of the
/// stop that comes. Sim asserts that the file is open then; the memory is freed by `done`.
#[test]
fn an_operation_owns_file_and_memory_until_its_end() {
    let bench = open_sim(SimConfig::default(), |_| ());
    bench.disk().inject(slow(Call::Write, Duration::from_millis(300)));
    let file = bench.create("segment");
    let mut memory = Memory::new(64 << 10);
    memory.fill(5);
    let expected = memory.bytes().to_vec();
    let slice = memory.all();
    let (sender, receiver) = channel();
    let done: Done = Box::new(move |result| {
        drop(memory); // The slot that the request owned.
        let _ = sender.send(result);
    });
    let (offset, class, expires) = (0, Class::Save, None);
    let operation = Operation::Write;
    bench.backend.submit(Request { operation, file, offset, memory: slice, class, expires, done });
    while bench.disk().calls(Call::Write) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(bench.backend.stop(Instant::now() + Duration::from_millis(20)), Drained::Leaked);
    assert!(receiver.try_recv().is_err(), "done is not called before the operation has ended");
    receiver.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(bench.disk().peek(Path::new("/store/segment")).unwrap(), expected);
    assert_eq!(bench.backend.stop(Instant::now() + PATIENCE), Drained::Yes);
    assert_eq!(bench.disk().usage().1, 0, "the file is closed");
}

/// Goal: of a batch that is larger than the queue, what finds no room ends with Busy through the same
/// `done`, on the caller's thread, and the rest is served.
#[test]
fn a_batch_too_large_ends_with_busy_on_the_same_path() {
    let bench = open_sim(SimConfig::default(), |config| {
        config.queue_depth = 8;
        config.depth = 1;
    });
    bench.disk().inject(slow(Call::Write, Duration::from_millis(20)));
    let file = bench.create("segment");
    let memory = Memory::new(4096);
    let (requests, ends): (Vec<_>, Vec<_>) = (0..40)
        .map(|index| bench.request(Operation::Write, &file, index * 8192, memory.all()))
        .unzip();
    bench.backend.submit_all(requests);
    let busy_at_once = ends.iter().filter(|end| matches!(end.try_recv(), Ok(Err(_)))).count();
    assert!(busy_at_once >= 40 - 8 - 2, "{busy_at_once} were refused by the time submit returned");
    let mut served = 0;
    let mut refused = busy_at_once;
    for end in ends {
        match end.recv_timeout(PATIENCE) {
            Ok(Ok(())) => served += 1,
            Ok(Err(error)) => {
                assert_eq!(error.kind(), ErrorKind::Busy);
                refused += 1;
            }
            Err(_) => {} // Taken above.
        }
    }
    assert_eq!(served + refused, 40);
    assert!(served >= 8);
}

/// Goal: a request whose deadline passes while it waits ends with Timeout, though nothing moves.
#[test]
fn a_stuck_engine_does_not_stop_deadlines() {
    let bench = open_sim(SimConfig::default(), |config| config.depth = 2);
    let stuck = Duration::from_millis(700);
    bench.disk().inject(slow(Call::Write, stuck));
    let file = bench.create("segment");
    let memory = Memory::new(4096);
    let started = Instant::now();
    let stuck_ends: Vec<_> = (0..2)
        .map(|index| {
            let (request, end) = bench.request(Operation::Write, &file, index * 8192, memory.all());
            bench.backend.submit(request);
            end
        })
        .collect();
    std::thread::sleep(Duration::from_millis(30));
    let (mut request, end) = bench.request(Operation::Read, &file, 0, memory.all());
    request.expires = Some(Instant::now() + Duration::from_millis(50));
    bench.backend.submit(request);
    let error = end.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(started.elapsed() < stuck, "it did not wait for the stuck ones");
    for end in stuck_ends {
        end.recv_timeout(PATIENCE).unwrap().unwrap();
    }
}

/// Goal: a bad sector fails the request that covers it, not those that were coalesced with it.
#[test]
fn a_bad_sector_fails_one_request_of_a_coalesced_operation() {
    let bench = open_sim(SimConfig::default(), |_| ());
    let file = bench.create("segment");
    let mut memory = Memory::new(64 << 10);
    memory.fill(9);
    bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap();
    bench.disk().inject(Fault {
        call: Call::Read,
        occasion: Occasion::Bytes("segment".into(), 20_000..20_001),
        effect: Effect::Errno(libc::EIO),
    });
    let (requests, ends): (Vec<_>, Vec<_>) = (0..4)
        .map(|index| {
            let start = index * (16 << 10);
            let piece = memory.slice(start..start + (16 << 10));
            bench.request(Operation::Read, &file, start as u64, piece)
        })
        .unzip();
    bench.backend.submit_all(requests);
    let results: Vec<_> = ends.iter().map(|end| end.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true, true]);
    assert_eq!(results[1].as_ref().unwrap_err().errno(), Some(libc::EIO));
    assert!(bench.backend.report().counters.coalesced > 0);
}

/// Goal: EAGAIN and EINTR from an operation are tried again, not reported; ENOSPC is reported.
#[test]
fn passing_refusals_are_tried_again() {
    let bench = open_sim(SimConfig::default(), |_| ());
    let file = bench.create("segment");
    let memory = Memory::new(4096);
    for (nth, errno) in [(1, libc::EAGAIN), (2, libc::EINTR), (3, libc::EBUSY), (5, libc::ENOSPC)] {
        let occasion = Occasion::Nth(nth);
        let effect = Effect::Errno(errno);
        bench.disk().inject(Fault { call: Call::Write, occasion, effect });
    }
    bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap();
    let error = bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(bench.backend.report().counters.retried, 3);
}

/// Goal: loads overtake saves that wait, and neither saves nor background starve under loads.
#[test]
fn loads_go_first_and_saves_do_not_starve() {
    let delay_max = Duration::from_micros(100);
    let disk = SimConfig { delay_max, ..SimConfig::default() };
    let bench = open_sim(disk, |config| {
        config.depth = 1;
        config.io_bytes = 4096;
    });
    let file = bench.create("segment");
    let memory = Memory::new(4096);
    bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap();
    bench.disk().inject(slow(Call::Write, Duration::from_millis(100)));
    let (blocker, blocked) = bench.request(Operation::Write, &file, 8192, memory.all());
    bench.backend.submit(blocker);
    while bench.disk().calls(Call::Write) < 2 {
        std::thread::yield_now();
    }
    bench.disk().heal();
    let (sender, order) = channel();
    let mut requests = Vec::new();
    for class in [Class::Background, Class::Save, Class::Load] {
        for _ in 0..100 {
            let sender = sender.clone();
            let (mut request, _) = bench.request(Operation::Read, &file, 0, memory.all());
            request.class = class;
            request.done = Box::new(move |_| _ = sender.send(class));
            requests.push(request);
        }
    }
    drop(sender);
    bench.backend.submit_all(requests);
    blocked.recv_timeout(PATIENCE).unwrap().unwrap();
    let order: Vec<Class> = order.iter().collect();
    assert_eq!(order.len(), 300);
    let among_first = |class| order[..100].iter().filter(|other| **other == class).count();
    assert!(among_first(Class::Load) >= 75, "{}", among_first(Class::Load));
    assert!((5..=15).contains(&among_first(Class::Save)), "{}", among_first(Class::Save));
    assert!((2..=10).contains(&among_first(Class::Background)));
}

/// Goal: errors say what failed, where, and what to do.
#[test]
fn errors_name_file_offset_and_remedy() {
    let bench = open_sim(SimConfig::default(), |_| ());
    let file = bench.create("segment");
    let memory = Memory::new(4096);
    let effect = Effect::Errno(libc::ENOSPC);
    bench.disk().inject(Fault { call: Call::Write, occasion: Occasion::Always, effect });
    let error: Error = bench.transfer(Operation::Write, &file, 8192, memory.all()).unwrap_err();
    let text = error.to_string();
    for part in ["write", "/store/segment", "byte 8192", "free some", "errno 28"] {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

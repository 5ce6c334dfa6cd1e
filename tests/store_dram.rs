//! The DRAM-only pipelines, tasks and their stages: what needs no storage.

mod common;

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use ucm::device::{CapturedEvent, CopyJob, CopyStream, Device, Finished, Marker, Staging, Wake};
use ucm::error::{Error, ErrorKind, Result};
use ucm::store::{Platform, Store};
use ucm::task::{Notify, Progress, Stage};

const BLOCK: usize = 64 << 10;

fn dram(extra: &[(&str, &str)]) -> Vec<(String, String)> {
    let base = [
        ("store_pipeline", "Cache|Empty"),
        ("cache_buffer_capacity_gb", "0.01"),
        ("block_size", "65536"),
    ];
    base.iter().chain(extra).map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

fn open_dram(extra: &[(&str, &str)]) -> Arc<Store> {
    let pairs = dram(extra);
    let pairs: Vec<_> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    open(&pairs)
}

/// Goal: what was saved is found and loaded, byte for byte, and what was not is NOT_FOUND.
#[test]
fn saves_and_loads_through_dram() {
    let store = open_dram(&[]);
    save_blocks(&store, &[1, 2, 3], BLOCK);
    let mut found = [9; 4];
    store.lookup(&[id(1), id(9), id(3), id(2)], &mut found).unwrap();
    assert_eq!(found, [1, 0, 1, 1]);
    assert_eq!(store.lookup_prefix(&[id(3), id(2), id(8), id(1)]).unwrap(), 2);
    assert_eq!(load_blocks(&store, &[3, 7, 1], BLOCK), [(7, ErrorKind::NotFound)]);
}

/// Goal: an evicted block of a DRAM-only pipeline is a miss, never another block's bytes.
#[test]
fn an_evicted_block_in_a_dram_only_pipeline_is_a_miss() {
    let store = open_dram(&[]);
    let numbers: Vec<u64> = (0..600).collect();
    for chunk in numbers.chunks(50) {
        save_blocks(&store, chunk, BLOCK);
    }
    let failed = load_blocks(&store, &numbers, BLOCK);
    assert!(failed.len() > 400 && failed.len() < 600, "{}", failed.len());
    assert!(failed.iter().all(|(_, kind)| *kind == ErrorKind::NotFound));
    for (number, _) in failed {
        let mut found = [1];
        store.lookup(&[id(number)], &mut found).unwrap();
        assert_eq!(found, [0]);
    }
}

/// Goal: layer-wise shards in any order, in different tasks, from different threads, make one whole block.
#[test]
fn shards_in_any_order_from_any_thread_make_a_block() {
    let store = open_dram(&[("shard_size", "8192"), ("tensor_size", "4096")]);
    let shards = BLOCK / 8192;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                for shard in (0..shards).rev().filter(|shard| shard % 4 == thread) {
                    let mut pages = Pages::new(1, 8192);
                    pages.fill(0, 77, shard * 8192);
                    let addresses = [pages.address(0, 0), pages.address(0, 4096)];
                    let task = save(store, &[id(77)], Some(&[shard as u32]), &addresses).unwrap();
                    done(&task, Stage::Copied);
                    pages.clear();
                }
            });
        }
    });
    let mut pages = Pages::new(shards, 8192);
    let addresses: Vec<_> = (0..shards)
        .flat_map(|shard| [pages.address(shard, 0), pages.address(shard, 4096)])
        .collect();
    let indexes: Vec<u32> = (0..shards as u32).collect();
    let task = load(&store, &vec![id(77); shards], Some(&indexes), &addresses).unwrap();
    done(&task, Stage::Loaded);
    for shard in 0..shards {
        assert_eq!(pages.wrong(shard, 77, shard * 8192), None, "shard {shard}");
    }
}

/// Goal: the sink takes saves and keeps nothing.
#[test]
fn the_sink_keeps_nothing() {
    let pairs = [
        ("store_pipeline", "Empty"),
        ("cache_buffer_capacity_gb", "0.01"),
        ("block_size", "65536"),
    ];
    let store = open(&pairs);
    save_blocks(&store, &[1, 2], BLOCK);
    assert_eq!(store.lookup_prefix(&[id(1)]).unwrap(), 0);
    assert_eq!(load_blocks(&store, &[1], BLOCK), [(1, ErrorKind::NotFound)]);
}

/// A host device whose copies take a while, in the background, like a real device's.
#[derive(Clone, Default)]
struct Slow {
    delay: Duration,
    copies: Arc<AtomicUsize>,
    /// While it is held, the device takes no copies.
    gate: Arc<Mutex<()>>,
    /// Told when copies come to the gate.
    at_gate: Option<Sender<usize>>,
}

struct SlowStream {
    gate: Arc<Mutex<()>>,
    at_gate: Option<Sender<usize>>,
    jobs: std::sync::mpsc::Sender<(u64, Work)>,
    finished: std::sync::mpsc::Receiver<u64>,
}

type Work = Box<dyn FnOnce() + Send>;

impl Device for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }
    unsafe fn capture_event(&self, _event: *mut c_void) -> Result<CapturedEvent> {
        Ok(Arc::new(()))
    }
    unsafe fn pin(&self, _base: *mut u8, _length: usize) -> Result<()> {
        Ok(())
    }
    fn unpin(&self, _base: *mut u8) {}
    fn open_stream(&self, wake: Wake) -> Result<Box<dyn CopyStream>> {
        let (jobs, queue) = std::sync::mpsc::channel::<(u64, Work)>();
        let (done, finished) = std::sync::mpsc::channel();
        let (delay, copies) = (self.delay, Arc::clone(&self.copies));
        std::thread::spawn(move || {
            for (ticket, work) in queue {
                std::thread::sleep(delay);
                work();
                copies.fetch_add(1, Ordering::Relaxed);
                let _ = done.send(ticket);
                wake();
            }
        });
        let (gate, at_gate) = (Arc::clone(&self.gate), self.at_gate.clone());
        Ok(Box::new(SlowStream { gate, at_gate, jobs, finished }))
    }
    unsafe fn stream_wait(&self, _stream: *mut c_void, _markers: &[Marker]) -> Result<()> {
        Ok(())
    }
}

impl CopyStream for SlowStream {
    unsafe fn enqueue(&mut self, jobs: &[CopyJob<'_>]) -> Option<Marker> {
        if let Some(at_gate) = &self.at_gate {
            let _ = at_gate.send(jobs.len());
        }
        drop(self.gate.lock().unwrap());
        for job in jobs {
            struct Sendable(Vec<*mut c_void>, *mut u8);
            // SAFETY: the addresses are used by one thread at a time, while the job is in flight.
            unsafe impl Send for Sendable {}
            let memory = Sendable(job.addresses.to_vec(), job.staging);
            let (slices, direction) = (job.slices.to_vec(), job.direction);
            let work = Box::new(move || {
                let Sendable(addresses, mut staging) = { memory };
                for (address, shape) in addresses.iter().zip(&slices) {
                    // SAFETY: the contract of `enqueue`.
                    unsafe {
                        ucm::device::host::copy_slice(direction, address.cast(), staging, shape);
                        staging = staging.add(shape.bytes() as usize);
                    }
                }
            });
            self.jobs.send((job.ticket, work)).unwrap();
        }
        None
    }
    fn poll(&mut self, finished: &mut Vec<Finished>) {
        finished.extend(self.finished.try_iter().map(|ticket| Finished {
            ticket,
            result: Ok(()),
            staging: Staging::Free,
        }));
    }
}

/// A device that opens one stream and no more, and counts what is pinned on it.
#[derive(Default)]
struct Stingy {
    streams: AtomicUsize,
    pins: AtomicUsize,
    unpins: AtomicUsize,
}

impl Device for Stingy {
    fn name(&self) -> &'static str {
        "stingy"
    }
    unsafe fn capture_event(&self, _event: *mut c_void) -> Result<CapturedEvent> {
        Ok(Arc::new(()))
    }
    unsafe fn pin(&self, _base: *mut u8, _length: usize) -> Result<()> {
        self.pins.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn unpin(&self, _base: *mut u8) {
        self.unpins.fetch_add(1, Ordering::Relaxed);
    }
    fn open_stream(&self, wake: Wake) -> Result<Box<dyn CopyStream>> {
        match self.streams.fetch_add(1, Ordering::Relaxed) {
            0 => ucm::device::host::Host.open_stream(wake),
            _ => Err(Error::new(ErrorKind::Device, "no more streams")),
        }
    }
    unsafe fn stream_wait(&self, _stream: *mut c_void, _markers: &[Marker]) -> Result<()> {
        Ok(())
    }
}

/// Goal: an open that fails half-way gives everything back: threads, pinned pages, arena.
#[test]
fn an_open_that_fails_half_way_leaves_nothing_behind() {
    let pairs = dram(&[("stream_number", "3")]);
    let pairs: Vec<_> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let config = options(&pairs).build().unwrap();
    let device = Arc::new(Stingy::default());
    let platform = Platform { device: Some(device.clone()), ..Platform::default() };
    let error = Store::open_on(config, platform).err().expect("the second stream is refused");
    assert_eq!(error.kind(), ErrorKind::Device);
    assert_eq!(device.pins.load(Ordering::Relaxed), 1);
    assert_eq!(device.unpins.load(Ordering::Relaxed), 1);
    assert_eq!(Arc::strong_count(&device), 1, "a worker holds the engine, and so its arena");
}

/// A store on a slow device, and how many copies the device has made.
fn open_slow(delay: Duration, extra: &[(&str, &str)]) -> (Arc<Store>, Arc<AtomicUsize>) {
    let device = Slow { delay, ..Slow::default() };
    let copies = Arc::clone(&device.copies);
    (open_on(device, extra), copies)
}

fn open_on(device: Slow, extra: &[(&str, &str)]) -> Arc<Store> {
    let pairs = dram(extra);
    let pairs: Vec<_> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let config = options(&pairs).build().unwrap();
    let platform = Platform { device: Some(Arc::new(device)), ..Platform::default() };
    Store::open_on(config, platform).unwrap()
}

/// Goal: a deadline ends the wait, not the copy: RELEASED comes when the device is done, and nothing is
/// written after it.
#[test]
fn a_slow_device_writes_nothing_after_released() {
    let (store, _) = open_slow(Duration::from_millis(300), &[("stream_number", "1")]);
    save_blocks_anywhere(&store, &[5, 6], BLOCK);
    let mut pages = Pages::new(2, BLOCK);
    let addresses = [pages.address(0, 0), pages.address(1, 0)];
    let ids = [id(5), id(6)];
    let mut late = batch(&ids, None, &addresses);
    late.timeout_ms = 100;
    // SAFETY: the memory outlives the wait for RELEASED.
    let task = unsafe { store.load(&late) }.unwrap();
    assert_eq!(failure(&task, Stage::Loaded), ErrorKind::Timeout);
    assert!(matches!(task.poll(Stage::Released), Progress::Pending), "the device is still at it");
    done(&task, Stage::Released);
    pages.clear();
    std::thread::sleep(Duration::from_millis(700));
    assert!(pages.page(0).iter().chain(&[0xEE]).all(|byte| *byte == 0xEE));
    assert!(pages.page(1).iter().all(|byte| *byte == 0xEE));
}

/// Goal: cancel stops what has not begun, and waits for nothing.
#[test]
fn cancel_stops_what_has_not_begun() {
    let (at_gate, came) = std::sync::mpsc::channel();
    let device = Slow { at_gate: Some(at_gate), ..Slow::default() };
    let store = open_on(device.clone(), &[("stream_number", "1")]);
    let mut pages = Pages::new(21, BLOCK);
    let addresses: Vec<_> = (0..21).map(|index| pages.address(index, 0)).collect();
    let ids: Vec<_> = (0..21).map(id).collect();
    // The only worker is stuck with another task's copy, so that none of this task can begin.
    let closed = device.gate.lock().unwrap();
    let other = save(&store, &ids[20..], None, &addresses[20..]).unwrap();
    assert_eq!(came.recv().unwrap(), 1);
    let task = save(&store, &ids[..20], None, &addresses[..20]).unwrap();
    task.cancel();
    assert_eq!(failure(&task, Stage::Persisted), ErrorKind::Cancelled);
    done(&task, Stage::Released);
    drop(closed);
    done(&other, Stage::Persisted);
    assert_eq!(store.lookup_prefix(&[id(20)]).unwrap(), 1);
    assert_eq!(device.copies.load(Ordering::Relaxed), 1, "what had not begun was stopped");
    assert_eq!(store.lookup_prefix(&[id(19)]).unwrap(), 0);
}

/// Goal: close with copies in flight finishes what has begun and answers CLOSED afterwards.
#[test]
fn close_with_work_in_flight_returns_and_closes_tasks() {
    let (store, _) = open_slow(Duration::from_millis(30), &[("timeout_ms", "2000")]);
    let mut pages = Pages::new(8, BLOCK);
    let addresses: Vec<_> = (0..8).map(|index| pages.address(index, 0)).collect();
    let ids: Vec<_> = (0..8).map(id).collect();
    let task = save(&store, &ids, None, &addresses).unwrap();
    let closer = Arc::clone(&store);
    let begun = Instant::now();
    std::thread::spawn(move || closer.close()).join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert!(
        matches!(task.poll(Stage::Persisted), Progress::Failed(error) if error.kind() == ErrorKind::Closed)
    );
    assert!(matches!(store.lookup_prefix(&ids), Err(error) if error.kind() == ErrorKind::Closed));
}

/// Goal: close also wakes those who wait without a limit for a stage that will not come: the device hangs, so
/// RELEASED is out of reach, and the task answers CLOSED.
#[test]
fn close_wakes_who_waits_for_released_behind_a_device_that_hangs() {
    let hung = Duration::from_secs(3600);
    let (store, _) = open_slow(hung, &[("timeout_ms", "300"), ("stream_number", "1")]);
    let mut pages = Pages::new(1, BLOCK);
    let task = save(&store, &[id(1)], None, &[pages.address(0, 0)]).unwrap();
    assert_eq!(failure(&task, Stage::Persisted), ErrorKind::Timeout);
    let (told, answer) = std::sync::mpsc::channel();
    let waiting = Arc::clone(&task);
    std::thread::spawn(move || told.send(waiting.wait(Stage::Released, None)));
    // The waiter is asleep by the time that close has waited for the device in vain.
    std::thread::spawn(move || store.close());
    let answer = answer.recv_timeout(Duration::from_secs(60)).expect("the waiter was never woken");
    assert!(matches!(answer, Progress::Failed(error) if error.kind() == ErrorKind::Closed));
    // The device has the addresses for ever.
    std::mem::forget(pages);
}

/// Goal: completions come through the descriptor, each once, and freed tasks leave the queue.
#[test]
fn completions_come_through_the_descriptor() {
    let store = open_dram(&[]);
    let mut pages = Pages::new(2, BLOCK);
    let addresses = [pages.address(0, 0), pages.address(1, 0)];
    let ids = [id(1), id(2)];
    let mut noted = batch(&ids, None, &addresses);
    (noted.notify, noted.user_data, noted.tag) = (Notify { last: true, copied: true }, 42, 7);
    // SAFETY: the memory outlives the wait.
    let task = unsafe { store.save(&noted) }.unwrap();
    done(&task, Stage::Persisted);
    let mut poll =
        libc::pollfd { fd: store.completion_fd().unwrap(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 5000) }, 1);
    let reaped = store.reap(10).unwrap();
    let stages: Vec<_> =
        reaped.iter().map(|it| (it.tag, it.user_data, it.stage, it.result.is_ok())).collect();
    assert_eq!(stages, [(7, 42, Stage::Copied, true), (7, 42, Stage::Persisted, true)]);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 0, "drained");
    // SAFETY: the memory outlives the wait.
    let task = unsafe { store.load(&noted) }.unwrap();
    done(&task, Stage::Released);
    task.release_handle();
    assert!(store.reap(10).unwrap().is_empty());
}

/// Goal: bad batches get a status and a sentence that names the field, and make no task.
#[test]
fn bad_batches_are_refused_by_name() {
    let store = open_dram(&[("shard_size", "8192")]);
    let mut pages = Pages::new(1, BLOCK);
    let address = pages.address(0, 0);
    let refused = |blocks: &[_], shards: Option<&[u32]>, addresses: &[_]| {
        let error = save(&store, blocks, shards, addresses).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        error.to_string()
    };
    assert!(refused(&[], None, &[]).contains("count"));
    assert!(refused(&[id(1)], Some(&[8]), &[address]).contains("shards[0]"));
    assert!(refused(&[id(1)], None, &[]).contains("addresses"));
    assert!(
        refused(&[id(1), id(2)], None, &[address, std::ptr::null_mut()]).contains("addresses[1]")
    );
    assert_eq!(store.stats().unwrap().tasks, 0);
}

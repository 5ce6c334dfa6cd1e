//! Defects that were reproduced in other stores of this kind. Each has a test here that is named after it;
//! those of the connector (poisoned stores, 5-D layouts, keys) are in `python/tests`.

mod common;

use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use tempfile::TempDir;
use ucm::device::host::copy_slice;
use ucm::device::{CapturedEvent, CopyJob, CopyStream, Device, Finished, Marker, Staging, Wake};
use ucm::error::{Error, ErrorKind, Result};
use ucm::io::backend::BackendConfig;
use ucm::io::sim::{Call, Effect, Fault, Occasion, SimConfig, SimDisk};
use ucm::store::{Platform, Store};
use ucm::task::{Progress, Stage};

const BLOCK: usize = 64 << 10;
const LAYERS: usize = 8;
const LAYER: usize = BLOCK / LAYERS;

/// What a lookup says of a block after a refresh.
fn is_present_now(store: &Store, number: u64) -> bool {
    store.refresh(None).unwrap();
    is_present(store, number)
}

/// A store on a simulated disk.
fn store_on(disk: &Arc<SimDisk>, extra: &[(&str, &str)]) -> Arc<Store> {
    let config = options(&pairs_in("/sim", extra)).build().unwrap();
    let backend = disk.backend(Path::new("/sim"), &BackendConfig::default());
    Store::open_on(config, Platform { backends: Some(vec![backend]), ..Platform::default() })
        .unwrap()
}

fn save_layer(store: &Store, number: u64, layer: usize) -> Arc<ucm::task::Task> {
    let mut pages = Pages::new(1, LAYER);
    pages.fill(0, number, layer * LAYER);
    let address = [pages.address(0, 0)];
    let task = save(store, &[id(number)], Some(&[layer as u32]), &address).unwrap();
    let _ = task.wait(Stage::Copied, WAIT);
    done(&task, Stage::Released);
    task
}

/// Goal: a block whose last-numbered layer came first is not there until all layers are.
#[test]
fn a_block_is_published_when_the_last_numbered_layer_is_written() {
    let directory = TempDir::new().unwrap();
    let store = store_in(directory.path(), &[("shard_size", "8192")]);
    let reader = store_in(directory.path(), &[]);
    let mut tasks = Vec::new();
    for layer in (0..LAYERS).rev() {
        assert!(!is_present_now(&store, 1) && !is_present_now(&reader, 1), "before layer {layer}");
        assert_eq!(load_blocks(&reader, &[1], BLOCK), [(1, ErrorKind::NotFound)]);
        tasks.push(save_layer(&store, 1, layer));
    }
    tasks.iter().for_each(|task| done(task, Stage::Persisted));
    assert!(is_present_now(&reader, 1));
    assert_eq!(load_blocks(&reader, &[1], BLOCK), []);
}

/// A host device whose copy number `fails` fails.
struct Failing {
    fails: usize,
    copies: Arc<AtomicUsize>,
}

struct FailingStream {
    fails: usize,
    copies: Arc<AtomicUsize>,
    finished: Vec<Finished>,
}

impl Device for Failing {
    fn name(&self) -> &'static str {
        "failing"
    }
    unsafe fn capture_event(&self, _event: *mut c_void) -> Result<CapturedEvent> {
        Ok(Arc::new(()))
    }
    unsafe fn pin(&self, _base: *mut u8, _length: usize) -> Result<()> {
        Ok(())
    }
    fn unpin(&self, _base: *mut u8) {}
    fn open_stream(&self, _wake: Wake) -> Result<Box<dyn CopyStream>> {
        let (fails, copies) = (self.fails, Arc::clone(&self.copies));
        Ok(Box::new(FailingStream { fails, copies, finished: Vec::new() }))
    }
    unsafe fn stream_wait(&self, _stream: *mut c_void, _markers: &[Marker]) -> Result<()> {
        Ok(())
    }
}

impl CopyStream for FailingStream {
    unsafe fn enqueue(&mut self, jobs: &[CopyJob<'_>]) -> Option<Marker> {
        for job in jobs {
            let failed = self.copies.fetch_add(1, Ordering::Relaxed) == self.fails;
            let result =
                if failed { Err(Error::new(ErrorKind::Device, "injected")) } else { Ok(()) };
            if result.is_ok() {
                // SAFETY: the contract of `enqueue`; one slice a shard here.
                unsafe {
                    copy_slice(job.direction, job.addresses[0].cast(), job.staging, &job.slices[0])
                };
            }
            self.finished.push(Finished { ticket: job.ticket, result, staging: Staging::Free });
        }
        None
    }
    fn poll(&mut self, finished: &mut Vec<Finished>) {
        finished.append(&mut self.finished);
    }
}

/// Goal: whichever layer's copy fails, the block is not published and every layer's save says so.
#[test]
fn an_earlier_layer_fails_and_the_last_one_publishes_the_block() {
    for fails in 0..LAYERS {
        let directory = TempDir::new().unwrap();
        let text = directory.path().to_str().unwrap().to_owned();
        let config = options(&pairs_in(&text, &[("shard_size", "8192")])).build().unwrap();
        let device = Arc::new(Failing { fails, copies: Arc::default() });
        let platform = Platform { device: Some(device), ..Platform::default() };
        let store = Store::open_on(config, platform).unwrap();
        let tasks: Vec<_> = (0..LAYERS).map(|layer| save_layer(&store, 1, layer)).collect();
        for task in &tasks {
            assert_eq!(failure(task, Stage::Persisted), ErrorKind::Device);
        }
        assert!(!is_present_now(&store, 1));
        let again: Vec<_> = (0..LAYERS).map(|layer| save_layer(&store, 1, layer)).collect();
        again.iter().for_each(|task| done(task, Stage::Persisted));
        assert_eq!(load_blocks(&store_in(directory.path(), &[]), &[1], BLOCK), []);
    }
}

/// Goal: writers that save the same blocks at the same time harm nobody.
#[test]
fn two_writers_save_the_same_block() {
    let directory = TempDir::new().unwrap();
    let numbers: Vec<u64> = (0..50).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| save_blocks(&store_in(directory.path(), &[]), &numbers, BLOCK));
        }
    });
    assert_eq!(load_blocks(&store_in(directory.path(), &[]), &numbers, BLOCK), []);
}

/// Goal: short transfers are continued, and a file that ends early is a miss.
#[test]
fn a_short_read_counts_as_success() {
    let disk = SimDisk::new(SimConfig { seed: 7, short: Some(2), ..SimConfig::default() });
    let store = store_on(&disk, &[("store_pipeline", "Posix")]);
    let numbers: Vec<u64> = (0..40).collect();
    save_blocks(&store, &numbers, BLOCK);
    assert_eq!(load_blocks(&store, &numbers, BLOCK), []);
    let directory = TempDir::new().unwrap();
    let store = store_in(directory.path(), &[("store_pipeline", "Posix")]);
    save_blocks(&store, &numbers, BLOCK);
    for segment in files(directory.path(), "segments") {
        std::fs::OpenOptions::new().write(true).open(segment).unwrap().set_len(100_000).unwrap();
    }
    assert!(load_blocks(&store, &numbers, BLOCK).len() >= 39);
}

/// Goal: when the disk refuses the write the save says so, and no lookup ever answers yes.
#[test]
fn a_save_whose_disk_write_fails_reports_ok() {
    for errno in [libc::EIO, libc::ENOSPC] {
        let disk = SimDisk::new(SimConfig::default());
        let store = store_on(&disk, &[]);
        save_blocks(&store, &[1], BLOCK);
        disk.inject(Fault {
            call: Call::Write,
            occasion: Occasion::Always,
            effect: Effect::Errno(errno),
        });
        let mut pages = Pages::new(1, BLOCK);
        pages.fill(0, 2, 0);
        let address = [pages.address(0, 0)];
        let task = save(&store, &[id(2)], None, &address).unwrap();
        let expected = if errno == libc::EIO { ErrorKind::Io } else { ErrorKind::NoSpace };
        assert_eq!(failure(&task, Stage::Persisted), expected);
        assert!(!is_present_now(&store, 2));
        assert_eq!(load_blocks(&store, &[2], BLOCK), [(2, ErrorKind::NotFound)]);
        disk.heal();
        assert!(is_present_now(&store, 1));
        assert_eq!(load_blocks(&store, &[1], BLOCK), []);
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until {
            let task = save(&store, &[id(2)], None, &address).unwrap();
            if matches!(task.wait(Stage::Persisted, WAIT), Progress::Done) {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(load_blocks(&store, &[2], BLOCK), [], "a healed disk takes saves again");
    }
}

/// Goal: after a load failed for good, lookup no longer says yes.
#[test]
fn a_failed_load_leaves_a_lookup_that_says_yes() {
    let directory = TempDir::new().unwrap();
    save_blocks(&store_in(directory.path(), &[]), &[1, 2], BLOCK);
    let reader = store_in(directory.path(), &[]);
    assert!(is_present_now(&reader, 1));
    for segment in files(directory.path(), "segments") {
        std::fs::remove_file(segment).unwrap();
    }
    assert_eq!(load_blocks(&reader, &[1, 2], BLOCK).len(), 2);
    assert!(!is_present_now(&reader, 1) && !is_present_now(&reader, 2));
}

/// Goal: lookup answers for each block, also behind one that is missing.
#[test]
fn lookup_returns_the_contiguous_prefix_only() {
    let directory = TempDir::new().unwrap();
    let store = store_in(directory.path(), &[]);
    save_blocks(&store, &[0, 1, 4], BLOCK);
    let ids: Vec<_> = (0..6).map(id).collect();
    let mut found = [9; 6];
    store.lookup(&ids, &mut found).unwrap();
    assert_eq!(found, [1, 1, 0, 0, 1, 0]);
    assert_eq!(store.lookup_prefix(&ids).unwrap(), 2);
}

/// Goal: a block one of whose parts is gone is not present, for whichever store one asks.
#[test]
fn lookup_sees_rank_0_only() {
    let directory = TempDir::new().unwrap();
    let rank = |part| store_in(directory.path(), &[("part_count", "2"), ("part_index", part)]);
    save_blocks(&rank("0"), &[1], BLOCK);
    for path in [rank("0"), store_in(directory.path(), &[("part_count", "2"), ("device_id", "-1")])]
    {
        assert!(!is_present_now(&path, 1));
    }
    save_blocks(&rank("1"), &[1], BLOCK);
    assert!(is_present_now(&rank("0"), 1) && is_present_now(&rank("1"), 1));
}

/// Goal: content that is named by other words has other ids and another namespace.
#[test]
fn the_hash_leaves_out_what_decides_content() {
    let directory = TempDir::new().unwrap();
    let store = store_in(directory.path(), &[]);
    let tokens: Vec<u32> = (0..256).collect();
    let ids = |extra: &[u8], parent: Option<&ucm::block::BlockId>| {
        let mut ids = [ucm::block::BlockId::default(); 2];
        assert_eq!(store.hash_tokens(&tokens, 128, parent, extra, &mut ids).unwrap(), 2);
        ids
    };
    let all = [ids(b"", None), ids(b"lora-a", None), ids(b"lora-b", None), ids(b"", Some(&id(1)))];
    for (one, ids) in all.iter().enumerate() {
        assert_ne!(ids[0], ids[1]);
        assert!(all.iter().skip(one + 1).all(|other| other[0] != ids[0] && other[1] != ids[1]));
    }
    let other = store_in(directory.path(), &[("dtype", "fp8_e4m3")]);
    let mut elsewhere = [ucm::block::BlockId::default(); 2];
    other.hash_tokens(&tokens, 128, None, b"", &mut elsewhere).unwrap();
    assert_ne!(elsewhere[0], all[0][0]);
}

fn thread_count() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn cpu_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage fills the struct.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Goal: an idle store has a handful of threads and uses no CPU. Runs as a child, alone in its process.
#[test]
fn an_idle_store_has_307_threads_and_burns_a_core() {
    if common::on_a_device() {
        return; // A pretended device's streams are threads of this process.
    }
    if std::env::var_os("UCM_TEST_ALONE").is_none() {
        let name = "an_idle_store_has_307_threads_and_burns_a_core";
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads", "1"])
            .env("UCM_TEST_ALONE", "1")
            .status();
        assert!(child.unwrap().success());
        return;
    }
    let directory = TempDir::new().unwrap();
    let threads = thread_count();
    let store = store_in(directory.path(), &[]);
    save_blocks(&store, &[1, 2, 3], BLOCK);
    load_blocks(&store, &[1, 2, 3], BLOCK);
    std::thread::sleep(Duration::from_millis(500));
    let (before, begun) = (cpu_time(), Instant::now());
    std::thread::sleep(Duration::from_secs(5));
    let (cpu, wall) = (cpu_time() - before, begun.elapsed());
    let more = thread_count() - threads;
    println!("idle: {more} threads, {cpu:?} of CPU in {wall:?}");
    assert!(more <= 8, "{more} threads");
    assert!(cpu < wall / 1000, "{cpu:?} of CPU in {wall:?}: more than 0.1 % of a core");
}

/// Goal: nobody else can read what the store writes, on storage or in shared memory.
#[test]
fn files_and_shared_memory_are_readable_by_everyone() {
    use std::os::unix::fs::PermissionsExt;
    let parent = TempDir::new().unwrap();
    let directory = parent.path().join("kv");
    let store = store_in(&directory, &[]);
    save_blocks(&store, &[1], BLOCK);
    let shared = std::fs::read_dir("/dev/shm").unwrap().flatten().map(|entry| entry.path());
    let shared = shared.filter(|path| path.to_str().unwrap().contains("ucm"));
    for path in files(&directory, "").into_iter().chain(shared).chain([directory.clone()]) {
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        assert_eq!(metadata.permissions().mode() & 0o077, 0, "{}", path.display());
    }
}

/// A load whose bytes come long after its deadline; returns the memory it was for, after the disk is done.
fn load_from_a_slow_disk(registered: bool) {
    if registered && common::on_a_device() {
        return; // Memory of a device cannot be registered.
    }
    let disk = SimDisk::new(SimConfig::default());
    let store = store_on(&disk, &[("store_pipeline", "Posix")]);
    save_blocks(&store, &[1], BLOCK);
    let mut pages = Pages::new(1, BLOCK);
    let (base, length) = (pages.base(), pages.length());
    if registered {
        // SAFETY: the pages outlive the registration.
        unsafe { store.register_memory(base.cast(), length) }.unwrap();
    }
    let delay = Duration::from_millis(600);
    disk.inject(Fault {
        call: Call::Read,
        occasion: Occasion::Always,
        effect: Effect::Delay(delay),
    });
    let (ids, addresses) = ([id(1)], [pages.address(0, 0)]);
    let mut late = batch(&ids, None, &addresses);
    late.timeout_ms = 100;
    // SAFETY: the pages outlive the wait for RELEASED.
    let task = unsafe { store.load(&late) }.unwrap();
    assert_eq!(failure(&task, Stage::Loaded), ErrorKind::Timeout);
    if registered {
        assert!(
            matches!(task.poll(Stage::Released), Progress::Pending),
            "the drive writes there yet"
        );
        let busy = store.unregister_memory(base.cast()).unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy, "memory under a read stays registered");
    }
    done(&task, Stage::Released);
    pages.clear();
    std::thread::sleep(2 * delay);
    assert!(pages.page(0).iter().all(|byte| *byte == 0xEE), "bytes landed after RELEASED");
    if registered {
        store.unregister_memory(base.cast()).unwrap();
    }
    disk.heal();
    assert_eq!(load_blocks(&store, &[1], BLOCK), [], "what was slow is still there");
}

/// Goal: a disk that answers long after the deadline writes nothing into memory that was given back,
/// staged through the arena or not.
#[test]
fn a_slow_disk_writes_into_memory_that_was_given_back() {
    load_from_a_slow_disk(false);
    load_from_a_slow_disk(true);
}

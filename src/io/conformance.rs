//! What every engine must do, run for io_uring, psync and sim alike through a `Backend`.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::sim::{Call, Effect, Fault, Occasion, SimConfig, SimDisk};
use super::*;
use crate::error::ErrorKind;

/// Page-aligned memory for tests.
pub(super) struct Memory {
    pointer: *mut u8,
    length: usize,
}

// SAFETY: an allocation that nothing is bound to a thread by.
unsafe impl Send for Memory {}

impl Memory {
    pub(super) fn new(length: usize) -> Self {
        // SAFETY: the layout is valid and not empty.
        let pointer = unsafe { std::alloc::alloc_zeroed(Self::layout(length)) };
        Self { pointer, length }
    }

    fn layout(length: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(length, 4096).unwrap()
    }

    pub(super) fn slice(&self, range: std::ops::Range<usize>) -> DmaSlice {
        assert!(range.end <= self.length);
        DmaSlice { pointer: self.pointer.wrapping_add(range.start), length: range.len() }
    }

    pub(super) fn all(&self) -> DmaSlice {
        self.slice(0..self.length)
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: tests look only while no transfer is in flight.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.length) }
    }

    /// Fills with bytes that differ from page to page.
    pub(super) fn fill(&mut self, seed: u64) {
        let mut state = seed | 1;
        for word in self.bytes().chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { std::alloc::dealloc(self.pointer, Self::layout(self.length)) };
    }
}

/// A backend to test, and what keeps its directory.
pub(super) struct Bench {
    pub(super) backend: Arc<Backend>,
    directory: Directory,
}

enum Directory {
    Real { _kept: tempfile::TempDir },
    Sim(Arc<SimDisk>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Uring,
    Psync,
    Sim,
}

pub(super) const KINDS: [Kind; 3] = [Kind::Uring, Kind::Psync, Kind::Sim];

/// Longer than anything takes, on a loaded machine too.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn open(kind: Kind, change: impl FnOnce(&mut BackendConfig)) -> Bench {
    let engine = match kind {
        Kind::Uring => IoEngine::IoUring,
        Kind::Psync => IoEngine::Psync,
        Kind::Sim => {
            let delay_max = Duration::from_micros(300);
            let disk = SimConfig { seed: 11, delay_max, short: Some(3), ..SimConfig::default() };
            return open_sim(disk, change);
        }
    };
    let directory = tempfile::tempdir().unwrap();
    let mut config = BackendConfig { engine, ..BackendConfig::default() };
    change(&mut config);
    let backend = Backend::open(directory.path(), &config, Instant::now() + PATIENCE).unwrap();
    Bench { backend, directory: Directory::Real { _kept: directory } }
}

pub(super) fn open_sim(disk: SimConfig, change: impl FnOnce(&mut BackendConfig)) -> Bench {
    let mut config = BackendConfig::default();
    change(&mut config);
    let disk = SimDisk::new(disk);
    let backend = disk.backend(Path::new("/store"), &config);
    Bench { backend, directory: Directory::Sim(disk) }
}

pub(super) fn slow(call: Call, delay: Duration) -> Fault {
    Fault { call, occasion: Occasion::Always, effect: Effect::Delay(delay) }
}

impl Bench {
    pub(super) fn disk(&self) -> &SimDisk {
        match &self.directory {
            Directory::Sim(disk) => disk,
            Directory::Real { .. } => panic!("not a simulated disk"),
        }
    }

    pub(super) fn create(&self, name: &str) -> File {
        let how = OpenHow {
            access: Access::ReadWrite,
            create: Create::New,
            direct: self.backend.is_direct(),
        };
        self.backend.files().open(&self.backend.directory().join(name), how).unwrap()
    }

    pub(super) fn request(
        &self,
        operation: Operation,
        file: &File,
        offset: u64,
        memory: DmaSlice,
    ) -> (Request, Receiver<Result<()>>) {
        let (sender, receiver) = channel();
        let done: Done = Box::new(move |result| _ = sender.send(result));
        let request = Request {
            operation,
            file: file.clone(),
            offset,
            memory,
            class: if operation == Operation::Read { Class::Load } else { Class::Save },
            expires: None,
            done,
        };
        (request, receiver)
    }

    pub(super) fn transfer(
        &self,
        operation: Operation,
        file: &File,
        offset: u64,
        memory: DmaSlice,
    ) -> Result<()> {
        let (request, end) = self.request(operation, file, offset, memory);
        self.backend.submit(request);
        end.recv_timeout(PATIENCE).expect("done is called")
    }
}

/// Goal: bytes written through an engine come back, whole, in pieces, coalesced and split.
#[test]
fn bytes_come_back() {
    for engine in KINDS {
        let bench = open(engine, |config| config.io_bytes = 256 << 10);
        let file = bench.create("segment");
        let mut memory = Memory::new(4 << 20);
        memory.fill(7);
        let expected = memory.bytes().to_vec();
        bench.transfer(Operation::Write, &file, 8192, memory.all()).unwrap();
        memory.bytes().fill(0);
        let mut ends = Vec::new();
        let mut requests = Vec::new();
        for start in (0..4 << 20).step_by(64 << 10) {
            let piece = memory.slice(start..start + (64 << 10));
            let (request, end) = bench.request(Operation::Read, &file, 8192 + start as u64, piece);
            requests.push(request);
            ends.push(end);
        }
        bench.backend.submit_all(requests);
        for end in ends {
            end.recv_timeout(PATIENCE).unwrap().unwrap();
        }
        assert_eq!(memory.bytes(), expected, "{engine:?}");
        let counters = bench.backend.report().counters;
        assert_eq!(counters.requests, 65);
        assert!(counters.coalesced > 0, "{engine:?}: {counters:?}");
        assert_eq!(counters.bytes_written, 4 << 20);
        assert_eq!(counters.bytes_read, 4 << 20);
    }
}

/// Goal: a read past the end of the file is Corrupt and names the file; neighbours that it was
/// coalesced with, and that lie before the end, are served.
#[test]
fn a_truncated_file_fails_only_what_it_lacks() {
    for engine in KINDS {
        let bench = open(engine, |_| ());
        let file = bench.create("segment");
        let mut memory = Memory::new(64 << 10);
        memory.fill(3);
        let expected = memory.bytes().to_vec();
        bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap();
        bench.backend.files().truncate(&file, (32 << 10) + 100).unwrap();
        memory.bytes().fill(0);
        let (requests, ends): (Vec<_>, Vec<_>) = (0..4)
            .map(|index| {
                let start = index * (16 << 10);
                let piece = memory.slice(start..start + (16 << 10));
                bench.request(Operation::Read, &file, start as u64, piece)
            })
            .unzip();
        bench.backend.submit_all(requests);
        let results: Vec<_> =
            ends.iter().map(|end| end.recv_timeout(PATIENCE).expect("done is called")).collect();
        assert!(results[0].is_ok() && results[1].is_ok(), "{engine:?}: {results:?}");
        for result in &results[2..] {
            let error = result.as_ref().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{engine:?}: {error}");
            assert!(error.to_string().contains("segment"), "{error}");
        }
        assert_eq!(memory.bytes()[..32 << 10], expected[..32 << 10]);
    }
}

/// Goal: stop ends all, calls every done once, and refuses what comes later.
#[test]
fn stop_drains() {
    for engine in KINDS {
        let bench = open(engine, |_| ());
        let file = bench.create("segment");
        let memory = Memory::new(1 << 20);
        let (requests, ends): (Vec<_>, Vec<_>) = (0..200)
            .map(|index| bench.request(Operation::Write, &file, index << 21, memory.all()))
            .unzip();
        bench.backend.submit_all(requests);
        let drained = bench.backend.stop(Instant::now() + PATIENCE);
        assert_eq!(drained, Drained::Yes);
        for end in ends {
            match end.try_recv().expect("done was called before stop returned") {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::Closed),
            }
        }
        let late = bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Closed);
    }
}

/// Goal: a `done` that panics ends every outstanding request with an error and shuts the backend.
#[test]
fn a_panic_on_a_reactor_fails_all_and_latches() {
    for engine in KINDS {
        let bench = open(engine, |config| config.depth = 4);
        let file = bench.create("segment");
        let memory = Memory::new(64 << 10);
        let (mut requests, ends): (Vec<_>, Vec<_>) = (0..64)
            .map(|index| bench.request(Operation::Write, &file, index << 20, memory.all()))
            .unzip();
        requests[3].done = Box::new(|_| panic!("on purpose"));
        bench.backend.submit_all(requests);
        let mut failed = 0;
        for (index, end) in ends.iter().enumerate() {
            match end.recv_timeout(PATIENCE) {
                Ok(result) => failed += usize::from(result.is_err()),
                Err(_) => assert_eq!(index, 3, "{engine:?}: every done is called"),
            }
        }
        assert!(failed > 0, "{engine:?}");
        let late = bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Internal, "{engine:?}: {late}");
        assert!(bench.backend.report().broken.is_some());
        assert_eq!(bench.backend.stop(Instant::now() + PATIENCE), Drained::Yes);
    }
}

/// Goal: memory that was registered carries the same bytes, through fixed buffers; it cannot be taken
/// back while a transfer uses it, and can afterwards.
#[test]
fn registered_memory_works_and_is_given_back() {
    for engine in KINDS {
        let bench = open(engine, |_| ());
        let mut memory = Memory::new(2 << 20);
        memory.fill(13);
        let expected = memory.bytes().to_vec();
        let base = memory.all().pointer;
        bench.backend.register_memory(base, 2 << 20).unwrap();
        let report = bench.backend.report();
        assert!(report.fallbacks.is_empty(), "{:?}", report.fallbacks);
        if engine == Kind::Uring {
            assert_eq!(report.registered_bytes, 2 << 20);
        }
        let file = bench.create("segment");
        bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap();
        memory.bytes().fill(0);
        bench.transfer(Operation::Read, &file, 0, memory.all()).unwrap();
        assert_eq!(memory.bytes(), expected);
        if let Directory::Sim(disk) = &bench.directory {
            disk.inject(slow(Call::Read, Duration::from_millis(100)));
            let (request, end) = bench.request(Operation::Read, &file, 0, memory.slice(0..4096));
            bench.backend.submit(request);
            let busy = bench.backend.unregister_memory(base).unwrap_err();
            assert_eq!(busy.kind(), ErrorKind::Busy);
            end.recv_timeout(PATIENCE).unwrap().unwrap();
        }
        bench.backend.unregister_memory(base).unwrap();
        assert_eq!(bench.backend.report().registered_bytes, 0);
        let again = bench.backend.unregister_memory(base).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::InvalidArgument);
        bench.transfer(Operation::Read, &file, 0, memory.all()).unwrap();
    }
}

/// Goal: a reactor with nothing to do sleeps: no ticks, no polling. A thread that never runs never switches.
#[test]
fn an_idle_reactor_sleeps() {
    for engine in KINDS {
        let bench = open(engine, |_| ());
        let file = bench.create("segment");
        let memory = Memory::new(4096);
        let (mut request, _) = bench.request(Operation::Write, &file, 0, memory.all());
        let (sender, reactor) = channel();
        request.done = Box::new(move |_| {
            let _ = sender.send(rustix::thread::gettid());
        });
        bench.backend.submit(request);
        let reactor = reactor.recv_timeout(PATIENCE).unwrap().as_raw_nonzero();
        std::thread::sleep(Duration::from_millis(50));
        let before = context_switches(reactor.get());
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(context_switches(reactor.get()), before, "{engine:?}");
        bench.transfer(Operation::Write, &file, 0, memory.all()).unwrap();
        assert!(context_switches(reactor.get()) > before, "the measure sees work");
    }
}

fn context_switches(thread: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
    let counts = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
    counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum()
}

/// Goal: random overlapping-free transfers of all sizes, many at once, agree with a plain array; on every
/// engine, with two reactors.
#[test]
fn random_transfers_agree_with_an_array() {
    const PAGES: usize = 2048;
    for engine in KINDS {
        for seed in 0..3 {
            let bench = open(engine, |config| {
                config.threads = 2;
                config.depth = 8;
                config.io_bytes = 64 << 10;
            });
            let file = bench.create("segment");
            bench.backend.files().allocate(&file, (PAGES * 4096) as u64).unwrap();
            let mut dice = fastrand(seed);
            let mut model = vec![0u8; PAGES * 4096];
            for _ in 0..6 {
                let mut memory = Memory::new(PAGES * 4096);
                memory.fill(dice());
                let mut requests = Vec::new();
                let mut ends = Vec::new();
                let mut page = 0;
                while page < PAGES {
                    let count = (1 + dice() as usize % 40).min(PAGES - page);
                    let range = page * 4096..(page + count) * 4096;
                    if !dice().is_multiple_of(4) {
                        model[range.clone()].copy_from_slice(&memory.bytes()[range.clone()]);
                        let slice = memory.slice(range.clone());
                        let (request, end) =
                            bench.request(Operation::Write, &file, range.start as u64, slice);
                        requests.push(request);
                        ends.push(end);
                    }
                    page += count;
                }
                while requests.len() > 1 {
                    let at = dice() as usize % requests.len();
                    let few = requests.split_off(at.max(requests.len().saturating_sub(7)).max(1));
                    bench.backend.submit_all(few);
                }
                bench.backend.submit_all(requests);
                for end in ends {
                    end.recv_timeout(PATIENCE).unwrap().unwrap();
                }
                bench.transfer(Operation::Read, &file, 0, memory.all()).unwrap();
                assert!(memory.bytes() == model, "{engine:?}, seed {seed}");
            }
        }
    }
}

fn fastrand(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 8
    }
}

/// Goal: calls that enter the ring may be interrupted or refused at any time (EINTR, EAGAIN, EBUSY) and
/// every transfer still ends well. `strace` injects the refusals into a child that runs another test.
#[test]
fn a_ring_survives_refused_entries() {
    let strace = std::process::Command::new("strace").arg("-V").output();
    if !strace.is_ok_and(|output| output.status.success()) {
        eprintln!("strace is not installed: not tested");
        return;
    }
    for (errno, test) in [
        ("EINTR", "io::conformance::bytes_come_back"),
        ("EAGAIN", "io::conformance::bytes_come_back"),
        ("EBUSY", "io::conformance::stop_drains"),
    ] {
        let output = std::process::Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e"])
            .arg(format!("inject=io_uring_enter:error={errno}:when=2+3"))
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", test])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("1 passed"), "{errno}: {text}");
    }
}

/// Goal: the last owner of a backend may be a `done`, on the reactor's own thread: no deadlock.
#[test]
fn a_backend_may_be_dropped_by_a_done() {
    for engine in KINDS {
        let bench = open(engine, |_| ());
        let file = bench.create("segment");
        let memory = Memory::new(4096);
        let (mut request, _) = bench.request(Operation::Write, &file, 0, memory.all());
        let (sender, dropped) = channel();
        let backend = Arc::clone(&bench.backend);
        let (go, gone) = channel::<()>();
        request.done = Box::new(move |_| {
            let _ = gone.recv();
            drop(backend);
            let _ = sender.send(());
        });
        bench.backend.submit(request);
        drop(bench.backend);
        go.send(()).unwrap();
        dropped.recv_timeout(Duration::from_secs(3)).expect("it does not wait for itself");
    }
}

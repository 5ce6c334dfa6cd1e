//! What every engine must do, run for io_uring, psync and sim alike through a `Backend`.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

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
    _directory: Option<tempfile::TempDir>,
}

pub(super) const ENGINES: [IoEngine; 2] = [IoEngine::IoUring, IoEngine::Psync];

pub(super) fn open(engine: IoEngine, change: impl FnOnce(&mut BackendConfig)) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let mut config = BackendConfig { engine, ..BackendConfig::default() };
    change(&mut config);
    let deadline = Instant::now() + Duration::from_secs(20);
    let backend = Backend::open(directory.path(), &config, deadline).unwrap();
    Bench { backend, _directory: Some(directory) }
}

impl Bench {
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
        end.recv_timeout(Duration::from_secs(20)).expect("done is called")
    }
}

/// Goal: bytes written through an engine come back, whole, in pieces, coalesced and split.
#[test]
fn bytes_come_back() {
    for engine in ENGINES {
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
            end.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
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
    for engine in ENGINES {
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
        let results: Vec<_> = ends
            .iter()
            .map(|end| end.recv_timeout(Duration::from_secs(20)).expect("done is called"))
            .collect();
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
    for engine in ENGINES {
        let bench = open(engine, |_| ());
        let file = bench.create("segment");
        let memory = Memory::new(1 << 20);
        let (requests, ends): (Vec<_>, Vec<_>) = (0..200)
            .map(|index| bench.request(Operation::Write, &file, index << 21, memory.all()))
            .unzip();
        bench.backend.submit_all(requests);
        let drained = bench.backend.stop(Instant::now() + Duration::from_secs(20));
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

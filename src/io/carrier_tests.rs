//! The engine of threads with a carrier of its own.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::ThreadId;
use std::time::Duration;

use parking_lot::Mutex;

use super::carrier::Carrier;
use super::engine::Io;
use super::pool::Pool;
use super::psync::Psync;
use super::thread::Stack;
use super::{DmaSlice, FileId, Operation};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// As deep as a vendor's library may be.
fn use_stack() {
    let mut deep = [1u8; 1 << 20];
    std::hint::black_box(&mut deep);
}

/// Forgets files when it is told to, and tells which thread did.
#[derive(Debug)]
struct Slow {
    go: Mutex<Receiver<()>>,
    forgotten: Sender<(FileId, ThreadId)>,
}

impl Carrier for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn stack(&self) -> Stack {
        Stack::Vendor
    }

    fn forget(&self, file: FileId) {
        use_stack();
        let _ = self.go.lock().recv_timeout(PATIENCE);
        let _ = self.forgotten.send((file, std::thread::current().id()));
    }

    unsafe fn transfer(
        &self,
        _operation: Operation,
        _file: FileId,
        _raw: i32,
        _offset: u64,
        memory: DmaSlice,
    ) -> isize {
        memory.length as isize
    }
}

/// A carrier that blocks while it drops what it keeps of a closed file once held up the reactor, and with it every
/// transfer of the directory.
#[test]
fn forgetting_a_file_held_up_the_reactor() {
    let (go, gone) = channel();
    let (sender, forgotten) = channel();
    let carrier = Slow { go: Mutex::new(gone), forgotten: sender };
    let mut io = Psync::carried_by(Arc::new(carrier), 2);
    let files = [FileId(1), FileId(2), FileId(3)];
    files.iter().for_each(|file| io.forget_file(*file));
    assert!(forgotten.try_recv().is_err(), "the reactor waited for the carrier");
    for file in files {
        go.send(()).unwrap();
        let (which, thread) = forgotten.recv_timeout(PATIENCE).unwrap();
        assert_eq!(which, file);
        assert_ne!(thread, std::thread::current().id());
    }
}

/// Threads that call a vendor's library once had 512 KiB of stack, which it may overrun: that ends the process.
#[test]
fn a_library_overran_the_small_stack() {
    let (go, gone) = channel();
    let (sender, forgotten) = channel();
    let mut io = Psync::carried_by(Arc::new(Slow { go: Mutex::new(gone), forgotten: sender }), 1);
    assert_eq!(io.stack(), Stack::Vendor, "the reactor lets go of the carrier");
    io.forget_file(FileId(1));
    go.send(()).unwrap();
    forgotten.recv_timeout(PATIENCE).unwrap();
    let (done, ended) = channel();
    let job = Box::new(move || {
        use_stack();
        done.send(()).unwrap();
    });
    Pool::new("ucm-test", Stack::Vendor).run(job).unwrap();
    ended.recv_timeout(PATIENCE).unwrap();
}

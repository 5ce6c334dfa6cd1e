//! The engine of threads with a carrier of its own.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::ThreadId;
use std::time::Duration;

use parking_lot::Mutex;

use super::carrier::Carrier;
use super::engine::Io;
use super::psync::Psync;
use super::{DmaSlice, FileId, Operation};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

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

    fn forget(&self, file: FileId) {
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

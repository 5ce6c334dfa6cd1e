//! Memory that is used again: what follows a save on a stream of the model may overwrite what is being saved.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use ucm::error::ErrorKind;
use ucm::store::{Batch, Store};
use ucm::task::{Progress, Stage, Task};

use crate::common::{batch, done, expected, failure, id, is_present, load, options, pairs_in};
use crate::fakes::{ALL, EACH_DRIVER, Fake, Kind, Memory, ModelStream, Steering};

/// With its trailer page a quarter of the least arena, of 2 MiB: a store has four slots.
const BLOCK: usize = (512 << 10) - 4096;

fn open(directory: &Path, device: &str) -> Arc<Store> {
    let block = BLOCK.to_string();
    let extra = [
        ("device", device),
        ("device_id", "0"),
        ("block_size", block.as_str()),
        ("cache_buffer_capacity_gb", "0.0019"),
        ("store_pipeline", "Posix"),
    ];
    Store::open(options(&pairs_in(directory.to_str().unwrap(), &extra)).build().unwrap()).unwrap()
}

fn page_of(number: u64) -> Vec<u8> {
    (0..BLOCK).map(|at| expected(number, at)).collect()
}

/// Memory of the model with these blocks in it, one after another.
fn memory_with<'f>(fake: &'f Fake, numbers: &[u64]) -> Memory<'f> {
    let memory = fake.alloc(numbers.len() * BLOCK);
    memory.write(&numbers.iter().flat_map(|number| page_of(*number)).collect::<Vec<_>>());
    memory
}

fn save(store: &Store, memory: &Memory<'_>, numbers: &[u64], timeout_ms: i64) -> Arc<Task> {
    let ids: Vec<_> = numbers.iter().map(|number| id(*number)).collect();
    let addresses: Vec<_> =
        (0..numbers.len()).map(|at| memory.base.wrapping_add(at * BLOCK).cast()).collect();
    // SAFETY: the memory lives until the task is released.
    unsafe { store.save(&Batch { timeout_ms, ..batch(&ids, None, &addresses) }) }.unwrap()
}

/// Loads a block elsewhere and compares it.
fn assert_stored(fake: &Fake, store: &Store, number: u64) {
    let memory = fake.alloc(BLOCK);
    done(&load(store, &[id(number)], None, &[memory.base.cast()]).unwrap(), Stage::Loaded);
    assert!(memory.read() == page_of(number), "block {number} was stored wrong");
}

/// Whether copies queue on this device: of memory that is not pinned each blocks its worker.
fn queues(kind: Kind) -> bool {
    !kind.file.contains("ascendcl-old")
}

fn stream_wait(store: &Store, task: &Task, stream: &ModelStream<'_>) {
    // SAFETY: the stream lives.
    unsafe { store.stream_wait(task, stream.stream) }.unwrap();
}

/// Goal: streams that were made to wait for a save overwrite its blocks, at once as far as the CPU sees, and what is
/// stored is what was there before. Where nothing queues on the device, the CPU waits instead.
#[test]
fn a_stream_overwrites_what_is_being_saved() {
    for &kind in ALL {
        let (fake, directory) = (Fake::take(kind), TempDir::new().unwrap());
        let store = open(directory.path(), kind.device);
        let memory = memory_with(&fake, &[1, 2]);
        let streams = [fake.stream(), fake.stream()];
        fake.delay(2000);
        fake.hold(queues(kind));
        let task = save(&store, &memory, &[1, 2], 0);
        for (at, stream) in streams.iter().enumerate() {
            stream_wait(&store, &task, stream);
            stream_wait(&store, &task, stream);
            stream.take(memory.base.wrapping_add(at * BLOCK), &page_of(7));
        }
        let copied = task.poll(Stage::Copied);
        assert!(!queues(kind) || matches!(copied, Progress::Pending), "{kind:?}: {copied:?}");
        fake.hold(false);
        streams.iter().for_each(ModelStream::sync);
        assert!(memory.read() == [page_of(7), page_of(7)].concat(), "{kind:?}: not overwritten");
        done(&task, Stage::Persisted);
        assert_stored(&fake, &store, 1);
        assert_stored(&fake, &store, 2);
        store.close();
        drop((streams, memory, task, store));
        fake.assert_no_leak();
    }
}

/// Goal: the fakes catch the same save where the stream was not made to wait.
#[test]
fn a_stream_that_does_not_wait_is_caught() {
    const CHILD: &str = "UCM_TEST_REUSE";
    if let Ok(index) = std::env::var(CHILD) {
        let (fake, directory) =
            (Fake::take(ALL[index.parse::<usize>().unwrap()]), TempDir::new().unwrap());
        let store = open(directory.path(), fake.kind().device);
        let (memory, stream) = (memory_with(&fake, &[1]), fake.stream());
        fake.hold(true);
        let task = save(&store, &memory, &[1], 0);
        if queues(fake.kind()) {
            done(&task, Stage::Enqueued);
        }
        stream.take(memory.base, &page_of(7));
        stream.sync();
        fake.hold(false);
        done(&task, Stage::Persisted);
        return;
    }
    for (index, kind) in ALL.iter().enumerate() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "reuse::a_stream_that_does_not_wait_is_caught", "--nocapture"])
            .env(CHILD, index.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let caught = !output.status.success() && text.contains("did not wait for this copy");
        assert!(caught, "{kind:?}: {text}");
    }
}

/// Saves that fill all slots but one while the device stands still, and then one of two blocks, of which the second
/// gets no slot.
fn crowd(store: &Store, memories: &[Memory<'_>; 2], timeout_ms: i64) -> [Arc<Task>; 2] {
    let first = save(store, &memories[0], &[1, 2, 3], 0);
    let second = save(store, &memories[1], &[4, 5], timeout_ms);
    done(&first, Stage::Enqueued);
    [first, second]
}

/// Goal: a save of which a block waits for a slot is waited for by the CPU; once there is a slot the rest is left to
/// the device, and all blocks are stored as they were.
#[test]
fn a_block_that_waits_for_a_slot_is_waited_for() {
    for &kind in EACH_DRIVER {
        let (fake, directory) = (Fake::take(kind), TempDir::new().unwrap());
        let store = open(directory.path(), kind.device);
        let memories = [memory_with(&fake, &[1, 2, 3]), memory_with(&fake, &[4, 5])];
        let stream = fake.stream();
        fake.hold(true);
        let tasks = crowd(&store, &memories, 0);
        let early = tasks[1].wait(Stage::Enqueued, Some(Duration::from_millis(50)));
        assert!(matches!(early, Progress::Pending), "{kind:?}: {early:?}, so there was a slot");
        std::thread::scope(|scope| {
            scope.spawn(|| fake.hold(false));
            stream_wait(&store, &tasks[1], &stream);
        });
        stream.take(memories[1].base, &[page_of(7), page_of(7)].concat());
        stream.sync();
        tasks.iter().for_each(|task| done(task, Stage::Persisted));
        drop((stream, memories));
        (1..=5).for_each(|number| assert_stored(&fake, &store, number));
        store.close();
        drop((tasks, store));
        fake.assert_no_leak();
    }
}

/// Goal: blocks that still wait for a slot when their save is cancelled, or when its deadline passes, are not waited
/// for any longer, and their memory, which the model takes at once, is not read when the slot comes.
#[test]
fn a_save_that_was_given_up_does_not_read_what_follows() {
    for &kind in EACH_DRIVER {
        for (timeout_ms, ends_with) in [(0, ErrorKind::Cancelled), (100, ErrorKind::Timeout)] {
            let (fake, directory) = (Fake::take(kind), TempDir::new().unwrap());
            let store = open(directory.path(), kind.device);
            let memories = [memory_with(&fake, &[1, 2, 3]), memory_with(&fake, &[4, 5])];
            let stream = fake.stream();
            fake.hold(true);
            let tasks = crowd(&store, &memories, timeout_ms);
            if timeout_ms == 0 {
                tasks[1].cancel();
            }
            stream_wait(&store, &tasks[1], &stream);
            stream.take(memories[1].base, &[page_of(7), page_of(7)].concat());
            assert_eq!(failure(&tasks[1], Stage::Persisted), ends_with);
            fake.hold(false);
            stream.sync();
            done(&tasks[0], Stage::Persisted);
            done(&tasks[1], Stage::Released);
            drop((stream, memories));
            (1..=3).for_each(|number| assert_stored(&fake, &store, number));
            // Its copy may have begun before: then it goes on, and is right.
            if is_present(&store, 4) {
                assert_stored(&fake, &store, 4);
            }
            assert!(!is_present(&store, 5), "{kind:?}: it never had a slot");
            store.close();
            drop((tasks, store));
            fake.assert_no_leak();
        }
    }
}

//! A store whose device fails: one call, all of it, or with the process. What fails ends with DEVICE, nothing
//! wedges, no wrong byte is handed out, and the store closes.

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use ucm::error::{ErrorKind, Result};
use ucm::store::{Batch, Store};
use ucm::task::{Progress, Stage, Task};

use crate::common::{batch, done, expected, failure, id, options, pairs_in};
use crate::fakes::{ALL, Fake, Kind, Memory, Steering};

const BLOCKS: usize = 3;
const SLICE: usize = 16 << 10;
const SLICES: usize = 4;
const BLOCK: usize = SLICES * SLICE;

/// A driver of each make, copying in batches.
const BATCHED: [usize; 2] = [1, 7];

/// An error of a call that is nobody else's: out of memory.
const STATUS_OF_ONE_CALL: i32 = 2;
/// What every call returns once the device is gone.
const STATUS_OF_ALL_CALLS: i32 = 700;

/// A wait that ends before the test is taken for hung, on a busy machine too.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(30));

fn open(directory: &Path, kind: Kind) -> Result<Arc<Store>> {
    let (slice, block) = (SLICE.to_string(), BLOCK.to_string());
    let extra = [
        ("device", kind.device),
        ("device_id", "0"),
        ("tensor_size", slice.as_str()),
        ("block_size", block.as_str()),
        ("cache_buffer_capacity_gb", "0.002"),
    ];
    Store::open(options(&pairs_in(directory.to_str().unwrap(), &extra)).build().unwrap())
}

/// Where block `at` of a page of device memory has its slices: apart, in an order of their own.
fn addresses(memory: &Memory<'_>) -> Vec<*mut c_void> {
    let slice = |at: usize, slice: usize| ((slice * BLOCKS) + (at + 1) % BLOCKS) * SLICE;
    (0..BLOCKS)
        .flat_map(|at| (0..SLICES).map(move |number| slice(at, number)))
        .map(|offset| memory.base.wrapping_add(offset).cast())
        .collect()
}

/// The bytes of device memory that holds these blocks.
fn page_of(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS * BLOCK];
    for (at, number) in numbers.iter().enumerate() {
        for slice in 0..SLICES {
            let from = ((slice * BLOCKS) + (at + 1) % BLOCKS) * SLICE;
            let content = (0..SLICE).map(|byte| expected(*number, slice * SLICE + byte));
            bytes[from..from + SLICE].iter_mut().zip(content).for_each(|(to, from)| *to = from);
        }
    }
    bytes
}

/// The status of each entry, once nothing touches the task's memory any more.
fn statuses(task: &Task) -> Vec<Result<()>> {
    assert!(
        !matches!(task.wait(Stage::Released, PATIENCE), Progress::Pending),
        "RELEASED never came"
    );
    let last = if task.kind() == ucm::task::Kind::Save { Stage::Persisted } else { Stage::Loaded };
    assert!(!matches!(task.wait(last, PATIENCE), Progress::Pending), "{last:?} never came");
    task.statuses().unwrap()
}

/// Saves blocks that a kernel is still writing, takes their memory back on a stream that waits, and loads them elsewhere
/// on a stream that waits. Gives the errors; whatever ends well must be right.
fn round(fake: &Fake, store: &Store, numbers: [u64; BLOCKS]) -> Vec<ucm::error::Error> {
    let (source, target) = (fake.alloc(BLOCKS * BLOCK), fake.alloc(BLOCKS * BLOCK));
    let (stream, event) = (fake.stream(), fake.event());
    let (ids, page) = (numbers.map(id), page_of(&numbers));
    stream.write(source.base, &page, 200);
    event.record(&stream);
    let (from, to) = (addresses(&source), addresses(&target));
    let saved = Batch { wait_event: event.event, ..batch(&ids, None, &from) };
    // SAFETY: the memory lives until the task is released, the event until submit returns.
    let save = unsafe { store.save(&saved) };
    drop(event);
    let (mut errors, zeros) = (Vec::new(), vec![0; BLOCKS * BLOCK]);
    match &save {
        Ok(task) => {
            // SAFETY: the stream lives. Where it waits, the model takes the memory back.
            if unsafe { store.stream_wait(task, stream.stream) }.is_ok() {
                stream.take(source.base, &zeros);
            }
            errors.extend(statuses(task).into_iter().filter_map(Result::err));
        }
        Err(error) => errors.push(error.clone()),
    }
    stream.sync();
    target.write(&zeros);
    // SAFETY: as above.
    let task = unsafe { store.load(&batch(&ids, None, &to)) }.unwrap();
    // SAFETY: the stream lives.
    if unsafe { store.stream_wait(&task, stream.stream) }.is_ok() {
        let mut seen = vec![0; BLOCKS * BLOCK];
        stream.read(&mut seen, target.base);
        stream.sync();
        assert!(seen == page, "a stream went on without the bytes");
    }
    let loaded = statuses(&task);
    let bytes = target.read();
    for (at, result) in loaded.into_iter().enumerate() {
        let mut right = (0..SLICES).map(|slice| ((slice * BLOCKS) + (at + 1) % BLOCKS) * SLICE);
        match result {
            Ok(()) => {
                assert!(right.all(|from| bytes[from..from + SLICE] == page[from..from + SLICE]))
            }
            Err(error) => errors.push(error),
        }
    }
    errors
}

/// One life of a store in which the nth call fails. Gives the call's name; `None`: there were not so many.
fn life_with_a_failure(kind: Kind, nth: i64) -> Option<String> {
    let (fake, directory) = (Fake::take(kind), TempDir::new().unwrap());
    fake.fail(nth, STATUS_OF_ONE_CALL, false);
    let store = match open(directory.path(), kind) {
        Ok(store) => store,
        Err(error) => {
            let call = fake.failed().expect("an open fails without a failure");
            assert_eq!(error.kind(), ErrorKind::Device, "{call}: {error}");
            assert!(error.to_string().contains(&call), "{call} is not named: {error}");
            fake.assert_no_leak();
            return Some(call);
        }
    };
    let errors = round(&fake, &store, [1, 2, 3]);
    let call = fake.failed();
    for error in &errors {
        let call = call.as_ref().unwrap_or_else(|| panic!("{kind:?}: {error} without a failure"));
        // What was not saved is not there.
        let known = matches!(error.kind(), ErrorKind::Device | ErrorKind::NotFound);
        assert!(known, "{kind:?}: {call}: {error}");
    }
    // One call failed, the device is there: what comes next is as if nothing had been.
    if call.is_some() {
        let errors = round(&fake, &store, [4, 5, 6]);
        assert!(errors.is_empty(), "{kind:?}: after {call:?}: {errors:?}");
    }
    store.close();
    drop(store);
    // A call that fails while the store closes may leave behind what it was to give back.
    let call = call.or_else(|| fake.failed());
    if call.is_none() {
        fake.assert_no_leak();
    }
    call
}

/// Goal: whichever single call of the driver fails in the life of a store, entries fail with DEVICE, none ends
/// well with wrong bytes, the tasks after it go on, and the store closes.
#[test]
fn each_call_of_a_store_fails_once() {
    for kind in BATCHED.map(|index| ALL[index]) {
        let failures = (1..).take_while(|nth| life_with_a_failure(kind, *nth).is_some()).count();
        println!("{kind:?}: each of {failures} calls was failed");
        assert!(failures > 20, "{kind:?}: {failures} calls cannot be a store's life");
    }
}

/// Goal: when the device is lost under copies, their tasks end with DEVICE and are released, later ones are
/// told to restart the process, what is on storage is still found, and the store closes.
#[test]
fn a_lost_device_ends_its_tasks_and_no_other() {
    for kind in BATCHED.map(|index| ALL[index]) {
        let (fake, directory) = (Fake::take(kind), TempDir::new().unwrap());
        let store = open(directory.path(), kind).unwrap();
        assert!(round(&fake, &store, [1, 2, 3]).is_empty());
        let memory = std::mem::ManuallyDrop::new(fake.alloc(BLOCKS * BLOCK));
        let (ids, from) = ([4, 5, 6].map(id), addresses(&memory));
        fake.hold(true);
        // SAFETY: the memory is never freed.
        let task = unsafe { store.save(&batch(&ids, None, &from)) }.unwrap();
        let early = task.wait(Stage::Copied, Some(Duration::from_millis(50)));
        assert!(matches!(early, Progress::Pending));
        fake.fail(1, STATUS_OF_ALL_CALLS, true);
        assert_eq!(failure(&task, Stage::Persisted), ErrorKind::Device, "{kind:?}");
        done(&task, Stage::Released);
        // SAFETY: as above.
        let next = unsafe { store.load(&batch(&[1, 2, 3].map(id), None, &from)) }.unwrap();
        let Progress::Failed(error) = next.wait(Stage::Loaded, PATIENCE) else {
            panic!("{kind:?}")
        };
        assert!(error.to_string().contains("restart the process"), "{error}");
        let mut found = [0; BLOCKS];
        store.lookup(&[1, 2, 3].map(id), &mut found).unwrap();
        assert_eq!(found, [1; BLOCKS]);
        store.close();
        drop((task, next, store));
        fake.reset();
    }
}

/// Goal: when somebody resets the device under a store, tasks end with DEVICE, and the store closes.
#[test]
fn a_destroyed_context_ends_tasks() {
    for kind in BATCHED.map(|index| ALL[index]) {
        let (fake, directory) = (Fake::take(kind), TempDir::new().unwrap());
        let store = open(directory.path(), kind).unwrap();
        assert!(round(&fake, &store, [1, 2, 3]).is_empty());
        let memory = fake.alloc(BLOCKS * BLOCK);
        let (ids, from) = ([4, 5, 6].map(id), addresses(&memory));
        fake.reset_device();
        // SAFETY: the memory lives until the task is released.
        let task = unsafe { store.save(&batch(&ids, None, &from)) }.unwrap();
        assert_eq!(failure(&task, Stage::Persisted), ErrorKind::Device, "{kind:?}");
        done(&task, Stage::Released);
        store.close();
        drop((task, store));
        fake.revive();
    }
}

/// Goal: what is no event is refused by name and makes no task; the store goes on.
#[test]
fn an_invalid_event_makes_no_task() {
    for kind in BATCHED.map(|index| ALL[index]) {
        let (fake, directory) = (Fake::take(kind), TempDir::new().unwrap());
        let store = open(directory.path(), kind).unwrap();
        let memory = fake.alloc(BLOCKS * BLOCK);
        let (ids, from) = ([1, 2, 3].map(id), addresses(&memory));
        let invalid = Batch { wait_event: std::ptr::dangling_mut(), ..batch(&ids, None, &from) };
        // SAFETY: the fakes look the handle up before they touch it; the memory outlives the store.
        for submitted in unsafe { [store.save(&invalid), store.load(&invalid)] } {
            let error = submitted.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Device);
            assert!(error.to_string().contains("wait_event"), "{error}");
        }
        assert!(round(&fake, &store, [1, 2, 3]).is_empty());
        store.close();
    }
}

/// Goal: a process that ends while a store's copies run ends: no hang, no fault, with the store open.
#[test]
fn a_process_ends_while_a_store_copies() {
    const CHILD: &str = "UCM_TEST_STORE_EXIT";
    if let Ok(index) = std::env::var(CHILD) {
        let directory = TempDir::new().unwrap();
        let fake = std::mem::ManuallyDrop::new(Fake::take(ALL[index.parse::<usize>().unwrap()]));
        let store = open(directory.path(), fake.kind()).unwrap();
        let memory = std::mem::ManuallyDrop::new(fake.alloc(BLOCKS * BLOCK));
        fake.hold(true);
        // SAFETY: the memory is there until the process ends.
        let task = unsafe { store.save(&batch(&[1, 2, 3].map(id), None, &addresses(&memory))) };
        let early = task.unwrap().wait(Stage::Copied, Some(Duration::from_millis(50)));
        assert!(matches!(early, Progress::Pending));
        std::process::exit(7);
    }
    for index in BATCHED {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "failures::a_process_ends_while_a_store_copies", "--nocapture"])
            .env(CHILD, index.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "{:?}: {text}", ALL[index]);
    }
}

//! Calls that fail, a device that does not answer or is lost, and closing under all of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ucm::error::{Error, ErrorKind};
use ucm::store::Store;
use ucm::task::{Stage, Task};

use crate::common::{batch, done, failure, id};
use crate::fakes::{Memory, Steering};
use crate::world::*;

/// Saves two blocks and loads them; the first failure.
fn exercise(world: &World) -> Result<(), Error> {
    let store = world.open()?;
    let result = [1, 2]
        .iter()
        .try_for_each(|number| save_block(world, &store, *number))
        .and_then(|()| [1, 2].iter().try_for_each(|number| load_block(world, &store, *number)));
    store.close();
    result
}

/// Goal: whichever single call of cuFile fails, it is an error of the open or of one entry, it names what happened,
/// nothing hangs, no wrong byte is served and nothing is left behind.
#[test]
fn each_call_of_cufile_fails_once() {
    // A status of cuFile, one of its CUDA errors, and an errno of the drive.
    for code in [5010, 5011, libc::EIO] {
        let mut failures = 0;
        for nth in 1.. {
            let world = World::new();
            world.cufile.fail(nth, code);
            let result = exercise(&world);
            let Some(call) = world.cufile.failed() else {
                result.unwrap();
                world.assert_no_leak();
                break;
            };
            failures += 1;
            // A setting that could not be made shows in the properties where it matters.
            if call != "cuFileSetParameterBool" || result.is_err() {
                let text = result.expect_err(&call).to_string();
                let told = ["cuFile", "cufile", "drive"].iter().any(|word| text.contains(word));
                assert!(told, "{call}: {text}");
            }
            world.assert_no_leak();
        }
        assert!(failures > 10, "{failures} calls were failed with {code}");
    }
}

/// Goal: the same for calls of the CUDA driver, which computes the checksums.
#[test]
fn each_call_of_the_driver_fails_once() {
    const STATUS: i32 = 2;
    let mut failures = 0;
    for nth in 1.. {
        let world = World::new();
        world.fake.fail(nth, STATUS, false);
        let result = exercise(&world);
        let Some(call) = world.fake.failed() else {
            result.unwrap();
            world.assert_no_leak();
            break;
        };
        failures += 1;
        if let Err(error) = result {
            let kinds = [ErrorKind::Device, ErrorKind::Unsupported];
            assert!(kinds.contains(&error.kind()), "{call}: {error}");
        }
        assert_eq!(world.fake.depth(), 0, "{call}: a context was left on the caller's stack");
        // What the driver refuses to give back is the driver's.
        world.fake.reset();
    }
    println!("each of {failures} calls was failed");
    assert!(failures > 50);
}

/// Goal: a store that is closed while the drive moves bytes of its slots waits for them; afterwards nothing is
/// registered and no memory is left.
#[test]
fn closing_waits_for_transfers_in_flight() {
    let world = World::new();
    let store = world.open().unwrap();
    (1..5).for_each(|number| save_block(&world, &store, number).unwrap());
    let memory = world.fake.alloc(BLOCK);
    world.cufile.hold(true);
    let addresses = halves(&memory);
    let blocks: Vec<_> = (1..5).map(|number| [id(number)]).collect();
    let loads: Vec<_> =
        blocks.iter().map(|ids| load(&store, &batch(ids, None, &addresses))).collect();
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| store.close());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!closing.is_finished(), "closed under transfers of its slots");
        world.cufile.hold(false);
    });
    // What began has ended before the close did: nothing may touch the memory now.
    drop((loads, store, memory));
    world.assert_no_leak();
}

/// Runs a test, which leaves something behind, in a process of its own; whether this is that process.
fn alone(test: &str) -> bool {
    const CHILD: &str = "UCM_TEST_DIRECT_ALONE";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    false
}

/// Waits until the device holds a checksum, and closes the store.
fn close_under_a_hash(world: &World, store: &Store) {
    let begun = Instant::now();
    while world.fake.stopped() == 0 {
        assert!(begun.elapsed() < PATIENCE, "no checksum was asked for");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| store.close());
        let begun = Instant::now();
        while !closing.is_finished() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        let finished = closing.is_finished();
        world.fake.hold(false);
        assert!(finished, "close hangs with the device");
    });
}

/// Closes a store of the blocks `stored` while its device does not answer the checksum that the tasks of `submit` wait
/// for. What the device may still write is leaked, so the process ends here, and is one for this test alone.
fn close_hung_under_a_checksum(
    test: &str,
    stored: &[u64],
    submit: impl FnOnce(&Store, &Memory<'_>) -> Vec<Arc<Task>>,
) {
    if !alone(test) {
        return;
    }
    let world = World::new();
    let keys = [("timeout_ms", "500"), ("tensor_size", &(BLOCK / 2).to_string())];
    let store = world.open_with(&keys).unwrap();
    stored.iter().for_each(|number| save_block(&world, &store, *number).unwrap());
    let memory = std::mem::ManuallyDrop::new(world.fake.alloc(BLOCK));
    memory.write(&in_halves(9));
    let held = world.fake.live()[2];
    world.fake.hold_hashes(true);
    let tasks = submit(&store, &memory);
    close_under_a_hash(&world, &store);
    let released = tasks.iter().all(|task| task.is_released());
    assert!(released, "the caller's memory is read before the checksum, and written after it");
    drop(store);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(world.fake.live()[2], held, "memory of a device that did not answer was given back");
    std::process::exit(0);
}

/// Goal: a store whose device does not answer a checksum of a load closes all the same, within its time limits, and
/// what the device may still write is leaked; a checksum that ends after that does no harm.
#[test]
fn close_hung_under_a_checksum_of_a_load() {
    let test = "failures::close_hung_under_a_checksum_of_a_load";
    close_hung_under_a_checksum(test, &[1, 2], |store, memory| {
        let load_it = |number| load(store, &batch(&[id(number)], None, &halves(memory)));
        vec![load_it(1), load_it(2)]
    });
}

/// Goal: the same for the checksum of a save.
#[test]
fn close_hung_under_a_checksum_of_a_save() {
    let test = "failures::close_hung_under_a_checksum_of_a_save";
    close_hung_under_a_checksum(test, &[], |store, memory| {
        vec![save(store, &batch(&[id(1)], None, &halves(memory)))]
    });
}

/// Goal: a device that is lost under the direct path ends its entries with DEVICE, and the store closes; what is on the
/// drive is served by the next process.
#[test]
fn a_lost_device_ends_entries_and_the_store_closes() {
    // What a lost device may still touch stays for ever.
    if !alone("failures::a_lost_device_ends_entries_and_the_store_closes") {
        return;
    }
    let world = World::new();
    let store = world.open().unwrap();
    (1..3).for_each(|number| save_block(&world, &store, number).unwrap());
    let memory = std::mem::ManuallyDrop::new(world.fake.alloc(BLOCK));
    let addresses = halves(&memory);
    world.cufile.hold(true);
    let loads = [1, 2].map(|number| load(&store, &batch(&[id(number)], None, &addresses)));
    std::thread::sleep(Duration::from_millis(50));
    world.fake.fail(1, 700, true);
    world.cufile.hold(false);
    for task in &loads {
        assert_eq!(failure(task, Stage::Loaded), ErrorKind::Device);
        done(task, Stage::Released);
    }
    let task = save(&store, &batch(&[id(3)], None, &addresses));
    assert_eq!(failure(&task, Stage::Persisted), ErrorKind::Device);
    store.close();
    // Neither the device nor what it leaked can be given back.
    std::process::exit(0);
}

//! Blocks and layers to the drive and back, what was damaged on the way, and the room of those that were reclaimed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ucm::error::ErrorKind;
use ucm::store::Batch;
use ucm::task::{Progress, Stage, Task};

use crate::common::{batch, damage_at, done, failure, files, id};
use crate::fakes::{ALL, Memory, Steering};
use crate::world::*;

/// Goal: blocks go to the drive and come back byte for byte, whatever the way of copying on the device, through short
/// transfers too; the files are those that a store without the direct path reads, and the other way round.
#[test]
fn round_trips_are_exact() {
    for &kind in ALL.iter().filter(|kind| kind.device == "cuda" && !kind.strategy.is_empty()) {
        let world = World::with(kind, "libcufile.so.0");
        let store = world.open().unwrap();
        assert_eq!(engine(&store), "cufile");
        world.cufile.delay(200);
        (1..6).for_each(|number| save_block(&world, &store, number).unwrap());
        world.cufile.short(12 << 10);
        save_block(&world, &store, 6).unwrap();
        (1..7).for_each(|number| load_block(&world, &store, number).unwrap());
        store.close();
        drop(store);
        let pinned = [("tensor_size", (BLOCK / 2).to_string()), ("gpu_direct", "off".into())];
        let pinned = pinned.each_ref().map(|(key, value)| (*key, value.as_str()));
        let store = world.open_with(&pinned).unwrap();
        assert_ne!(engine(&store), "cufile");
        (1..7).for_each(|number| load_block(&world, &store, number).unwrap());
        save_block(&world, &store, 7).unwrap();
        store.close();
        drop(store);
        let store = world.open().unwrap();
        load_block(&world, &store, 7).unwrap();
        store.close();
        drop(store);
        world.assert_no_leak();
    }
}

/// Hands the layers of block 1 in, the last first; gives the tasks in the order of the layers.
fn each_layer(memory: &Memory<'_>, submit: impl Fn(&Batch<'_>) -> Arc<Task>) -> Vec<Arc<Task>> {
    let mut tasks: Vec<_> = (0..LAYERS)
        .rev()
        .map(|layer| {
            let (blocks, shards) = ([id(1)], [layer as u32]);
            let addresses = [memory.base.wrapping_add(layer * LAYER).cast()];
            submit(&batch(&blocks, Some(&shards), &addresses))
        })
        .collect();
    tasks.reverse();
    tasks
}

/// Goal: layers are saved and loaded one by one, each verified by its own checksum on the device; damage to one fails
/// that one alone, and its memory keeps what it had.
#[test]
fn layers_are_verified_one_by_one() {
    const BAD: usize = 3;
    let world = World::new();
    let store = world.open_layers();
    let memory = world.fake.alloc(BLOCK);
    memory.write(&block_bytes(1));
    let saves = each_layer(&memory, |batch| save(&store, batch));
    saves.iter().for_each(|task| done(task, Stage::Persisted));
    store.close();
    drop(store);
    for damaged in [false, true] {
        if damaged {
            damage_at(world.path(), 1, BAD * LAYER + 1000);
        }
        let store = world.open_layers();
        memory.write(&vec![0xEE; BLOCK]);
        let loads = each_layer(&memory, |batch| load(&store, batch));
        for (layer, task) in loads.iter().enumerate() {
            if damaged && layer == BAD {
                assert_eq!(failure(task, Stage::Loaded), ErrorKind::Corrupt);
            } else {
                done(task, Stage::Loaded);
            }
            done(task, Stage::Released);
        }
        let (bytes, right) = (memory.read(), block_bytes(1));
        for layer in 0..LAYERS {
            let range = layer * LAYER..(layer + 1) * LAYER;
            let untouched = vec![0xEE; LAYER];
            let wanted =
                if damaged && layer == BAD { &untouched[..] } else { &right[range.clone()] };
            assert!(&bytes[range] == wanted, "layer {layer}, damaged: {damaged}");
        }
        assert_eq!(store.stats().unwrap().verify_failures, u64::from(damaged));
        store.close();
    }
    drop((memory, saves));
    world.assert_no_leak();
}

/// Goal: a stream that was made to wait for a save writes over the block while its bytes are still on their way into the
/// slot, which alone is hashed and written; the CPU waits for none of it.
#[test]
fn a_stream_overwrites_what_is_being_saved() {
    let world = World::new();
    let store = world.open().unwrap();
    let (memory, stream) = (world.fake.alloc(BLOCK), world.fake.stream());
    memory.write(&in_halves(1));
    world.fake.hold(true);
    let task = save(&store, &batch(&[id(1)], None, &halves(&memory)));
    // SAFETY: the stream lives.
    unsafe { store.stream_wait(&task, stream.stream) }.unwrap();
    stream.take(memory.base, &in_halves(2));
    assert!(matches!(task.poll(Stage::Copied), Progress::Pending));
    world.fake.hold(false);
    ended(task, Stage::Persisted);
    stream.sync();
    drop((memory, stream));
    load_block(&world, &store, 1).unwrap();
    store.close();
    drop(store);
    world.assert_no_leak();
}

/// Goal: several directories, each tried out, and several reactors share one cuFile; a directory that is not there is
/// left out as ever, and one whose file system is refused refuses the path.
#[test]
fn directories_and_reactors_share_cufile() {
    let world = World::new();
    let second = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let both = format!("{}:{}", world.path().display(), second.path().display());
    let tensor = (BLOCK / 2).to_string();
    let keys = [("storage_backends", both.as_str()), ("io_threads", "2"), ("tensor_size", &tensor)];
    let store = world.open_with(&keys).unwrap();
    (1..17).for_each(|number| save_block(&world, &store, number).unwrap());
    (1..17).for_each(|number| load_block(&world, &store, number).unwrap());
    let used = [world.path(), second.path()].map(|path| !files(path, "segments").is_empty());
    assert_eq!(used, [true, true], "both directories are used");
    store.close();
    drop(store);
    world.cufile.fail_call("cuFileHandleRegister", 2, 5008);
    let error = world.open_with(&keys).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    world.assert_no_leak();
}

/// Goal: addresses of plain host memory work too, as they do with pinned slots, and strided slices are converted on
/// the device.
#[test]
fn host_memory_and_strided_slices_work() {
    let world = World::new();
    let store = world.open().unwrap();
    let mut bytes = in_halves(1);
    let addresses = [bytes[BLOCK / 2..].as_mut_ptr().cast(), bytes.as_mut_ptr().cast()];
    ended(save(&store, &batch(&[id(1)], None, &addresses)), Stage::Persisted);
    bytes.fill(0xEE);
    ended(load(&store, &batch(&[id(1)], None, &addresses)), Stage::Loaded);
    assert!(bytes == in_halves(1));
    store.close();
    drop(store);
    // Rows of 256 bytes that lie twice as far apart in memory.
    const ROW: usize = 256;
    let shape = format!("{ROW},{}:{}", BLOCK / ROW, 2 * ROW);
    let store = world.open_with(&[("tensor_shape_list", &shape)]).unwrap();
    let memory = world.fake.alloc(2 * BLOCK);
    let apart: Vec<u8> =
        block_bytes(2).chunks(ROW).flat_map(|row| [row, &[7; ROW]].concat()).collect();
    memory.write(&apart);
    let addresses = [memory.base.cast()];
    ended(save(&store, &batch(&[id(2)], None, &addresses)), Stage::Persisted);
    memory.write(&vec![7; 2 * BLOCK]);
    ended(load(&store, &batch(&[id(2)], None, &addresses)), Stage::Loaded);
    assert!(memory.read() == apart, "rows are not where they were");
    store.close();
    drop((store, memory));
    world.assert_no_leak();
}

/// Goal: segments that were reclaimed are forgotten by cuFile too, else their space would stay in use.
#[test]
fn reclaimed_segments_are_forgotten() {
    const SAVED: u64 = 100;
    let world = World::new();
    let tensor = (BLOCK / 2).to_string();
    let keys = [("tensor_size", tensor.as_str()), ("segment_size_mb", "1")];
    let bounded = [("posix_capacity_gb", "0.01"), ("timeout_ms", "1000")];
    let store = world.open_with(&[keys, bounded].concat()).unwrap();
    let (mut most, begin) = (0, Instant::now());
    for number in 1..SAVED {
        // Reclaiming takes a while before it frees anything.
        while let Err(error) = save_block(&world, &store, number) {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            assert!(begin.elapsed() < PATIENCE, "nothing is reclaimed");
            std::thread::sleep(Duration::from_millis(50));
        }
        most = most.max(world.cufile.live()[0]);
    }
    assert!(most > 2, "{most} segments at a time");
    let kept = || files(world.path(), "segments").len() as i64;
    while world.cufile.live()[0] > kept() && begin.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    let (registered, kept) = (world.cufile.live()[0], kept());
    println!("{most} files at most, {registered} now, {kept} segments");
    assert!(registered <= kept, "{registered} files are registered, {kept} segments are there");
    store.close();
    drop(store);
    world.assert_no_leak();
}

/// Goal: a block that was damaged on the drive, at its beginning or its end, is CORRUPT and never reaches the caller's
/// memory; the next one is served.
#[test]
fn damage_is_corrupt_and_never_bytes() {
    let world = World::new();
    let store = world.open().unwrap();
    (1..4).for_each(|number| save_block(&world, &store, number).unwrap());
    store.close();
    drop(store);
    damage_at(world.path(), 1, 0);
    damage_at(world.path(), 2, BLOCK - 64);
    let store = world.open().unwrap();
    for number in [1, 2] {
        assert_eq!(load_block(&world, &store, number).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    load_block(&world, &store, 3).unwrap();
    assert_eq!(load_block(&world, &store, 1).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.stats().unwrap().verify_failures, 2);
    store.close();
    drop(store);
    world.assert_no_leak();
}

/// Goal: a library that says it has read, and has not, serves nobody: the slot holds other bytes than the checksum
/// is of.
#[test]
fn a_read_that_moved_nothing_is_caught() {
    let world = World::new();
    let store = world.open().unwrap();
    (1..3).for_each(|number| save_block(&world, &store, number).unwrap());
    world.cufile.lie(true);
    assert_eq!(load_block(&world, &store, 1).unwrap_err().kind(), ErrorKind::Corrupt);
    world.cufile.lie(false);
    load_block(&world, &store, 2).unwrap();
    store.close();
    drop(store);
    world.assert_no_leak();
}

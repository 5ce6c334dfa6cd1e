//! GPUDirect Storage against the fake libcufile and the fake libcuda: bytes, damage, refusals, failures, leaks. The
//! fakes abort on misuse; device memory cannot be seen by the CPU, so that an engine which reads it dies.

mod common;
mod fakes;

use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{batch, damage_at, done, expected, failure, files, id, options};
use fakes::cufile::CuFake;
use fakes::{ALL, EACH_DRIVER, Fake, Kind, Memory};
use ucm::error::{Error, ErrorKind};
use ucm::store::{Batch, Store};
use ucm::task::{Stage, Task};

const LAYERS: usize = 6;
const LAYER: usize = 32 << 10;
const BLOCK: usize = LAYERS * LAYER;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A device and cuFile, both fake, and a directory on a file system that takes direct I/O.
struct World {
    cufile: CuFake,
    fake: Fake,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self::with(ALL[0], "libcufile.so.0")
    }

    fn with(kind: Kind, library: &str) -> Self {
        let fake = Fake::take(kind);
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { cufile: CuFake::take(library), fake, directory }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn open_with(&self, extra: &[(&str, &str)]) -> Result<Arc<Store>, Error> {
        let block = BLOCK.to_string();
        let mut pairs = vec![
            ("storage_backends", self.path().to_str().unwrap()),
            ("store_pipeline", "Posix"),
            ("cache_buffer_capacity_gb", "0.004"),
            ("block_size", block.as_str()),
            ("segment_size_mb", "8"),
            ("lookup_refresh_ms", "20"),
            ("timeout_ms", "20000"),
            ("device", self.fake.kind().device),
            ("device_id", "0"),
            ("gpu_direct", "required"),
        ];
        pairs.retain(|(key, _)| !extra.iter().any(|(other, _)| key == other));
        pairs.extend(extra);
        Store::open(options(&pairs).build()?)
    }

    /// Whole blocks of two tensors.
    fn open(&self) -> Result<Arc<Store>, Error> {
        self.open_with(&[("tensor_size", &(BLOCK / 2).to_string())])
    }

    /// Layer by layer.
    fn open_layers(&self) -> Arc<Store> {
        let layer = LAYER.to_string();
        self.open_with(&[("shard_size", &layer), ("tensor_size", &layer)]).unwrap()
    }

    /// Nothing that a store made is left. A thread that told of the last failure may be the one that lets go last.
    fn assert_no_leak(self) {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE && !(self.cufile.live() == [0; 2] && self.fake.is_clean())
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(self.cufile.live(), [0; 2], "files, buffers of cuFile");
        self.fake.assert_no_leak();
        assert_eq!(self.fake.depth(), 0, "a context was left on the caller's stack");
    }
}

fn block_bytes(number: u64) -> Vec<u8> {
    (0..BLOCK).map(|at| expected(number, at)).collect()
}

/// Both halves of a block, swapped in memory so that they cannot be moved in one piece.
fn halves(memory: &Memory<'_>) -> [*mut c_void; 2] {
    [memory.base.wrapping_add(BLOCK / 2).cast(), memory.base.cast()]
}

/// What memory addressed by [`halves`] holds when block `number` is in it.
fn in_halves(number: u64) -> Vec<u8> {
    let bytes = block_bytes(number);
    [&bytes[BLOCK / 2..], &bytes[..BLOCK / 2]].concat()
}

fn save(store: &Store, batch: &Batch<'_>) -> Arc<Task> {
    // SAFETY: the tests keep their memory until the task is released.
    unsafe { store.save(batch) }.unwrap()
}

fn load(store: &Store, batch: &Batch<'_>) -> Arc<Task> {
    // SAFETY: as above.
    unsafe { store.load(batch) }.unwrap()
}

/// Waits for a task that ends well, and lets go of it and of the events it holds.
fn ended(task: Arc<Task>, stage: Stage) {
    done(&task, stage);
    done(&task, Stage::Released);
}

fn save_block(world: &World, store: &Store, number: u64) -> Result<(), Error> {
    let memory = world.fake.alloc(BLOCK);
    memory.write(&in_halves(number));
    let (blocks, addresses) = ([id(number)], halves(&memory));
    let task = save(store, &batch(&blocks, None, &addresses));
    task.wait(Stage::Persisted, common::WAIT);
    done(&task, Stage::Released);
    task.statuses().unwrap().remove(0)
}

/// Loads a block; its memory is untouched where that fails.
fn load_block(world: &World, store: &Store, number: u64) -> Result<(), Error> {
    let memory = world.fake.alloc(BLOCK);
    memory.write(&vec![0xEE; BLOCK]);
    let (blocks, addresses) = ([id(number)], halves(&memory));
    let task = load(store, &batch(&blocks, None, &addresses));
    task.wait(Stage::Loaded, common::WAIT);
    done(&task, Stage::Released);
    let result = task.statuses().unwrap().remove(0);
    let wanted = if result.is_ok() { in_halves(number) } else { vec![0xEE; BLOCK] };
    assert!(memory.read() == wanted, "wrong bytes of block {number}: {result:?}");
    result
}

/// What the store's directory runs on.
fn engine(store: &Store) -> String {
    store.stats().unwrap().backends[0].engine.clone()
}

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

/// What is missing, how it is made to be, and what must be said of it.
type Refusal = (&'static str, fn(&World), &'static [&'static str]);

/// Goal: where something is missing, `required` is an error that names it and the remedy, `auto` uses pinned memory,
/// says so in the statistics and works, and `off` does not even look.
#[test]
fn what_is_missing_is_told() {
    let refusals: [Refusal; 7] = [
        (
            "library",
            |_| set_library("/nonexistent/libcufile.so.0"),
            &["UCM_CUFILE_LIBRARY", "install"],
        ),
        (
            "driver",
            |w| w.cufile.fail_call("cuFileDriverOpen", 1, 5001),
            &["1.14", "nvidia-fs", "modprobe"],
        ),
        ("file system", |w| w.cufile.unsupported(true), &["1.14", "does not work on", "gdscheck"]),
        ("pinning", |w| w.cufile.fail_call("cuFileBufRegister", 1, 5036), &["pinned", "BAR1"]),
        ("transfer", |w| w.cufile.lie(true), &["did not bring back"]),
        ("checksums", |w| w.fake.falsify(1), &["checksum of 241 bytes", "driver"]),
        ("long checksums", |w| w.fake.falsify(10_000), &["checksum of 33000 bytes"]),
    ];
    for (what, refuse, words) in refusals {
        let world = World::new();
        refuse(&world);
        let error = world.open().err().unwrap_or_else(|| panic!("{what}: opened"));
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{what}: {error}");
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "{what}: {word} is not in: {text}");
        }
        if what == "file system" {
            assert!(
                text.contains(world.path().to_str().unwrap()),
                "the directory is not in: {text}"
            );
        }
        assert!(text.contains("gpu_direct is required"), "{text}");
        assert_eq!(world.cufile.live(), [0; 2], "{what}");
        world.fake.assert_no_leak();
        refuse(&world);
        let tensor = (BLOCK / 2).to_string();
        let auto = [("tensor_size", tensor.as_str()), ("gpu_direct", "auto")];
        let store = world.open_with(&auto).unwrap();
        let report = store.stats().unwrap().backends.remove(0);
        assert_ne!(report.engine, "cufile");
        let told =
            report.fallbacks.iter().any(|fallback| fallback.what.contains("gpu_direct: auto"));
        assert!(told, "{what}: {:?}", report.fallbacks);
        save_block(&world, &store, 1).unwrap();
        load_block(&world, &store, 1).unwrap();
        store.close();
        drop(store);
        let calls = world.cufile.calls();
        let off = [("tensor_size", tensor.as_str()), ("gpu_direct", "off")];
        let store = world.open_with(&off).unwrap();
        assert!(store.stats().unwrap().backends[0].fallbacks.is_empty());
        drop(store);
        assert_eq!(world.cufile.calls(), calls, "{what}: off looked for cuFile");
        world.assert_no_leak();
    }
}

fn set_library(path: &str) {
    // SAFETY: the caller holds the fake device, so no other test reads the environment.
    unsafe { std::env::set_var("UCM_CUFILE_LIBRARY", path) };
}

/// Goal: compatibility mode counts as not supported: with a library that cannot be told to forbid it, and where
/// somebody else has opened cuFile with it.
#[test]
fn compatibility_mode_is_refused() {
    let world = World::with(ALL[0], "libcufile-old.so.0");
    let text = world.open().err().unwrap().to_string();
    assert!(
        text.contains("properties.allow_compat_mode") && text.contains("cufile.json"),
        "{text}"
    );
    world.assert_no_leak();
    let world = World::new();
    world.cufile.open_by_others(true);
    let text = world.open().err().unwrap().to_string();
    assert!(text.contains("open in this process"), "{text}");
    assert!(world.cufile.is_open(), "what others opened stays open");
    assert_eq!(world.cufile.live(), [0; 2]);
    world.cufile.open_by_others(false);
    let store = world.open().unwrap();
    drop(store);
    world.assert_no_leak();
}

/// Goal: ways through host memory are forbidden under the numbers that the version's own header has, and no number is
/// used that it lacks; where it has a way but no number to forbid it, cufile.json must.
#[test]
fn settings_were_made_that_the_version_does_not_have() {
    for (version, allowed) in
        [(1140, None), (1160, None), (1170, Some("posix_io_mode")), (1190, None)]
    {
        let world = World::new();
        world.cufile.version(version);
        match (world.open(), allowed) {
            (Ok(store), None) => save_block(&world, &store, 1).unwrap(),
            (Err(error), Some(name)) => assert!(error.to_string().contains(name), "{error}"),
            (other, _) => panic!("{version}: {:?}", other.err()),
        }
        world.assert_no_leak();
    }
}

/// Goal: an open that failed leaves no setting behind that the next one would miss.
#[test]
fn an_open_after_a_failed_one_forbids_compatibility_again() {
    let world = World::new();
    world.cufile.fail_call("cuFileDriverOpen", 1, 5001);
    assert!(world.open().is_err());
    let stores = [world.open().unwrap(), world.open().unwrap()];
    save_block(&world, &stores[0], 1).unwrap();
    drop(stores);
    world.assert_no_leak();
}

/// Goal: the last store once closed cuFile, and took it from other libraries of the process, which had found it open and
/// used it too.
#[test]
fn the_last_store_closed_cufile_under_others() {
    let world = World::new();
    for _ in 0..2 {
        let store = world.open().unwrap();
        save_block(&world, &store, 1).unwrap();
        load_block(&world, &store, 1).unwrap();
        store.close();
        drop(store);
        let begin = Instant::now();
        while world.cufile.live() != [0; 2] && begin.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(world.cufile.is_open());
    }
    world.assert_no_leak();
}

/// Goal: keys that exclude the direct path are named, and are an error of the configuration.
#[test]
fn excluding_keys_are_named() {
    let world = World::new();
    let tensor = (BLOCK / 2).to_string();
    for (key, value, word) in [
        ("store_pipeline", "Cache|Posix", "store_pipeline"),
        ("io_direct", "false", "io_direct"),
        ("io_engine", "psync", "io_engine"),
        ("block_size", "6000", "pages"),
    ] {
        let tensor = if key == "block_size" { "3000" } else { tensor.as_str() };
        let error = world.open_with(&[("tensor_size", tensor), (key, value)]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{key}: {error}");
        assert!(error.to_string().contains(word), "{key}: {error}");
    }
    assert_eq!(world.cufile.calls(), 0, "a mistake in the configuration costs no call");
    world.assert_no_leak();
}

/// Goal: other devices say that they have no such path.
#[test]
fn other_devices_have_none() {
    for kind in EACH_DRIVER.iter().filter(|kind| kind.device != "cuda") {
        let world = World::with(*kind, "libcufile.so.0");
        let error = world.open().err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("ascend"), "{error}");
        world.fake.assert_no_leak();
    }
    let world = World::new();
    let tensor = (BLOCK / 2).to_string();
    let error = world.open_with(&[("tensor_size", &tensor), ("device", "host")]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("host"), "{error}");
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

/// Goal: a store whose device does not answer a checksum of a load closes all the same, within its time limits, and
/// what the device may still write is leaked; a checksum that ends after that does no harm.
#[test]
fn close_hung_under_a_checksum_of_a_load() {
    if !alone("close_hung_under_a_checksum_of_a_load") {
        return;
    }
    let world = World::new();
    let keys = [("timeout_ms", "500"), ("tensor_size", &(BLOCK / 2).to_string())];
    let store = world.open_with(&keys).unwrap();
    (1..3).for_each(|number| save_block(&world, &store, number).unwrap());
    let memory = std::mem::ManuallyDrop::new(world.fake.alloc(BLOCK));
    let addresses = halves(&memory);
    world.fake.hold_hashes(true);
    let loads = [1, 2].map(|number| load(&store, &batch(&[id(number)], None, &addresses)));
    let held = world.fake.live()[2];
    close_under_a_hash(&world, &store);
    assert!(
        loads.iter().all(|task| task.is_released()),
        "nothing was copied to the callers' memory"
    );
    drop(store);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(world.fake.live()[2], held, "memory of a device that did not answer was given back");
    // What was leaked cannot be given back.
    std::process::exit(0);
}

/// Goal: the same for the checksum of a save.
#[test]
fn close_hung_under_a_checksum_of_a_save() {
    if !alone("close_hung_under_a_checksum_of_a_save") {
        return;
    }
    let world = World::new();
    let keys = [("timeout_ms", "500"), ("tensor_size", &(BLOCK / 2).to_string())];
    let store = world.open_with(&keys).unwrap();
    let memory = std::mem::ManuallyDrop::new(world.fake.alloc(BLOCK));
    memory.write(&in_halves(1));
    let addresses = halves(&memory);
    world.fake.hold_hashes(true);
    let held = world.fake.live()[2];
    let task = save(&store, &batch(&[id(1)], None, &addresses));
    close_under_a_hash(&world, &store);
    assert!(task.is_released(), "the caller's memory was gathered before");
    drop(store);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(world.fake.live()[2], held, "memory of a device that did not answer was given back");
    std::process::exit(0);
}

/// Goal: a device that is lost under the direct path ends its entries with DEVICE, and the store closes; what is on the
/// drive is served by the next process.
#[test]
fn a_lost_device_ends_entries_and_the_store_closes() {
    // What a lost device may still touch stays for ever.
    if !alone("a_lost_device_ends_entries_and_the_store_closes") {
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

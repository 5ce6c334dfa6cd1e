//! Layer-wise loads: a layer does not wait for those behind it, damage to one is damage to one, and all together
//! are what was saved, however the writer cut it.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use tempfile::TempDir;
use ucm::error::ErrorKind;
use ucm::io::backend::BackendConfig;
use ucm::io::sim::{Call, Effect, Fault, Occasion, SimConfig, SimDisk};
use ucm::store::{Platform, Store};
use ucm::task::{Progress, Stage, Task};

const LAYERS: usize = 16;
const LAYER: usize = 256 << 10;
const BLOCK: usize = LAYERS * LAYER;

fn pairs(directory: &Path, layer: usize, extra: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut pairs = vec![
        ("storage_backends".to_owned(), directory.display().to_string()),
        ("cache_buffer_capacity_gb".to_owned(), "0.03".to_owned()),
        ("block_size".to_owned(), BLOCK.to_string()),
        ("shard_size".to_owned(), layer.to_string()),
        ("segment_size_mb".to_owned(), "64".to_owned()),
        ("lookup_refresh_ms".to_owned(), "20".to_owned()),
    ];
    pairs.extend(extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    pairs
}

fn store_in(directory: &Path, layer: usize, extra: &[(&str, &str)]) -> Arc<Store> {
    let pairs = pairs(directory, layer, extra);
    open(&pairs.iter().map(|(key, value)| (&**key, &**value)).collect::<Vec<_>>())
}

/// A store on a simulated disk whose largest operation is a MiB.
fn store_on(disk: &Arc<SimDisk>, extra: &[(&str, &str)]) -> Arc<Store> {
    let pairs = pairs(Path::new("/sim"), LAYER, extra);
    let pairs: Vec<_> = pairs.iter().map(|(key, value)| (&**key, &**value)).collect();
    let io = BackendConfig { io_bytes: 1 << 20, ..BackendConfig::default() };
    let backends = Some(vec![disk.backend(Path::new("/sim"), &io)]);
    Store::open_on(options(&pairs).build().unwrap(), Platform { backends, ..Platform::default() })
        .unwrap()
}

fn save_by_layers(store: &Store, number: u64, layer: usize) {
    let mut pages = Pages::new(BLOCK / layer, layer);
    let tasks: Vec<_> = (0..BLOCK / layer)
        .map(|index| {
            pages.fill(index, number, index * layer);
            let address = [pages.address(index, 0)];
            save(store, &[id(number)], Some(&[index as u32]), &address).unwrap()
        })
        .collect();
    tasks.iter().for_each(|task| done(task, Stage::Persisted));
}

/// Loads of one block, each of its layers by a task of its own.
struct Layers {
    number: u64,
    pages: Pages,
    /// The layer and its task, in the order of submission.
    tasks: Vec<(usize, Arc<Task>)>,
}

impl Layers {
    fn submit(
        store: &Store,
        number: u64,
        layer: usize,
        order: impl Iterator<Item = usize>,
        timeout_ms: i64,
    ) -> Self {
        let mut pages = Pages::new(BLOCK / layer, layer);
        let tasks = order
            .map(|index| {
                let (blocks, shards) = ([id(number)], [index as u32]);
                let addresses = [pages.address(index, 0)];
                let mut one = batch(&blocks, Some(&shards), &addresses);
                one.timeout_ms = timeout_ms;
                // SAFETY: the pages live until every task is released, see `end`.
                (index, unsafe { store.load(&one) }.unwrap())
            })
            .collect();
        Self { number, pages, tasks }
    }

    fn task(&self, layer: usize) -> &Task {
        &self.tasks.iter().find(|(index, _)| *index == layer).unwrap().1
    }

    /// Waits for all and checks every byte of those that succeeded; returns the others.
    fn end(mut self) -> Vec<(usize, ErrorKind)> {
        let mut failed = Vec::new();
        for (index, task) in &self.tasks {
            let progress = task.wait(Stage::Loaded, WAIT);
            done(task, Stage::Released);
            match progress {
                Progress::Done => {
                    let from = index * self.pages.block;
                    let wrong = self.pages.wrong(*index, self.number, from);
                    assert_eq!(wrong, None, "block {} layer {index}", self.number);
                }
                Progress::Failed(error) => failed.push((*index, error.kind())),
                Progress::Pending => panic!("layer {index} never came"),
            }
        }
        failed
    }
}

/// A disk with block 1, saved by layers, on which reads of this layer's first byte take long.
fn disk_with_a_slow_layer(layer: usize, delay: Duration) -> Arc<SimDisk> {
    let disk = SimDisk::new(SimConfig::default());
    let writer = store_on(&disk, &[]);
    save_by_layers(&writer, 1, LAYER);
    writer.close();
    // The first extent begins behind the segment's header page.
    let at = (4096 + layer * LAYER) as u64;
    let occasion = Occasion::Bytes("segments".into(), at..at + 1);
    disk.inject(Fault { call: Call::Read, occasion, effect: Effect::Delay(delay) });
    disk
}

/// Goal: while the last layer is still on the drive, the first is loaded, and the one behind it too; then all are.
#[test]
fn the_first_layer_is_there_while_the_last_is_on_the_drive() {
    for pipeline in ["Cache|Posix", "Posix"] {
        let disk = disk_with_a_slow_layer(LAYERS - 1, Duration::from_secs(4));
        let store = store_on(&disk, &[("store_pipeline", pipeline)]);
        let layers = Layers::submit(&store, 1, LAYER, 0..LAYERS, 0);
        for early in [0, 1] {
            done(layers.task(early), Stage::Loaded);
        }
        assert!(
            matches!(layers.task(LAYERS - 1).poll(Stage::Loaded), Progress::Pending),
            "the first layer waited for the last ({pipeline})"
        );
        assert_eq!(layers.end(), [], "{pipeline}");
        assert_eq!(Layers::submit(&store, 1, LAYER, 0..LAYERS, 0).end(), [], "{pipeline}");
    }
}

/// Goal: a layer that comes too late fails alone, with TIMEOUT, and later loads of the block get all of it.
#[test]
fn a_layer_that_is_late_fails_alone() {
    let disk = disk_with_a_slow_layer(LAYERS - 1, Duration::from_secs(3));
    let store = store_on(&disk, &[]);
    let early = Layers::submit(&store, 1, LAYER, 0..LAYERS - 4, 0);
    let late = Layers::submit(&store, 1, LAYER, LAYERS - 1..LAYERS, 300);
    assert_eq!(early.end(), []);
    assert_eq!(late.end(), [(LAYERS - 1, ErrorKind::Timeout)]);
    assert_eq!(Layers::submit(&store, 1, LAYER, 0..LAYERS, 0).end(), []);
}

/// Goal: a store closes while some layers of a block are there and others are being read.
#[test]
fn a_store_closes_while_layers_are_read() {
    let disk = disk_with_a_slow_layer(LAYERS - 1, Duration::from_secs(1));
    let store = store_on(&disk, &[]);
    let layers = Layers::submit(&store, 1, LAYER, 0..LAYERS, 0);
    done(layers.task(0), Stage::Loaded);
    store.close();
    for (layer, task) in &layers.tasks {
        assert_eq!(failure(task, Stage::Loaded), ErrorKind::Closed, "layer {layer}");
    }
}

/// Goal: layers in any order, in tasks of their own and from several threads, several blocks at a time, are what
/// was saved: with the writer's layers, with larger ones, with smaller ones, and of blocks that were saved whole.
#[test]
fn layers_are_what_was_saved_however_they_were_cut() {
    for engine in ["io_uring", "psync"] {
        let directory = TempDir::new().unwrap();
        let extra = [("io_engine", engine)];
        let with = |layer| store_in(directory.path(), layer, &extra);
        let writer = with(LAYER);
        (1..4).for_each(|number| save_by_layers(&writer, number, LAYER));
        save_blocks(&with(BLOCK), &[4], BLOCK);
        for layer in [LAYER, 2 * LAYER, LAYER / 2] {
            let store = with(layer);
            let count = BLOCK / layer;
            std::thread::scope(|scope| {
                for thread in 0..2 {
                    let store = &store;
                    scope.spawn(move || {
                        for number in 1..5 {
                            let order = (0..count).map(|index| (index * 5 + thread * 3) % count);
                            let layers = Layers::submit(store, number, layer, order, 0);
                            assert_eq!(layers.end(), [], "{engine} {layer}");
                        }
                    });
                }
            });
            let stats = store.stats().unwrap();
            assert_eq!((stats.loads_failed, stats.verify_failures), (0, 0), "{engine} {layer}");
        }
    }
}

/// A block with a byte changed in one of its layers, and a store that has not read it yet.
fn store_with_a_damaged_layer(directory: &Path, damaged: usize) -> Arc<Store> {
    let writer = store_in(directory, LAYER, &[]);
    save_by_layers(&writer, 1, LAYER);
    writer.close();
    damage_at(directory, 1, damaged * LAYER + 100);
    store_in(directory, LAYER, &[])
}

/// Goal: damage to a layer is CORRUPT for that layer only, wherever it is in the order; lookup then says no, the
/// block is not served from DRAM, and can be saved again.
#[test]
fn a_damaged_layer_is_corrupt_alone() {
    const ATTEMPTS: usize = 20;
    for damaged in [0, 5, LAYERS - 1] {
        let (_directory, store, ended) = (0..ATTEMPTS)
            .find_map(|_| {
                let directory = TempDir::new().unwrap();
                let store = store_with_a_damaged_layer(directory.path(), damaged);
                let ended = Layers::submit(&store, 1, LAYER, 0..LAYERS, 0).end();
                // Once the damage is found there is no block for layers that are submitted only then.
                let is_late = |(_, kind): &(usize, ErrorKind)| *kind == ErrorKind::NotFound;
                (!ended.iter().any(is_late)).then_some((directory, store, ended))
            })
            .expect("layers that were submitted before the damage was found");
        assert_eq!(ended, [(damaged, ErrorKind::Corrupt)]);
        assert_eq!(store.lookup_prefix(&[id(1)]).unwrap(), 0);
        let again = Layers::submit(&store, 1, LAYER, 0..LAYERS, 0).end();
        assert!(
            again.iter().all(|(_, kind)| *kind == ErrorKind::NotFound) && again.len() == LAYERS
        );
        save_by_layers(&store, 1, LAYER);
        assert_eq!(Layers::submit(&store, 1, LAYER, 0..LAYERS, 0).end(), []);
    }
}

/// Goal: where only the trailer is damaged the block is good as a whole, and is served.
#[test]
fn a_damaged_trailer_loses_no_layer() {
    let directory = TempDir::new().unwrap();
    let writer = store_in(directory.path(), LAYER, &[]);
    save_by_layers(&writer, 1, LAYER);
    writer.close();
    for path in files(directory.path(), "segments") {
        let mut bytes = std::fs::read(&path).unwrap();
        // The trailer is the page behind the first extent's bytes.
        bytes[4096 + BLOCK + 40] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let store = store_in(directory.path(), LAYER, &[]);
    assert_eq!(Layers::submit(&store, 1, LAYER, 0..LAYERS, 0).end(), []);
    assert_eq!(store.lookup_prefix(&[id(1)]).unwrap(), 1);
}

/// Goal: without checksums layers come by themselves too.
#[test]
fn layers_come_without_checksums() {
    let directory = TempDir::new().unwrap();
    let store = store_in(directory.path(), LAYER, &[("checksum", "off")]);
    save_by_layers(&store, 1, LAYER);
    let other = store_in(directory.path(), LAYER, &[("checksum", "off")]);
    assert_eq!(Layers::submit(&other, 1, LAYER, (0..LAYERS).rev(), 0).end(), []);
    let verifying = store_in(directory.path(), LAYER, &[]);
    assert_eq!(Layers::submit(&verifying, 1, LAYER, 0..LAYERS, 0).end(), []);
}

/// Goal: all layers of a block, one task each, cost its bytes once, and its trailer; a batch of all costs no more
/// than the bytes.
#[test]
fn a_block_is_read_once_whatever_the_tasks() {
    let directory = TempDir::new().unwrap();
    save_by_layers(&store_in(directory.path(), LAYER, &[]), 1, LAYER);
    let read = |store: &Store| {
        let text = store.metrics().unwrap();
        let line = text.lines().find(|it| it.starts_with("ucm_storage_read_bytes_total ")).unwrap();
        line.rsplit(' ').next().unwrap().parse::<usize>().unwrap()
    };
    let store = store_in(directory.path(), LAYER, &[]);
    let before = read(&store);
    assert_eq!(Layers::submit(&store, 1, LAYER, 0..LAYERS, 0).end(), []);
    assert_eq!(read(&store) - before, BLOCK + 4096);
    let store = store_in(directory.path(), LAYER, &[]);
    let before = read(&store);
    let mut pages = Pages::new(LAYERS, LAYER);
    let addresses: Vec<_> = (0..LAYERS).map(|layer| pages.address(layer, 0)).collect();
    let shards: Vec<u32> = (0..LAYERS as u32).collect();
    let task = load(&store, &[id(1); LAYERS], Some(&shards), &addresses).unwrap();
    done(&task, Stage::Loaded);
    assert!((0..LAYERS).all(|layer| pages.wrong(layer, 1, layer * LAYER).is_none()));
    assert_eq!(read(&store) - before, BLOCK);
}

//! Layer by layer into a device: a stream waits for the layers that it needs, not for those behind them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{batch, done, expected, id, options, save};
use crate::fakes::{EACH_DRIVER, Fake, Steering};
use ucm::io::backend::BackendConfig;
use ucm::io::sim::{Call, Effect, Fault, Occasion, SimConfig, SimDisk};
use ucm::store::{Platform, Store};
use ucm::task::{Progress, Stage};

const LAYERS: usize = 24;
const LAYER: usize = 128 << 10;
const BLOCK: usize = LAYERS * LAYER;

fn store_on(disk: &Arc<SimDisk>, device: &str) -> Arc<Store> {
    let (block, layer) = (BLOCK.to_string(), LAYER.to_string());
    let pairs = [
        ("storage_backends", "/sim"),
        ("cache_buffer_capacity_gb", "0.03"),
        ("block_size", block.as_str()),
        ("shard_size", layer.as_str()),
        ("tensor_size_list", layer.as_str()),
        ("segment_size_mb", "64"),
        ("device", device),
        ("device_id", "0"),
    ];
    let io = BackendConfig { io_bytes: 1 << 20, ..BackendConfig::default() };
    let backends = Some(vec![disk.backend(Path::new("/sim"), &io)]);
    Store::open_on(options(&pairs).build().unwrap(), Platform { backends, ..Platform::default() })
        .unwrap()
}

fn save_block(disk: &Arc<SimDisk>) {
    let writer = store_on(disk, "host");
    let mut bytes: Vec<u8> = (0..BLOCK).map(|at| expected(1, at)).collect();
    let addresses: Vec<_> =
        (0..LAYERS).map(|layer| bytes[layer * LAYER..].as_mut_ptr().cast()).collect();
    let shards: Vec<u32> = (0..LAYERS as u32).collect();
    let task = save(&writer, &[id(1); LAYERS], Some(&shards), &addresses).unwrap();
    done(&task, Stage::Persisted);
    done(&task, Stage::Released);
    writer.close();
}

/// Goal: while a late layer is still being read from the drive, the stream of the model is made to wait for layer 0
/// and reads its bytes, and those of the layers that have come since; in the end all are right and nothing leaks.
#[test]
fn a_stream_gets_layer_0_while_a_later_one_is_on_the_drive() {
    const LATE: usize = LAYERS - 2;
    for &kind in EACH_DRIVER {
        let fake = Fake::take(kind);
        let disk = SimDisk::new(SimConfig::default());
        save_block(&disk);
        // The first extent begins behind the segment's header page.
        let at = (4096 + LATE * LAYER) as u64;
        let occasion = Occasion::Bytes("segments".into(), at..at + 1);
        let effect = Effect::Delay(Duration::from_secs(4));
        disk.inject(Fault { call: Call::Read, occasion, effect });
        let store = store_on(&disk, kind.device);
        fake.delay(200);
        let memory = fake.alloc(BLOCK);
        let stream = fake.stream();
        let tasks: Vec<_> = (0..LAYERS)
            .map(|layer| {
                let (blocks, shards) = ([id(1)], [layer as u32]);
                let addresses = [memory.base.wrapping_add(layer * LAYER).cast()];
                // SAFETY: the memory lives until every task is released.
                unsafe { store.load(&batch(&blocks, Some(&shards), &addresses)) }.unwrap()
            })
            .collect();
        for (layer, task) in tasks.iter().enumerate() {
            // SAFETY: the stream lives.
            unsafe { store.stream_wait(task, stream.stream) }.unwrap();
            if layer == 0 {
                let late = tasks[LATE].poll(Stage::Loaded);
                assert!(matches!(late, Progress::Pending), "layer 0 waited for {LATE}: {kind:?}");
            }
            let mut seen = vec![0; LAYER];
            stream.read(&mut seen, memory.base.wrapping_add(layer * LAYER));
            stream.sync();
            let wrong = (0..LAYER).find(|at| seen[*at] != expected(1, layer * LAYER + at));
            assert_eq!(wrong, None, "layer {layer}: {kind:?}");
        }
        for task in &tasks {
            done(task, Stage::Loaded);
            done(task, Stage::Released);
        }
        store.close();
        drop((stream, memory, tasks, store));
        fake.assert_no_leak();
    }
}

//! The store against a naive model: for every pipeline, on the simulated disk and on both real engines,
//! whole-part and layer-wise, 1 to 8 parts, with faults, reopening and several stores on one directory.
//!
//! The model knows of each part whether its save was acknowledged. What was acknowledged must be found and
//! loaded; what nobody tried to save must not; and whatever is loaded must have the right bytes.

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use proptest::prelude::*;
use tempfile::TempDir;
use ucm::error::ErrorKind;
use ucm::io::backend::BackendConfig;
use ucm::io::sim::{Call, Effect, Fault, Occasion, SimConfig, SimDisk};
use ucm::store::{Platform, Store};
use ucm::task::{Progress, Stage, Task};

const PART: usize = 32 << 10;
const BLOCKS: u64 = 12;

#[derive(Clone, Copy, Debug)]
enum Disk {
    Sim,
    Uring,
    Psync,
}

#[derive(Clone, Debug)]
struct World {
    pipeline: &'static str,
    disk: Disk,
    parts: usize,
    shards: usize,
    durability: &'static str,
    seed: u64,
}

fn world() -> impl Strategy<Value = World> {
    (
        prop::sample::select(vec!["Cache|Posix", "Posix", "Cache|Empty"]),
        prop::sample::select(vec![Disk::Sim, Disk::Sim, Disk::Uring, Disk::Psync]),
        prop::sample::select(vec![1usize, 2, 3, 8]),
        prop::sample::select(vec![1usize, 2, 8]),
        prop::sample::select(vec!["none", "ordered", "durable"]),
        any::<u64>(),
    )
        .prop_map(|(pipeline, disk, parts, shards, durability, seed)| World {
            pipeline,
            disk,
            parts,
            shards,
            durability,
            seed,
        })
}

#[derive(Clone, Debug)]
enum Step {
    Save { store: usize, blocks: Vec<u64> },
    SaveShards { store: usize, block: u64, from: usize, count: usize },
    Load { store: usize, blocks: Vec<u64> },
    LoadByShards { store: usize, block: u64, from: usize },
    Hold { store: usize, blocks: Vec<u64> },
    Release { which: usize },
    Lookup { store: usize },
    Prefetch { store: usize, blocks: Vec<u64> },
    Reopen { store: usize },
    Break { call: usize },
    Heal,
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = || prop::collection::vec(0..BLOCKS, 1..5);
    prop_oneof![
        4 => (0usize..16, blocks()).prop_map(|(store, blocks)| Step::Save { store, blocks }),
        3 => (0usize..16, 0..BLOCKS, 0usize..8, 1usize..9)
            .prop_map(|(store, block, from, count)| Step::SaveShards { store, block, from, count }),
        4 => (0usize..16, blocks()).prop_map(|(store, blocks)| Step::Load { store, blocks }),
        3 => (0usize..16, 0..BLOCKS, 0usize..8)
            .prop_map(|(store, block, from)| Step::LoadByShards { store, block, from }),
        1 => (0usize..16, blocks()).prop_map(|(store, blocks)| Step::Hold { store, blocks }),
        1 => (0usize..16).prop_map(|which| Step::Release { which }),
        2 => (0usize..16).prop_map(|store| Step::Lookup { store }),
        1 => (0usize..16, blocks()).prop_map(|(store, blocks)| Step::Prefetch { store, blocks }),
        1 => (0usize..16).prop_map(|store| Step::Reopen { store }),
        1 => (0usize..3).prop_map(|call| Step::Break { call }),
        1 => Just(Step::Heal),
    ]
}

/// Two stores for each part, a model of what they have said, and the disk under them.
struct Run {
    world: World,
    directory: TempDir,
    sim: Arc<SimDisk>,
    stores: Vec<Arc<Store>>,
    /// Blocks that a store holds, with the task that does.
    holds: Vec<(usize, u64, Arc<Task>)>,
    acknowledged: HashSet<(u64, usize)>,
    tried: HashSet<(u64, usize)>,
    broken: bool,
}

impl Run {
    fn new(world: World) -> Self {
        let config = SimConfig {
            seed: world.seed,
            short: world.seed.is_multiple_of(2).then_some(5),
            delay_max: Duration::from_micros(world.seed % 3 * 100),
            ..SimConfig::default()
        };
        let mut run = Self {
            directory: TempDir::new().unwrap(),
            sim: SimDisk::new(config),
            stores: Vec::new(),
            holds: Vec::new(),
            acknowledged: HashSet::new(),
            tried: HashSet::new(),
            broken: false,
            world,
        };
        run.stores =
            (0..run.world.parts * 2).map(|index| run.open(index % run.world.parts)).collect();
        run
    }

    fn open(&self, part: usize) -> Arc<Store> {
        let world = &self.world;
        let directory = match world.disk {
            Disk::Sim => "/sim",
            _ => self.directory.path().to_str().unwrap(),
        };
        let (part, parts) = (part.to_string(), world.parts.to_string());
        let (size, shard) = (PART.to_string(), (PART / world.shards).to_string());
        let engine = if matches!(world.disk, Disk::Psync) { "psync" } else { "auto" };
        let mut pairs = vec![
            ("store_pipeline", world.pipeline),
            ("cache_buffer_capacity_gb", "0.002"),
            ("part_count", parts.as_str()),
            ("part_index", &part),
            ("block_size", &size),
            ("shard_size", &shard),
            ("durability", world.durability),
            ("io_engine", engine),
            ("segment_size_mb", "1"),
            ("timeout_ms", "20000"),
            ("lookup_refresh_ms", "1"),
        ];
        if world.pipeline != "Cache|Empty" {
            pairs.push(("storage_backends", directory));
        }
        let config = options(&pairs).build().unwrap();
        let on_sim = matches!(world.disk, Disk::Sim) && world.pipeline != "Cache|Empty";
        let backends =
            on_sim.then(|| vec![self.sim.backend(Path::new("/sim"), &BackendConfig::default())]);
        Store::open_on(config, Platform { backends, ..Platform::default() }).unwrap()
    }

    fn part(&self, store: usize) -> usize {
        store % self.world.parts
    }

    fn shard_bytes(&self) -> usize {
        PART / self.world.shards
    }

    fn is_dram_only(&self) -> bool {
        self.world.pipeline == "Cache|Empty"
    }

    /// Number under which the bytes of a part are made.
    fn content(block: u64, part: usize) -> u64 {
        block * 100 + part as u64
    }

    /// Saves shards `range` of the blocks; whole parts are acknowledged when the task is.
    fn save(&mut self, store: usize, blocks: &[u64], range: std::ops::Range<usize>) {
        let (part, bytes) = (self.part(store), self.shard_bytes());
        let entries: Vec<(u64, usize)> = blocks
            .iter()
            .flat_map(|block| range.clone().map(move |shard| (*block, shard)))
            .collect();
        let mut pages = Pages::new(entries.len(), bytes);
        for (index, (block, shard)) in entries.iter().enumerate() {
            pages.fill(index, Self::content(*block, part), shard * bytes);
        }
        let ids: Vec<_> = entries.iter().map(|(block, _)| id(*block)).collect();
        let shards: Vec<_> = entries.iter().map(|(_, shard)| *shard as u32).collect();
        let addresses: Vec<_> = (0..entries.len()).map(|index| pages.address(index, 0)).collect();
        let task = save(&self.stores[store], &ids, Some(&shards), &addresses).unwrap();
        let copied = task.wait(Stage::Copied, WAIT);
        assert!(self.broken || matches!(copied, Progress::Done), "{copied:?}");
        done(&task, Stage::Released);
        self.tried.extend(blocks.iter().map(|block| (*block, part)));
        if range.len() < self.world.shards {
            return;
        }
        let persisted = task.wait(Stage::Persisted, WAIT);
        assert!(self.broken || matches!(persisted, Progress::Done), "{persisted:?}");
        for (entry, status) in entries.iter().zip(task.statuses().unwrap()) {
            if status.is_ok() && !self.is_dram_only() {
                self.acknowledged.insert((entry.0, part));
            }
        }
    }

    fn load(&mut self, store: usize, blocks: &[u64]) {
        let (part, bytes, shards) = (self.part(store), self.shard_bytes(), self.world.shards);
        let entries: Vec<(u64, usize)> =
            blocks.iter().flat_map(|block| (0..shards).map(move |shard| (*block, shard))).collect();
        let mut pages = Pages::new(entries.len(), bytes);
        let ids: Vec<_> = entries.iter().map(|(block, _)| id(*block)).collect();
        let indexes: Vec<_> = entries.iter().map(|(_, shard)| *shard as u32).collect();
        let addresses: Vec<_> = (0..entries.len()).map(|index| pages.address(index, 0)).collect();
        let task = load(&self.stores[store], &ids, Some(&indexes), &addresses).unwrap();
        let _ = task.wait(Stage::Loaded, WAIT);
        done(&task, Stage::Released);
        for (index, status) in task.statuses().unwrap().into_iter().enumerate() {
            let (block, shard) = entries[index];
            self.judge_load(store, block, &status);
            if status.is_ok() {
                assert_eq!(pages.wrong(index, Self::content(block, part), shard * bytes), None);
            }
        }
    }

    /// Every shard by a task of its own, beginning anywhere, all under way together.
    fn load_by_shards(&mut self, store: usize, block: u64, from: usize) {
        let (part, bytes, shards) = (self.part(store), self.shard_bytes(), self.world.shards);
        let mut pages = Pages::new(shards, bytes);
        let tasks: Vec<_> = (0..shards)
            .map(|shard| {
                let shard = (shard + from) % shards;
                let address = [pages.address(shard, 0)];
                let index = [shard as u32];
                (shard, load(&self.stores[store], &[id(block)], Some(&index), &address).unwrap())
            })
            .collect();
        for (shard, task) in tasks {
            let _ = task.wait(Stage::Loaded, WAIT);
            done(&task, Stage::Released);
            let status = task.statuses().unwrap().remove(0);
            self.judge_load(store, block, &status);
            if status.is_ok() {
                assert_eq!(pages.wrong(shard, Self::content(block, part), shard * bytes), None);
            }
        }
    }

    fn hold(&mut self, store: usize, blocks: &[u64]) {
        let ids: Vec<_> = blocks.iter().map(|block| id(*block)).collect();
        let task = match self.stores[store].hold(&ids, 0) {
            Ok(task) => task,
            Err(error) => {
                assert!(self.world.pipeline == "Posix" && error.kind() == ErrorKind::Unsupported);
                return;
            }
        };
        let _ = task.wait(Stage::Loaded, WAIT);
        for (block, status) in blocks.iter().zip(task.statuses().unwrap()) {
            match &status {
                Ok(()) => self.holds.push((store, *block, Arc::clone(&task))),
                Err(error) if error.kind() == ErrorKind::Busy => {}
                Err(_) => self.judge_load(store, *block, &status),
            }
        }
    }

    fn release(&mut self, which: usize) {
        if self.holds.is_empty() {
            return;
        }
        let (_, _, task) = self.holds.swap_remove(which % self.holds.len());
        self.holds.retain(|(_, _, other)| !Arc::ptr_eq(other, &task));
        task.release_handle();
    }

    /// Whether the status of a load is one that the model allows.
    fn judge_load(&mut self, store: usize, block: u64, status: &ucm::error::Result<()>) {
        let part = self.part(store);
        let held = self.holds.iter().any(|(at, held, _)| (*at, *held) == (store, block));
        match status {
            Err(error) if held => panic!("a load of held block {block} failed: {error}"),
            Ok(()) => {
                assert!(self.tried.contains(&(block, part)), "block {block} came from nowhere");
            }
            Err(error) if self.broken => {
                // A read that failed for good leaves the index: the part may be missed from now on.
                assert_ne!(error.kind(), ErrorKind::Internal, "{error}");
                self.acknowledged.remove(&(block, part));
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                assert!(
                    !self.acknowledged.contains(&(block, part)),
                    "block {block} is lost: {error}"
                );
            }
        }
    }

    fn lookup(&self, store: usize) {
        let ids: Vec<_> = (0..BLOCKS).map(id).collect();
        let mut found = vec![9; ids.len()];
        if self.stores[store].refresh(None).is_err() {
            assert!(self.broken);
            return;
        }
        self.stores[store].lookup(&ids, &mut found).unwrap();
        for block in 0..BLOCKS {
            let parts = || (0..self.world.parts).map(|part| (block, part));
            let must = parts().all(|part| self.acknowledged.contains(&part)) && !self.broken;
            let may = parts().all(|part| self.tried.contains(&part));
            let answer = found[block as usize] == 1;
            assert!(
                (!must || answer) && (may || !answer),
                "block {block}: {answer}, must {must}, may {may}"
            );
        }
        let length = |found: &[u8]| found.iter().take_while(|found| **found == 1).count();
        let prefix = self.stores[store].lookup_prefix(&ids).unwrap();
        let before = length(&found);
        if prefix != before {
            // A prefetch in the background that evicts, or whose read fails, takes blocks away in between.
            self.stores[store].lookup(&ids, &mut found).unwrap();
            let after = length(&found);
            assert!((after..before).contains(&prefix), "{prefix}, not from {after} to {before}");
        }
    }

    fn take(&mut self, step: Step) {
        let count = self.stores.len();
        match step {
            Step::Save { store, blocks } => self.save(store % count, &blocks, 0..self.world.shards),
            Step::SaveShards { store, block, from, count: length } => {
                let from = from % self.world.shards;
                let to = (from + length).min(self.world.shards);
                self.save(store % count, &[block], from..to);
            }
            Step::Load { store, blocks } => self.load(store % count, &blocks),
            Step::LoadByShards { store, block, from } => {
                self.load_by_shards(store % count, block, from);
            }
            Step::Hold { store, blocks } => self.hold(store % count, &blocks),
            Step::Release { which } => self.release(which),
            Step::Lookup { store } => self.lookup(store % count),
            Step::Prefetch { store, blocks } => {
                let ids: Vec<_> = blocks.into_iter().map(id).collect();
                self.stores[store % count].prefetch(&ids).unwrap();
            }
            Step::Reopen { store } if !self.broken => {
                let store = store % count;
                self.stores[store].close();
                self.holds.retain(|(at, _, _)| *at != store);
                self.stores[store] = self.open(self.part(store));
            }
            Step::Break { call } if matches!(self.world.disk, Disk::Sim) => {
                let call = [Call::Read, Call::Write, Call::SyncData][call];
                self.sim.inject(Fault {
                    call,
                    occasion: Occasion::OneIn(3),
                    effect: Effect::Errno(libc::EIO),
                });
                self.broken = true;
            }
            Step::Reopen { .. } | Step::Break { .. } => {}
            Step::Heal => {
                self.sim.heal();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Goal: whatever the order of events and faults, the store keeps what it acknowledged and serves
    /// nothing else.
    #[test]
    fn the_store_does_what_the_model_says(world in world(), steps in prop::collection::vec(step(), 5..40)) {
        let mut run = Run::new(world);
        for step in steps {
            run.take(step);
        }
        for store in 0..run.stores.len() {
            run.lookup(store);
            run.load(store, &(0..BLOCKS).collect::<Vec<_>>());
        }
    }
}

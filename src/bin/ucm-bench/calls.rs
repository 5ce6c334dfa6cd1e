//! Workloads without transfers: lookups, hashes, restarts, an idle store, and plain memcpy to compare with.
//!
//! Each runs on one thread until its share is through or the run is stopped.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::abi::Store;
use crate::job::{Job, RateProcess, Workload};
use crate::memory::Mapping;
use crate::model::Shape;
use crate::options;
use crate::pattern::block_id;
use crate::random::Random;
use crate::source::{ABSENT, Arrivals, INSERTED, Source, Work};
use crate::tally::Tally;
use crate::transfer::{Bench, Transfer, UNSERVED, pages_needed};

/// Batches of keys that are made before the clock starts, and then asked for in turn.
const POOL_BATCHES: usize = 4096;
/// Lookups and hashes of a job without a runtime, in keys or blocks.
const KEYS_MIN: u64 = 1_000_000;
/// Blocks that the inserting thread has in flight at most.
pub const INSERT_DEPTH: u32 = 32;
/// Restarts of a job without a runtime.
const OPENS: u64 = 5;
/// Memory that memcpy reads from, at most: well beyond any processor cache.
const MEMCPY_SOURCE: u64 = 1 << 30;
/// How often an idle thread looks for the end. Seldom, because its wake-ups are counted too.
const TICK: Duration = Duration::from_millis(250);

/// Runs the job's workload on this thread; `blocks` is the data set.
pub fn run(
    bench: &Bench<'_>,
    blocks: u64,
    clone: u32,
    folders: &[std::path::PathBuf],
    copies: Option<&Copies>,
) -> Tally {
    match bench.job.rw {
        Workload::Lookup | Workload::Prefix => lookup(bench, blocks, clone),
        Workload::Hash => hash(bench, clone),
        Workload::Open => open(bench, folders),
        Workload::Memcpy => copies.map_or_else(Tally::default, |copies| memcpy(bench, copies)),
        _ => idle(bench),
    }
}

fn stopped(bench: &Bench<'_>) -> bool {
    bench.shared.stop.load(Ordering::Relaxed)
}

fn counting(bench: &Bench<'_>) -> bool {
    bench.shared.counting.load(Ordering::Relaxed)
}

/// Batches of keys, a share `hit` of them present: mixed at random, or, for a prefix, the first ones.
fn key_pool(job: &Job, seed: u64, blocks: u64, clone: u32) -> Vec<Vec<[u8; 16]>> {
    let mut random = Random::new(job.randseed ^ 0x6b65_7973 ^ (u64::from(clone) << 32));
    let batch = u64::from(job.batch);
    let present = (job.hit * batch as f64).round() as u64;
    let keys = |random: &mut Random| {
        let first = random.below(blocks);
        (0..batch)
            .map(|n| {
                let number = match job.rw {
                    Workload::Prefix if n < present => (first + n) % blocks,
                    Workload::Prefix => ABSENT + first + n,
                    _ if random.fraction() < job.hit => random.below(blocks),
                    _ => ABSENT + random.below(blocks),
                };
                block_id(seed, number)
            })
            .collect()
    };
    let batches = (2 * KEYS_MIN / batch).clamp(1, POOL_BATCHES as u64);
    (0..batches).map(|_| keys(&mut random)).collect()
}

fn lookup(bench: &Bench<'_>, blocks: u64, clone: u32) -> Tally {
    let job = bench.job;
    let mut tally = Tally::default();
    let pool = key_pool(job, bench.seed, blocks, clone);
    let mut found = vec![0; job.batch as usize];
    let mut asked = 0;
    for keys in pool.iter().cycle() {
        let through = asked >= KEYS_MIN.max(blocks) && !job.time_based && job.runtime.is_none();
        if through || stopped(bench) {
            break;
        }
        asked += keys.len() as u64;
        let start = Instant::now();
        let present = if job.rw == Workload::Prefix {
            bench.store.lookup_prefix(keys).map(|hits| hits as u64)
        } else {
            bench
                .store
                .lookup(keys, &mut found)
                .map(|()| found.iter().filter(|&&present| present != 0).count() as u64)
        };
        let elapsed = start.elapsed();
        bench.shared.blocks.fetch_add(keys.len() as u64, Ordering::Relaxed);
        if !counting(bench) {
            continue;
        }
        match present {
            Ok(present) => {
                tally.latency("lookup", elapsed, 1);
                tally.asked += keys.len() as u64;
                tally.blocks += keys.len() as u64;
                tally.present += present;
            }
            Err(failure) => {
                tally.error(crate::abi::status_name(failure.status), 1, || failure.message);
            }
        }
    }
    tally
}

/// Saves blocks of its own at the job's `insert_rate` while lookups run, `INSERT_DEPTH` in flight at most. What it
/// saved and what failed is told apart from the lookups.
pub fn insert(bench: &Bench<'_>, pages: &crate::memory::Pages) -> Tally {
    let job = Job {
        rw: Workload::Save,
        iodepth: INSERT_DEPTH,
        batch: 1,
        numjobs: 1,
        layerwise: false,
        rate_process: RateProcess::Linear,
        ..bench.job.clone()
    };
    let inner = Bench { job: &job, ..*bench };
    let arrivals = Arrivals::new(&job, job.insert_rate, job.batch, 0);
    let mut numbers = INSERTED..;
    let mut next =
        || Some(Work { direction: crate::abi::Direction::Save, numbers: vec![numbers.next()?] });
    let saved = Transfer::new(&inner, pages).run(&mut next, Some(arrivals));
    let mut tally = Tally { inserted: saved.blocks, busy: saved.busy, ..Tally::default() };
    // The rate reached tells of those that stood in line.
    for (name, error) in saved.errors.iter().filter(|(name, _)| name.as_str() != UNSERVED) {
        tally.error(format!("insert {name}"), error.count, || error.example.clone());
    }
    tally
}

fn hash(bench: &Bench<'_>, clone: u32) -> Tally {
    let job = bench.job;
    let mut tally = Tally::default();
    let mut random = Random::new(job.randseed ^ (u64::from(clone) << 32));
    let count = job.batch as usize * job.block_tokens as usize;
    let tokens: Vec<u32> = (0..count).map(|_| random.below(150_000) as u32).collect();
    let mut ids = vec![[0; 16]; job.batch as usize];
    let mut asked = 0_u64;
    while !stopped(bench) && (job.runtime.is_some() || asked < KEYS_MIN) {
        asked += u64::from(job.batch);
        let start = Instant::now();
        let hashed = bench.store.hash(&tokens, job.block_tokens, &mut ids);
        let elapsed = start.elapsed();
        bench.shared.blocks.fetch_add(ids.len() as u64, Ordering::Relaxed);
        match hashed {
            Ok(hashed) if counting(bench) => {
                tally.latency("hash", elapsed, 1);
                tally.blocks += hashed as u64;
                tally.bytes += tokens.len() as u64 * 4;
            }
            Ok(_) => {}
            Err(failure) => {
                tally.error(crate::abi::status_name(failure.status), 1, || failure.message);
                break;
            }
        }
    }
    tally
}

fn open(bench: &Bench<'_>, folders: &[std::path::PathBuf]) -> Tally {
    let mut tally = Tally::default();
    let mut opened = 0;
    let known = [block_id(bench.seed, 0)];
    while !stopped(bench) && (bench.job.runtime.is_some() || opened < OPENS) {
        opened += 1;
        let mut found = [0];
        let start = Instant::now();
        let store = match options::of(bench.job, folders) {
            Ok(options) => Store::open(&options),
            Err(message) => Err(crate::abi::Failure { status: 3, message }),
        };
        let looked = store.and_then(|store| {
            let opened = start.elapsed();
            store.lookup(&known, &mut found)?;
            Ok((opened, start.elapsed()))
        });
        match looked {
            Ok((opened, looked)) if counting(bench) => {
                tally.latency("opened", opened, 1);
                tally.latency("first lookup", looked, 1);
                tally.blocks += 1;
                tally.asked += 1;
                tally.present += u64::from(found[0] != 0);
            }
            Ok(_) => {}
            Err(failure) => {
                tally.error(crate::abi::status_name(failure.status), 1, || failure.message);
                break;
            }
        }
        bench.shared.blocks.fetch_add(1, Ordering::Relaxed);
    }
    tally
}

fn idle(bench: &Bench<'_>) -> Tally {
    while !stopped(bench) {
        std::thread::sleep(TICK);
    }
    Tally::default()
}

/// What memcpy reads and writes, made before the clock starts.
pub struct Copies {
    from: Mapping,
    from_blocks: u64,
    to: Mapping,
    to_blocks: u64,
}

impl Copies {
    /// A source well beyond any processor cache, and room for the blocks in flight.
    pub fn new(job: &Job, shape: &Shape) -> Result<Self, String> {
        let bytes = shape.bytes();
        let from_blocks = (MEMCPY_SOURCE.min(job.size) / bytes).max(1);
        let to_blocks = pages_needed(job) as u64;
        Ok(Self {
            from: Mapping::new((from_blocks * bytes) as usize)?,
            from_blocks,
            to: Mapping::new((to_blocks * bytes) as usize)?,
            to_blocks,
        })
    }
}

fn memcpy(bench: &Bench<'_>, copies: &Copies) -> Tally {
    let job = bench.job;
    let mut tally = Tally::default();
    let bytes = bench.shape.bytes() as usize;
    // In random order, as blocks of a cache are read.
    let endless =
        Job { rw: Workload::RandLoad, batch: 1, numjobs: 1, time_based: true, ..job.clone() };
    let mut order = Source::new(&endless, copies.from_blocks, 0);
    let blocks = job.block_count().unwrap_or(1);
    let mut done = 0;
    while !stopped(bench) && (job.runtime.is_some() || done < blocks) {
        let Some(work) = order.next() else { break };
        let start = Instant::now();
        // SAFETY: both numbers are below the block counts that the mappings were made for; the mappings
        // are different, and one thread copies (`memcpy` jobs have one).
        unsafe {
            let from = copies.from.base().add(work.numbers[0] as usize * bytes);
            let to = copies.to.base().add((done % copies.to_blocks) as usize * bytes);
            std::ptr::copy_nonoverlapping(from, to, bytes);
        }
        done += 1;
        let elapsed = start.elapsed();
        bench.shared.blocks.fetch_add(1, Ordering::Relaxed);
        bench.shared.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if counting(bench) {
            tally.latency("copied", elapsed, 1);
            tally.blocks += 1;
            tally.bytes += bytes as u64;
        }
    }
    tally
}

//! Several processes on one directory: killed at random moments, and all at once for a while.
//!
//! Children are this test binary again, started on the test `child` with what to do in the environment.

mod common;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use tempfile::TempDir;
use ucm::error::ErrorKind;
use ucm::store::Store;
use ucm::task::Stage;

const BLOCK: usize = 64 << 10;
const KILLS: u64 = 50;

/// Seconds of the run with 4 writers and 4 readers.
fn soak_seconds() -> u64 {
    std::env::var("UCM_TEST_SOAK_SECONDS").map_or(60, |seconds| seconds.parse().expect("seconds"))
}

/// A store with little DRAM, so that most loads come from storage.
fn small_store(directory: &Path, extra: &[(&str, &str)]) -> Arc<Store> {
    let mut all = vec![("cache_buffer_capacity_gb", "0.004")];
    all.extend(extra);
    store_in(directory, &all)
}

fn spawn(role: &str, directory: &Path, seed: u64, seconds: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--ignored"])
        .env("UCM_TEST_ROLE", role)
        .env("UCM_TEST_DIRECTORY", directory)
        .env("UCM_TEST_SEED", seed.to_string())
        .env("UCM_TEST_SECONDS", seconds.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Small, seeded, and good enough to choose by.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Not a test: what the children do.
#[test]
#[ignore = "the body of the child processes"]
fn child() {
    let Ok(role) = std::env::var("UCM_TEST_ROLE") else { return };
    let directory = std::env::var("UCM_TEST_DIRECTORY").unwrap();
    let seed: u64 = std::env::var("UCM_TEST_SEED").unwrap().parse().unwrap();
    let seconds: u64 = std::env::var("UCM_TEST_SECONDS").unwrap().parse().unwrap();
    let until = Instant::now() + Duration::from_secs(seconds);
    match role.as_str() {
        "victim" => save_until_killed(Path::new(&directory), seed),
        "writer" => write_at_random(Path::new(&directory), seed, until),
        "reader" => read_at_random(Path::new(&directory), seed, until),
        other => panic!("no role {other}"),
    }
}

/// Saves blocks without end, some at once and some layer by layer, and says which were PERSISTED.
fn save_until_killed(directory: &Path, seed: u64) {
    let layerwise = seed.is_multiple_of(3);
    let durability = ["none", "ordered", "durable"][(seed % 5).min(2) as usize];
    let mut extra = vec![("durability", durability)];
    if layerwise {
        extra.push(("shard_size", "8192"));
    }
    let store = small_store(directory, &extra);
    let mut random = Random(seed * 2 + 1);
    let mut next = seed << 20;
    let mut out = std::io::stdout();
    loop {
        let count = 1 + random.below(12);
        let numbers: Vec<u64> = (next..next + count).collect();
        next += count;
        if layerwise {
            numbers.iter().for_each(|number| save_layers(&store, *number));
        } else {
            save_blocks(&store, &numbers, BLOCK);
        }
        for number in numbers {
            writeln!(out, "persisted {number}").unwrap();
        }
        out.flush().unwrap();
    }
}

fn save_layers(store: &Store, number: u64) {
    let mut tasks = Vec::new();
    let mut memory = Vec::new();
    for shard in 0..8u32 {
        let mut pages = Pages::new(1, 8192);
        pages.fill(0, number, shard as usize * 8192);
        let address = [pages.address(0, 0)];
        tasks.push(save(store, &[id(number)], Some(&[shard]), &address).unwrap());
        memory.push(pages);
    }
    tasks.iter().for_each(|task| done(task, Stage::Persisted));
}

/// Goal: killed at any moment, a saver leaves a directory from which everything that it acknowledged as
/// PERSISTED is served, and nothing wrong.
#[test]
fn a_saver_killed_fifty_times_loses_nothing_it_acknowledged() {
    let directory = TempDir::new().unwrap();
    let mut persisted: Vec<u64> = Vec::new();
    let mut random = Random(0xC0FFEE);
    for kill in 1..=KILLS {
        let mut victim = spawn("victim", directory.path(), kill, 0);
        let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let number =
            |line: &str| line.strip_prefix("persisted ").and_then(|n| n.parse::<u64>().ok());
        let mut news = Vec::new();
        // Every other one is killed some time after its first block, the others at any moment of their start.
        while kill.is_multiple_of(2) && news.is_empty() {
            news.extend(number(&lines.next().expect("the child saves").unwrap()));
        }
        let patience = Duration::from_millis(random.below(280));
        let killer = std::thread::spawn(move || {
            std::thread::sleep(patience);
            victim.kill().unwrap();
            victim.wait().unwrap();
        });
        while let Some(Ok(line)) = lines.next() {
            news.extend(number(&line));
        }
        killer.join().unwrap();
        let store = small_store(directory.path(), &[]);
        // A line may be cut by the kill: its number is then of another block, which is checked all the same.
        for chunk in news.chunks(32) {
            let failed = load_blocks(&store, chunk, BLOCK);
            assert!(failed.is_empty(), "kill {kill}: acknowledged blocks are gone: {failed:?}");
        }
        serve_nothing_wrong(&store, kill);
        persisted.extend(news);
        store.close();
    }
    println!("{KILLS} kills, {} blocks acknowledged", persisted.len());
    assert!(persisted.len() as u64 >= KILLS / 2, "the children hardly saved: {}", persisted.len());
    let store = small_store(directory.path(), &[]);
    for chunk in persisted.chunks(64) {
        assert_eq!(load_blocks(&store, chunk, BLOCK), []);
    }
    let used = used_bytes(directory.path());
    let needed = persisted.len() as u64 * (BLOCK as u64 + 4096) + (KILLS + 2) * (1 << 20);
    assert!(
        used < 2 * needed,
        "{used} bytes on disk for {needed}: dead writers' leftovers pile up"
    );
}

/// Loads what the victim may have been saving when it was killed: right bytes, or a miss.
fn serve_nothing_wrong(store: &Store, kill: u64) {
    let first = kill << 20;
    let numbers: Vec<u64> = (first..first + 400).collect();
    for chunk in numbers.chunks(50) {
        for (number, kind) in load_blocks(store, chunk, BLOCK) {
            assert_eq!(kind, ErrorKind::NotFound, "block {number}");
        }
    }
}

fn used_bytes(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let metadata = entry.metadata().unwrap();
        bytes +=
            if metadata.is_dir() { used_bytes(&entry.path()) } else { metadata.blocks() * 512 };
    }
    bytes
}

/// Blocks of a prompt family: prefixes are shared among all writers.
const FAMILIES: u64 = 40;
const LENGTH: u64 = 30;

fn write_at_random(directory: &Path, seed: u64, until: Instant) {
    let layerwise = seed % 2 == 1;
    let store = small_store(directory, if layerwise { &[("shard_size", "8192")] } else { &[] });
    let mut random = Random(seed + 77);
    let mut saved = 0;
    while Instant::now() < until {
        let family = random.below(FAMILIES);
        let length = 1 + random.below(LENGTH);
        let numbers: Vec<u64> = (0..length).map(|at| family * 1000 + at).collect();
        if layerwise {
            numbers.iter().for_each(|number| save_layers(&store, *number));
        } else {
            save_blocks(&store, &numbers, BLOCK);
        }
        // What this process was told is PERSISTED it can load.
        assert_eq!(load_whole(&store, &numbers, layerwise), 0);
        saved += length;
    }
    println!("saved {saved}");
}

/// Loads blocks whole or layer by layer; returns how many were missing.
fn load_whole(store: &Store, numbers: &[u64], layerwise: bool) -> usize {
    if !layerwise {
        return load_blocks(store, numbers, BLOCK).len();
    }
    let mut missing = 0;
    for number in numbers {
        let mut pages = Pages::new(8, 8192);
        let addresses: Vec<_> = (0..8).map(|shard| pages.address(shard, 0)).collect();
        let task =
            load(store, &[id(*number); 8], Some(&[0, 1, 2, 3, 4, 5, 6, 7]), &addresses).unwrap();
        let _ = task.wait(Stage::Loaded, WAIT);
        for (shard, status) in task.statuses().unwrap().into_iter().enumerate() {
            match status {
                Ok(()) => {
                    assert_eq!(pages.wrong(shard, *number, shard * 8192), None, "block {number}")
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                    missing += 1;
                }
            }
        }
    }
    missing
}

fn read_at_random(directory: &Path, seed: u64, until: Instant) {
    let store =
        small_store(directory, if seed % 2 == 1 { &[("store_pipeline", "Posix")] } else { &[] });
    let mut random = Random(seed + 991);
    let mut known: HashSet<u64> = HashSet::new();
    let (mut loaded, mut descriptors, mut memory) = (0, 0, 0);
    let begun = Instant::now();
    while Instant::now() < until {
        let family = random.below(FAMILIES);
        let numbers: Vec<u64> = (0..LENGTH).map(|at| family * 1000 + at).collect();
        let ids: Vec<_> = numbers.iter().map(|number| id(*number)).collect();
        let hits = store.lookup_prefix(&ids).unwrap();
        if hits == 0 {
            continue;
        }
        assert_eq!(load_blocks(&store, &numbers[..hits], BLOCK), [], "what a lookup promised");
        known.extend(&numbers[..hits]);
        for number in numbers.iter().filter(|number| known.contains(*number)) {
            let mut found = [0];
            store.lookup(&[id(*number)], &mut found).unwrap();
            assert_eq!(found, [1], "block {number} was published and is lost");
        }
        loaded += hits;
        // Growth is measured from a third of the time on, when caches are warm.
        if descriptors == 0 && begun.elapsed() > until.duration_since(begun) / 3 {
            (descriptors, memory) = (open_descriptors(), resident_bytes());
        }
    }
    assert!(loaded > 0, "the reader never hit");
    assert!(
        open_descriptors() <= descriptors + 40,
        "{} descriptors, {descriptors} before",
        open_descriptors()
    );
    assert!(resident_bytes() < memory + (32 << 20), "{} bytes, {memory} before", resident_bytes());
    println!("loaded {loaded}");
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Goal: 4 writers and 4 readers on one directory, shared prefixes, random work: no wrong byte, no lost
/// published block, no growth of descriptors or memory.
#[test]
fn four_writers_and_four_readers_agree() {
    let directory = TempDir::new().unwrap();
    let seconds = soak_seconds();
    let writers = (0..4).map(|seed| spawn("writer", directory.path(), seed, seconds));
    let readers = (0..4).map(|seed| spawn("reader", directory.path(), seed, seconds));
    let children: Vec<Child> = writers.chain(readers).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}");
        for line in
            text.lines().filter(|line| line.starts_with("saved ") || line.starts_with("loaded "))
        {
            println!("{line}");
        }
    }
}

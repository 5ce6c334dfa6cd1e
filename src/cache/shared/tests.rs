//! Tests of the shared table: against a set, across processes, and against dead writers.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::block::{BlockId, PartKey};

/// Set for the process that plays the writer: the directory of its table.
const CHILD: &str = "UCM_TEST_SHARED_WRITER";

fn scope() -> SharedScope {
    SharedScope { fingerprint: [9; 16], instance: "engine".into() }
}

fn key(number: u64, part: u16) -> PartKey {
    let mut block = BlockId::default();
    block.0[..8].copy_from_slice(&number.to_le_bytes());
    block.0[8..].copy_from_slice(&number.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    PartKey { block, part }
}

fn tables(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

#[test]
fn a_reader_sees_what_the_writer_holds_and_nothing_after_it_closed() {
    // Goal: insert, remove, close, as seen from a reader that was open before and one that came later.
    let directory = tempfile::tempdir().unwrap();
    let early = SharedReaders::new_in(directory.path(), &scope());
    assert!(!early.view().contains(&key(1, 0)));
    let mut writer = SharedTable::create_in(directory.path(), &scope(), 100).unwrap();
    let mode = writer.path().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    writer.insert(&key(1, 0));
    writer.insert(&key(1, 1));
    early.scan();
    let late = SharedReaders::new_in(directory.path(), &scope());
    for reader in [&early, &late] {
        let view = reader.view();
        assert!(view.contains(&key(1, 0)) && view.contains(&key(1, 1)));
        assert!(!view.contains(&key(1, 2)) && !view.contains(&key(2, 0)));
    }
    writer.remove(&key(1, 0));
    assert!(!late.view().contains(&key(1, 0)) && late.view().contains(&key(1, 1)));
    drop(writer);
    assert!(!late.view().contains(&key(1, 1)));
    assert_eq!(tables(directory.path()), 0);
    late.scan();
    assert!(late.is_empty());
}

#[test]
fn other_namespaces_and_instances_are_not_seen() {
    // Goal: DRAM of another engine, or with another content, is no hit.
    let directory = tempfile::tempdir().unwrap();
    let mut writer = SharedTable::create_in(directory.path(), &scope(), 10).unwrap();
    writer.insert(&key(1, 0));
    for other in [
        SharedScope { fingerprint: [8; 16], ..scope() },
        SharedScope { instance: "other".into(), ..scope() },
    ] {
        let reader = SharedReaders::new_in(directory.path(), &other);
        assert!(reader.is_empty() && !reader.view().contains(&key(1, 0)));
    }
}

#[test]
fn a_table_is_bounded() {
    // Goal: more keys than slots cannot be; what comes beyond is left out, and room is found again.
    let directory = tempfile::tempdir().unwrap();
    let mut writer = SharedTable::create_in(directory.path(), &scope(), 3).unwrap();
    (0..10).for_each(|number| writer.insert(&key(number, 0)));
    assert_eq!(writer.len(), 3);
    writer.remove(&key(0, 0));
    writer.insert(&key(9, 0));
    let reader = SharedReaders::new_in(directory.path(), &scope());
    let view = reader.view();
    let seen: Vec<_> = (0..10).filter(|number| view.contains(&key(*number, 0))).collect();
    assert_eq!(seen, [1, 2, 9]);
}

#[test]
fn files_that_are_no_tables_are_not_believed() {
    // Goal: short, foreign, readable-by-all and lying files are ignored; nothing is mapped beyond its end.
    let directory = tempfile::tempdir().unwrap();
    let mut writer = SharedTable::create_in(directory.path(), &scope(), 100).unwrap();
    writer.insert(&key(1, 0));
    let bytes = std::fs::read(writer.path()).unwrap();
    let prefix = scope().prefix();
    let copy = |name: &str, bytes: &[u8], mode: u32| {
        let path = directory.path().join(format!("{prefix}{name}"));
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    copy("a", b"", 0o600);
    copy("b", &bytes[..100], 0o600);
    copy("c", &bytes[..bytes.len() - 64], 0o600);
    copy("d", &bytes, 0o644);
    let mut huge = bytes.clone();
    huge[8..16].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    copy("e", &huge, 0o600);
    let mut elsewhere = bytes.clone();
    elsewhere[24..32].copy_from_slice(&1_u64.to_le_bytes());
    copy("f", &elsewhere, 0o600);
    let reader = SharedReaders::new_in(directory.path(), &scope());
    assert_eq!(reader.len(), 1, "only the writer's own");
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u64, u16),
    Remove(u64, u16),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_table_matches_a_set(
        steps in prop::collection::vec(
            prop_oneof![
                (0_u64..60, 0_u16..3).prop_map(|(n, part)| Step::Insert(n, part)),
                (0_u64..60, 0_u16..3).prop_map(|(n, part)| Step::Remove(n, part)),
            ], 1..400),
        bound in 1_u32..80,
    ) {
        // Goal: against a set of the same bound, also where buckets overflow and are passed.
        let directory = tempfile::tempdir().unwrap();
        let mut writer = SharedTable::create_in(directory.path(), &scope(), bound).unwrap();
        let reader = SharedReaders::new_in(directory.path(), &scope());
        let mut model = HashSet::new();
        for step in steps {
            match step {
                Step::Insert(number, part) => {
                    writer.insert(&key(number, part));
                    if model.len() < bound as usize {
                        model.insert((number, part));
                    }
                }
                Step::Remove(number, part) => {
                    writer.remove(&key(number, part));
                    model.remove(&(number, part));
                }
            }
            prop_assert_eq!(writer.len(), model.len());
        }
        let view = reader.view();
        for number in 0..60 {
            for part in 0..3 {
                prop_assert_eq!(view.contains(&key(number, part)), model.contains(&(number, part)));
            }
        }
    }
}

#[test]
fn readers_beside_a_busy_writer_never_lose_a_key_that_stays() {
    // Goal: while others come and go around them, keys that stay are always found, keys never written never.
    const STAY: u64 = 500;
    let directory = tempfile::tempdir().unwrap();
    let mut writer = SharedTable::create_in(directory.path(), &scope(), 1000).unwrap();
    (0..STAY).for_each(|number| writer.insert(&key(number, 0)));
    let reader = SharedReaders::new_in(directory.path(), &scope());
    let (stop, looked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let view = reader.view();
                    for number in 0..STAY {
                        assert!(view.contains(&key(number, 0)), "key {number} was lost");
                        assert!(!view.contains(&key(number, 7)), "key {number} was invented");
                    }
                    looked.fetch_add(STAY, Ordering::Relaxed);
                }
            });
        }
        let start = Instant::now();
        let mut round = 0;
        while start.elapsed() < Duration::from_millis(300) {
            for number in 0..400 {
                writer.insert(&key(10_000 + round * 400 + number, 0));
            }
            for number in 0..400 {
                writer.remove(&key(10_000 + round * 400 + number, 0));
            }
            round += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(looked.load(Ordering::Relaxed) > STAY);
}

/// Not a test of its own: the process that plays the writer in the test below.
#[test]
fn the_writer_process() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let mut writer = SharedTable::create_in(Path::new(&directory), &scope(), 100).unwrap();
    (0..50).for_each(|number| writer.insert(&key(number, 0)));
    std::fs::write(Path::new(&directory).join("ready"), b"").unwrap();
    std::thread::sleep(Duration::from_secs(60));
    drop(writer);
}

#[test]
fn a_killed_writers_table_is_not_believed_and_is_removed_by_the_next() {
    // Goal: another process's table is read; after kill -9 it says nothing at once, even to a reader that
    // has it mapped, and the next writer removes the file.
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["cache::shared::tests::the_writer_process", "--exact"])
        .env(CHILD, directory.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let ready = directory.path().join("ready");
    let start = Instant::now();
    while !ready.exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "the writer did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let reader = SharedReaders::new_in(directory.path(), &scope());
    let view = reader.view();
    assert!((0..50).all(|number| view.contains(&key(number, 0))));
    assert!(!view.contains(&key(50, 0)));
    child.kill().unwrap();
    // Not reaped yet: a zombie is dead too. Wait for the kernel to have ended it.
    let start = Instant::now();
    while reader.view().contains(&key(0, 0)) {
        assert!(start.elapsed() < Duration::from_secs(10), "a dead writer is believed");
    }
    child.wait().unwrap();
    assert!(!reader.view().contains(&key(0, 0)));
    assert_eq!(tables(directory.path()), 2, "the table is still there");
    assert!(SharedReaders::new_in(directory.path(), &scope()).is_empty());
    let writer = SharedTable::create_in(directory.path(), &scope(), 10).unwrap();
    assert_eq!(tables(directory.path()), 2, "the dead one is gone, the new one there");
    assert!(writer.path().exists());
}

#[test]
fn a_forked_child_takes_nothing_with_it() {
    // Goal: a child that ends, destructors included, leaves its parent's table alone.
    let directory = tempfile::tempdir().unwrap();
    let mut writer = SharedTable::create_in(directory.path(), &scope(), 10).unwrap();
    writer.insert(&key(1, 0));
    let reader = SharedReaders::new_in(directory.path(), &scope());
    // SAFETY: the child only drops the writer, which in a child returns at once, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(writer);
        // SAFETY: ends the child without running anything of the test harness.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: reaps the child that was just made.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    assert!(writer.path().exists() && reader.view().contains(&key(1, 0)));
}

#[test]
fn a_question_costs_nanoseconds() {
    // Goal: prints what a key costs a lookup; a release build keeps it under 200 ns with hits and misses.
    const KEYS: u64 = 20_000;
    let directory = tempfile::tempdir().unwrap();
    let mut writer = SharedTable::create_in(directory.path(), &scope(), KEYS as u32).unwrap();
    (0..KEYS).for_each(|number| writer.insert(&key(number, 0)));
    let reader = SharedReaders::new_in(directory.path(), &scope());
    let keys: Vec<_> = (0..2 * KEYS).map(|number| key(number * 7 % (2 * KEYS), 0)).collect();
    let mut each = Duration::MAX;
    for _ in 0..20 {
        let (mut hits, start) = (0, Instant::now());
        for batch in keys.chunks(256) {
            let view = reader.view();
            hits += batch.iter().filter(|key| view.contains(key)).count() as u64;
        }
        each = each.min(start.elapsed() / keys.len() as u32);
        assert_eq!(hits, KEYS);
    }
    println!("{each:?} per key in batches of 256, of {KEYS} in the table");
    if !cfg!(debug_assertions) {
        assert!(each < Duration::from_nanos(200), "{each:?}");
    }
}

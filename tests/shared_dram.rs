//! A scheduler's lookup-only store sees what is in the DRAM of the host's other stores.

mod common;

use common::*;

const BLOCK: usize = 64 << 10;

fn pairs<'a>(namespace: &'a str, extra: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut pairs = vec![
        ("store_pipeline", "Cache|Empty"),
        ("cache_buffer_capacity_gb", "0.01"),
        ("block_size", "65536"),
        ("namespace_extra", namespace),
    ];
    pairs.extend(extra);
    pairs
}

/// Goal: DRAM hits of a transferring store are seen by a lookup-only store, until the blocks are gone.
#[test]
fn a_scheduler_sees_the_dram_of_its_workers() {
    let namespace = format!("test-{}", std::process::id());
    let scheduler = open(&pairs(&namespace, &[("device_id", "-1")]));
    let worker = open(&pairs(&namespace, &[]));
    let ids = [id(1), id(2), id(3)];
    assert_eq!(scheduler.lookup_prefix(&ids).unwrap(), 0);
    save_blocks(&worker, &[1, 2], BLOCK);
    scheduler.refresh(None).unwrap();
    assert_eq!(scheduler.lookup_prefix(&ids).unwrap(), 2);
    save_blocks(&worker, &(100..400).collect::<Vec<_>>(), BLOCK);
    assert_eq!(scheduler.lookup_prefix(&ids).unwrap(), 0, "evicted");
    save_blocks(&worker, &[3], BLOCK);
    assert_eq!(scheduler.lookup_prefix(&ids[2..]).unwrap(), 1);
    worker.close();
    assert_eq!(scheduler.lookup_prefix(&ids[2..]).unwrap(), 0, "its writer is gone");
}

/// Goal: of a block in two parts both ranks' DRAM must have theirs.
#[test]
fn both_ranks_must_have_their_part() {
    let namespace = format!("test-tp2-{}", std::process::id());
    let rank = |part| open(&pairs(&namespace, &[("part_count", "2"), ("part_index", part)]));
    let scheduler = open(&pairs(&namespace, &[("part_count", "2"), ("device_id", "-1")]));
    let (first, second) = (rank("0"), rank("1"));
    save_blocks(&first, &[1], BLOCK);
    assert_eq!(scheduler.lookup_prefix(&[id(1)]).unwrap(), 0);
    save_blocks(&second, &[1], BLOCK);
    scheduler.refresh(None).unwrap();
    first.refresh(None).unwrap();
    assert_eq!(scheduler.lookup_prefix(&[id(1)]).unwrap(), 1);
    assert_eq!(first.lookup_prefix(&[id(1)]).unwrap(), 1);
}

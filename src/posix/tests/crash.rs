//! Power cuts and process deaths at every step of a save, on the seeded disk.

use std::path::Path;
use std::sync::Arc;

use super::world::*;
use crate::config::{DirectIo, Durability, IoEngine};
use crate::io::backend::BackendConfig;
use crate::io::sim::{SimConfig, SimDisk, Survival};
use crate::posix::{Scope, Tail, Tier, TierConfig};

const DIRECTORY: &str = "/store";
/// Parts that a run saves, three at a time: more than a page of records in all.
const PARTS: u64 = 75;

fn tier_on(disk: &SimDisk, durability: Durability) -> crate::error::Result<Arc<Tier>> {
    let backend = disk.backend(
        Path::new(DIRECTORY),
        &BackendConfig {
            engine: IoEngine::Psync,
            direct: DirectIo::Auto,
            threads: 1,
            depth: 8,
            io_bytes: 1 << 20,
            queue_depth: 1024,
            ..BackendConfig::default()
        },
    );
    let scope = Scope { parts: 0..1, tail: Tail::Own };
    let config = TierConfig { durability, segment_bytes: 1 << 18, ..config() };
    Tier::open(&namespace(1), scope, vec![backend], config, deadline())
}

/// Saves until the power goes; returns the numbers that were acknowledged.
fn save_until_dark(disk: &SimDisk, durability: Durability) -> Vec<u64> {
    let Ok(tier) = tier_on(disk, durability) else { return Vec::new() };
    let mut acknowledged = Vec::new();
    for first in (0..PARTS).step_by(3) {
        let numbers: Vec<u64> = (first..first + 3).collect();
        let keys: Vec<_> = numbers.iter().map(|number| key(*number, 0)).collect();
        let saved = save_many(&tier, &keys);
        acknowledged.extend(
            numbers.iter().zip(saved).filter(|(_, saved)| saved.is_ok()).map(|(number, _)| number),
        );
        if disk.is_dark() {
            break;
        }
    }
    std::mem::forget(tier);
    acknowledged
}

/// Everything acknowledged is served where it must be, and nothing is ever served wrong. Returns how many
/// acknowledged parts were lost.
fn check(disk: &SimDisk, acknowledged: &[u64], must_serve: bool, what: &str) -> usize {
    let mut lost = 0;
    let tier = tier_on(disk, Durability::None).unwrap();
    for number in 0..PARTS {
        let key = key(number, 0);
        match load(&tier, &key) {
            Ok(bytes) => assert!(bytes == expected(&key), "{what}: part {number} is wrong"),
            Err(error) if acknowledged.contains(&number) => {
                assert!(!must_serve, "{what}: part {number} was acknowledged and is lost: {error}");
                lost += 1;
            }
            Err(_) => {}
        }
    }
    // And the heir can save.
    save(&tier, key(PARTS + 1, 0)).unwrap();
    lost
}

fn crash_at_every(
    stride: u64,
    durability: Durability,
    survival: Survival,
    must_serve: bool,
) -> usize {
    let calm = SimDisk::new(SimConfig::default());
    assert_eq!(save_until_dark(&calm, durability).len() as u64, PARTS);
    let steps = calm.steps();
    assert!(steps > 80, "{steps} steps");
    let (mut served, mut lost) = (0, 0);
    for crash_at in (1..steps).step_by(stride as usize) {
        let config = SimConfig { seed: crash_at, crash_at: Some(crash_at), ..Default::default() };
        let disk = SimDisk::new(config);
        let acknowledged = save_until_dark(&disk, durability);
        served += acknowledged.len();
        let after = disk.reboot(survival, SimConfig { seed: crash_at, ..Default::default() });
        lost +=
            check(&after, &acknowledged, must_serve, &format!("{durability:?}, step {crash_at}"));
    }
    assert!(served > 0, "nothing was acknowledged in any run: the test tests nothing");
    lost
}

/// Goal: a process may die at any step; what it acknowledged is served, whatever the durability.
#[test]
fn a_death_at_any_step_loses_nothing_acknowledged() {
    crash_at_every(3, Durability::None, Survival::ProcessDeath, true);
}

/// Goal: with `durable` a power cut at any step loses nothing that was acknowledged.
#[test]
fn durable_survives_a_power_cut_at_any_step() {
    crash_at_every(4, Durability::Durable, Survival::PowerLoss, true);
}

/// Goal: a power cut that keeps a head page and loses the full page that it counts loses nothing that was
/// acknowledged with `durable`: the head before still has those records.
#[test]
fn a_page_that_just_became_full_is_not_lost() {
    let calm = SimDisk::new(SimConfig::default());
    let tier = tier_on(&calm, Durability::Durable).unwrap();
    let mut steps = Vec::new();
    for first in (0..PARTS).step_by(3) {
        let keys: Vec<_> = (first..first + 3).map(|number| key(number, 0)).collect();
        save_many(&tier, &keys).into_iter().for_each(|saved| saved.unwrap());
        steps.push(calm.steps());
    }
    drop(tier);
    // A page holds 64 records, and every few parts a segment is sealed.
    for crash_at in steps[14]..steps[21] {
        let config = SimConfig { seed: crash_at, crash_at: Some(crash_at), ..Default::default() };
        let disk = SimDisk::new(config);
        let acknowledged = save_until_dark(&disk, Durability::Durable);
        for seed in 0..4 {
            let after = disk.reboot(Survival::PowerLoss, SimConfig { seed, ..Default::default() });
            check(&after, &acknowledged, true, &format!("step {crash_at}, seed {seed}"));
        }
    }
}

/// Goal: with `ordered` and `none` a power cut may lose parts, but never serves wrong bytes.
#[test]
fn a_power_cut_falsifies_nothing() {
    crash_at_every(7, Durability::Ordered, Survival::PowerLoss, false);
    let lost = crash_at_every(7, Durability::None, Survival::PowerLoss, false);
    assert!(
        lost > 0,
        "the disk kept what was never flushed: these tests would not see a missing flush"
    );
}

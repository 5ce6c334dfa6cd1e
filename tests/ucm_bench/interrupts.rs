//! Ctrl-C in the middle: what ended before is reported, and nothing is left behind.

use crate::comparisons::{against_copies, has_fio, has_fio_with_ring};
use crate::rig::{Bench, SMALL};

/// Goal: a run that would go on prints what it has, says that it was cut short, and removes its files.
#[test]
fn ctrl_c_prints_what_a_run_has() {
    let bench = Bench::new();
    let directory = format!("--directory={}", bench.path().display());
    let endless = ["--name=endless", "--rw=randload", "--time-based", "--runtime=1h"];
    let format = ["--output-format=json"];
    let mut running = bench.start(&[&[directory.as_str()][..], &SMALL, &format, &endless].concat());
    // A line of the layout before it says so after the first blank.
    running.until("endless:  ");
    assert_eq!(bench.entries().len(), 1, "a folder of its own");
    let root = running.interrupt().json();
    assert_eq!(root["interrupted"], true);
    let job = &root["groups"][0]["jobs"][0];
    assert!(job["blocks"].as_u64() > Some(0), "{job:#}");
    assert_eq!(job["errors"], serde_json::json!({}));
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

/// Goal: a sweep reports the points that ended.
#[test]
fn ctrl_c_keeps_the_points_of_a_sweep() {
    let bench = Bench::new();
    let place = tempfile::tempdir().unwrap();
    let directory = format!("--directory={}", bench.path().display());
    let report = format!("--report={}", place.path().join("sweep.html").display());
    let lists = ["--sweep-rw=save,randload", "--sweep-block-size=64k", "--sweep-iodepth=1"];
    let endless = ["--size=2m", "--segment-size-mb=8", "--time-based", "--runtime=1h"];
    let arguments = ["sweep", &directory, &report, "--output-format=json"];
    let mut running = bench.start(&[&arguments[..], &lists, &endless].concat());
    running.until("randload 64 KiB depth 1: ");
    let root = running.interrupt().json();
    assert_eq!(
        (&root["interrupted"], &root["groups"][0]["jobs"][0]["rw"]),
        (&true.into(), &"save".into())
    );
    let page = std::fs::read_to_string(place.path().join("sweep.html")).unwrap();
    assert!(page.contains("save: Throughput") && page.contains("interrupted: these are"));
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

/// Goal: the rounds that ended before are compared, and the JSON says that there should be more.
#[test]
fn ctrl_c_keeps_the_rounds_against_fio() {
    if !has_fio() {
        return;
    }
    let bench = Bench::new();
    let directory = format!("--directory={}", bench.path().display());
    let arguments = ["compare", "fio", &directory, "--bs=64k", "--size=2m", "--rounds=100000"];
    let settings =
        ["--segment-size-mb=8", "--sides=load", "--io-engine=psync", "--output-format=json"];
    let mut running = bench.start(&[&arguments[..], &settings].concat());
    running.until("load: round 2 of");
    let answer = running.interrupt();
    assert!(answer.complaint.contains("rounds that ended before"), "{}", answer.complaint);
    let root = answer.json();
    assert_eq!(root["interrupted"], true);
    let rounds = root["sides"][0]["rounds"].as_array().unwrap().len();
    assert!((1..100).contains(&rounds), "{rounds}");
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

/// Goal: loads beside saves report the rounds that ended, too.
#[test]
fn ctrl_c_keeps_the_rounds_beside() {
    let bench = Bench::new();
    if !has_fio_with_ring(&bench) {
        return;
    }
    let directory = format!("--directory={}", bench.path().display());
    let arguments = ["compare", "beside", &directory, "--bs=64k", "--size=2m", "--rounds=100000"];
    let settings = ["--segment-size-mb=8", "--runtime=300ms", "--output-format=json"];
    let mut running = bench.start(&[&arguments[..], &settings].concat());
    running.until("beside: round 2 of");
    let root = running.interrupt().json();
    assert_eq!(
        (&root["format"], &root["interrupted"]),
        (&"ucm-bench compare beside".into(), &true.into())
    );
    assert!(!root["rounds"].as_array().unwrap().is_empty(), "{root:#}");
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

/// Goal: the rows that ended before Ctrl-C came, in a row that had no round yet, are reported.
#[test]
fn ctrl_c_discarded_the_rows_against_plain_copies() {
    let bench = Bench::new();
    let more = ["--runtime=1h", "--rounds=1", "--output-format=json"];
    let mut running = bench.start_with(against_copies(&bench, &more));
    running.until("load of 16 KiB: round 0");
    let root = running.interrupt().json();
    assert_eq!(root["interrupted"], true);
    let ways: Vec<_> = root["rows"].as_array().unwrap().iter().map(|row| &row["way"]).collect();
    assert_eq!(ways, ["save"]);
}

/// Goal: a replay whose requests have all arrived and are worked on slowly ends, with those that are through.
#[test]
fn ctrl_c_did_not_end_a_replay_that_had_all_its_requests() {
    let bench = Bench::new();
    let place = tempfile::tempdir().unwrap();
    let trace = place.path().join("t.jsonl");
    let line = r#"{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}"#;
    std::fs::write(&trace, format!("{line}\n").repeat(5)).unwrap();
    let directory = format!("--directory={}", bench.path().display());
    let arguments =
        ["trace", "replay", trace.to_str().unwrap(), &directory, "--output-format=json"];
    let slow = ["--numjobs=1", "--bs=64k", "--segment-size-mb=8", "--prefill-rate=0.1"];
    let mut running = bench.start(&[&arguments[..], &slow].concat());
    running.until_times("blocks/s", 4);
    let root = running.interrupt().json();
    assert_eq!(root["interrupted"], true);
    // The first misses everything, so nothing holds it up before its answer is computed.
    assert_eq!(root["groups"][0]["jobs"][0]["latency_us"]["request ready"]["count"], 1, "{root:#}");
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

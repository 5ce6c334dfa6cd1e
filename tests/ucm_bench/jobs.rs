//! Jobs: what their reports say, and that the reports say it of what happened.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use crate::rig::{BLOCK, BLOCKS, Bench};

/// The documentation of the JSON.
const DOCUMENTED: &str = include_str!("../../docs/performance.md");

fn names(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("{name} in {value:#}"))
}

/// The documentation names these fields, and of groups and jobs no others.
fn check_documentation(fields: &BTreeSet<&str>) {
    let section = DOCUMENTED.split("\n## ").find(|section| section.starts_with("JSON")).unwrap();
    let told = |text: &'static str| text.split('`').skip(1).step_by(2);
    let words: BTreeSet<&str> = told(section)
        .flat_map(|code| code.split(|c: char| c != '_' && !c.is_alphanumeric()))
        .collect();
    for field in fields {
        // Both are told as one.
        let name = if field.ends_with("_per_gb") { "_per_gb" } else { field };
        assert!(words.contains(name), "`{field}` is not documented");
    }
    let rows = section.lines().filter(|line| line.starts_with("| `groups[]"));
    let is_name = |code: &&str| code.chars().all(|c| c == '_' || c.is_ascii_lowercase());
    for name in rows.flat_map(told).filter(is_name) {
        // Of an error.
        let inner = ["count", "example"].contains(&name);
        assert!(inner || fields.contains(name), "`{name}` is documented and not there");
    }
}

/// The latencies of a stage are of so many, and in order.
fn check_latencies(job: &Value, stage: &str, count: u64) {
    let latency = &job["latency_us"][stage];
    assert_eq!(latency["count"], count, "{stage} in {job:#}");
    let order = ["p50", "p90", "p99", "p999", "max"].map(|name| number(latency, name));
    assert!(order[0] > 0.0 && order.is_sorted(), "{latency:#}");
    let mean = number(latency, "mean");
    assert!(mean > 0.0 && mean <= order[4], "{latency:#}");
}

/// Goal: every field of the JSON stands in the documentation, has its unit, and agrees with the others.
#[test]
fn json_says_what_is_documented() {
    let bench = Bench::new();
    let root = bench.json(&["--rw=randload", "--verify", "--iodepth=8", "--batch=4"]);
    let group = &root["groups"][0];
    let job = &group["jobs"][0];
    let objects = [&root, group, job, &job["latency_us"]["loaded"]];
    check_documentation(&objects.into_iter().flat_map(names).collect());
    assert_eq!((&root["format"], &root["version"]), (&"ucm-bench".into(), &1.into()));
    assert_eq!(root["interrupted"], false);
    assert_eq!((&job["rw"], &job["block_bytes"]), (&"randload".into(), &BLOCK.into()));
    assert_eq!(
        (&job["iodepth"], &job["batch"], &job["numjobs"]),
        (&8.into(), &4.into(), &1.into())
    );
    assert_eq!(job["store"]["segment_size_mb"], "8");
    assert_eq!((&job["blocks"], &job["bytes"]), (&BLOCKS.into(), &(BLOCKS * BLOCK).into()));
    let seconds = number(job, "seconds");
    let close = |name: &str, expected: f64| {
        let value = number(job, name);
        assert!((value / expected - 1.0).abs() < 1e-6, "{name} is {value} and not {expected}");
    };
    close("gb_per_second", (BLOCKS * BLOCK) as f64 / 1e9 / seconds);
    close("blocks_per_second", BLOCKS as f64 / seconds);
    close("hit_ratio", 1.0);
    assert_eq!((&job["wrong_blocks"], &job["errors"]), (&0.into(), &serde_json::json!({})));
    assert_eq!(names(&job["latency_us"]), BTreeSet::from(["loaded"]));
    check_latencies(job, "loaded", BLOCKS);
    let cpu = number(group, "cpu_user_seconds") + number(group, "cpu_system_seconds");
    let per_gb =
        number(group, "cpu_user_seconds_per_gb") + number(group, "cpu_system_seconds_per_gb");
    assert!(cpu > 0.0 && (per_gb * (BLOCKS * BLOCK) as f64 / 1e9 / cpu - 1.0).abs() < 1e-6);
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

/// Goal: a save has both of its stages.
#[test]
fn saves_have_two_stages() {
    let root = Bench::new().json(&["--rw=save"]);
    let job = &root["groups"][0]["jobs"][0];
    check_latencies(job, "copied", BLOCKS);
    check_latencies(job, "persisted", BLOCKS);
}

/// Goal: CSV has one line for each stage, under the names of its columns.
#[test]
fn csv_has_a_line_for_each_stage() {
    let text = Bench::new().small(&["--rw=save", "--output-format=csv"]).good();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(',').collect()).collect();
    let at = |line: usize, name: &str| {
        let column = lines[0].iter().position(|column| *column == name).unwrap();
        assert_eq!(lines[line].len(), lines[0].len(), "{text}");
        lines[line][column]
    };
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!([at(1, "stage"), at(2, "stage")], ["copied", "persisted"]);
    for line in [1, 2] {
        let (blocks, bytes) = (BLOCKS.to_string(), (BLOCKS * BLOCK).to_string());
        assert_eq!(
            [at(line, "blocks"), at(line, "bytes"), at(line, "count")],
            [&blocks, &bytes, &blocks]
        );
        let p50: f64 = at(line, "p50_us").parse().unwrap();
        assert!(p50 > 0.0 && p50 <= at(line, "max_us").parse().unwrap(), "{text}");
    }
}

/// Goal: the sections of a job file run in turn behind a stonewall, with the settings of `[global]`.
#[test]
fn job_file_with_two_jobs() {
    let bench = Bench::new();
    let file = bench.file("two.fio");
    let text = "; as fio's\n[global]\ndirectory=${UCM_BENCH_PLACE}\nbs=64k\nsize=2m\nsegment_size_mb=8\n\
                group_reporting\n\n[fill]\nrw=save  # new blocks\n\n[read]\nstonewall\nrw=randload\niodepth=4\n";
    std::fs::write(&file, text).unwrap();
    let mut command = bench.command(&[file.to_str().unwrap(), "--output-format=json"]);
    command.env("UCM_BENCH_PLACE", bench.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let root: Value = serde_json::from_slice(&output.stdout).unwrap();
    let jobs = ["fill", "read"].map(|name| {
        let mut all = root["groups"].as_array().unwrap().iter().map(|group| &group["jobs"][0]);
        all.find(|job| job["name"] == name).unwrap()
    });
    assert_eq!(root["groups"].as_array().unwrap().len(), 2, "{root:#}");
    assert_eq!([&jobs[0]["rw"], &jobs[1]["rw"]], ["save", "randload"]);
    assert_eq!([&jobs[0]["iodepth"], &jobs[1]["iodepth"]], [32, 4]);
    assert_eq!([&jobs[0]["blocks"], &jobs[1]["blocks"]], [BLOCKS, BLOCKS]);
}

/// Goal: jobs by `--name` without a stonewall run together.
#[test]
fn named_jobs_share_a_group() {
    let root = Bench::new().json(&["--name=a", "--rw=save", "--name=b", "--rw=load"]);
    let groups = root["groups"].as_array().unwrap();
    assert_eq!((groups.len(), groups[0]["jobs"].as_array().unwrap().len()), (1, 2), "{root:#}");
}

/// Goal: sizes, times, counts, percentages and switches are written as fio's.
#[test]
fn units() {
    let bench = Bench::new();
    let job = |arguments: &[&str]| bench.json(arguments)["groups"][0]["jobs"][0].clone();
    let sizes = job(&["--rw=load", "--bs=0.125M", "--size=1024KiB", "--runtime=100000ms"]);
    assert_eq!([&sizes["block_bytes"], &sizes["blocks"]], [128 << 10, 8]);
    let counts = job(&["--rw=save", "--bs=4k", "--blocks=0.1k", "--direct=0", "--verify=no"]);
    assert_eq!((&counts["blocks"], &counts["store"]["io_direct"]), (&100.into(), &"false".into()));
    let ended = job(&["--rw=load", "--runtime=1000ms", "--time_based"]);
    let seconds = number(&ended, "seconds");
    assert!(seconds >= 1.0 && ended["blocks"].as_u64() > Some(0), "{ended:#}");
    let hits = job(&["--rw=lookup", "--hit=25%", "--batch=1", "--runtime=1", "--blocks=64"]);
    let ratio = number(&hits, "hit_ratio");
    assert!((0.2..0.3).contains(&ratio), "{ratio}");
}

/// Goal: `--keep` leaves the blocks, and the next run loads them without saving them again.
#[test]
fn kept_blocks_are_found_again() {
    let bench = Bench::new();
    bench.small(&["--rw=save", "--verify", "--keep"]).good();
    let saved = kept_segments(&bench);
    let root = bench.json(&["--rw=load", "--verify", "--keep"]);
    let job = &root["groups"][0]["jobs"][0];
    assert_eq!((&job["blocks"], &job["wrong_blocks"]), (&BLOCKS.into(), &0.into()));
    assert!(!saved.is_empty() && kept_segments(&bench) == saved, "the data set was saved again");
    assert_eq!(bench.entries(), ["ucm-bench-keep"]);
}

/// Goal: blocks that cannot be loaded are told, and make the run fail.
#[test]
fn damaged_blocks_exit_2() {
    let bench = Bench::new();
    bench.small(&["--rw=save", "--verify", "--keep"]).good();
    for segment in kept_segments(&bench) {
        let length = std::fs::metadata(&segment).unwrap().len();
        std::fs::write(&segment, vec![0xA5; length as usize]).unwrap();
    }
    let answer = bench.small(&["--rw=load", "--verify", "--keep", "--output-format=json"]);
    assert_eq!(answer.code, Some(2), "{}{}", answer.text, answer.complaint);
    let root: Value = serde_json::from_str(&answer.text).unwrap();
    let job = &root["groups"][0]["jobs"][0];
    assert_eq!((&job["blocks"], &job["wrong_blocks"]), (&0.into(), &0.into()), "{job:#}");
    let counts = job["errors"].as_object().unwrap().values().map(|error| &error["count"]);
    assert_eq!(counts.map(|count| count.as_u64().unwrap()).sum::<u64>(), BLOCKS, "{job:#}");
}

/// The segment files that `--keep` left.
fn kept_segments(bench: &Bench) -> BTreeSet<PathBuf> {
    let mut folders = vec![bench.file("ucm-bench-keep")];
    let mut segments = BTreeSet::new();
    while let Some(folder) = folders.pop() {
        let inside = folder.ends_with("segments");
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.is_dir() {
                true => folders.push(entry),
                false if inside => drop(segments.insert(entry)),
                false => {}
            }
        }
    }
    segments
}

/// Goal: people get a table with throughput, stages and CPU, in the place they name.
#[test]
fn table_goes_where_it_is_asked_for() {
    let bench = Bench::new();
    let place = tempfile::NamedTempFile::new().unwrap();
    let output = format!("--output={}", place.path().display());
    assert_eq!(bench.small(&["--rw=load", "--verify", &output]).good(), "");
    let table = std::fs::read_to_string(place.path()).unwrap();
    for word in
        ["load: load, blocks of 64 KiB", "GB/s", "p99.9", "loaded", "verify: every byte right"]
    {
        assert!(table.contains(word), "{word} in\n{table}");
    }
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

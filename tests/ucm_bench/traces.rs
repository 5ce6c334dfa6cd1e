//! Traces: made, and replayed with the hits that their prefixes promise.

use std::collections::HashSet;

use serde_json::Value;

use crate::fakes;
use crate::rig::Bench;

/// Requests of a generated trace.
const REQUESTS: usize = 60;
/// Tokens of a hash id, and of a block.
const TOKENS: u64 = 512;

/// Makes a trace in the directory of the bench and gives its requests.
fn generate(bench: &Bench, name: &str) -> Vec<Value> {
    let path = bench.file(name);
    let path = path.to_str().unwrap();
    let traffic = ["--requests=60", "--request-rate=1000", "--prompts=2", "--question-tokens=600"];
    bench.run(&[&["trace", "generate", path, "--seed=7"][..], &traffic].concat()).good();
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Hits and blocks of requests that come one after the other, each saving what it misses.
fn expected(trace: &[Value]) -> (u64, u64) {
    let (mut saved, mut hits, mut all) = (HashSet::new(), 0, 0);
    for request in trace {
        let full = request["input_length"].as_u64().unwrap() / TOKENS;
        let ids = request["hash_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap());
        let blocks: Vec<u64> = ids.take(full as usize).collect();
        hits += blocks.iter().take_while(|block| saved.contains(*block)).count() as u64;
        all += blocks.len() as u64;
        saved.extend(blocks);
    }
    (hits, all)
}

/// The command that replays a trace request by request.
fn replay(bench: &Bench, name: &str, more: &[&str]) -> std::process::Command {
    let (file, directory) = (bench.file(name), format!("--directory={}", bench.path().display()));
    let arguments = ["trace", "replay", file.to_str().unwrap(), &directory, "--numjobs=1"];
    let shape = ["--bs=16k", "--block-tokens=512", "--segment-size-mb=8", "--cache-size=16m"];
    bench.command(&[&arguments[..], &shape, more].concat())
}

fn json(mut command: std::process::Command) -> Value {
    let output = command.arg("--output-format=json").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Goal: the hit ratio of a replay is that of the trace, every request is loaded and saved, and the same seed makes
/// the same trace.
#[test]
fn replay_hits_what_the_trace_shares() {
    let bench = Bench::new();
    let trace = generate(&bench, "t.jsonl");
    assert_eq!((trace.len(), &generate(&bench, "again.jsonl")), (REQUESTS, &trace));
    let (hits, all) = expected(&trace);
    assert!(hits > all / 4, "a trace that shares nothing shows nothing: {hits} of {all}");
    let root = json(replay(&bench, "t.jsonl", &["--verify"]));
    let job = &root["groups"][0]["jobs"][0];
    assert_eq!(job["hit_ratio"].as_f64().unwrap(), hits as f64 / all as f64, "{job:#}");
    assert_eq!(job["latency_us"]["loaded"]["count"], hits, "{job:#}");
    assert_eq!(job["latency_us"]["persisted"]["count"], all - hits, "{job:#}");
    assert_eq!(job["latency_us"]["request ready"]["count"], REQUESTS, "{job:#}");
    assert_eq!((&job["errors"], &job["wrong_blocks"]), (&serde_json::json!({}), &0.into()));
    let left = bench.entries();
    assert!(left.iter().all(|name| name.ends_with(".jsonl")), "left behind: {left:?}");
}

/// Goal: what storage cost the requests stands in the JSON and the CSV, as in the table.
#[test]
fn time_lost_to_storage_stood_in_the_table_alone() {
    let bench = Bench::new();
    generate(&bench, "t.jsonl");
    let root = json(replay(&bench, "t.jsonl", &[]));
    let job = &root["groups"][0]["jobs"][0];
    let lost = job["lost_to_storage_seconds"].as_f64().unwrap();
    let ready = &job["latency_us"]["request ready"];
    let of = |name: &str| ready[name].as_f64().unwrap();
    let sum = of("mean") * of("count") * 1e-6;
    assert!(lost > 0.0 && (lost / sum - 1.0).abs() < 1e-6, "{lost} and not {sum}");
    let text = |format: &str| {
        let output = replay(&bench, "t.jsonl", &[format]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let csv = text("--output-format=csv");
    let mut lines = csv.lines();
    assert!(lines.next().unwrap().ends_with(",max_us,lost_to_storage_seconds"), "{csv}");
    for line in lines {
        let lost: f64 = line.rsplit(',').next().unwrap().parse().unwrap();
        assert!(lost > 0.0, "{csv}");
    }
    let table = text("--output-format=normal");
    assert!(
        table.contains("time lost to storage: ") && table.contains("over 60 requests"),
        "{table}"
    );
    let plain = bench.json(&["--rw=load"]);
    assert_eq!(plain["groups"][0]["jobs"][0]["lost_to_storage_seconds"], Value::Null);
}

/// Goal: with a device the blocks of a replay, and of a data set that is laid out, live in its memory. This AscendCL
/// cannot say whose an address is, and copies nothing from one place of the host to another: a block that does not
/// live there ends the program.
#[test]
fn replays_and_layouts_gave_the_device_memory_of_the_host() {
    let bench = Bench::new();
    let trace = generate(&bench, "t.jsonl");
    let (hits, _) = expected(&trace);
    let on_device = |mut command: std::process::Command| {
        command.env("UCM_ASCENDCL_LIBRARY", fakes::folder().join("libascendcl-old.so"));
        json(command)
    };
    let root = on_device(replay(&bench, "t.jsonl", &["--verify", "--device=ascend"]));
    let job = &root["groups"][0]["jobs"][0];
    assert_eq!(
        (&job["latency_us"]["loaded"]["count"], &job["wrong_blocks"]),
        (&hits.into(), &0.into())
    );
    let directory = format!("--directory={}", bench.path().display());
    let loads = ["--rw=load", "--bs=64k", "--layers=4", "--size=2m", "--verify", "--device=ascend"];
    let root = on_device(bench.command(&[&[directory.as_str()], &loads[..]].concat()));
    let job = &root["groups"][0]["jobs"][0];
    assert_eq!((&job["blocks"], &job["wrong_blocks"]), (&32.into(), &0.into()), "{job:#}");
}

//! Comparisons: what they need, what they refuse, and a short round of each.

use serde_json::Value;

use crate::fakes;
use crate::rig::{Answer, Bench};

/// Whether fio is there; says so where it is not.
pub fn has_fio() -> bool {
    let found = std::process::Command::new("fio").arg("--version").output().is_ok();
    if !found {
        println!("skipped: fio is not installed");
    }
    found
}

/// Whether fio is there and may use io_uring, which containers often forbid; says so where not.
pub fn has_fio_with_ring(bench: &Bench) -> bool {
    let file = format!("--filename={}", bench.file("probe").display());
    let flags = ["--name=probe", "--ioengine=io_uring", "--rw=write", "--size=4k", &file];
    let works = has_fio()
        && std::process::Command::new("fio").args(flags).output().unwrap().status.success();
    // Where fio made none there is none.
    let _ = std::fs::remove_file(bench.file("probe"));
    if !works {
        println!("skipped: fio with io_uring does not work here");
    }
    works
}

/// The comparison with the driver's copies, on the fake driver: small, and with what is given besides.
pub fn against_copies(bench: &Bench, more: &[&str]) -> std::process::Command {
    let small = ["--slice-sizes=16k", "--bs=64k", "--iodepth=8", "--batch=4", "--size=1m"];
    let mut command = bench.command(&[&["compare", "device"], &small[..], more].concat());
    command.env("UCM_CUDA_LIBRARY", fakes::folder().join("libcuda.so.1"));
    command.env("UCM_CUDA_COPY", "batch");
    command
}

/// Median and spread are those of one round of this ratio.
fn check_ratio(value: &Value, only: f64) {
    for name in ["least", "median", "most"] {
        let seen = value[name].as_f64().unwrap();
        assert!(seen > 0.0 && (seen / only - 1.0).abs() < 1e-9, "{name}: {seen} and not {only}");
    }
}

/// Goal: without fio a person reads how to install it.
#[test]
fn without_fio_it_says_how_to_install_it() {
    let bench = Bench::new();
    let empty = tempfile::tempdir().unwrap();
    for comparison in ["fio", "beside"] {
        let directory = format!("--directory={}", bench.path().display());
        let mut command = bench.command(&["compare", comparison, &directory]);
        let output = command.env("PATH", empty.path()).output().unwrap();
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{complaint}");
        assert!(complaint.contains("fio is not installed"), "{complaint}");
        assert!(complaint.contains("apt-get install fio"), "{complaint}");
    }
    assert!(bench.entries().is_empty());
}

/// Goal: a short round of both sides with fio gives ratios that agree with their rounds.
#[test]
fn one_round_against_fio() {
    if !has_fio() {
        return;
    }
    let bench = Bench::new();
    let directory = format!("--directory={}", bench.path().display());
    let arguments = ["compare", "fio", &directory, "--bs=64k", "--size=4m", "--rounds=1"];
    let settings = ["--iodepth=8", "--batch=4", "--io-engine=psync", "--output-format=json"];
    let root = bench.run(&[&arguments[..], &settings].concat()).json();
    assert_eq!(
        (&root["format"], &root["interrupted"]),
        (&"ucm-bench compare".into(), &false.into())
    );
    assert!(root["fio"].as_str().unwrap().starts_with("fio-"));
    let sides = root["sides"].as_array().unwrap();
    assert_eq!([&sides[0]["side"], &sides[1]["side"]], ["save", "load"]);
    for side in sides {
        let rounds = side["rounds"].as_array().unwrap();
        assert_eq!(rounds.len(), 1);
        let of = |name: &str| rounds[0][name].as_f64().unwrap();
        let speed = of("engine_gb_per_second") / of("fio_gb_per_second");
        check_ratio(&side["gb_per_second"], speed);
        let both = of("fio_cpu_seconds_per_gb") + of("memcpy_cpu_seconds_per_gb");
        let cpu = of("engine_cpu_seconds_per_gb") / both;
        check_ratio(&side["cpu_per_gb_against_fio_and_memcpy"], cpu);
        let flags = side["fio"].to_string();
        assert!(flags.contains("--ioengine=psync") && flags.contains("--bs=65536"), "{flags}");
    }
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

/// Goal: what one side alone would heed is refused in every comparison, with the remedy.
#[test]
fn numjobs_was_taken_and_not_heeded() {
    let bench = Bench::new();
    let directory = format!("--directory={}", bench.path().display());
    let refused = |answer: Answer, words: [&str; 2]| {
        assert_eq!(answer.code, Some(1), "{}", answer.complaint);
        for word in words {
            assert!(answer.complaint.contains(word), "{word}: {}", answer.complaint);
        }
    };
    if has_fio() {
        let beside = |flag| bench.run(&["compare", "beside", &directory, flag]);
        refused(beside("--numjobs=2"), ["--numjobs", "give --iodepth"]);
        refused(beside("--rate=1m"), ["--rate", "give --share"]);
    }
    refused(bench.run(&["compare", "device", "--numjobs=2"]), ["--numjobs", "give --iodepth"]);
    assert!(bench.entries().is_empty());
}

/// Goal: engine and plain copies are compared over the bus, with every byte of the first round verified.
#[test]
fn one_round_against_plain_copies() {
    let bench = Bench::new();
    let more = ["--runtime=100ms", "--rounds=1", "--output-format=json"];
    let output = against_copies(&bench, &more).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let root: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = root["rows"].as_array().unwrap();
    assert_eq!([&rows[0]["way"], &rows[1]["way"]], ["save", "load"]);
    for row in rows {
        let round = &row["rounds"][0];
        let of = |name: &str| round[name].as_f64().unwrap();
        let share = of("engine_gb_per_second") / of("plain_gb_per_second");
        check_ratio(&row["ratio"], share);
        assert_eq!(row["slice_bytes"], 16 << 10);
    }
    assert!(root["notes"].to_string().contains("no --directory"), "{root:#}");
}

//! Sweeps: every point is measured, and the report is a page with drawings.

use crate::rig::Bench;

const POINTS: [&str; 5] = [
    "--sweep-block-size=16k,64k",
    "--sweep-iodepth=1,4",
    "--sweep-rw=save,randload",
    "--size=1m",
    "--segment-size-mb=8",
];

/// The figures that are drawn of each workload.
const FIGURES: [&str; 3] = ["Throughput", "Latency, 99 %", "CPU per GB"];

fn sweep(bench: &Bench, report: &str, format: &str) -> String {
    let directory = format!("--directory={}", bench.path().display());
    let report = format!("--report={report}");
    let format = format!("--output-format={format}");
    bench.run(&[&["sweep", &directory, &report, &format][..], &POINTS].concat()).good()
}

/// Goal: the page shows each figure of each workload with a line for each block size, and the table below.
#[test]
fn report_is_a_page_with_drawings() {
    let bench = Bench::new();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("sweep.html");
    let printed = sweep(&bench, path.to_str().unwrap(), "normal");
    assert!(printed.contains(&format!("report: {}", path.display())), "{printed}");
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
    assert_eq!((page.matches("<svg").count(), page.matches("</svg>").count()), (1, 1));
    for rw in ["save", "randload"] {
        for figure in FIGURES {
            assert!(page.contains(&format!("{rw}: {figure}")), "{rw}: {figure}");
        }
    }
    // Two workloads, three figures, two block sizes.
    assert!(page.matches("<polyline").count() >= 12, "{} lines", page.matches("<polyline").count());
    assert!(page.contains("16 KiB") && page.contains("64 KiB"));
    assert!(page.contains("randload 64 KiB depth 4: randload"), "the table is missing");
    assert!(bench.entries().is_empty(), "left behind: {:?}", bench.entries());
}

/// Goal: all points stand in the JSON, and a report called `.svg` is the drawing alone.
#[test]
fn every_point_is_measured() {
    let bench = Bench::new();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("sweep.svg");
    let root: serde_json::Value =
        serde_json::from_str(&sweep(&bench, path.to_str().unwrap(), "json")).unwrap();
    let groups = root["groups"].as_array().unwrap();
    let names: Vec<&str> =
        groups.iter().map(|group| group["jobs"][0]["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "save 16 KiB depth 1",
            "save 16 KiB depth 4",
            "save 64 KiB depth 1",
            "save 64 KiB depth 4",
            "randload 16 KiB depth 1",
            "randload 16 KiB depth 4",
            "randload 64 KiB depth 1",
            "randload 64 KiB depth 4",
        ]
    );
    for group in groups {
        assert_eq!(group["jobs"][0]["bytes"], 1 << 20, "{group:#}");
    }
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("<svg"));
}

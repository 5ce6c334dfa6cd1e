//! Time of the paths that every block takes. `cargo bench --bench paths`; under `cargo test` each runs once
//! on small data.

mod cases;

use criterion::{Criterion, Throughput};

fn main() {
    // criterion's own convention: cargo bench passes --bench, cargo test does not.
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let scale = if measuring { cases::Scale::Full } else { cases::Scale::Small };
    let mut criterion = Criterion::default().configure_from_args();
    for mut case in cases::all(scale) {
        let (room, what) = case.name.split_once('/').unwrap_or(("", case.name));
        let mut group = criterion.benchmark_group(room);
        group.throughput(match case.unit {
            "byte" => Throughput::Bytes(case.items),
            _ => Throughput::Elements(case.items),
        });
        group.bench_function(what, |bencher| bencher.iter(|| (case.run)()));
        group.finish();
    }
    criterion.final_summary();
}

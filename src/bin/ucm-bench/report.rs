//! What a run says at the end: a table for people, JSON and CSV for programs.
//!
//! The JSON is documented in `docs/performance.md`; `JSON_VERSION` grows when a field changes its meaning or
//! goes. New fields may come at any time.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use serde::Serialize;

use crate::job::{Job, Workload};
use crate::run::{GroupResult, JobResult};
use crate::tally::Latencies;
use crate::units::{show_size, show_time};

/// Version of the JSON and of the columns of the CSV.
pub const JSON_VERSION: u32 = 1;
/// Stage of a trace's requests, from arrival until the prefix is in memory: what they lose to storage.
pub const REQUEST_READY: &str = "request ready";
/// Bytes of a GB, as everywhere in storage.
pub const GB: f64 = 1e9;

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Normal,
    /// For programs.
    Json,
    /// For spreadsheets.
    Csv,
}

impl Format {
    /// By its name on the command line.
    pub fn parse(name: &str) -> Result<Self, String> {
        match name {
            "normal" | "table" => Ok(Self::Normal),
            "json" => Ok(Self::Json),
            "csv" => Ok(Self::Csv),
            _ => Err(format!("`{name}` is none of normal, json, csv")),
        }
    }
}

/// Root of the JSON.
#[derive(Serialize)]
pub struct Document {
    /// Always `ucm-bench`.
    pub format: &'static str,
    /// `JSON_VERSION`.
    pub version: u32,
    /// Version of the library.
    pub library: String,
    /// Kernel release.
    pub kernel: String,
    /// Processors this process may use.
    pub processors: usize,
    /// Whether Ctrl-C cut the run short.
    pub interrupted: bool,
    /// Jobs that ran together share a group.
    pub groups: Vec<Group>,
}

/// Jobs that ran together, and what they cost the process.
#[derive(Serialize)]
pub struct Group {
    /// Wall time.
    pub seconds: f64,
    /// CPU seconds in user mode, all threads.
    pub cpu_user_seconds: f64,
    /// CPU seconds in the kernel.
    pub cpu_system_seconds: f64,
    /// CPU as a share of one core.
    pub cpu_percent_of_core: f64,
    /// CPU seconds in user mode for each GB moved.
    pub cpu_user_seconds_per_gb: Option<f64>,
    /// CPU seconds in the kernel for each GB moved.
    pub cpu_system_seconds_per_gb: Option<f64>,
    /// System calls of the process for each block; null where they cannot be counted.
    pub syscalls_per_block: Option<f64>,
    /// The jobs.
    pub jobs: Vec<JobReport>,
}

/// One job.
#[derive(Serialize)]
pub struct JobReport {
    /// Name of the section.
    pub name: String,
    /// Workload.
    pub rw: &'static str,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Blocks in flight.
    pub iodepth: u32,
    /// Blocks of a task.
    pub batch: u32,
    /// Threads.
    pub numjobs: u32,
    /// Model that gave the shape.
    pub model: Option<String>,
    /// Whether each layer was a task.
    pub layerwise: bool,
    /// Settings of the store.
    pub store: std::collections::BTreeMap<String, String>,
    /// Wall time of the job.
    pub seconds: f64,
    /// Blocks (or keys) that ended well.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// 10^9 bytes a second.
    pub gb_per_second: f64,
    /// Blocks (or keys) a second.
    pub blocks_per_second: f64,
    /// Blocks a second that the inserting thread saved; null without `insert_rate`.
    pub inserts_per_second: Option<f64>,
    /// Share of the blocks asked for that were there.
    pub hit_ratio: Option<f64>,
    /// Share of the parts asked for that lay in the Cache tier, as the store counts it.
    pub cache_hit_ratio: Option<f64>,
    /// What all requests of a trace together waited from their arrival until their prefix was in memory; null
    /// for other workloads.
    pub lost_to_storage_seconds: Option<f64>,
    /// Submit calls that were refused for now and tried again.
    pub busy: u64,
    /// Blocks with wrong bytes (verify).
    pub wrong_blocks: u64,
    /// Failures by status.
    pub errors: std::collections::BTreeMap<String, ErrorReport>,
    /// Latencies by stage, in microseconds.
    pub latency_us: std::collections::BTreeMap<&'static str, LatencyReport>,
}

/// Failures of one status.
#[derive(Serialize)]
pub struct ErrorReport {
    /// How many.
    pub count: u64,
    /// The first message.
    pub example: String,
}

/// Latencies of one stage, in microseconds.
#[derive(Serialize)]
pub struct LatencyReport {
    /// Blocks measured (for lookups and hashes: calls).
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90 % are below.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

impl From<&Latencies> for LatencyReport {
    fn from(latencies: &Latencies) -> Self {
        let at = |quantile| latencies.at(quantile) * 1e6;
        Self {
            count: latencies.count(),
            mean: latencies.mean() * 1e6,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: latencies.max() * 1e6,
        }
    }
}

fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

/// The Cache tier's hit ratio in a store's metrics (Prometheus text).
fn cache_hits(metrics: &str) -> Option<f64> {
    let value = |name: &str| -> Option<f64> {
        let line = metrics.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse().ok()
    };
    let hits = value("ucm_cache_hits_total")?;
    ratio(hits, hits + value("ucm_cache_misses_total")?)
}

impl JobReport {
    fn new(result: &JobResult) -> Self {
        let (job, tally) = (&result.job, &result.tally);
        let seconds = result.elapsed.as_secs_f64();
        let errors = tally.errors.iter().map(|(name, error)| {
            (name.clone(), ErrorReport { count: error.count, example: error.example.clone() })
        });
        Self {
            name: job.name.clone(),
            rw: job.rw.name(),
            block_bytes: result.block_bytes,
            iodepth: job.iodepth,
            batch: job.batch,
            numjobs: job.numjobs,
            model: job.model.clone(),
            layerwise: job.layerwise,
            store: job.store.iter().cloned().collect(),
            seconds,
            blocks: tally.blocks,
            bytes: tally.bytes,
            gb_per_second: tally.bytes as f64 / GB / seconds.max(1e-9),
            blocks_per_second: tally.blocks as f64 / seconds.max(1e-9),
            inserts_per_second: (job.insert_rate > 0.0)
                .then(|| tally.inserted as f64 / seconds.max(1e-9)),
            hit_ratio: ratio(tally.present as f64, tally.asked as f64),
            cache_hit_ratio: cache_hits(&result.metrics),
            lost_to_storage_seconds: tally
                .stages
                .get(REQUEST_READY)
                .map(|ready| ready.mean() * ready.count() as f64),
            busy: tally.busy,
            wrong_blocks: tally.wrong,
            errors: errors.collect(),
            latency_us: tally.stages.iter().map(|(stage, l)| (*stage, l.into())).collect(),
        }
    }
}

impl Group {
    /// The report of a group.
    pub fn new(result: &GroupResult) -> Self {
        let seconds = result.cost.elapsed.as_secs_f64();
        let cpu = result.cost.cpu;
        let bytes: u64 = result.jobs.iter().map(|job| job.tally.bytes).sum();
        let blocks: u64 = result.jobs.iter().map(|job| job.tally.blocks).sum();
        let gb = bytes as f64 / GB;
        Self {
            seconds,
            cpu_user_seconds: cpu.user,
            cpu_system_seconds: cpu.system,
            cpu_percent_of_core: 100.0 * cpu.total() / seconds.max(1e-9),
            cpu_user_seconds_per_gb: ratio(cpu.user, gb),
            cpu_system_seconds_per_gb: ratio(cpu.system, gb),
            syscalls_per_block: result
                .cost
                .syscalls
                .and_then(|count| ratio(count as f64, blocks as f64)),
            jobs: result.jobs.iter().map(JobReport::new).collect(),
        }
    }
}

/// The whole report.
pub fn document(results: &[GroupResult], interrupted: bool) -> Document {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Document {
        format: "ucm-bench",
        version: JSON_VERSION,
        library: crate::abi::version(),
        kernel: kernel.trim().to_owned(),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        interrupted,
        groups: results.iter().map(Group::new).collect(),
    }
}

/// Writes a report in a format.
pub fn render(results: &[GroupResult], interrupted: bool, format: Format) -> String {
    let document = document(results, interrupted);
    match format {
        Format::Json => {
            // Numbers, texts and maps with text keys: serialisation cannot fail.
            serde_json::to_string_pretty(&document).unwrap_or_default() + "\n"
        }
        Format::Csv => csv(&document),
        Format::Normal => table(&document, results),
    }
}

fn csv(document: &Document) -> String {
    let mut out = String::from(
        "name,rw,block_bytes,iodepth,batch,numjobs,layerwise,seconds,blocks,bytes,gb_per_second,\
         blocks_per_second,hit_ratio,busy,wrong_blocks,errors,cpu_user_seconds_per_gb,\
         cpu_system_seconds_per_gb,syscalls_per_block,stage,count,mean_us,p50_us,p90_us,p99_us,p999_us,max_us,\
         lost_to_storage_seconds\n",
    );
    let optional = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.6}"));
    for group in &document.groups {
        for job in &group.jobs {
            let errors: u64 = job.errors.values().map(|error| error.count).sum();
            let head = format!(
                "{},{},{},{},{},{},{},{:.6},{},{},{:.6},{:.3},{},{},{},{errors},{},{},{}",
                quoted(&job.name),
                job.rw,
                job.block_bytes,
                job.iodepth,
                job.batch,
                job.numjobs,
                job.layerwise,
                job.seconds,
                job.blocks,
                job.bytes,
                job.gb_per_second,
                job.blocks_per_second,
                optional(job.hit_ratio),
                job.busy,
                job.wrong_blocks,
                optional(group.cpu_user_seconds_per_gb),
                optional(group.cpu_system_seconds_per_gb),
                optional(group.syscalls_per_block),
            );
            let lost = optional(job.lost_to_storage_seconds);
            if job.latency_us.is_empty() {
                let _ = writeln!(out, "{head},,,,,,,,,{lost}");
            }
            for (stage, l) in &job.latency_us {
                let _ = writeln!(
                    out,
                    "{head},{stage},{},{:.3},{:.3},{:.3},{:.3},{:.3},{:.3},{lost}",
                    l.count, l.mean, l.p50, l.p90, l.p99, l.p999, l.max
                );
            }
        }
    }
    out
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

fn table(document: &Document, results: &[GroupResult]) -> String {
    let mut out = String::new();
    for (group, result) in document.groups.iter().zip(results) {
        for (job, result) in group.jobs.iter().zip(&result.jobs) {
            job_table(&mut out, job, &result.job);
        }
        group_lines(&mut out, group);
    }
    if document.interrupted {
        out.push_str("interrupted: these are the figures up to then\n");
    }
    out
}

fn job_table(out: &mut String, job: &JobReport, settings: &Job) {
    let threads =
        if job.numjobs > 1 { format!(", {} threads", job.numjobs) } else { String::new() };
    let model = job.model.as_ref().map_or(String::new(), |model| format!(" ({model})"));
    let layers = if job.layerwise { ", layer by layer" } else { "" };
    let _ = writeln!(
        out,
        "{}: {}, blocks of {}{model}{layers}, iodepth {}, batch {}{threads}",
        job.name,
        job.rw,
        show_size(job.block_bytes),
        job.iodepth,
        job.batch
    );
    match settings.rw {
        Workload::Idle => {}
        Workload::Lookup | Workload::Prefix => per_item(out, job, "keys", settings.batch),
        Workload::Hash => per_item(out, job, "blocks hashed", settings.batch),
        Workload::Open => {}
        _ => {
            let _ = writeln!(
                out,
                "  {:.3} GB/s   {:.0} blocks/s   {} in {}",
                job.gb_per_second,
                job.blocks_per_second,
                show_size(job.bytes),
                show_time(job.seconds)
            );
        }
    }
    if !job.latency_us.is_empty() {
        let _ = writeln!(
            out,
            "  {:<13}{:>11}{:>11}{:>11}{:>11}{:>11}{:>11}",
            "latency", "p50", "p90", "p99", "p99.9", "max", "mean"
        );
    }
    for (stage, l) in &job.latency_us {
        let _ = write!(out, "  {stage:<13}");
        for value in [l.p50, l.p90, l.p99, l.p999, l.max, l.mean] {
            let _ = write!(out, "{:>11}", show_time(value * 1e-6));
        }
        out.push('\n');
    }
    if let Some(hits) = job.hit_ratio {
        let _ = write!(out, "  hit ratio {:.2} %", hits * 100.0);
        match job.cache_hit_ratio {
            Some(cache) => {
                let _ = writeln!(out, "; {:.2} % of the parts came from memory", cache * 100.0);
            }
            None => out.push('\n'),
        }
    }
    lost_line(out, job);
    if let Some(inserts) = job.inserts_per_second {
        let _ =
            writeln!(out, "  inserts {inserts:.0}/s of {:.0}/s asked for", settings.insert_rate);
    }
    if job.busy > 0 {
        let _ = writeln!(out, "  busy {} (submit calls refused for now, tried again)", job.busy);
    }
    for (name, error) in &job.errors {
        if error.count > 0 {
            let _ = writeln!(out, "  errors {name} x {}: {}", error.count, error.example);
        }
    }
    if settings.verify {
        let _ = match job.wrong_blocks {
            0 => writeln!(out, "  verify: every byte right"),
            wrong => writeln!(out, "  verify: {wrong} BLOCKS WITH WRONG BYTES"),
        };
    }
}

/// What storage cost the requests of a trace.
fn lost_line(out: &mut String, job: &JobReport) {
    if let Some((seconds, ready)) =
        job.lost_to_storage_seconds.zip(job.latency_us.get(REQUEST_READY))
    {
        let loaded = job.latency_us.get("loaded").map_or(0, |loaded| loaded.count);
        let _ = writeln!(
            out,
            "  time lost to storage: {} over {} requests, {} each on average, {} at 99 %; {loaded} blocks loaded, {}",
            show_time(seconds),
            ready.count,
            show_time(ready.mean * 1e-6),
            show_time(ready.p99 * 1e-6),
            show_size(loaded * job.block_bytes),
        );
    }
}

fn per_item(out: &mut String, job: &JobReport, item: &str, batch: u32) {
    // From the latencies, not from the clock: threads also count and draw keys between calls.
    let mean = job.latency_us.values().next().map_or(0.0, |latency| latency.mean);
    let _ = writeln!(
        out,
        "  {:.1} ns a key   {:.0} {item}/s on each thread, {} in all",
        mean * 1e3 / f64::from(batch),
        f64::from(batch) / (mean * 1e-6).max(1e-12),
        job.blocks
    );
}

fn group_lines(out: &mut String, group: &Group) {
    let _ = write!(
        out,
        "  cpu user {:.3} s, system {:.3} s ({:.2} % of a core)",
        group.cpu_user_seconds, group.cpu_system_seconds, group.cpu_percent_of_core
    );
    if let (Some(user), Some(system)) =
        (group.cpu_user_seconds_per_gb, group.cpu_system_seconds_per_gb)
    {
        let _ = write!(out, "; per GB {:.4} s (user {user:.4}, system {system:.4})", user + system);
    }
    match group.syscalls_per_block {
        Some(count) => {
            let _ = write!(out, "; {count:.3} syscalls per block");
        }
        None => out.push_str(
            "; syscalls not counted (as root: mount -t tracefs nodev /sys/kernel/tracing)",
        ),
    }
    out.push_str("\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::Cost;
    use crate::tally::Tally;
    use std::time::Duration;

    fn results() -> Vec<GroupResult> {
        let mut tally =
            Tally { blocks: 4, bytes: 4 << 20, asked: 5, present: 4, ..Tally::default() };
        tally.latency("loaded", Duration::from_micros(500), 4);
        tally.error("NOT_FOUND".into(), 1, || "gone".into());
        let job = Job { name: "a,b".into(), ..Job::default() };
        let job = JobResult {
            job,
            block_bytes: 1 << 20,
            tally,
            elapsed: Duration::from_secs(2),
            metrics: String::new(),
        };
        vec![GroupResult { jobs: vec![job], cost: Cost::default() }]
    }

    /// Goal: the JSON names its version and carries the figures under the documented names.
    #[test]
    fn json_fields() {
        let text = render(&results(), false, Format::Json);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["format"], "ucm-bench");
        assert_eq!(value["version"], JSON_VERSION);
        let job = &value["groups"][0]["jobs"][0];
        assert_eq!(job["hit_ratio"], 0.8);
        assert_eq!(job["errors"]["NOT_FOUND"]["count"], 1);
        let p99 = job["latency_us"]["loaded"]["p99"].as_f64().unwrap();
        assert!((499.0..501.0).contains(&p99), "{p99}");
        assert_eq!(job["gb_per_second"].as_f64().unwrap(), (4 << 20) as f64 / 2e9);
    }

    /// Goal: a thread that inserts less than it was asked to is seen in table and JSON.
    #[test]
    fn the_rate_of_inserts_was_not_reported() {
        let mut results = results();
        let job = &mut results[0].jobs[0];
        (job.job.insert_rate, job.tally.inserted) = (2000.0, 3000);
        let text = render(&results, false, Format::Normal);
        assert!(text.contains("inserts 1500/s of 2000/s"), "{text}");
        assert!(render(&results, false, Format::Json).contains("\"inserts_per_second\": 1500.0"));
    }

    /// Goal: every CSV line has the columns of its head, also with a comma in a job's name.
    #[test]
    fn csv_columns() {
        let text = render(&results(), false, Format::Csv);
        let mut lines = text.lines();
        let columns = lines.next().unwrap().split(',').count();
        let line = lines.next().unwrap().replace("\"a,b\"", "ab");
        assert_eq!(line.split(',').count(), columns);
    }

    /// Goal: the table shows what went wrong, and that it was cut short.
    #[test]
    fn table_tells() {
        let text = render(&results(), true, Format::Normal);
        for word in ["NOT_FOUND x 1: gone", "p99.9", "interrupted", "hit ratio 80.00 %"] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
    }
}

//! `ucm-bench compare fio`: engine and fio in turn on the same directory, same sizes and depth, and the
//! ratios as median and spread. The figure that is quoted; absolute numbers are not.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};
use serde::Serialize;

use crate::cli;
use crate::fio::{self, FioJob, FioResult};
use crate::ground::{After, Ground};
use crate::job::{Job, Workload};
use crate::report::{Format, GB};
use crate::run::{self, Context, GroupResult, Layout};
use crate::units::show_size;

/// Version of the JSON of a comparison.
const JSON_VERSION: u32 = 1;
/// Writes between two fdatasync calls of fio, against `durability: ordered`.
const WRITES_PER_SYNC: u32 = 256;
/// Rounds that are not counted.
pub const WARM_UP: usize = 1;

/// The subcommand.
pub fn command() -> Command {
    let fio = cli::with_rounds(cli::with_settings(Command::new("fio").about(
        "Runs the engine and the system's fio in turn and prints the ratios of GB/s, CPU per GB and system calls",
    )))
    .arg(
        Arg::new("sides")
            .long("sides")
            .value_name("LIST")
            .default_value("save,load")
            .help("What is compared: save, load, or both"),
    )
    .arg(
        Arg::new("sequential")
            .long("sequential")
            .num_args(0)
            .action(clap::ArgAction::SetTrue)
            .help("Load in the order of saving, against fio read instead of randread"),
    )
    .arg(
        Arg::new("fio-extra")
            .long("fio-extra")
            .value_name("FLAGS")
            .default_value("")
            .help("More flags for fio, as \"--iomem=mmaphuge\""),
    );
    Command::new("compare")
        .about("Compares the engine with a known yardstick")
        .subcommand_required(true)
        .subcommand(fio)
        .subcommand(crate::beside::command())
        .subcommand(crate::compare_device::command())
}

/// One round of one side.
#[derive(Clone, Copy, Debug, Serialize)]
struct Round {
    engine_gb_per_second: f64,
    fio_gb_per_second: f64,
    engine_cpu_seconds_per_gb: f64,
    fio_cpu_seconds_per_gb: f64,
    /// One memcpy of the same bytes, measured in this round.
    memcpy_cpu_seconds_per_gb: f64,
    engine_syscalls_per_block: Option<f64>,
    fio_syscalls_per_block: Option<f64>,
    engine_p99_us: f64,
    fio_p99_us: f64,
}

/// Median and range of a ratio.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ratio {
    /// The middle.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

#[derive(Serialize)]
struct Side {
    side: &'static str,
    fio: Vec<String>,
    rounds: Vec<Round>,
    gb_per_second: Ratio,
    cpu_per_gb: Ratio,
    cpu_per_gb_against_fio_and_memcpy: Ratio,
    syscalls_per_block_more: Option<Ratio>,
}

#[derive(Serialize)]
struct Comparison {
    format: &'static str,
    version: u32,
    library: String,
    fio: String,
    block_bytes: u64,
    iodepth: u32,
    batch: u32,
    size: u64,
    registered: bool,
    store: std::collections::BTreeMap<String, String>,
    sides: Vec<Side>,
}

/// `ucm-bench compare fio`.
pub fn main(matches: &ArgMatches, context: &Context) -> Result<ExitCode, String> {
    let fio_version = fio::version()?;
    let format = crate::format(matches)?;
    let job = cli::single(matches, Job::default())?;
    let rounds = cli::rounds(matches);
    let wanted = matches.get_one::<String>("sides").cloned().unwrap_or_default();
    let extra: Vec<String> = matches
        .get_one::<String>("fio-extra")
        .map(|flags| flags.split_whitespace().map(String::from).collect())
        .unwrap_or_default();
    let mut sides = Vec::new();
    for side in wanted.split(',').map(str::trim) {
        let pair = match side {
            "save" => Pair::save(&job, extra.clone())?,
            "load" => Pair::load(&job, extra.clone(), matches.get_flag("sequential"))?,
            _ => return Err(format!("--sides: `{side}` is neither save nor load")),
        };
        if let Some(side) = pair.run(rounds, context)? {
            sides.push(side);
        }
        if context.is_interrupted() {
            break;
        }
    }
    let comparison = Comparison {
        format: "ucm-bench compare",
        version: JSON_VERSION,
        library: crate::abi::version(),
        fio: fio_version,
        block_bytes: job.shape()?.bytes(),
        iodepth: job.iodepth,
        batch: job.batch,
        size: job.block_count()? * job.shape()?.bytes(),
        registered: job.register,
        store: job.store.iter().cloned().collect(),
        sides,
    };
    let text = match format {
        Format::Json => serde_json::to_string_pretty(&comparison).unwrap_or_default() + "\n",
        Format::Csv => csv(&comparison),
        Format::Normal => table(&comparison),
    };
    crate::write(matches, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The two that are compared.
struct Pair {
    name: &'static str,
    engine: Job,
    fio: FioJob,
}

impl Pair {
    fn new(job: &Job, name: &'static str, extra: Vec<String>) -> Result<Self, String> {
        job.validate()?;
        if job.directories.len() != 1 {
            return Err("compare takes one --directory, because fio's job is one file".into());
        }
        let engine = match job.store_setting("io_engine") {
            Some("psync") => "psync",
            _ => "io_uring",
        };
        let block_size = job.shape()?.bytes();
        let fio = FioJob {
            rw: "write",
            engine: engine.to_owned(),
            block_size,
            size: job.block_count()? * block_size,
            iodepth: job.iodepth,
            direct: job.store_setting("io_direct") != Some("false"),
            fdatasync: 0,
            extra,
        };
        Ok(Self { name, engine: job.clone(), fio })
    }

    fn save(job: &Job, extra: Vec<String>) -> Result<Self, String> {
        let mut pair = Self::new(job, "save", extra)?;
        pair.engine.rw = Workload::Save;
        if matches!(job.store_setting("durability"), Some("ordered" | "durable")) {
            pair.fio.fdatasync = WRITES_PER_SYNC;
        }
        Ok(pair)
    }

    fn load(job: &Job, extra: Vec<String>, sequential: bool) -> Result<Self, String> {
        let mut pair = Self::new(job, "load", extra)?;
        pair.engine.rw = if sequential { Workload::Load } else { Workload::RandLoad };
        pair.fio.rw = if sequential { "read" } else { "randread" };
        Ok(pair)
    }

    /// Runs all rounds; none after Ctrl-C in the first.
    fn run(&self, rounds: usize, context: &Context) -> Result<Option<Side>, String> {
        let is_save = self.engine.rw == Workload::Save;
        let bytes = run::footprint(&self.engine)?;
        let ground = Ground::new(&self.engine.directories, bytes * 2, After::Remove)?;
        let engine_folder = ground.folders()[0].join("engine");
        let file = ground.folders()[0].join("fio.data");
        if !is_save {
            let write = FioJob { rw: "write", fdatasync: 0, ..self.fio.clone() };
            write.run(&file, &context.syscalls)?;
        }
        let startup = self.startup_syscalls(&ground.folders()[0].join("fio.tiny"), context)?;
        let mut measured = Vec::new();
        let mut layout = Layout::Needed;
        for round in 0..rounds + WARM_UP {
            if context.is_interrupted() {
                break;
            }
            if context.progress {
                eprintln!("{}: round {round} of {rounds}", self.name);
            }
            let fio_first = round % 2 == 1;
            let mut fio = None;
            if fio_first {
                fio = Some(self.fio_round(&file, startup, context)?);
            }
            if is_save {
                // A fresh store in a fresh folder, as fio gets a fresh file.
                let _ = std::fs::remove_dir_all(&engine_folder);
            }
            let folders = std::slice::from_ref(&engine_folder);
            let engine = run::run_in(std::slice::from_ref(&self.engine), folders, layout, context)?;
            layout = Layout::Done;
            let fio = match fio {
                Some(fio) => fio,
                None => self.fio_round(&file, startup, context)?,
            };
            let memcpy =
                Job { rw: Workload::Memcpy, runtime: None, numjobs: 1, ..self.engine.clone() };
            let memcpy = run::run_in(&[memcpy], &[], Layout::Done, context)?;
            if round >= WARM_UP && !context.is_interrupted() {
                measured.push(round_of(&engine, &fio, &memcpy)?);
            }
        }
        Ok((!measured.is_empty()).then(|| self.side(measured, &file)))
    }

    fn fio_round(
        &self,
        file: &Path,
        startup: Option<u64>,
        context: &Context,
    ) -> Result<FioResult, String> {
        let mut result = self.fio.run(file, &context.syscalls)?;
        result.syscalls =
            result.syscalls.zip(startup).map(|(all, startup)| all.saturating_sub(startup));
        if self.fio.rw == "write" {
            // Its room is needed; a failure shows at the next write.
            let _ = std::fs::remove_file(file);
        }
        Ok(result)
    }

    /// System calls that fio makes for one single I/O: what it spends on starting and ending.
    fn startup_syscalls(&self, file: &Path, context: &Context) -> Result<Option<u64>, String> {
        let threads = if self.fio.engine == "psync" { u64::from(self.fio.iodepth) } else { 1 };
        let tiny = FioJob { size: self.fio.block_size * threads, ..self.fio.clone() };
        if tiny.rw != "write" {
            FioJob { rw: "write", ..tiny.clone() }.run(file, &context.syscalls)?;
        }
        Ok(tiny.run(file, &context.syscalls)?.syscalls)
    }

    fn side(&self, rounds: Vec<Round>, file: &Path) -> Side {
        let ratio = |value: &dyn Fn(&Round) -> f64| spread(rounds.iter().map(value).collect());
        let syscalls: Option<Vec<f64>> = rounds
            .iter()
            .map(|r| r.engine_syscalls_per_block.zip(r.fio_syscalls_per_block).map(|(a, b)| a - b))
            .collect();
        Side {
            side: self.name,
            fio: self.fio.arguments(file),
            gb_per_second: ratio(&|r| r.engine_gb_per_second / r.fio_gb_per_second),
            cpu_per_gb: ratio(&|r| r.engine_cpu_seconds_per_gb / r.fio_cpu_seconds_per_gb),
            cpu_per_gb_against_fio_and_memcpy: ratio(&|r| {
                r.engine_cpu_seconds_per_gb
                    / (r.fio_cpu_seconds_per_gb + r.memcpy_cpu_seconds_per_gb)
            }),
            syscalls_per_block_more: syscalls.map(spread),
            rounds,
        }
    }
}

fn round_of(engine: &GroupResult, fio: &FioResult, memcpy: &GroupResult) -> Result<Round, String> {
    let job = &engine.jobs[0];
    if job.tally.failures() > 0 || job.tally.blocks == 0 {
        let first = job.tally.errors.iter().next();
        return Err(format!(
            "the engine failed {} blocks, so there is nothing to compare: {}",
            job.tally.failures(),
            first.map_or(String::new(), |(name, error)| format!("{name}: {}", error.example))
        ));
    }
    let per_gb = |cpu: f64, bytes: u64| cpu / (bytes as f64 / GB).max(1e-9);
    let copied = &memcpy.jobs[0].tally;
    let last_stage = job.tally.stages.iter().find(|(name, _)| **name != "copied");
    Ok(Round {
        engine_gb_per_second: job.tally.bytes as f64 / GB / job.elapsed.as_secs_f64().max(1e-9),
        fio_gb_per_second: fio.gb_per_second,
        engine_cpu_seconds_per_gb: per_gb(engine.cost.cpu.total(), job.tally.bytes),
        fio_cpu_seconds_per_gb: per_gb(fio.cpu.total(), fio.bytes),
        memcpy_cpu_seconds_per_gb: per_gb(memcpy.cost.cpu.total(), copied.bytes),
        engine_syscalls_per_block: engine
            .cost
            .syscalls
            .map(|count| count as f64 / job.tally.blocks as f64),
        fio_syscalls_per_block: fio.syscalls.map(|count| count as f64 / fio.ios.max(1) as f64),
        engine_p99_us: last_stage.map_or(0.0, |(_, latency)| latency.at(0.99) * 1e6),
        fio_p99_us: fio.p99 * 1e6,
    })
}

/// Median and range of what the rounds gave.
pub fn spread(mut values: Vec<f64>) -> Ratio {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    };
    Ratio { median, least: values[0], most: values[values.len() - 1] }
}

fn table(comparison: &Comparison) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "engine against {}: blocks of {}, {} in flight, batch {}, {} of data{}",
        comparison.fio,
        show_size(comparison.block_bytes),
        comparison.iodepth,
        comparison.batch,
        show_size(comparison.size),
        if comparison.registered { ", registered memory" } else { ", staged through the arena" },
    );
    for side in &comparison.sides {
        let _ = writeln!(
            out,
            "\n{} against fio {}",
            side.side,
            side.fio[2].trim_start_matches("--rw=")
        );
        let _ = writeln!(
            out,
            "  {:>5}{:>10}{:>10}{:>8}{:>12}{:>12}{:>8}{:>11}{:>11}",
            "round", "GB/s", "fio", "ratio", "CPU s/GB", "fio", "ratio", "syscalls", "fio"
        );
        for (number, r) in side.rounds.iter().enumerate() {
            let count = |value: Option<f64>| value.map_or("n/a".into(), |v| format!("{v:.2}"));
            let _ = writeln!(
                out,
                "  {:>5}{:>10.3}{:>10.3}{:>8.3}{:>12.4}{:>12.4}{:>8.2}{:>11}{:>11}",
                number + 1,
                r.engine_gb_per_second,
                r.fio_gb_per_second,
                r.engine_gb_per_second / r.fio_gb_per_second,
                r.engine_cpu_seconds_per_gb,
                r.fio_cpu_seconds_per_gb,
                r.engine_cpu_seconds_per_gb / r.fio_cpu_seconds_per_gb,
                count(r.engine_syscalls_per_block),
                count(r.fio_syscalls_per_block),
            );
        }
        let line = |out: &mut String, name: &str, ratio: &Ratio| {
            let _ = writeln!(
                out,
                "  {name:<46}median {:.3}   spread {:.3} to {:.3}",
                ratio.median, ratio.least, ratio.most
            );
        };
        line(&mut out, "GB/s, engine / fio", &side.gb_per_second);
        line(&mut out, "CPU per GB, engine / fio", &side.cpu_per_gb);
        line(
            &mut out,
            "CPU per GB, engine / (fio + one memcpy)",
            &side.cpu_per_gb_against_fio_and_memcpy,
        );
        if let Some(more) = &side.syscalls_per_block_more {
            line(&mut out, "system calls per block, engine - fio", more);
        }
    }
    out
}

fn csv(comparison: &Comparison) -> String {
    let mut out = String::from(
        "side,block_bytes,iodepth,batch,round,engine_gb_per_second,fio_gb_per_second,\
         engine_cpu_seconds_per_gb,fio_cpu_seconds_per_gb,memcpy_cpu_seconds_per_gb,\
         engine_syscalls_per_block,fio_syscalls_per_block,engine_p99_us,fio_p99_us\n",
    );
    let count = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.4}"));
    for side in &comparison.sides {
        for (number, r) in side.rounds.iter().enumerate() {
            let _ = writeln!(
                out,
                "{},{},{},{},{},{:.6},{:.6},{:.6},{:.6},{:.6},{},{},{:.3},{:.3}",
                side.side,
                comparison.block_bytes,
                comparison.iodepth,
                comparison.batch,
                number + 1,
                r.engine_gb_per_second,
                r.fio_gb_per_second,
                r.engine_cpu_seconds_per_gb,
                r.fio_cpu_seconds_per_gb,
                r.memcpy_cpu_seconds_per_gb,
                count(r.engine_syscalls_per_block),
                count(r.fio_syscalls_per_block),
                r.engine_p99_us,
                r.fio_p99_us,
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the median is that of the ratios, for odd and even numbers of rounds.
    #[test]
    fn medians() {
        let odd = spread(vec![1.0, 0.5, 0.9]);
        assert_eq!((odd.median, odd.least, odd.most), (0.9, 0.5, 1.0));
        assert_eq!(spread(vec![1.0, 2.0, 4.0, 3.0]).median, 2.5);
    }

    /// Goal: the psync engine is compared with fio's psync, ordered saves with fdatasync.
    #[test]
    fn like_with_like() {
        let mut job = Job { directories: vec!["/x".into()], ..Job::default() };
        job.set_store("io_engine", "psync");
        job.set_store("durability", "ordered");
        let pair = Pair::save(&job, vec![]).unwrap();
        assert_eq!((pair.fio.engine.as_str(), pair.fio.fdatasync), ("psync", WRITES_PER_SYNC));
        let pair = Pair::load(&job, vec![], false).unwrap();
        assert_eq!((pair.fio.rw, pair.fio.fdatasync), ("randread", 0));
        job.directories.push("/y".into());
        assert!(Pair::load(&job, vec![], false).is_err());
    }
}

//! `ucm-bench compare fio`: engine and fio in turn on the same directory, same sizes and depth, and the
//! ratios as median and spread. The figure that is quoted; absolute numbers are not.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};
use serde::Serialize;

use crate::cli;
use crate::comparison::{
    self, Cell, Column, Comparison, Head, OneSided, Ratio, gb_per_second, succeeded,
};
use crate::fio::{self, FioJob, FioResult};
use crate::ground::{After, Ground};
use crate::job::{Job, Workload};
use crate::report::GB;
use crate::run::{self, Context, GroupResult, Layout};
use crate::units::show_size;

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

impl Round {
    /// GB/s, engine to fio.
    fn speed(&self) -> f64 {
        self.engine_gb_per_second / self.fio_gb_per_second
    }

    /// CPU seconds per GB, engine to fio.
    fn cpu(&self) -> f64 {
        self.engine_cpu_seconds_per_gb / self.fio_cpu_seconds_per_gb
    }
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
struct Against {
    #[serde(flatten)]
    head: Head,
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
    let pair = |side: &str| match side {
        "save" => Pair::save(&job, extra.clone()),
        "load" => Pair::load(&job, extra.clone(), matches.get_flag("sequential")),
        _ => Err(format!("--sides: `{side}` is neither save nor load")),
    };
    let pairs = wanted.split(',').map(str::trim).map(pair).collect::<Result<Vec<_>, _>>()?;
    let sides = context.each(&pairs, |pair| pair.run(rounds, context))?;
    let against = Against {
        head: Head::new("ucm-bench compare", Some(fio_version), context),
        block_bytes: job.shape()?.bytes(),
        iodepth: job.iodepth,
        batch: job.batch,
        size: job.block_count()? * job.shape()?.bytes(),
        registered: job.register,
        store: job.store.iter().cloned().collect(),
        sides,
    };
    comparison::write(matches, format, &against)?;
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
        let refused = [(job.runtime.is_some(), "runtime", "give --size, the bytes of both")];
        OneSided { command: "fio", yardstick: "fio", rate: "see compare beside" }
            .refuse(job, &refused)?;
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

    /// Runs all rounds, or those that ended before Ctrl-C.
    fn run(&self, rounds: usize, context: &Context) -> Result<Side, String> {
        let is_save = self.engine.rw == Workload::Save;
        let bytes = run::footprint(&self.engine)?;
        let ground = Ground::new(&self.engine.directories, bytes * 2, After::Remove)?;
        let engine_folder = ground.folders()[0].join("engine");
        let file = ground.folders()[0].join("fio.data");
        if !is_save {
            let write = FioJob { rw: "write", fdatasync: 0, ..self.fio.clone() };
            write.run(&file, context)?;
        }
        let startup = self.startup_syscalls(&ground.folders()[0].join("fio.tiny"), context)?;
        let mut layout = Layout::Needed;
        let measured = context.each(0..rounds + WARM_UP, |round| {
            if context.progress {
                eprintln!("{}: round {round} of {rounds}", self.name);
            }
            if is_save {
                // A fresh store in a fresh folder, as fio gets a fresh file.
                let _ = std::fs::remove_dir_all(&engine_folder);
            }
            let engine = || {
                let folders = std::slice::from_ref(&engine_folder);
                run::run_in(std::slice::from_ref(&self.engine), folders, layout, context)
            };
            let (engine, fio) = if round % 2 == 1 {
                let fio = self.fio_round(&file, startup, context)?;
                (engine()?, fio)
            } else {
                (engine()?, self.fio_round(&file, startup, context)?)
            };
            layout = Layout::Done;
            let memcpy =
                Job { rw: Workload::Memcpy, runtime: None, numjobs: 1, ..self.engine.clone() };
            let memcpy = run::run_in(&[memcpy], &[], Layout::Done, context)?;
            context.whole(())?;
            round_of(&engine, &fio, &memcpy)
        })?;
        let measured = measured.into_iter().skip(WARM_UP).collect::<Vec<_>>();
        if measured.is_empty() {
            context.whole(())?;
        }
        Ok(self.side(measured, &file))
    }

    fn fio_round(
        &self,
        file: &Path,
        startup: Option<u64>,
        context: &Context,
    ) -> Result<FioResult, String> {
        let mut result = self.fio.run(file, context)?;
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
            FioJob { rw: "write", ..tiny.clone() }.run(file, context)?;
        }
        Ok(tiny.run(file, context)?.syscalls)
    }

    fn side(&self, rounds: Vec<Round>, file: &Path) -> Side {
        let syscalls: Option<Vec<f64>> = rounds
            .iter()
            .map(|r| r.engine_syscalls_per_block.zip(r.fio_syscalls_per_block).map(|(a, b)| a - b))
            .collect();
        Side {
            side: self.name,
            fio: self.fio.arguments(file),
            gb_per_second: Ratio::of(&rounds, Round::speed),
            cpu_per_gb: Ratio::of(&rounds, Round::cpu),
            cpu_per_gb_against_fio_and_memcpy: Ratio::of(&rounds, |r| {
                r.engine_cpu_seconds_per_gb
                    / (r.fio_cpu_seconds_per_gb + r.memcpy_cpu_seconds_per_gb)
            }),
            syscalls_per_block_more: syscalls.map(|more| Ratio::of(&more, |more| *more)),
            rounds,
        }
    }
}

fn round_of(engine: &GroupResult, fio: &FioResult, memcpy: &GroupResult) -> Result<Round, String> {
    let job = succeeded(engine)?;
    let per_gb = |cpu: f64, bytes: u64| cpu / (bytes as f64 / GB).max(1e-9);
    let copied = &memcpy.jobs[0].tally;
    let last_stage = job.tally.stages.iter().find(|(name, _)| **name != "copied");
    Ok(Round {
        engine_gb_per_second: gb_per_second(job),
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

/// One line of the report.
struct Line<'a> {
    number: u64,
    side: &'a Side,
    all: &'a Against,
    round: Round,
}

fn columns<'a>() -> [Column<Line<'a>>; 16] {
    [
        Column::new("side", |line: &Line| Cell::Text(line.side.side.into())),
        Column::new("block_bytes", |line: &Line| Cell::Count(line.all.block_bytes)),
        Column::new("iodepth", |line: &Line| Cell::Count(line.all.iodepth.into())),
        Column::new("batch", |line: &Line| Cell::Count(line.all.batch.into())),
        Column::new("round", |line: &Line| Cell::Count(line.number)).shown("round", 5, 0),
        Column::new("engine_gb_per_second", |line: &Line| {
            Cell::Number(line.round.engine_gb_per_second)
        })
        .shown("GB/s", 10, 3),
        Column::new("fio_gb_per_second", |line: &Line| Cell::Number(line.round.fio_gb_per_second))
            .shown("fio", 10, 3),
        Column::seen("ratio", 8, 3, |line: &Line| Cell::Number(line.round.speed())),
        Column::new("engine_cpu_seconds_per_gb", |line: &Line| {
            Cell::Number(line.round.engine_cpu_seconds_per_gb)
        })
        .shown("CPU s/GB", 12, 4),
        Column::new("fio_cpu_seconds_per_gb", |line: &Line| {
            Cell::Number(line.round.fio_cpu_seconds_per_gb)
        })
        .shown("fio", 12, 4),
        Column::new("memcpy_cpu_seconds_per_gb", |line: &Line| {
            Cell::Number(line.round.memcpy_cpu_seconds_per_gb)
        }),
        Column::seen("ratio", 8, 2, |line: &Line| Cell::Number(line.round.cpu())),
        Column::new("engine_syscalls_per_block", |line: &Line| {
            Cell::maybe(line.round.engine_syscalls_per_block)
        })
        .shown("syscalls", 11, 2),
        Column::new("fio_syscalls_per_block", |line: &Line| {
            Cell::maybe(line.round.fio_syscalls_per_block)
        })
        .shown("fio", 11, 2),
        Column::new("engine_p99_us", |line: &Line| Cell::Number(line.round.engine_p99_us)),
        Column::new("fio_p99_us", |line: &Line| Cell::Number(line.round.fio_p99_us)),
    ]
}

impl Against {
    fn lines<'a>(&'a self, side: &'a Side) -> Vec<Line<'a>> {
        let line = |(number, round): (u64, &Round)| Line { number, side, all: self, round: *round };
        (1..).zip(&side.rounds).map(line).collect()
    }
}

impl Comparison for Against {
    fn head(&self) -> &Head {
        &self.head
    }

    fn table(&self) -> String {
        let mut out = format!(
            "engine against {}: blocks of {}, {} in flight, batch {}, {} of data{}\n",
            self.head.fio(),
            show_size(self.block_bytes),
            self.iodepth,
            self.batch,
            show_size(self.size),
            if self.registered { ", registered memory" } else { ", staged through the arena" },
        );
        for side in &self.sides {
            let fio = side.fio[2].trim_start_matches("--rw=");
            out += &format!("\n{} against fio {fio}\n", side.side);
            out += &comparison::table(&columns(), &self.lines(side));
            out += &side.gb_per_second.line("GB/s, engine / fio");
            out += &side.cpu_per_gb.line("CPU per GB, engine / fio");
            out += &side
                .cpu_per_gb_against_fio_and_memcpy
                .line("CPU per GB, engine / (fio + one memcpy)");
            if let Some(more) = &side.syscalls_per_block_more {
                out += &more.line("system calls per block, engine - fio");
            }
        }
        out
    }

    fn csv(&self) -> String {
        let lines: Vec<_> = self.sides.iter().flat_map(|side| self.lines(side)).collect();
        comparison::csv(&columns(), &lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// Goal: what only the engine would heed is refused, because `numjobs` once gave it a multiple of fio's depth.
    #[test]
    fn numjobs_gave_the_engine_more_depth_than_fio() {
        let job = Job { directories: vec!["/x".into()], ..Job::default() };
        let second = Some(std::time::Duration::from_secs(1));
        let cases = [
            (Job { numjobs: 4, ..job.clone() }, "--numjobs"),
            (Job { rate: Some(1e9), ..job.clone() }, "--rate"),
            (Job { rate_blocks: Some(1e3), ..job.clone() }, "--rate"),
            (Job { runtime: second, ..job.clone() }, "--runtime"),
            (Job { verify: true, ..job.clone() }, "--verify"),
        ];
        for (job, word) in cases {
            let message = Pair::load(&job, vec![], false).map(drop).unwrap_err();
            assert!(message.contains(word), "{message}");
        }
        assert!(Pair::load(&job, vec![], false).is_ok());
    }
}

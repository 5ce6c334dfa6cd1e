//! `ucm-bench compare beside`: loads that arrive at a share of what the drive can, beside saves without limit;
//! the engine and fio in turn, with the same mix and the same I/O priorities.
//!
//! What is compared: how long loads take (99 %), and how much of their solo rate the saves keep. A load's
//! latency counts from its arrival, fio's from the moment fio submits it.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde::Serialize;

use crate::cli;
use crate::comparison::{self, Cell, Column, Comparison, Head, OneSided, Ratio, gb_per_second};
use crate::fio::{self, FioResult};
use crate::ground::{After, Ground};
use crate::job::{Job, Workload};
use crate::report::GB;
use crate::run::{self, Context, GroupResult};
use crate::transfer::UNSERVED;
use crate::units::show_size;

/// Seconds of a measurement where `--runtime` gives none.
const RUNTIME: Duration = Duration::from_secs(4);
/// What the drive is taken to save at most, to know how many blocks a run may need.
const SAVE_BYTES_PER_SECOND: u64 = 4 << 30;
/// Levels of best effort, as the engine gives them to loads and saves.
const LOAD_PRIORITY: u32 = 0;
const SAVE_PRIORITY: u32 = 4;

/// The subcommand.
pub fn command() -> Command {
    cli::with_rounds(cli::with_settings(Command::new("beside").about(
        "Loads at a share of their solo rate beside saves without limit: engine and fio in turn, p99 and rates",
    )))
    .arg(
        Arg::new("share")
            .long("share")
            .value_name("PERCENT")
            .default_value("30")
            .value_parser(clap::value_parser!(u32).range(1..=100))
            .help("Arrivals, in percent of the smaller solo rate of the two [30]"),
    )
}

/// What each does alone, GB/s.
#[derive(Clone, Copy, Debug, Serialize)]
struct Solo {
    engine_load: f64,
    engine_save: f64,
    fio_read: f64,
    fio_write: f64,
}

/// One round of both.
#[derive(Clone, Copy, Debug, Serialize)]
struct Round {
    engine_p99_us: f64,
    fio_p99_us: f64,
    engine_unserved: u64,
    engine_load_gb_per_second: f64,
    fio_read_gb_per_second: f64,
    engine_save_gb_per_second: f64,
    fio_write_gb_per_second: f64,
}

impl Round {
    /// p99 of loads, engine to fio.
    fn p99(&self) -> f64 {
        self.engine_p99_us / self.fio_p99_us
    }
}

#[derive(Serialize)]
struct Beside {
    #[serde(flatten)]
    head: Head,
    block_bytes: u64,
    iodepth: u32,
    arrivals_gb_per_second: f64,
    solo: Solo,
    rounds: Vec<Round>,
    load_p99: Ratio,
    saves_of_solo: Ratio,
    fio_writes_of_solo: Ratio,
}

/// `ucm-bench compare beside`.
pub fn main(matches: &ArgMatches, context: &Context) -> Result<ExitCode, String> {
    let version = fio::version()?;
    let format = crate::format(matches)?;
    let mut job = cli::single(matches, Job::default())?;
    job.runtime.get_or_insert(RUNTIME);
    job.validate()?;
    refuse(&job)?;
    let share = f64::from(matches.get_one::<u32>("share").copied().unwrap_or(30)) / 100.0;
    let rounds = cli::rounds(matches);
    let field = Field::new(&job)?;
    let solo = field.solo(context)?;
    let arrivals = solo.engine_load.min(solo.fio_read) * share;
    let measured = context.each(0..rounds, |round| {
        if context.progress {
            eprintln!("beside: round {} of {rounds}", round + 1);
        }
        let measured = field.round(arrivals, round % 2 == 1, context)?;
        context.whole(measured)
    })?;
    if measured.is_empty() {
        context.whole(())?;
    }
    let beside = Beside {
        head: Head::new("ucm-bench compare beside", Some(version), context),
        block_bytes: job.shape()?.bytes(),
        iodepth: job.iodepth,
        arrivals_gb_per_second: arrivals,
        solo,
        load_p99: Ratio::of(&measured, Round::p99),
        saves_of_solo: Ratio::of(&measured, |round| {
            round.engine_save_gb_per_second / solo.engine_save
        }),
        fio_writes_of_solo: Ratio::of(&measured, |round| {
            round.fio_write_gb_per_second / solo.fio_write
        }),
        rounds: measured,
    };
    comparison::write(matches, format, &beside)?;
    Ok(ExitCode::SUCCESS)
}

/// Refuses what the two sides would not share.
fn refuse(job: &Job) -> Result<(), String> {
    OneSided { command: "beside", yardstick: "fio", rate: "give --share, which is that of both" }
        .refuse(job, &[])?;
    if job.directories.len() != 1 {
        return Err("compare takes one --directory, because fio's jobs are files in it".into());
    }
    Ok(())
}

/// Where it happens: a folder with fio's files and the engine's.
struct Field {
    job: Job,
    block_size: u64,
    seconds: f64,
    /// Blocks that a save job has to give: more than the drive takes in the time.
    save_blocks: u64,
    ground: Ground,
}

impl Field {
    fn new(job: &Job) -> Result<Self, String> {
        let block_size = job.shape()?.bytes();
        let seconds = job.runtime.unwrap_or(RUNTIME).as_secs_f64();
        let saved = (seconds * SAVE_BYTES_PER_SECOND as f64) as u64;
        let ground = Ground::new(&job.directories, saved + 2 * job.size, After::Remove)?;
        Ok(Self { job: job.clone(), block_size, seconds, save_blocks: saved / block_size, ground })
    }

    fn folder(&self) -> &Path {
        &self.ground.folders()[0]
    }

    fn loads(&self, rate: Option<f64>) -> Job {
        Job {
            name: "loads".into(),
            rw: Workload::RandLoad,
            time_based: true,
            batch: 1,
            rate_blocks: rate.map(|rate| rate * GB / self.block_size as f64),
            ..self.job.clone()
        }
    }

    /// New blocks, of ids that the loads do not know.
    fn saves(&self) -> Job {
        Job {
            name: "saves".into(),
            rw: Workload::Save,
            blocks: Some(self.save_blocks),
            randseed: !self.job.randseed,
            ..self.job.clone()
        }
    }

    /// The engine's jobs together, on one store that is thrown away.
    fn engine(&self, jobs: &[Job], context: &Context) -> Result<GroupResult, String> {
        let folder = self.folder().join("engine");
        let _ = std::fs::remove_dir_all(&folder);
        let result = run::run_sharing(jobs, std::slice::from_ref(&folder), context);
        let _ = std::fs::remove_dir_all(&folder);
        let result = result?;
        for job in &result.jobs {
            let failed = |(name, _): &(&String, _)| name.as_str() != UNSERVED;
            if let Some((name, error)) = job.tally.errors.iter().find(failed) {
                return Err(format!(
                    "the engine's {} failed: {name}: {}",
                    job.job.name, error.example
                ));
            }
        }
        Ok(result)
    }

    /// fio's jobs together. `rate`: of the reads, GB/s; `None` without limit.
    fn fio(
        &self,
        reads: bool,
        rate: Option<f64>,
        writes: bool,
        context: &Context,
    ) -> Result<Vec<FioResult>, String> {
        let file = |name: &str| self.folder().join(name).display().to_string();
        let mut flags = vec![
            format!("--bs={}", self.block_size),
            format!("--direct={}", u8::from(self.job.store_setting("io_direct") != Some("false"))),
            format!("--iodepth={}", self.job.iodepth),
            format!("--runtime={}", self.seconds),
        ];
        let common = [
            "--ioengine=io_uring",
            "--fixedbufs=1",
            "--registerfiles=1",
            "--thread",
            "--prioclass=2",
            "--randrepeat=0",
        ];
        flags.extend(common.map(String::from));
        if reads {
            flags.extend([
                String::from("--name=reads"),
                format!("--filename={}", file("fio.reads")),
                String::from("--rw=randread"),
                format!("--size={}", self.job.size),
                String::from("--time_based"),
                format!("--prio={LOAD_PRIORITY}"),
            ]);
            if let Some(rate) = rate {
                let per_second = (rate * GB / self.block_size as f64).max(1.0);
                flags.push(format!("--rate_iops={per_second:.0}"));
                flags.push(String::from("--rate_process=poisson"));
            }
        }
        if writes {
            flags.extend([
                String::from("--name=writes"),
                format!("--filename={}", file("fio.writes")),
                String::from("--rw=write"),
                format!("--size={}", self.save_blocks * self.block_size),
                format!("--prio={SAVE_PRIORITY}"),
            ]);
        }
        let text = fio::call(&flags, context)?;
        let _ = std::fs::remove_file(file("fio.writes"));
        (0..usize::from(reads) + usize::from(writes))
            .map(|index| fio::parse(&text, index))
            .collect()
    }

    fn solo(&self, context: &Context) -> Result<Solo, String> {
        let laid_out = fio::FioJob {
            rw: "write",
            engine: "io_uring".into(),
            block_size: self.block_size,
            size: self.job.size,
            iodepth: self.job.iodepth,
            direct: true,
            fdatasync: 0,
            extra: Vec::new(),
        };
        laid_out.run(&self.folder().join("fio.reads"), context)?;
        let rate = |result: &GroupResult| gb_per_second(&result.jobs[0]);
        Ok(Solo {
            engine_load: rate(&self.engine(&[self.loads(None)], context)?),
            fio_read: self.fio(true, None, false, context)?[0].gb_per_second,
            engine_save: rate(&self.engine(&[self.saves()], context)?),
            fio_write: self.fio(false, None, true, context)?[0].gb_per_second,
        })
    }

    fn round(&self, arrivals: f64, fio_first: bool, context: &Context) -> Result<Round, String> {
        let mut fio = None;
        if fio_first {
            fio = Some(self.fio(true, Some(arrivals), true, context)?);
        }
        let engine = self.engine(&[self.loads(Some(arrivals)), self.saves()], context)?;
        let fio = match fio {
            Some(fio) => fio,
            None => self.fio(true, Some(arrivals), true, context)?,
        };
        let unserved = engine.jobs[0].tally.errors.get(UNSERVED).map_or(0, |error| error.count);
        let loaded = engine.jobs[0].tally.stages.get("loaded");
        Ok(Round {
            engine_p99_us: loaded.map_or(0.0, |latency| latency.at(0.99) * 1e6),
            fio_p99_us: fio[0].p99 * 1e6,
            engine_unserved: unserved,
            engine_load_gb_per_second: gb_per_second(&engine.jobs[0]),
            fio_read_gb_per_second: fio[0].gb_per_second,
            engine_save_gb_per_second: gb_per_second(&engine.jobs[1]),
            fio_write_gb_per_second: fio[1].gb_per_second,
        })
    }
}

type Line = (u64, Round);

fn columns() -> [Column<Line>; 9] {
    [
        Column::new("round", |line: &Line| Cell::Count(line.0)).shown("round", 5, 0),
        Column::new("engine_p99_us", |line: &Line| Cell::Number(line.1.engine_p99_us))
            .shown("p99 us", 12, 0),
        Column::new("fio_p99_us", |line: &Line| Cell::Number(line.1.fio_p99_us))
            .shown("fio", 12, 0),
        Column::seen("ratio", 8, 2, |line: &Line| Cell::Number(line.1.p99())),
        Column::new("engine_unserved", |line: &Line| Cell::Count(line.1.engine_unserved))
            .shown("unserved", 10, 0),
        Column::new("engine_load_gb_per_second", |line: &Line| {
            Cell::Number(line.1.engine_load_gb_per_second)
        })
        .shown("loads GB/s", 14, 3),
        Column::new("fio_read_gb_per_second", |line: &Line| {
            Cell::Number(line.1.fio_read_gb_per_second)
        })
        .shown("fio", 10, 3),
        Column::new("engine_save_gb_per_second", |line: &Line| {
            Cell::Number(line.1.engine_save_gb_per_second)
        })
        .shown("saves GB/s", 14, 3),
        Column::new("fio_write_gb_per_second", |line: &Line| {
            Cell::Number(line.1.fio_write_gb_per_second)
        })
        .shown("fio", 10, 3),
    ]
}

impl Beside {
    fn lines(&self) -> Vec<Line> {
        (1..).zip(self.rounds.iter().copied()).collect()
    }
}

impl Comparison for Beside {
    fn head(&self) -> &Head {
        &self.head
    }

    fn table(&self) -> String {
        let solo = self.solo;
        let mut out = format!(
            "loads at {:.3} GB/s beside saves without limit, engine against {}: blocks of {}, {} in flight\n\
             alone, GB/s: loads {:.3}, fio reads {:.3}; saves {:.3}, fio writes {:.3}\n\n",
            self.arrivals_gb_per_second,
            self.head.fio(),
            show_size(self.block_bytes),
            self.iodepth,
            solo.engine_load,
            solo.fio_read,
            solo.engine_save,
            solo.fio_write,
        );
        out += &comparison::table(&columns(), &self.lines());
        out += &self.load_p99.line("p99 of loads, engine / fio");
        out += &self.saves_of_solo.line("saves, of their solo rate");
        out += &self.fio_writes_of_solo.line("fio's writes, of their solo rate");
        out
    }

    fn csv(&self) -> String {
        comparison::csv(&columns(), &self.lines())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what only the engine would heed is refused: with `numjobs` it had a multiple of fio's depth.
    #[test]
    fn numjobs_was_taken_beside_and_not_given_to_fio() {
        let job = Job { directories: vec!["/x".into()], runtime: Some(RUNTIME), ..Job::default() };
        assert_eq!(refuse(&job), Ok(()));
        let more = Job { numjobs: 4, ..job.clone() };
        let message = refuse(&more).unwrap_err();
        assert!(message.contains("--numjobs") && message.contains("--iodepth"), "{message}");
        let rated = Job { rate: Some(1e9), ..job };
        assert!(refuse(&rated).unwrap_err().contains("--share"));
    }

    /// Goal: the loads know their own blocks only, arrive at the rate asked for, and the saves never end first.
    #[test]
    fn the_two_jobs_share_nothing_but_the_store() {
        let directory = std::env::temp_dir();
        let job = Job { directories: vec![directory], size: 8 << 20, ..Job::default() };
        let job = Job { runtime: Some(Duration::from_millis(10)), ..job };
        let field = Field::new(&job).unwrap();
        let (loads, saves) = (field.loads(Some(0.5)), field.saves());
        assert_ne!(run::data_seed(&loads), run::data_seed(&saves));
        assert_eq!(loads.arrivals().unwrap(), Some(0.5 * GB / (1 << 20) as f64));
        assert!(saves.block_count().unwrap() * field.block_size >= SAVE_BYTES_PER_SECOND / 110);
        assert!(saves.validate().is_ok() && loads.validate().is_ok());
    }
}

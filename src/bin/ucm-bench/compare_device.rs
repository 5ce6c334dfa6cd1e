//! `ucm-bench compare device`: engine and one large plain copy in turn over the same bus, and the ratios
//! as median and spread. With a directory, also from the drive to the device, against the slower of fio
//! and the bus.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde::Serialize;

use crate::abi::Direction;
use crate::cli;
use crate::compare::{Ratio, WARM_UP, spread};
use crate::fio::{self, FioJob};
use crate::ground::{After, Ground};
use crate::job::{Job, Workload};
use crate::peak::Peak;
use crate::report::{Format, GB};
use crate::run::{self, Context, GroupResult, Layout};
use crate::units::{self, show_size};

/// Version of the JSON of a comparison.
const JSON_VERSION: u32 = 1;
/// Bytes of one plain copy: four milliseconds at 64 GB/s, so that its start does not show.
const PLAIN_BYTES: usize = 256 << 20;
/// Plain copies in one measurement, one behind the other.
const PLAIN_TIMES: u32 = 16;
/// Arena of the stores: twice the blocks in flight, so that none waits for a slot.
const ARENA_OF_FLIGHT: f64 = 2.0;
/// Blocks in flight where the drive is read: what keeps a drive busy.
const DRIVE_DEPTH: u32 = 32;
const DRIVE_BATCH: u32 = 8;
/// Bytes that are read from the drive in a round.
const DRIVE_BYTES: u64 = 2 << 30;

/// The subcommand.
pub fn command() -> Command {
    cli::with_rounds(cli::with_settings(Command::new("device").about(
        "Runs the engine and the driver's plain large copies in turn and prints the ratios of GB/s",
    )))
    .arg(
        Arg::new("slice-sizes")
            .long("slice-sizes")
            .value_name("LIST")
            .default_value("2m,128k,32k")
            .help("Tensor slices of a block; the drive is measured with the middle one"),
    )
}

/// What a comparison is run with, where the flags do not say.
fn defaults() -> Job {
    Job {
        device: "cuda".into(),
        block_size: 4 << 20,
        batch: 64,
        iodepth: 192,
        size: 16 << 30,
        runtime: Some(Duration::from_secs(1)),
        ..Job::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Way {
    /// Device to pinned memory.
    Save,
    /// Pinned memory to device.
    Load,
    /// Drive to device.
    DriveToDevice,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Round {
    engine_gb_per_second: f64,
    engine_cpu_seconds_per_gb: f64,
    plain_gb_per_second: f64,
    fio_gb_per_second: Option<f64>,
}

impl Round {
    /// The engine's share of what is possible.
    fn ratio(&self) -> f64 {
        let most = self.fio_gb_per_second.map_or(f64::INFINITY, |fio| fio);
        self.engine_gb_per_second / self.plain_gb_per_second.min(most)
    }
}

#[derive(Serialize)]
struct Row {
    way: Way,
    slice_bytes: u64,
    block_bytes: u64,
    batch: u32,
    iodepth: u32,
    rounds: Vec<Round>,
    ratio: Ratio,
}

#[derive(Serialize)]
struct Comparison {
    format: &'static str,
    version: u32,
    library: String,
    rows: Vec<Row>,
    notes: Vec<String>,
}

/// `ucm-bench compare device`.
pub fn main(matches: &ArgMatches, context: &Context) -> Result<ExitCode, String> {
    let format = crate::format(matches)?;
    let job = cli::single(matches, defaults())?;
    if job.device != "cuda" {
        return Err(format!("--device={}: the plain copies are those of cuda", job.device));
    }
    let rounds = cli::rounds(matches);
    let list = matches.get_one::<String>("slice-sizes").cloned().unwrap_or_default();
    let slices = list.split(',').map(units::size).collect::<Result<Vec<_>, _>>()?;
    let peak = Peak::new(job.device_id, PLAIN_BYTES.min(job.size as usize))?;
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    for &slice in &slices {
        for way in [Way::Save, Way::Load] {
            let job = over_the_bus(&job, slice, way)?;
            rows.extend(run_row(&job, way, slice, None, rounds, &peak, context)?);
        }
    }
    if job.directories.is_empty() {
        notes.push("drive to device: not measured, no --directory".into());
    } else if let Err(message) = fio::version() {
        notes.push(format!("drive to device: not measured: {message}"));
    } else {
        let slice = slices[slices.len() / 2];
        let job = from_the_drive(&job, slice)?;
        let way = Way::DriveToDevice;
        rows.extend(run_row(&job, way, slice, Some(fio_of(&job)?), rounds, &peak, context)?);
    }
    let library = crate::abi::version();
    let format_name = "ucm-bench compare device";
    let all = Comparison { format: format_name, version: JSON_VERSION, library, rows, notes };
    let text = match format {
        Format::Json => serde_json::to_string_pretty(&all).unwrap_or_default() + "\n",
        Format::Csv => csv(&all),
        Format::Normal => table(&all),
    };
    crate::write(matches, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The job cut into slices of this size, each in a tensor of its own.
fn cut(job: &Job, slice: u64) -> Result<Job, String> {
    if slice == 0 || !job.block_size.is_multiple_of(slice) {
        let (slice, block) = (show_size(slice), show_size(job.block_size));
        return Err(format!("--slice-sizes: {slice} does not divide a block of {block}"));
    }
    let layers = (job.block_size / slice) as u32;
    Ok(Job { layers, slices: 1, model: None, numjobs: 1, ..job.clone() })
}

/// Between device and arena: storage is left out.
fn over_the_bus(job: &Job, slice: u64, way: Way) -> Result<Job, String> {
    let mut job = cut(job, slice)?;
    let flight = job.block_size * u64::from(job.iodepth);
    job.directories.clear();
    job.set_store("store_pipeline", "Cache|Empty");
    if job.store_setting("cache_buffer_capacity_gb").is_none() {
        let gib = ARENA_OF_FLIGHT * flight as f64 / f64::from(1 << 30);
        job.set_store("cache_buffer_capacity_gb", format!("{gib:.3}"));
    }
    if way == Way::Save {
        (job.rw, job.runtime) = (Workload::Save, None);
    } else {
        // As much as is in flight, over and over: all of it stays in the arena.
        (job.rw, job.size) = (Workload::Load, flight);
        (job.time_based, job.warm_cache) = (true, true);
    }
    job.validate()?;
    Ok(job)
}

/// From the drive into the device, nothing from memory.
fn from_the_drive(job: &Job, slice: u64) -> Result<Job, String> {
    let mut job = cut(job, slice)?;
    (job.rw, job.runtime, job.size) = (Workload::RandLoad, None, DRIVE_BYTES.min(job.size));
    (job.iodepth, job.batch) = (DRIVE_DEPTH.min(job.iodepth), DRIVE_BATCH.min(job.batch));
    job.validate()?;
    if job.directories.len() != 1 {
        return Err("compare takes one --directory, because fio's job is one file".into());
    }
    Ok(job)
}

fn fio_of(job: &Job) -> Result<FioJob, String> {
    let psync = job.store_setting("io_engine") == Some("psync");
    Ok(FioJob {
        rw: "randread",
        engine: String::from(if psync { "psync" } else { "io_uring" }),
        block_size: job.block_size,
        size: job.block_count()? * job.block_size,
        iodepth: job.iodepth,
        direct: job.store_setting("io_direct") != Some("false"),
        fdatasync: 0,
        extra: Vec::new(),
    })
}

/// Runs all rounds of a row; none after Ctrl-C in the first.
fn run_row(
    job: &Job,
    way: Way,
    slice: u64,
    fio: Option<FioJob>,
    rounds: usize,
    peak: &Peak,
    context: &Context,
) -> Result<Option<Row>, String> {
    let ground = Ground::new(&job.directories, run::footprint(job)? * 2, After::Remove)?;
    let folders: Vec<_> = ground.folders().iter().map(|folder| folder.join("engine")).collect();
    let fio = fio.map(|fio| (fio, ground.folders()[0].join("fio.data")));
    if let Some((fio, file)) = &fio {
        FioJob { rw: "write", ..fio.clone() }.run(file, &context.syscalls)?;
    }
    let direction = if way == Way::Save { Direction::Save } else { Direction::Load };
    let (mut measured, mut layout) = (Vec::new(), Layout::Needed);
    for round in 0..rounds + WARM_UP {
        if context.is_interrupted() {
            break;
        }
        // The warm-up looks at every byte: a rate of wrong bytes is none.
        let verify = round < WARM_UP && fio.is_none() && way == Way::Load;
        let job = Job { verify, ..job.clone() };
        let read = fio.as_ref().map(|(fio, file)| fio.run(file, &context.syscalls)).transpose()?;
        let before = peak.gb_per_second(direction, PLAIN_TIMES)?;
        let engine = run::run_in(std::slice::from_ref(&job), &folders, layout, context)?;
        let after = peak.gb_per_second(direction, PLAIN_TIMES)?;
        if fio.is_some() {
            layout = Layout::Done;
        }
        let mut seen = round_of(&engine, before.max(after))?;
        seen.fio_gb_per_second = read.map(|read| read.gb_per_second);
        if round >= WARM_UP && !context.is_interrupted() {
            measured.push(seen);
        }
    }
    if measured.is_empty() {
        return Ok(None);
    }
    let ratio = spread(measured.iter().map(Round::ratio).collect());
    let (block_bytes, batch, iodepth) = (job.block_size, job.batch, job.iodepth);
    Ok(Some(Row { way, slice_bytes: slice, block_bytes, batch, iodepth, rounds: measured, ratio }))
}

fn round_of(engine: &GroupResult, plain: f64) -> Result<Round, String> {
    let job = &engine.jobs[0];
    if job.tally.failures() > 0 || job.tally.blocks == 0 {
        let first = job.tally.errors.iter().next();
        return Err(format!(
            "the engine failed {} blocks, so there is nothing to compare: {}",
            job.tally.failures(),
            first.map_or(String::new(), |(name, error)| format!("{name}: {}", error.example))
        ));
    }
    let gb = job.tally.bytes as f64 / GB;
    Ok(Round {
        engine_gb_per_second: gb / job.elapsed.as_secs_f64().max(1e-9),
        engine_cpu_seconds_per_gb: engine.cost.cpu.total() / gb.max(1e-9),
        plain_gb_per_second: plain,
        fio_gb_per_second: None,
    })
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Save => "save",
            Way::Load => "load",
            Way::DriveToDevice => "drive to device",
        }
    }
}

fn table(all: &Comparison) -> String {
    let mut out = String::from(
        "engine against one large plain copy (drive to device: or fio, if that is less), GB/s\n\n",
    );
    let _ = writeln!(
        out,
        "  {:<16}{:>9}{:>9}{:>8}{:>8}{:>8}{:>12}   ratio, median (spread)",
        "way", "slices", "engine", "plain", "fio", "batch", "CPU s/GB"
    );
    for row in &all.rows {
        let middle =
            |value: &dyn Fn(&Round) -> f64| spread(row.rounds.iter().map(value).collect()).median;
        let fio = row.rounds[0].fio_gb_per_second.map_or("-".to_owned(), |_| {
            format!("{:.2}", middle(&|round| round.fio_gb_per_second.unwrap_or_default()))
        });
        let _ = writeln!(
            out,
            "  {:<16}{:>9}{:>9.2}{:>8.2}{:>8}{:>8}{:>12.4}   {:.3} ({:.3} to {:.3})",
            row.way.name(),
            show_size(row.slice_bytes),
            middle(&|round| round.engine_gb_per_second),
            middle(&|round| round.plain_gb_per_second),
            fio,
            row.batch,
            middle(&|round| round.engine_cpu_seconds_per_gb),
            row.ratio.median,
            row.ratio.least,
            row.ratio.most,
        );
    }
    for note in &all.notes {
        let _ = writeln!(out, "\n{note}");
    }
    out
}

fn csv(all: &Comparison) -> String {
    let mut out = String::from(
        "way,slice_bytes,block_bytes,batch,iodepth,round,engine_gb_per_second,plain_gb_per_second,\
         fio_gb_per_second,engine_cpu_seconds_per_gb,ratio\n",
    );
    for row in &all.rows {
        for (number, round) in row.rounds.iter().enumerate() {
            let _ = writeln!(
                out,
                "{},{},{},{},{},{},{:.6},{:.6},{},{:.6},{:.6}",
                row.way.name(),
                row.slice_bytes,
                row.block_bytes,
                row.batch,
                row.iodepth,
                number + 1,
                round.engine_gb_per_second,
                round.plain_gb_per_second,
                round.fio_gb_per_second.map_or(String::new(), |fio| format!("{fio:.6}")),
                round.engine_cpu_seconds_per_gb,
                round.ratio(),
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the engine is held against the slower of drive and bus.
    #[test]
    fn the_slower_side_counts() {
        let round = |fio| Round {
            engine_gb_per_second: 1.8,
            engine_cpu_seconds_per_gb: 0.0,
            plain_gb_per_second: 50.0,
            fio_gb_per_second: fio,
        };
        assert!((round(None).ratio() - 0.036).abs() < 1e-9);
        assert!((round(Some(2.0)).ratio() - 0.9).abs() < 1e-9);
        assert!((round(Some(90.0)).ratio() - 0.036).abs() < 1e-9);
    }

    /// Goal: blocks are cut into the slices asked for, loads stay in the arena, and a slice that does not
    /// divide a block is refused by name.
    #[test]
    fn jobs_are_cut() {
        let job = over_the_bus(&defaults(), 32 << 10, Way::Load).unwrap();
        assert_eq!((job.layers, job.rw, job.warm_cache), (128, Workload::Load, true));
        let arena: f64 = job.store_setting("cache_buffer_capacity_gb").unwrap().parse().unwrap();
        assert!(arena * f64::from(1 << 30) >= 2.0 * job.size as f64);
        assert!(cut(&defaults(), 3 << 20).unwrap_err().contains("3 MiB"));
        assert!(from_the_drive(&defaults(), 2 << 20).unwrap_err().contains("--directory"));
    }
}

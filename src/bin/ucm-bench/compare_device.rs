//! `ucm-bench compare device`: engine and one large plain copy in turn over the same bus, and the ratios
//! as median and spread. With a directory, also from the drive to the device, against the slower of fio
//! and the bus.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde::Serialize;

use crate::abi::Direction;
use crate::cli;
use crate::compare::WARM_UP;
use crate::comparison::{
    self, Cell, Column, Comparison, Head, OneSided, Ratio, gb_per_second, succeeded,
};
use crate::fio::{self, FioJob};
use crate::ground::{After, Ground};
use crate::job::{Job, Workload};
use crate::peak::Peak;
use crate::report::GB;
use crate::run::{self, Context, GroupResult, Layout};
use crate::units::{self, show_size};

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
struct Devices {
    #[serde(flatten)]
    head: Head,
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
    OneSided {
        command: "device",
        yardstick: "the plain copies",
        rate: "both go as fast as they can",
    }
    .refuse(&job, &[])?;
    let rounds = cli::rounds(matches);
    let list = matches.get_one::<String>("slice-sizes").cloned().unwrap_or_default();
    let slices = list.split(',').map(units::size).collect::<Result<Vec<_>, _>>()?;
    let (plans, notes) = plans(&job, &slices)?;
    let peak = Peak::new(job.device_id, PLAIN_BYTES.min(job.size as usize))?;
    let rows = context.each(&plans, |plan| plan.run(rounds, &peak, context))?;
    let head = Head::new("ucm-bench compare device", None, context);
    comparison::write(matches, format, &Devices { head, rows, notes })?;
    Ok(ExitCode::SUCCESS)
}

/// What one row measures.
struct Plan {
    way: Way,
    slice: u64,
    engine: Job,
    fio: Option<FioJob>,
}

/// The rows to be, and what is left out.
fn plans(job: &Job, slices: &[u64]) -> Result<(Vec<Plan>, Vec<String>), String> {
    let (mut plans, mut notes) = (Vec::new(), Vec::new());
    for &slice in slices {
        for way in [Way::Save, Way::Load] {
            plans.push(Plan { way, slice, engine: over_the_bus(job, slice, way)?, fio: None });
        }
    }
    if job.directories.is_empty() {
        notes.push("drive to device: not measured, no --directory".into());
    } else if let Err(message) = fio::version() {
        notes.push(format!("drive to device: not measured: {message}"));
    } else {
        let slice = slices[slices.len() / 2];
        let engine = from_the_drive(job, slice)?;
        let fio = Some(fio_of(&engine)?);
        plans.push(Plan { way: Way::DriveToDevice, slice, engine, fio });
    }
    Ok((plans, notes))
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

impl Plan {
    /// Runs all rounds, or those that ended before Ctrl-C.
    fn run(&self, rounds: usize, peak: &Peak, context: &Context) -> Result<Row, String> {
        let job = &self.engine;
        let ground = Ground::new(&job.directories, run::footprint(job)? * 2, After::Remove)?;
        let folders: Vec<_> = ground.folders().iter().map(|folder| folder.join("engine")).collect();
        let fio = self.fio.as_ref().map(|fio| (fio, ground.folders()[0].join("fio.data")));
        if let Some((fio, file)) = &fio {
            FioJob { rw: "write", ..(*fio).clone() }.run(file, context)?;
        }
        let mut layout = Layout::Needed;
        let measured = context.each(0..rounds + WARM_UP, |round| {
            if context.progress {
                let (way, slice) = (self.way.name(), show_size(self.slice));
                eprintln!("{way} of {slice}: round {round} of {rounds}");
            }
            let read = fio.as_ref().map(|(fio, file)| fio.run(file, context)).transpose()?;
            let mut seen = self.round(round < WARM_UP, &folders, layout, peak, context)?;
            seen.fio_gb_per_second = read.map(|read| read.gb_per_second);
            if fio.is_some() {
                layout = Layout::Done;
            }
            context.whole(seen)
        })?;
        let measured: Vec<_> = measured.into_iter().skip(WARM_UP).collect();
        if measured.is_empty() {
            context.whole(())?;
        }
        Ok(self.row(measured))
    }

    /// The engine between two measurements of the plain copy, of which the better one counts.
    fn round(
        &self,
        warm_up: bool,
        folders: &[PathBuf],
        layout: Layout,
        peak: &Peak,
        context: &Context,
    ) -> Result<Round, String> {
        let direction = if self.way == Way::Save { Direction::Save } else { Direction::Load };
        // The warm-up looks at every byte: a rate of wrong bytes is none.
        let verify = warm_up && self.fio.is_none() && self.way == Way::Load;
        let job = Job { verify, ..self.engine.clone() };
        let before = peak.gb_per_second(direction, PLAIN_TIMES)?;
        let engine = run::run_in(std::slice::from_ref(&job), folders, layout, context)?;
        let after = peak.gb_per_second(direction, PLAIN_TIMES)?;
        round_of(&engine, before.max(after))
    }

    fn row(&self, rounds: Vec<Round>) -> Row {
        let Job { block_size: block_bytes, batch, iodepth, .. } = self.engine;
        let ratio = Ratio::of(&rounds, Round::ratio);
        Row { way: self.way, slice_bytes: self.slice, block_bytes, batch, iodepth, rounds, ratio }
    }
}

fn round_of(engine: &GroupResult, plain: f64) -> Result<Round, String> {
    let job = succeeded(engine)?;
    let gb = job.tally.bytes as f64 / GB;
    Ok(Round {
        engine_gb_per_second: gb_per_second(job),
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

impl Row {
    fn median(&self, value: impl Fn(&Round) -> f64) -> Cell {
        Cell::Number(Ratio::of(&self.rounds, value).median)
    }

    fn has_fio(&self) -> bool {
        self.rounds.iter().all(|round| round.fio_gb_per_second.is_some())
    }

    fn spread(&self) -> Cell {
        let Ratio { median, least, most } = self.ratio;
        Cell::Text(format!("{median:.3} ({least:.3} to {most:.3})"))
    }
}

/// What people see: a line for each row.
fn row_columns<'a>() -> [Column<&'a Row>; 8] {
    [
        Column::seen("way", 16, 0, |row: &&Row| Cell::Text(row.way.name().into())),
        Column::seen("slices", 9, 0, |row: &&Row| Cell::Text(show_size(row.slice_bytes))),
        Column::seen("engine", 9, 2, |row: &&Row| row.median(|round| round.engine_gb_per_second)),
        Column::seen("plain", 8, 2, |row: &&Row| row.median(|round| round.plain_gb_per_second)),
        Column::seen("fio", 8, 2, |row: &&Row| match row.has_fio() {
            true => row.median(|round| round.fio_gb_per_second.unwrap_or_default()),
            false => Cell::Missing,
        }),
        Column::seen("batch", 8, 0, |row: &&Row| Cell::Count(row.batch.into())),
        Column::seen("CPU s/GB", 12, 4, |row: &&Row| {
            row.median(|round| round.engine_cpu_seconds_per_gb)
        }),
        Column::seen("ratio, median (spread)", 28, 0, |row: &&Row| row.spread()),
    ]
}

/// One round, for spreadsheets.
struct Line<'a> {
    row: &'a Row,
    number: u64,
    round: Round,
}

fn columns<'a>() -> [Column<Line<'a>>; 11] {
    [
        Column::new("way", |line: &Line| Cell::Text(line.row.way.name().into())),
        Column::new("slice_bytes", |line: &Line| Cell::Count(line.row.slice_bytes)),
        Column::new("block_bytes", |line: &Line| Cell::Count(line.row.block_bytes)),
        Column::new("batch", |line: &Line| Cell::Count(line.row.batch.into())),
        Column::new("iodepth", |line: &Line| Cell::Count(line.row.iodepth.into())),
        Column::new("round", |line: &Line| Cell::Count(line.number)),
        Column::new("engine_gb_per_second", |line: &Line| {
            Cell::Number(line.round.engine_gb_per_second)
        }),
        Column::new("plain_gb_per_second", |line: &Line| {
            Cell::Number(line.round.plain_gb_per_second)
        }),
        Column::new("fio_gb_per_second", |line: &Line| Cell::maybe(line.round.fio_gb_per_second)),
        Column::new("engine_cpu_seconds_per_gb", |line: &Line| {
            Cell::Number(line.round.engine_cpu_seconds_per_gb)
        }),
        Column::new("ratio", |line: &Line| Cell::Number(line.round.ratio())),
    ]
}

impl Comparison for Devices {
    fn head(&self) -> &Head {
        &self.head
    }

    fn table(&self) -> String {
        let mut out = String::from(
            "engine against one large plain copy (drive to device: or fio, if that is less), GB/s\n\n",
        );
        out += &comparison::table(&row_columns(), &self.rows.iter().collect::<Vec<_>>());
        self.notes.iter().for_each(|note| out += &format!("\n{note}\n"));
        out
    }

    fn csv(&self) -> String {
        let lines = self.rows.iter().flat_map(|row| {
            let line = move |(number, round): (u64, &Round)| Line { row, number, round: *round };
            (1..).zip(&row.rounds).map(line)
        });
        comparison::csv(&columns(), &lines.collect::<Vec<_>>())
    }
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

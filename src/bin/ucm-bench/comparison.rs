//! What comparisons have in common: ratios as median and spread, rounds as lines of a table, and one writer for
//! all formats. A column is told once and serves people and spreadsheets.

#![forbid(unsafe_code)]

use clap::ArgMatches;
use serde::Serialize;

use crate::job::Job;
use crate::report::{Format, GB};
use crate::run::{Context, GroupResult, JobResult};

/// Version of the JSON and of the columns of the CSV.
const JSON_VERSION: u32 = 1;

/// How the JSON of a comparison begins.
#[derive(Serialize)]
pub struct Head {
    format: &'static str,
    version: u32,
    library: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fio: Option<String>,
    interrupted: bool,
}

impl Head {
    /// Of a comparison of that name that has been measured, with fio's version where it is the yardstick.
    pub fn new(format: &'static str, fio: Option<String>, context: &Context) -> Self {
        let interrupted = context.is_interrupted();
        Self { format, version: JSON_VERSION, library: crate::abi::version(), fio, interrupted }
    }

    /// Version text of fio.
    pub fn fio(&self) -> &str {
        self.fio.as_deref().unwrap_or_default()
    }
}

/// A comparison that has been measured.
pub trait Comparison: Serialize {
    /// What it is, and whether Ctrl-C made it shorter than was asked for.
    fn head(&self) -> &Head;
    /// For people.
    fn table(&self) -> String;
    /// One line for each round.
    fn csv(&self) -> String;
}

/// Writes it in the format and to the place that were asked for.
pub fn write(
    matches: &ArgMatches,
    format: Format,
    comparison: &impl Comparison,
) -> Result<(), String> {
    let text = match format {
        // Numbers and texts: serialisation cannot fail.
        Format::Json => serde_json::to_string_pretty(comparison).unwrap_or_default() + "\n",
        Format::Csv => comparison.csv(),
        Format::Normal => comparison.table(),
    };
    crate::write(matches, &text)?;
    if comparison.head().interrupted {
        eprintln!("ucm-bench: interrupted; the report is of the rounds that ended before");
    }
    Ok(())
}

/// What would reach the engine and not its yardstick: the ratio would be of two different things.
pub struct OneSided {
    /// Which comparison.
    pub command: &'static str,
    /// The other side.
    pub yardstick: &'static str,
    /// What to do instead of giving a rate.
    pub rate: &'static str,
}

impl OneSided {
    /// Refuses such settings, and `more` of this comparison: whether it is given, its name, and the remedy.
    pub fn refuse(
        &self,
        job: &Job,
        more: &[(bool, &'static str, &'static str)],
    ) -> Result<(), String> {
        let rated = job.rate.is_some() || job.rate_blocks.is_some();
        let always = [
            (job.numjobs != 1, "numjobs", "give --iodepth, which is the depth of both"),
            (rated, "rate", self.rate),
            (!job.ramp.is_zero(), "ramp-time", "the clock starts when all data is there"),
            (job.verify, "verify", "verify in a run of its own"),
        ];
        match always.iter().chain(more).find(|(given, ..)| *given) {
            None => Ok(()),
            Some((_, name, remedy)) => Err(format!(
                "compare {}: --{name} would hold for the engine and not for {}; leave it out ({remedy})",
                self.command, self.yardstick
            )),
        }
    }
}

/// The one job of the engine's run, if it did what was asked.
pub fn succeeded(engine: &GroupResult) -> Result<&JobResult, String> {
    let job = &engine.jobs[0];
    if job.tally.failures() == 0 && job.tally.blocks > 0 {
        return Ok(job);
    }
    let first = job.tally.errors.iter().next();
    Err(format!(
        "the engine failed {} blocks, so there is nothing to compare: {}",
        job.tally.failures(),
        first.map_or(String::new(), |(name, error)| format!("{name}: {}", error.example))
    ))
}

/// 10^9 bytes a second that a job moved.
pub fn gb_per_second(job: &JobResult) -> f64 {
    job.tally.bytes as f64 / GB / job.elapsed.as_secs_f64().max(1e-9)
}

/// Median and range of what the rounds gave.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ratio {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Ratio {
    /// Of some rounds.
    ///
    /// # Panics
    /// If there are none.
    pub fn of<R>(rounds: &[R], value: impl Fn(&R) -> f64) -> Self {
        let mut values: Vec<f64> = rounds.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        Self { median, least: values[0], most: values[values.len() - 1] }
    }

    /// As a line below a table.
    pub fn line(&self, name: &str) -> String {
        let Self { median, least, most } = self;
        format!("  {name:<46}median {median:.3}   spread {least:.3} to {most:.3}\n")
    }
}

/// What stands in a table at one place.
pub enum Cell {
    Text(String),
    Count(u64),
    Number(f64),
    /// Not measured.
    Missing,
}

impl Cell {
    /// A number where there is one.
    pub fn maybe(number: Option<f64>) -> Self {
        number.map_or(Self::Missing, Self::Number)
    }

    fn read(&self, decimals: usize, missing: &str) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Count(count) => count.to_string(),
            Self::Number(number) => format!("{number:.decimals$}"),
            Self::Missing => missing.to_owned(),
        }
    }
}

/// One column of lines of kind `R`.
pub struct Column<R> {
    name: &'static str,
    cell: fn(&R) -> Cell,
    head: &'static str,
    width: usize,
    decimals: usize,
}

/// Decimals of numbers in CSV.
const CSV_DECIMALS: usize = 6;

impl<R> Column<R> {
    /// A column of the CSV, called `name` there.
    pub fn new(name: &'static str, cell: fn(&R) -> Cell) -> Self {
        Self { name, cell, head: "", width: 0, decimals: 0 }
    }

    /// Shown to people too.
    pub fn shown(self, head: &'static str, width: usize, decimals: usize) -> Self {
        Self { head, width, decimals, ..self }
    }

    /// Shown to people alone.
    pub fn seen(head: &'static str, width: usize, decimals: usize, cell: fn(&R) -> Cell) -> Self {
        Self { name: "", cell, head, width, decimals }
    }
}

/// The lines of a table under their heads, for people.
pub fn table<R>(columns: &[Column<R>], lines: &[R]) -> String {
    let shown = || columns.iter().filter(|column| column.width > 0);
    let line = |cells: &mut dyn Iterator<Item = String>| {
        let padded = shown().zip(cells).map(|(column, cell)| format!("{cell:>0$}", column.width));
        format!("  {}\n", padded.collect::<String>())
    };
    let heads = line(&mut shown().map(|column| column.head.to_owned()));
    let read =
        |row: &R| line(&mut shown().map(|column| (column.cell)(row).read(column.decimals, "n/a")));
    heads + &lines.iter().map(read).collect::<String>()
}

/// The lines as CSV, with the names of the columns above.
pub fn csv<R>(columns: &[Column<R>], lines: &[R]) -> String {
    let told = || columns.iter().filter(|column| !column.name.is_empty());
    let join = |cells: Vec<String>| cells.join(",") + "\n";
    let names = join(told().map(|column| column.name.to_owned()).collect());
    let read =
        |row: &R| join(told().map(|column| (column.cell)(row).read(CSV_DECIMALS, "")).collect());
    names + &lines.iter().map(read).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the median of few rounds is the middle one, and of an even number the mean of two.
    #[test]
    fn medians() {
        let seen = Ratio::of(&[3.0, 1.0, 2.0], |round| *round);
        assert_eq!((seen.median, seen.least, seen.most), (2.0, 1.0, 3.0));
        assert_eq!(Ratio::of(&[4.0, 1.0, 2.0, 3.0], |round| *round).median, 2.5);
    }

    /// Goal: one description of the columns gives both forms; what was not measured is empty in CSV.
    #[test]
    fn a_column_serves_people_and_spreadsheets() {
        type Line = (u64, Option<f64>);
        let twice = |line: &Line| Cell::maybe(line.1.map(|rate| rate * 2.0));
        let columns = [
            Column::new("round", |line: &Line| Cell::Count(line.0)).shown("round", 5, 0),
            Column::new("rate", |line: &Line| Cell::maybe(line.1)).shown("GB/s", 8, 2),
            Column::new("twice", twice),
            Column::seen("kind", 6, 0, |_: &Line| Cell::Text("load".into())),
        ];
        let lines = [(1, Some(1.5)), (2, None)];
        let people = "  round    GB/s  kind\n      1    1.50  load\n      2     n/a  load\n";
        assert_eq!(table(&columns, &lines), people);
        assert_eq!(csv(&columns, &lines), "round,rate,twice\n1,1.500000,3.000000\n2,,\n");
    }
}

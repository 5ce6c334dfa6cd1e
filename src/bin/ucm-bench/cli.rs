//! The command line: flags from the table of settings, job files, subcommands.
//!
//! As in fio, each `--name` begins a job; flags before the first hold for all, and a job file's `[global]`
//! stands on top of them.

#![forbid(unsafe_code)]

use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::job::Job;
use crate::jobfile;
use crate::keys::{Arity, KEYS};
use crate::writers;

/// The whole command.
pub fn command() -> Command {
    let command = Command::new("ucm-bench")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Measures a UCM store as fio measures a drive")
        .after_help(
            "Each --name begins a job; flags before the first --name hold for all jobs. A job file is read like \
             fio's:\n\n  [global]\n  directory=/mnt/kv\n  model=qwen2.5-7b\n\n  [fill]\n  rw=save\n  size=4g\n\n  \
             [read]\n  stonewall\n  rw=randload\n\nWhat to measure first: ucm-bench compare fio --directory=DIR",
        )
        .args_conflicts_with_subcommands(true)
        .arg(Arg::new("jobfile").value_name("JOBFILE").num_args(0..).help("Job files"))
        .arg(
            Arg::new("name")
                .long("name")
                .value_name("NAME")
                .action(ArgAction::Append)
                .help("Begins a job of this name"),
        );
    with_output(with_settings(command))
        .subcommand(
            with_output(with_settings(Command::new("sweep").about(
                "Runs a job over lists of block sizes and depths, and draws the results (SVG inside HTML)",
            )))
            .arg(list("sweep-block-size", "64k,256k,1m,4m", "Block sizes"))
            .arg(list("sweep-iodepth", "1,4,16,32", "Blocks in flight"))
            .arg(list("sweep-rw", "save,randload", "Workloads"))
            .arg(
                Arg::new("report")
                    .long("report")
                    .value_name("FILE")
                    .default_value("ucm-bench-sweep.html")
                    .help("Where the report goes; .svg gives the drawing alone"),
            ),
        )
        .subcommand(crate::compare::command())
        .subcommand(crate::trace::command())
        .subcommand(Command::new("models").about("Lists the models whose shapes are known"))
        .subcommand(
            Command::new(writers::SUBCOMMAND)
                .hide(true)
                .arg(Arg::new("count").required(true).value_parser(clap::value_parser!(u32)))
                .arg(Arg::new("options").num_args(0..)),
        )
}

fn list(name: &'static str, default: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name("LIST").default_value(default).help(help)
}

/// Adds the settings of a job.
pub fn with_settings(mut command: Command) -> Command {
    for key in KEYS {
        let mut arg = Arg::new(key.name)
            .long(key.name)
            .value_name(key.hint)
            .help(key.help)
            .help_heading(key.group)
            .action(ArgAction::Append);
        for alias in key.aliases {
            arg = match alias.len() {
                1 => arg.short(alias.chars().next().unwrap_or('o')),
                _ => arg.visible_alias(*alias),
            };
        }
        // fio's own spelling with underscores.
        for name in std::iter::once(&key.name).chain(key.aliases) {
            if name.contains('-') {
                arg = arg.alias(name.replace('-', "_"));
            }
        }
        if key.arity == Arity::Switch {
            arg = arg.num_args(0..=1).require_equals(true).default_missing_value("1");
        }
        command = command.arg(arg);
    }
    command
}

/// Adds what a comparison has besides the settings: how many rounds, and where the report goes.
pub fn with_rounds(command: Command) -> Command {
    with_output(command).arg(
        Arg::new("rounds")
            .long("rounds")
            .value_name("N")
            .default_value("5")
            .value_parser(clap::value_parser!(u32).range(1..))
            .help("Rounds, each side in turn [5]"),
    )
}

/// The rounds asked for.
pub fn rounds(matches: &ArgMatches) -> usize {
    matches.get_one::<u32>("rounds").copied().unwrap_or(5) as usize
}

/// Adds where and how the report is written.
pub fn with_output(command: Command) -> Command {
    command
        .arg(
            Arg::new("output-format")
                .long("output-format")
                .value_name("FORMAT")
                .default_value("normal")
                .help_heading("Output")
                .help("normal, json or csv"),
        )
        .arg(
            Arg::new("output")
                .long("output")
                .value_name("FILE")
                .help_heading("Output")
                .help("Write the report here instead of to standard output"),
        )
        .arg(
            Arg::new("eta")
                .long("eta")
                .value_name("WHEN")
                .value_parser(["auto", "always", "never"])
                .default_value("auto")
                .help_heading("Output")
                .help("The progress line: auto shows it on a terminal only"),
        )
}

/// One flag as it was given.
struct Given {
    index: usize,
    key: &'static str,
    value: String,
}

fn given(matches: &ArgMatches) -> Vec<Given> {
    let mut all = Vec::new();
    let mut take = |id: &'static str| {
        let values = matches.get_many::<String>(id).into_iter().flatten();
        for (index, value) in matches.indices_of(id).into_iter().flatten().zip(values) {
            all.push(Given { index, key: id, value: value.clone() });
        }
    };
    KEYS.iter().for_each(|key| take(key.name));
    if matches.try_contains_id("name").unwrap_or(false) {
        take("name");
    }
    all.sort_by_key(|given| given.index);
    all
}

/// One job from the flags alone, for subcommands.
pub fn single(matches: &ArgMatches, mut job: Job) -> Result<Job, String> {
    for flag in given(matches) {
        crate::keys::apply(&mut job, flag.key, &flag.value)?;
    }
    Ok(job)
}

/// The jobs of a run.
pub fn jobs(matches: &ArgMatches) -> Result<Vec<Job>, String> {
    let mut defaults = Job::default();
    let mut jobs: Vec<Job> = Vec::new();
    for flag in given(matches) {
        if flag.key == "name" {
            jobs.push(Job { name: flag.value, ..defaults.clone() });
        } else {
            crate::keys::apply(jobs.last_mut().unwrap_or(&mut defaults), flag.key, &flag.value)?;
        }
    }
    let files: Vec<&String> = matches.get_many("jobfile").into_iter().flatten().collect();
    for path in &files {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
        jobs.extend(jobfile::parse(&text, &defaults, path)?);
    }
    if jobs.is_empty() {
        defaults.name = defaults.rw.name().to_owned();
        jobs.push(defaults);
    }
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Workload;

    fn parse(line: &str) -> Result<Vec<Job>, String> {
        let words = std::iter::once("ucm-bench").chain(line.split_whitespace());
        jobs(&command().try_get_matches_from(words).map_err(|error| error.to_string())?)
    }

    /// Goal: a fio user's line works: both spellings, bare switches, several jobs by --name.
    #[test]
    fn like_fio() {
        let jobs = parse(
            "--directory=/x --bs=64k --time_based --runtime=30s --name=a --rw=save --size=1g \
             --name=b --rw=randload --iodepth=4 --stonewall",
        )
        .unwrap();
        assert_eq!(jobs.len(), 2);
        assert!(jobs.iter().all(|job| job.block_size == 65536 && job.time_based));
        assert_eq!((jobs[0].rw, jobs[0].iodepth, jobs[0].stonewall), (Workload::Save, 32, false));
        assert_eq!((jobs[1].rw, jobs[1].iodepth, jobs[1].stonewall), (Workload::RandLoad, 4, true));
    }

    /// Goal: without --name there is one job, named after what it does.
    #[test]
    fn one_job() {
        let jobs = parse("--rw=lookup --batch 256 --verify=0 -o io_threads=2").unwrap();
        assert_eq!((jobs.len(), jobs[0].name.as_str(), jobs[0].verify), (1, "lookup", false));
        assert_eq!(jobs[0].store_setting("io_threads"), Some("2"));
    }

    /// Goal: clap's own consistency checks pass for all subcommands.
    #[test]
    fn command_is_sound() {
        command().debug_assert();
    }
}

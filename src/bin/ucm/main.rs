//! `ucm`: the operator's command line. Looks at directories and machines; never at a running process.

#![deny(unsafe_code)]

mod doctor;
mod listing;
mod machine;
mod namespace;
mod rebuild;
mod show;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use ucm::posix::rebuild::{Depth, Unproven};

/// Exit status of a command that ran and found something wrong.
const EXIT_FOUND: u8 = 2;

fn command() -> Command {
    let directory = || {
        Arg::new("directory")
            .required(true)
            .value_name("DIR")
            .value_parser(clap::value_parser!(PathBuf))
            .help("A storage backend, or one namespace's folder in it")
    };
    Command::new("ucm")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Looks after UCM's storage: KV blocks in the directories of storage_backends")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Command::new("doctor")
                .about("Says what this machine and a directory offer, what is missing, its cost and its cure")
                .arg(directory().required(false).help("Directory to probe (a file of one page is written and removed)")),
        )
        .subcommand(Command::new("ls").about("Lists the namespaces of a directory").arg(directory()))
        .subcommand(
            Command::new("stat")
                .about("Shows writers, segments and parts of each namespace of a directory")
                .arg(directory())
                .arg(
                    Arg::new("segments")
                        .long("segments")
                        .action(ArgAction::SetTrue)
                        .help("Also every segment"),
                ),
        )
        .subcommand(
            Command::new("verify")
                .about("Reads every part that can be found and compares its checksums (scrub); writes nothing")
                .arg(directory()),
        )
        .subcommand(
            Command::new("rebuild")
                .about("Writes the manifests that are missing or unreadable anew, from the segments")
                .arg(directory())
                .arg(
                    Arg::new("dry-run")
                        .long("dry-run")
                        .short('n')
                        .action(ArgAction::SetTrue)
                        .help("Only say what would be written"),
                )
                .arg(
                    Arg::new("payload")
                        .long("payload")
                        .action(ArgAction::SetTrue)
                        .help("Also read every part and leave out what does not match its checksum"),
                )
                .arg(
                    Arg::new("unproven")
                        .long("unproven")
                        .action(ArgAction::SetTrue)
                        .help("Also list parts saved with checksum: off; one whose write a crash cut short would be served"),
                ),
        )
        .subcommand(Command::new("version").about("Prints the version"))
}

fn main() -> ExitCode {
    match run(&command().get_matches()) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("ucm: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(matches: &ArgMatches) -> Result<ExitCode, String> {
    let found = |wrong: bool| if wrong { ExitCode::from(EXIT_FOUND) } else { ExitCode::SUCCESS };
    let directory = |matches: &ArgMatches| {
        matches.get_one::<PathBuf>("directory").cloned().ok_or("no directory was given")
    };
    match matches.subcommand() {
        Some(("doctor", inner)) => {
            doctor::run(inner.get_one::<PathBuf>("directory").map(PathBuf::as_path)).map(found)
        }
        Some(("ls", inner)) => listing::ls(&directory(inner)?).map(|()| ExitCode::SUCCESS),
        Some(("stat", inner)) => {
            listing::stat(&directory(inner)?, inner.get_flag("segments")).map(found)
        }
        Some(("verify", inner)) => verify::run(&directory(inner)?).map(found),
        Some(("rebuild", inner)) => {
            let mode = if inner.get_flag("dry-run") {
                rebuild::Mode::DryRun
            } else {
                rebuild::Mode::Write
            };
            let depth = if inner.get_flag("payload") { Depth::Payload } else { Depth::Trailers };
            let unproven =
                if inner.get_flag("unproven") { Unproven::Trusted } else { Unproven::LeftOut };
            rebuild::run(&directory(inner)?, mode, depth, unproven).map(found)
        }
        _ => {
            println!("ucm {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    /// Goal: clap's own consistency checks pass for all subcommands.
    #[test]
    fn command_is_sound() {
        super::command().debug_assert();
    }
}

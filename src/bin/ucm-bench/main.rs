//! `ucm-bench`: measures a store as fio measures a drive. See `docs/performance.md`.

mod abi;
mod beside;
mod calls;
mod cli;
mod compare;
mod compare_device;
mod comparison;
mod device;
mod fio;
mod ground;
mod job;
mod jobfile;
mod keys;
mod memory;
mod meter;
mod model;
mod options;
mod pattern;
mod peak;
mod plot;
mod progress;
mod random;
mod report;
mod run;
mod source;
mod sweep;
mod tally;
mod trace;
mod transfer;
mod units;
mod writers;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::ArgMatches;

use crate::report::Format;
use crate::run::Context;

/// Exit status where blocks failed or bytes were wrong.
const EXIT_FAILURES: u8 = 2;
/// A signal that follows the first one after this time says that the user does not want to wait.
const IMPATIENCE_MS: u64 = 500;
/// What asks a run to end: Ctrl-C, a supervisor, and a terminal or SSH session that closes.
const ENDING: [i32; 3] =
    [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP];

fn main() -> ExitCode {
    match start() {
        Ok(code) => code,
        Err(message) => {
            eprintln!("ucm-bench: {message}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<ExitCode, String> {
    let matches = cli::command().get_matches();
    if let Some((writers::SUBCOMMAND, matches)) = matches.subcommand() {
        let count = matches.get_one::<u32>("count").copied().unwrap_or(0);
        let options: Vec<String> =
            matches.get_many("options").into_iter().flatten().cloned().collect();
        return writers::hold(count, &options).map(|()| ExitCode::SUCCESS);
    }
    // Counting begins before any thread is made, so that all are counted.
    let syscalls = meter::Syscalls::start();
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in ENDING.into_iter().filter(|&signal| !spared_by_nohup(signal)) {
        end_on(signal, &interrupted).map_err(|error| format!("signal handler: {error}"))?;
    }
    let context = |matches: &ArgMatches| Context {
        interrupted: Arc::clone(&interrupted),
        syscalls,
        progress: match matches.get_one::<String>("eta").map(String::as_str) {
            Some("always") => true,
            Some("never") => false,
            _ => progress::is_watched(),
        },
    };
    match matches.subcommand() {
        Some(("models", _)) => {
            models();
            Ok(ExitCode::SUCCESS)
        }
        Some(("sweep", matches)) => sweep::main(matches, &context(matches)),
        Some(("compare", matches)) => match matches.subcommand() {
            Some(("beside", inner)) => beside::main(inner, &context(inner)),
            Some(("device", inner)) => compare_device::main(inner, &context(inner)),
            Some((_, inner)) => compare::main(inner, &context(inner)),
            None => Err("compare fio, compare beside or compare device".into()),
        },
        Some(("trace", matches)) => match matches.subcommand() {
            Some(("generate", inner)) => trace::generate::main(inner),
            Some((_, inner)) => trace::main(inner, &context(inner)),
            None => Err("trace generate or trace replay".into()),
        },
        _ => jobs(&matches, &context(&matches)),
    }
}

/// Whether `nohup` started the process with SIGHUP ignored: then it stays so. Shells start every background job of
/// a script with SIGINT ignored, and a script that sends it means it.
fn spared_by_nohup(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is a value of the struct; a null new action only asks.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        signal == libc::SIGHUP
            && libc::sigaction(signal, std::ptr::null(), &mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// The first signal asks the run to end, which removes what it has made; one that comes a while later ends the
/// process at once. `timeout` sends two in one moment, which is no impatience.
fn end_on(signal: i32, interrupted: &Arc<AtomicBool>) -> std::io::Result<()> {
    /// Milliseconds from `begun` to the first signal of either kind, and one; 0 while there was none.
    static FIRST: AtomicU64 = AtomicU64::new(0);
    let (begun, interrupted) = (Instant::now(), Arc::clone(interrupted));
    let handler = move || {
        interrupted.store(true, Ordering::Relaxed);
        let now = begun.elapsed().as_millis() as u64 + 1;
        let first = FIRST.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        if first.is_err_and(|first| now.saturating_sub(first) >= IMPATIENCE_MS) {
            signal_hook::low_level::exit(130);
        }
    };
    // SAFETY: the handler stores to atomics, reads the clock and leaves by _exit, all of which a signal handler
    // may do.
    unsafe { signal_hook::low_level::register(signal, handler) }.map(drop)
}

fn jobs(matches: &ArgMatches, context: &Context) -> Result<ExitCode, String> {
    let format = format(matches)?;
    let jobs = cli::jobs(matches)?;
    let results = run::run(&jobs, context)?;
    write(matches, &report::render(&results, context.is_interrupted(), format))?;
    let failures: u64 =
        results.iter().flat_map(|group| &group.jobs).map(|job| job.tally.failures()).sum();
    Ok(status_of(failures))
}

/// The exit status of a run with so many failed blocks and blocks of wrong bytes.
pub(crate) fn status_of(failures: u64) -> ExitCode {
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILURES) }
}

/// The format asked for.
pub(crate) fn format(matches: &ArgMatches) -> Result<Format, String> {
    Format::parse(matches.get_one::<String>("output-format").map_or("normal", String::as_str))
}

/// Writes a report where it was asked for.
pub(crate) fn write(matches: &ArgMatches, text: &str) -> Result<(), String> {
    match matches.get_one::<String>("output") {
        Some(path) => std::fs::write(path, text).map_err(|error| format!("{path}: {error}")),
        None => {
            use std::io::Write;
            // A reader that closed the pipe has what it wanted.
            let _ = std::io::stdout().write_all(text.as_bytes());
            Ok(())
        }
    }
}

fn models() {
    println!(
        "{:<18}{:>7}  {:<22}{:>12}{:>16}",
        "model", "layers", "KV of a layer", "per token", "128-token block"
    );
    for model in model::MODELS {
        let kind = match model.attention {
            model::Attention::Grouped { heads, dimension } => {
                format!("{heads} heads x {dimension}, K V")
            }
            model::Attention::Latent { elements } => format!("latent of {elements}"),
        };
        let bytes = model.shape(1, 1, 2).map_or(0, |shape| shape.bytes());
        println!(
            "{:<18}{:>7}  {kind:<22}{:>12}{:>16}",
            model.name,
            model.layers,
            units::show_size(bytes),
            units::show_size(bytes * 128)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a run with failures, of jobs or of a trace, does not look well to a script.
    #[test]
    fn failed_replay_exited_0() {
        assert_eq!(status_of(0), ExitCode::SUCCESS);
        assert_eq!(status_of(1), ExitCode::from(EXIT_FAILURES));
    }

    /// Goal: `kill -INT` of a script's background job, whose shell had SIGINT ignored, ends it in order.
    #[test]
    fn background_job_did_not_hear_sigint() {
        // SAFETY: ignores a signal that no test sends; its old action is put back.
        let old = unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
        assert!(!spared_by_nohup(libc::SIGINT));
        // SAFETY: as above.
        unsafe { libc::signal(libc::SIGINT, old) };
    }

    /// Goal: a terminal that closes ends the run in order, which removes its files.
    #[test]
    fn sighup_left_files_behind() {
        let interrupted = Arc::new(AtomicBool::new(false));
        let hangup = ENDING.into_iter().find(|&signal| signal == libc::SIGHUP).unwrap();
        end_on(hangup, &interrupted).unwrap();
        assert!(!spared_by_nohup(hangup));
        signal_hook::low_level::raise(hangup).unwrap();
        assert!(interrupted.load(Ordering::Relaxed));
    }
}

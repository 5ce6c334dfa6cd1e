//! Instructions of the paths that every block takes: they repeat exactly where times do not.
//!
//! `cargo bench --bench instructions` runs each case under callgrind (`apt-get install valgrind`) and compares
//! with `benches/instructions.txt`; `-- --save` writes that file, which names its compiler: another one gives
//! other counts, so then changes are shown and not marked. Under `cargo test` each case runs once, on
//! small data and without valgrind. Counts are of this thread alone, so of store cases they are the caller's.

mod cases;

use std::collections::BTreeMap;
use std::process::{Command, ExitCode};

use cases::Scale;

/// Where counts are kept.
const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.txt");
/// What a person without valgrind reads.
const MISSING: &str = "valgrind is not installed; instructions are counted by its callgrind:\n  \
    Debian, Ubuntu:  apt-get install valgrind\n  Fedora, RHEL:    dnf install valgrind";
/// Begin of the line of the baseline that names its compiler.
const COMPILER: &str = "# ";
/// Runs that are counted, after as many that are not.
const RUNS: u64 = 16;
/// A change that is worth a mark, in percent.
const WORTH_A_MARK: f64 = 3.0;

/// What callgrind counts: everything below this name.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ucm_counted_runs(case: &mut cases::Case) {
    (0..RUNS).for_each(|_| (case.run)());
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--case") {
        return one(&arguments[at + 1]);
    }
    if !arguments.iter().any(|argument| argument == "--bench") {
        cases::all(Scale::Small).iter_mut().for_each(|case| (case.run)());
        println!("instructions: every case ran once");
        return ExitCode::SUCCESS;
    }
    let save = arguments.iter().any(|argument| argument == "--save");
    let compiler = compiler();
    let (of, known) = baseline();
    let comparable = of.as_ref() == Some(&compiler);
    match &of {
        None => println!("there is no baseline; `-- --save` makes one"),
        Some(of) if !comparable => println!(
            "the baseline is of {of}, this is {compiler}: changes may be the compiler's and are not marked"
        ),
        Some(of) => println!("the baseline is of {of}, as this is"),
    }
    let mut lines = format!("{COMPILER}{compiler}\n");
    println!("{:<42}{:>16}{:>14}{:>10}", "case", "instructions", "per item", "change");
    for case in cases::all(Scale::Small) {
        let counted = match count(case.name) {
            Ok(counted) => counted,
            Err(message) => {
                eprintln!("{message}");
                return ExitCode::FAILURE;
            }
        };
        let run = counted as f64 / RUNS as f64;
        let change = known.get(case.name).map(|before| (run / before - 1.0) * 100.0);
        let worth = comparable && change.is_some_and(|change| change.abs() >= WORTH_A_MARK);
        let mark = if worth { "  <--" } else { "" };
        println!(
            "{:<42}{run:>16.0}{:>14.2}{:>10}{mark}",
            case.name,
            run / case.items as f64,
            change.map_or("new".into(), |change| format!("{change:+.2} %")),
        );
        lines += &format!("{run:.0}\t{}\n", case.name);
    }
    if save && let Err(error) = std::fs::write(BASELINE, lines) {
        eprintln!("{BASELINE}: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// In the child: warms up uncounted, then runs counted.
fn one(name: &str) -> ExitCode {
    for mut case in cases::all(Scale::Small) {
        if case.name == name {
            (0..RUNS).for_each(|_| (case.run)());
            ucm_counted_runs(&mut case);
            return ExitCode::SUCCESS;
        }
    }
    ExitCode::FAILURE
}

/// Instructions of all counted runs of a case.
fn count(name: &str) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=ucm_counted_runs")
        .arg(program)
        .args(["--case", name])
        .output()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => String::from(MISSING),
            _ => format!("valgrind: {error}"),
        })?;
    let text = String::from_utf8_lossy(&output.stderr);
    text.lines()
        .find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
        .ok_or_else(|| format!("callgrind counted nothing for `{name}`:\n{text}"))
}

/// The compiler and what it compiles for: what counts depend on beside the source.
fn compiler() -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    format!("{} for {}", version.unwrap_or_else(|_| "rustc ?".into()), std::env::consts::ARCH)
}

/// The compiler of the baseline and its counts.
fn baseline() -> (Option<String>, BTreeMap<String, f64>) {
    let text = std::fs::read_to_string(BASELINE).unwrap_or_default();
    let parse = |line: &str| {
        let (count, name) = line.split_once('\t')?;
        Some((name.to_owned(), count.parse().ok()?))
    };
    let of = text.lines().find_map(|line| line.strip_prefix(COMPILER)).map(String::from);
    (of, text.lines().filter_map(parse).collect())
}

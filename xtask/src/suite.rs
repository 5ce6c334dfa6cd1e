//! Every check of the repository, one after the other, with a summary. What a check needs and the machine
//! lacks is installed first (Debian and its kin), or named.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Outcome, cargo, cross, demo, fakes};

/// A tool that a check needs, how to see that it is there, and the Debian packages that bring it.
struct Tool {
    probe: &'static [&'static str],
    packages: &'static str,
}

/// Succeeds where clang can link a program with its address sanitizer.
const SANITIZER_OF_CLANG: &str =
    "echo 'int main(void) { return 0; }' | clang -fsanitize=address -x c - -o /dev/null";

const TOOLS: &[Tool] = &[
    Tool { probe: &["g++", "--version"], packages: "g++" },
    Tool { probe: &["clang", "--version"], packages: "clang" },
    Tool { probe: &["clang++", "--version"], packages: "clang" },
    // Clang brings its sanitizers in a package of their own, which it does not depend on.
    Tool { probe: &["sh", "-c", SANITIZER_OF_CLANG], packages: "libclang-rt-dev" },
    Tool { probe: &["cmake", "--version"], packages: "cmake" },
    Tool { probe: &["make", "--version"], packages: "make" },
    Tool { probe: &["pkg-config", "--version"], packages: "pkg-config" },
    Tool { probe: &["nm", "--version"], packages: "binutils" },
    Tool { probe: &["python3", "-c", "import ensurepip, venv"], packages: "python3-venv" },
    Tool { probe: &["cargo", "fmt", "--version"], packages: "" },
    Tool { probe: &["cargo", "clippy", "--version"], packages: "" },
];

/// Tests that ran.
#[derive(Clone, Copy, Default)]
struct Count {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// How a check ended.
struct Row {
    name: &'static str,
    count: Count,
    took: Duration,
    outcome: Outcome,
}

impl Row {
    fn state(&self) -> &'static str {
        let Count { passed, failed, ignored } = self.count;
        match self.outcome {
            Err(_) => "FAILED",
            Ok(()) if passed + failed == 0 && ignored > 0 => "skipped",
            Ok(()) => "ok",
        }
    }

    /// Its tests. A check without tests, or one that broke before it could count, is one.
    fn tests(&self) -> Count {
        let mut count = self.count;
        match self.state() {
            "FAILED" if count.failed == 0 => count.failed = 1,
            "ok" if count.passed + count.failed == 0 => count.passed = 1,
            _ => {}
        }
        count
    }
}

/// Runs everything, failed checks or not, and fails if one has.
pub fn run(root: &Path) -> Outcome {
    install_tools()?;
    let start = Instant::now();
    let mut rows = Vec::new();
    let mut check = |name: &'static str, body: &mut dyn FnMut(&mut Count) -> Outcome| {
        println!("\n==== {name}");
        let (start, mut count) = (Instant::now(), Count::default());
        let outcome = body(&mut count);
        if let Err(message) = &outcome {
            println!("FAILED: {message}");
        }
        rows.push(Row { name, count, took: start.elapsed(), outcome });
    };

    check("formatting", &mut |_| {
        follow(root, cargo().args(["fmt", "--all", "--check"]), &mut Count::default())
    });
    check("clippy", &mut |_| {
        let mut clippy = cargo();
        clippy.args(["clippy", "--workspace", "--all-targets", "--quiet"]);
        lint(root, &mut clippy)
    });
    check("clippy for aarch64", &mut |count| match cross::clippy() {
        Ok(mut clippy) => lint(root, &mut clippy),
        Err(reason) => {
            println!("skipped: {reason}");
            count.ignored += 1;
            Ok(())
        }
    });
    check("Rust, C and C++ tests", &mut |count| {
        follow(root, cargo().args(["test", "--workspace", "--no-fail-fast"]), count)
    });
    for fake in &fakes::FAKES {
        check(fake.check, &mut |count| follow(root, &mut fake.store_tests(root)?, count));
    }
    check("demonstration", &mut |_| demo::run(root, None));
    let python = root.join("python/tests/run.sh");
    if python.exists() {
        for (name, kind) in [("Python tests", "unit"), ("Python tests, real vLLM", "ci")] {
            check(name, &mut |count| {
                follow(root, Command::new("bash").arg(&python).arg(kind), count)
            });
        }
    }
    summarize(&rows, start.elapsed())
}

/// Runs clippy; its warnings fail where the compiler is the one that the code is kept clean for.
fn lint(root: &Path, clippy: &mut Command) -> Outcome {
    if is_own_toolchain(root)? {
        clippy.args(["--", "-D", "warnings"]);
    }
    follow(root, clippy, &mut Count::default())
}

/// Whether the compiler is of the release that the code is kept clean for. Newer ones warn of more with every
/// release: what they find is shown, and fails nothing.
fn is_own_toolchain(root: &Path) -> Result<bool, String> {
    let manifest = std::fs::read_to_string(root.join("Cargo.toml"))
        .map_err(|error| format!("Cargo.toml: {error}"))?;
    let own = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = \"")?.strip_suffix('"'))
        .ok_or("Cargo.toml: no rust-version")?;
    let output =
        cargo().arg("--version").output().map_err(|error| format!("cargo --version: {error}"))?;
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_own = version.starts_with(&format!("cargo {own}."));
    let warnings = match is_own {
        true => "denied".to_owned(),
        false => format!("shown only, since the code is kept clean for Rust {own}"),
    };
    println!("{}: warnings are {warnings}", version.trim());
    Ok(is_own)
}

/// Runs a command, shows what it prints as it comes, and counts the tests it tells of.
fn follow(root: &Path, command: &mut Command, count: &mut Count) -> Outcome {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{name}: {error}"))?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            println!("{line}");
            count.add(&line);
        }
    }
    // Lines of other processes must not overtake ours.
    let _ = std::io::stdout().flush();
    let status = child.wait().map_err(|error| format!("{name}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{name} ended with {status}")) }
}

impl Count {
    /// Adds what a summary line of cargo test or of pytest tells; other lines tell nothing.
    fn add(&mut self, line: &str) {
        let cargo = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "));
        let bare = line.trim_matches(|c| c == '=' || c == ' ');
        let pytest = bare.contains(" in ") && bare.split(' ').nth(1).is_some_and(is_outcome);
        let text = match cargo {
            Some((_, counts)) => counts,
            None if pytest => bare.split(" in ").next().unwrap_or_default(),
            None => return,
        };
        let words: Vec<&str> =
            text.split([' ', ',', ';']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<u64>() else { continue };
            match pair[1] {
                "passed" | "xfailed" => self.passed += number,
                "failed" | "error" | "errors" => self.failed += number,
                "ignored" | "skipped" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// The words of pytest's last line.
fn is_outcome(word: &str) -> bool {
    ["passed", "failed", "skipped", "error", "errors"].contains(&word.trim_end_matches(','))
}

/// The table, and one line in the form of cargo test's own.
fn summarize(rows: &[Row], took: Duration) -> Outcome {
    println!("\n==== summary");
    let mut total = Count::default();
    for row in rows {
        let Count { passed, failed, ignored } = row.count;
        let tests = match passed + failed + ignored {
            0 => String::new(),
            _ => format!("{passed} passed, {failed} failed, {ignored} ignored"),
        };
        println!("{:24} {:7} {:6.0} s  {tests}", row.name, row.state(), row.took.as_secs_f64());
        let counted = row.tests();
        total.passed += counted.passed;
        total.failed += counted.failed;
        total.ignored += counted.ignored;
    }
    let failed = rows.iter().filter(|row| row.outcome.is_err()).count();
    println!(
        "\ntest result: {}. {} passed; {} failed; {} ignored; 0 measured; 0 filtered out; finished in {:.2}s",
        if failed == 0 { "ok" } else { "FAILED" },
        total.passed,
        total.failed,
        total.ignored,
        took.as_secs_f64()
    );
    if failed == 0 { Ok(()) } else { Err(format!("{failed} of {} checks failed", rows.len())) }
}

fn is_there(probe: &[&str]) -> bool {
    Command::new(probe[0])
        .args(&probe[1..])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Installs what is missing: Debian packages as root or through sudo, Rust components through rustup.
fn install_tools() -> Outcome {
    let missing: Vec<&Tool> = TOOLS.iter().filter(|tool| !is_there(tool.probe)).collect();
    if missing.is_empty() {
        println!("all tools that the tests need are there");
        return Ok(());
    }
    if missing.iter().any(|tool| tool.packages.is_empty()) {
        shell("rustup component add rustfmt clippy")?;
    }
    let mut packages: Vec<&str> =
        missing.iter().map(|tool| tool.packages).filter(|name| !name.is_empty()).collect();
    packages.dedup();
    if !packages.is_empty() {
        shell(&install_line(&packages.join(" ")))?;
    }
    match missing.iter().find(|tool| !is_there(tool.probe)) {
        Some(tool) => Err(format!("still missing: {}", tool.probe.join(" "))),
        None => Ok(()),
    }
}

/// What installs Debian packages, as root or through sudo.
pub fn install_line(packages: &str) -> String {
    let sudo = if is_there(&["sudo", "-n", "true"]) { "sudo " } else { "" };
    let install = format!("apt-get install --yes --no-install-recommends {packages}");
    format!("{sudo}apt-get update && {sudo}env DEBIAN_FRONTEND=noninteractive {install}")
}

fn shell(line: &str) -> Outcome {
    println!("installing what the tests need: {line}");
    match Command::new("sh").args(["-c", line]).status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!("could not install; run this as root, then try again: {line}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: the last lines of cargo test and pytest are counted, and nothing else is.
    #[test]
    fn summaries_of_both_runners_are_counted() {
        let mut count = Count::default();
        for line in [
            "test result: ok. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 3.04s",
            "====== 3 failed, 20 passed, 1 skipped in 61.20s (0:01:01) ======",
            "7 passed in 0.12s",
            "test a::b ... ok",
            "running 12 tests",
            "loaded 5 blocks: 1 GB in 2 s",
        ] {
            count.add(line);
        }
        assert_eq!((count.passed, count.failed, count.ignored), (39, 4, 3));
    }

    // Goal: what was skipped counts as ignored, never as passed; what broke before its first test has failed.
    #[test]
    fn a_skipped_check_has_not_passed() {
        let row = |passed, failed, ignored, outcome| {
            let count = Count { passed, failed, ignored };
            let row = Row { name: "a check", count, took: Duration::ZERO, outcome };
            let Count { passed, failed, ignored } = row.tests();
            (row.state(), passed, failed, ignored)
        };
        let broken = || Err("it broke".to_owned());
        assert_eq!(row(0, 0, 1, Ok(())), ("skipped", 0, 0, 1));
        assert_eq!(row(0, 0, 0, Ok(())), ("ok", 1, 0, 0));
        assert_eq!(row(7, 0, 2, Ok(())), ("ok", 7, 0, 2));
        assert_eq!(row(7, 0, 2, broken()), ("FAILED", 7, 1, 2));
        assert_eq!(row(7, 3, 0, broken()), ("FAILED", 7, 3, 0));
    }
}

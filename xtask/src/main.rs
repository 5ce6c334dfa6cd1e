//! Chores of the repository: `cargo xtask <chore>`. Without a chore it lists them.

#![forbid(unsafe_code)]

mod header;
mod install;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

const USAGE: &str = "\
usage: cargo xtask <chore>

  header [--check]         write include/ucm.h from src/capi (or only compare)
  install --prefix DIR     build, and put header, libraries, pkg-config and CMake files below DIR
";

/// What a chore ends with: nothing, or a sentence for the person who ran it.
type Outcome = Result<(), String>;

/// The root of the repository.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Builds the library optimised, with the cargo that runs this, and returns the folder it lies in.
fn build_release() -> Result<PathBuf, String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--package", "ucm", "--lib", "--message-format=json"]);
    let output = cargo
        .current_dir(root())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cargo: {error}"))?;
    if !output.status.success() {
        return Err("cargo build failed".to_owned());
    }
    // Of all artifacts only ours is a libucm.so; its folder depends on CARGO_TARGET_DIR and the like.
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    messages
        .split('"')
        .find(|word| word.ends_with("/libucm.so"))
        .and_then(|file| Path::new(file).parent())
        .map(Path::to_path_buf)
        .ok_or_else(|| "cargo built no libucm.so".to_owned())
}

fn install_release(prefix: &Path) -> Outcome {
    for file in install::install(&root(), &build_release()?, prefix)? {
        println!("installed {}", file.display());
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["header"] => header::write(&root()),
        ["header", "--check"] => header::check(&root()),
        ["install", "--prefix", prefix] => install_release(Path::new(prefix)),
        [] | ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            Ok(())
        }
        _ => Err(format!("unknown chore: {}\n\n{USAGE}", words.join(" "))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

//! Chores of the repository: `cargo xtask <chore>`. Without a chore it lists them.

#![forbid(unsafe_code)]

mod cross;
mod demo;
mod fakes;
mod gpu;
mod header;
mod install;
mod suite;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

const USAGE: &str = "\
usage: cargo xtask <chore>

  header [--check]         write include/ucm.h from src/capi (or only compare)
  demo [--directory DIR]   build the library and the examples, and run prefill and decode as processes
  test                     install what the tests need, run every check, and sum up
  fake-test                run the device tests and the store tests on the fake drivers
  gpu-test                 run what needs a real NVIDIA GPU (and PyTorch, compute-sanitizer if there)
  ptx                      make the committed PTX of the kernels again (needs nvcc)
  install --prefix DIR     build, and put header, libraries, pkg-config and CMake files below DIR
";

/// What a chore ends with: nothing, or a sentence for the person who ran it.
type Outcome = Result<(), String>;

/// The root of the repository.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The cargo that runs this.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Builds the library optimised and returns the folder it lies in.
fn build_release() -> Result<PathBuf, String> {
    let mut build = cargo();
    build.args([
        "build",
        "--release",
        "--package",
        "ucm",
        "--lib",
        "--no-default-features",
        "--message-format=json",
    ]);
    let output = build
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
        ["fake-test"] => fakes::test(&root()),
        ["gpu-test"] => gpu::gpu_test(),
        ["ptx"] => gpu::ptx(),
        ["header"] => header::write(&root()),
        ["header", "--check"] => header::check(&root()),
        ["demo"] => demo::run(&root(), None),
        ["demo", "--directory", directory] => demo::run(&root(), Some(Path::new(directory))),
        ["test"] => suite::run(&root()),
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

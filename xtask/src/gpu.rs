//! GPU chores: the tests on a real GPU, and the kernels' PTX.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, cargo, root};

/// Kernel sources whose PTX is committed.
const KERNELS: [&str; 3] =
    ["src/device/cuda/copy.cu", "src/device/cuda/hash.cu", "tests/gpu/model.cu"];

/// The kernels of the model that the C++ programs stand for.
const MODEL: &str = "tests/gpu/model.ptx";

/// Random saves and loads, half of each, that each of two processes does.
const TRAFFIC_OPERATIONS: &str = "10000";

/// The compiler that made the committed PTX: its version decides the oldest driver that can load it.
const NVCC_RELEASE: &str = "11.8";

fn run(command: &mut Command, what: &str) -> Outcome {
    let status =
        command.current_dir(root()).status().map_err(|error| format!("{what}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{what} failed")) }
}

/// Runs everything that needs a real GPU, with what the machine has: the driver alone for the device
/// tests, compute-sanitizer and PyTorch for more.
pub(crate) fn gpu_test() -> Outcome {
    let device_tests = |binary: &str, arguments: &[&str]| {
        let mut tests = cargo();
        tests.args(["test", "--release", "--package", "ucm", "--test", binary, "--"]);
        tests.args(["--ignored", "--test-threads=1", "--nocapture"]).args(arguments);
        tests
    };
    for binary in ["device_gpu", "device_gpu_direct"] {
        run(&mut device_tests(binary, &[]), "device tests")?;
    }
    let sanitizer = which("compute-sanitizer");
    match &sanitizer {
        Some(sanitizer) => {
            let runner = format!("{} --error-exitcode 9", sanitizer.display());
            for (binary, test) in
                [("device_gpu", "slices_are_exact"), ("device_gpu_direct", "hashes_are_exact")]
            {
                let mut tests = device_tests(binary, &[test]);
                tests.env(runner_variable(std::env::consts::ARCH), &runner);
                run(&mut tests, "compute-sanitizer")?;
            }
        }
        None => println!("compute-sanitizer is not on the PATH: not run"),
    }
    run(cargo().args(["build", "--release", "--package", "ucm"]), "cargo build")?;
    let built = root().join("target/release");
    let folder = root().join("target/gpu-test");
    // What an earlier run left; a folder that is not there is as good.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    cpp_tests(&built, &folder)?;
    run(
        Command::new(built.join("ucm-bench"))
            .args(["compare", "device", "--device=cuda"])
            .arg(format!("--directory={}", folder.display())),
        "ucm-bench compare device",
    )?;
    torch_test(&built)
}

/// The variable that makes cargo run the tests of this machine's target under another program. Cargo reads it
/// for the host's target alone, whose triple differs by the processor.
fn runner_variable(arch: &str) -> String {
    format!("CARGO_TARGET_{}_UNKNOWN_LINUX_GNU_RUNNER", arch.to_uppercase())
}

/// Compiles and runs the C++ programs, which know the driver API and `ucm.hpp` alone.
fn cpp_tests(built: &Path, folder: &Path) -> Outcome {
    // The programs ask for the library by its soname.
    std::os::unix::fs::symlink(built.join("libucm.so"), folder.join("libucm.so.0"))
        .map_err(|error| format!("{}: {error}", folder.display()))?;
    let driver = compile("driver", built, folder)?;
    run(Command::new(&driver).arg(folder.join("driver-stores")).arg(MODEL), "the C++ program")?;
    // Two processes on one GPU and one folder, which evict from it what the other has saved.
    let traffic = compile("traffic", built, folder)?;
    let processes = ["1", "2"].map(|seed| {
        Command::new(&traffic)
            .arg(folder.join("traffic"))
            .args([MODEL, TRAFFIC_OPERATIONS, seed])
            .current_dir(root())
            .spawn()
    });
    for process in processes {
        let status = process.and_then(|mut process| process.wait());
        if !status.map_err(|error| format!("traffic: {error}"))?.success() {
            return Err("random saves and loads failed".to_owned());
        }
    }
    Ok(())
}

/// Compiles one of `tests/gpu/*.cpp` against the library.
fn compile(name: &str, built: &Path, folder: &Path) -> Result<PathBuf, String> {
    let program = folder.join(name);
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    run(
        Command::new(compiler)
            .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-Iinclude"])
            .arg(format!("tests/gpu/{name}.cpp"))
            .arg("-o")
            .arg(&program)
            .arg("-L")
            .arg(built)
            .arg(format!("-Wl,-rpath,{}", folder.display()))
            .args(["-lucm", "-ldl"]),
        "the C++ compiler",
    )?;
    Ok(program)
}

fn torch_test(built: &Path) -> Outcome {
    let torch = Command::new("python3")
        .args(["-c", "import torch; raise SystemExit(not torch.cuda.is_available())"])
        .status()
        .is_ok_and(|status| status.success());
    if !torch {
        println!("python3 has no PyTorch that sees a GPU: the PyTorch tests are not run");
        return Ok(());
    }
    run(
        Command::new("python3")
            .arg("tests/gpu/torch_store.py")
            .env("PYTHONPATH", root().join("python"))
            .env("UCM_LIBRARY", built.join("libucm.so")),
        "PyTorch tests",
    )
}

/// Makes the committed PTX again; the sources say with which compiler.
pub(crate) fn ptx() -> Outcome {
    let nvcc = which("nvcc").ok_or("nvcc is not on the PATH; install the CUDA toolkit")?;
    let version =
        Command::new(&nvcc).arg("--version").output().map_err(|e| format!("nvcc: {e}"))?;
    if !String::from_utf8_lossy(&version.stdout).contains(&format!("release {NVCC_RELEASE}")) {
        println!(
            "note: the committed PTX is of release {NVCC_RELEASE}; a newer one needs newer drivers"
        );
    }
    for source in KERNELS {
        let target = Path::new(source).with_extension("ptx");
        let mut compile = Command::new(&nvcc);
        compile.args(["-ptx", "-arch=compute_75", "--std=c++17", "-O3", source, "-o"]).arg(&target);
        run(&mut compile, "nvcc")?;
    }
    Ok(())
}

fn which(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|path| path.join(program)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: on a Grace or Kunpeng host, too, the sanitizer runs the tests, not only on x86-64.
    #[test]
    fn runner_is_of_the_host() {
        let name = runner_variable("aarch64");
        assert_eq!(name, "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER");
        assert!(runner_variable("x86_64").contains("_X86_64_"));
    }
}

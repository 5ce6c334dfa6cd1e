//! The store's tests on the fake drivers: the same tests, with the caller's memory on a pretended device.

use std::path::Path;
use std::process::Command;

use crate::{Outcome, cargo};

/// The store's test-suite: what opens stores and moves bytes through them.
const STORE_TESTS: [&str; 9] = [
    "store_dram",
    "store_posix",
    "defects",
    "layers",
    "holds",
    "model",
    "shared_dram",
    "hung_mount",
    "processes",
];

/// The tests of the devices themselves, which take fakes as they need them.
const DEVICE_TESTS: [&str; 3] = ["device_fakes", "device_store", "device_direct"];

/// Seconds of the run with many processes: it is about drives, which the plain run tries for longer.
const SOAK_SECONDS: &str = "10";

/// A driver that is pretended.
pub(crate) struct Fake {
    /// What a check is called that runs on it.
    pub(crate) check: &'static str,
    file: &'static str,
    /// Where the engine looks for it, and for the other one.
    variables: [&'static str; 2],
}

/// Both.
pub(crate) const FAKES: [Fake; 2] = [
    Fake {
        check: "Store tests, fake CUDA",
        file: "libcuda.so.1",
        variables: ["UCM_CUDA_LIBRARY", "UCM_ASCENDCL_LIBRARY"],
    },
    Fake {
        check: "Store tests, fake Ascend",
        file: "libascendcl.so",
        variables: ["UCM_ASCENDCL_LIBRARY", "UCM_CUDA_LIBRARY"],
    },
];

impl Fake {
    /// Builds the fakes, and gives the command that runs the store's tests on this one.
    pub(crate) fn store_tests(&self, root: &Path) -> Result<Command, String> {
        let folder = root.join("target/fakes");
        std::fs::create_dir_all(&folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut make = Command::new("make");
        make.args(["-s", "-C", "ffi-tests/stub"]).arg(format!("OUT={}", folder.display()));
        run(root, &mut make, "make")?;
        let library = folder.join(self.file);
        let mut tests = cargo();
        tests.args(["test", "--package", "ucm", "--no-fail-fast"]);
        tests.args(STORE_TESTS.iter().flat_map(|name| ["--test", name]));
        tests
            .env(self.variables[0], &library)
            .env(self.variables[1], "/nonexistent/driver.so")
            .env("UCM_TEST_DEVICE_LIBRARY", &library)
            .env("UCM_TEST_SOAK_SECONDS", SOAK_SECONDS)
            .env("UCM_STUB_VISIBLE", "1")
            // Measuring is for the device tests: these open hundreds of stores.
            .env("UCM_CUDA_COPY", "batch")
            .env("UCM_ASCEND_COPY", "batch");
        Ok(tests)
    }
}

/// Runs the device tests, and the store's tests on each fake.
pub(crate) fn test(root: &Path) -> Outcome {
    let mut devices = cargo();
    devices.args(["test", "--package", "ucm", "--no-fail-fast"]);
    devices.args(DEVICE_TESTS.iter().flat_map(|name| ["--test", name]));
    run(root, &mut devices, "device tests")?;
    FAKES.iter().try_for_each(|fake| run(root, &mut fake.store_tests(root)?, fake.check))
}

fn run(root: &Path, command: &mut Command, what: &str) -> Outcome {
    let status = command.current_dir(root).status().map_err(|error| format!("{what}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{what} failed")) }
}

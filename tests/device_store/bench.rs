//! The bench on devices: it allocates, fills and reads device memory by itself.

use std::process::Command;

use tempfile::TempDir;

use crate::fakes::{EACH_DRIVER, folder};

/// Goal: `ucm-bench --device` saves and loads blocks in memory of each make of device, and finds every byte right.
#[test]
fn the_bench_runs_on_each_make_of_device() {
    const BLOCKS: usize = 16;
    for kind in EACH_DRIVER {
        let directory = TempDir::new().unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_ucm-bench"))
            .arg(format!("--directory={}", directory.path().display()))
            .arg(format!("--device={}", kind.device))
            .arg(format!("--blocks={BLOCKS}"))
            .args(["--bs=256k", "--layers=2", "--slices=4", "--cache-size=4m", "--verify"])
            .args(["--name=fill", "--rw=save", "--name=read", "--rw=randload", "--stonewall"])
            .arg("--output-format=json")
            .env("UCM_CUDA_LIBRARY", "/nonexistent/libcuda.so.1")
            .env("UCM_ASCENDCL_LIBRARY", "/nonexistent/libascendcl.so")
            .env(kind.library_variable, folder().join(kind.file))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{kind:?}: {text}{errors}");
        for wanted in [format!("\"blocks\": {BLOCKS},"), "\"wrong_blocks\": 0,".to_owned()] {
            let jobs = text.matches(&wanted).count();
            assert_eq!(jobs, 2, "{kind:?}: {wanted} is not what both jobs say: {text}");
        }
    }
}

//! Linker arguments of `libucm.so`, and the commit that `ucm_version` names. Needs neither network nor
//! any tool: without git the commit is `unknown`. The header is written by `cargo xtask header`.

use std::process::Command;

/// The part of the soname that changes when the ABI breaks; 0 while the major version is 0.
const ABI_MAJOR: &str = "0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if target == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libucm.so.{ABI_MAJOR}");
        // Engine threads run code of the library: it is never unmapped, whatever dlclose is told.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    println!("cargo:rustc-env=UCM_COMMIT={}", commit());
}

/// The short name of the commit that is checked out.
fn commit() -> String {
    // The reflog of HEAD grows with every commit and checkout, in worktrees too.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"])
        && std::path::Path::new(&log).exists()
    {
        println!("cargo:rerun-if-changed={log}");
    }
    git(&["rev-parse", "--short=10", "HEAD"]).unwrap_or_else(|| "unknown".to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

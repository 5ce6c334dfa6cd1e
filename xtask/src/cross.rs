//! The code off x86-64: whether it still compiles for aarch64, with the warnings of every other check.
//!
//! Nothing is linked or run. The standard library of the target comes from rustup, and the C compiler, which BLAKE3's
//! NEON code wants, from Debian. A machine that has neither and no network skips the check and says why.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::{cargo, suite};

/// What is compiled for.
const TARGET: &str = "aarch64-unknown-linux-gnu";
/// The C compiler for it, and the packages that bring it.
const COMPILER: &str = "aarch64-linux-gnu-gcc";
const PACKAGES: &str = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross";

/// The command, or why it cannot run here.
pub fn clippy() -> Result<Command, String> {
    if cfg!(target_arch = "aarch64") {
        return Err("this machine is an aarch64: the other checks are the check".to_owned());
    }
    get("the standard library of the target", has_std, &format!("rustup target add {TARGET}"))?;
    get("a C compiler for the target", has_compiler, &suite::install_line(PACKAGES))?;
    let mut clippy = cargo();
    // Before a plain `CC`, which names the compiler of this machine.
    clippy.env(format!("CC_{}", TARGET.replace('-', "_")), COMPILER);
    clippy.args(["clippy", "--target", TARGET, "--package", "ucm", "--lib", "--bins", "--quiet"]);
    Ok(clippy)
}

/// Sees to it that something is there: by its installation, if it is not.
fn get(what: &str, is_there: fn() -> bool, install: &str) -> Result<(), String> {
    if is_there() {
        return Ok(());
    }
    println!("installing {what}: {install}");
    let _ = Command::new("sh").args(["-c", install]).status();
    match is_there() {
        true => Ok(()),
        false => Err(format!("{what} is missing and could not be installed: {install}")),
    }
}

/// Whether the compiler that cargo takes has the target's standard library.
fn has_std() -> bool {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    Command::new(compiler)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .is_some_and(|folder| holds_std(Path::new(folder.trim())))
}

/// Whether a folder has the standard library. rustc names it also where nothing lies in it.
fn holds_std(folder: &Path) -> bool {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libstd-"))
}

/// Whether the compiler finds its own headers and those of the C library.
fn has_compiler() -> bool {
    let source = "printf '#include <arm_neon.h>\\n#include <string.h>\\n'";
    Command::new("sh")
        .args(["-c", &format!("{source} | {COMPILER} -fsyntax-only -x c -")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a folder that rustc names and rustup has not filled is no standard library.
    #[test]
    fn a_folder_without_the_library_is_none() {
        let folder = std::env::temp_dir().join(format!("ucm-cross-{}", std::process::id()));
        assert!(!holds_std(&folder));
        std::fs::create_dir_all(&folder).unwrap();
        assert!(!holds_std(&folder));
        std::fs::write(folder.join("libstd-0123456789abcdef.rlib"), "").unwrap();
        assert!(holds_std(&folder));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// Goal: what is neither there nor to be had is named with the command that would bring it.
    #[test]
    fn a_missing_thing_is_named_with_its_remedy() {
        let reason = get("a moon", || false, "false # bring one").unwrap_err();
        assert!(reason.contains("a moon") && reason.ends_with("false # bring one"), "{reason}");
        assert_eq!(get("the sun", || true, "exit 1"), Ok(()));
    }
}

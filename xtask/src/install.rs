//! The install step: header, libraries, pkg-config and CMake files below a prefix.
//!
//! Also compiled into `tests/ffi.rs`, which installs what `cargo test` built; so it knows no cargo.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The part of the soname that changes when the ABI breaks. `build.rs` has it too; a test compares.
pub const ABI_MAJOR: &str = "0";

/// What a program that links `libucm.a` links besides (`rustc --print native-static-libs`, without what
/// every compiler adds by itself).
pub const STATIC_LIBS: &[&str] = &["-lpthread", "-lm", "-ldl"];

/// The version of the root package.
pub fn version(root: &Path) -> Result<String, String> {
    let manifest = read(&root.join("Cargo.toml"))?;
    let section = manifest.split("[workspace.package]").nth(1).unwrap_or_default();
    let line = section.lines().find_map(|line| line.strip_prefix("version = \""));
    line.and_then(|rest| rest.strip_suffix('"'))
        .map(str::to_owned)
        .ok_or_else(|| "Cargo.toml: [workspace.package] has no version".to_owned())
}

/// Installs the libraries that lie in `built` below `prefix`, and returns the files made. An existing
/// installation is replaced file by file, so that programs that run keep theirs.
pub fn install(root: &Path, built: &Path, prefix: &Path) -> Result<Vec<PathBuf>, String> {
    let version = version(root)?;
    let (include, lib) = (prefix.join("include"), prefix.join("lib"));
    let mut made = Vec::new();
    for name in ["ucm.h", "ucm.hpp"] {
        made.push(copy(&root.join("include").join(name), &include.join(name))?);
    }
    let shared = format!("libucm.so.{version}");
    made.push(copy(&built.join("libucm.so"), &lib.join(&shared))?);
    made.push(link(&shared, &lib.join(format!("libucm.so.{ABI_MAJOR}")))?);
    made.push(link(&format!("libucm.so.{ABI_MAJOR}"), &lib.join("libucm.so"))?);
    made.push(copy(&built.join("libucm.a"), &lib.join("libucm.a"))?);
    for (template, place) in [
        ("ucm.pc.in", "pkgconfig/ucm.pc"),
        ("cmake/ucm-config.cmake.in", "cmake/ucm/ucm-config.cmake"),
        ("cmake/ucm-config-version.cmake.in", "cmake/ucm/ucm-config-version.cmake"),
    ] {
        let text = fill(&read(&root.join("include").join(template))?, &version)?;
        made.push(replace(&lib.join(place), |file| fs::write(file, &text))?);
    }
    Ok(made)
}

/// A template with its `@WORDS@` replaced.
fn fill(template: &str, version: &str) -> Result<String, String> {
    let major = version.split('.').next().unwrap_or_default();
    let text = template
        .replace("@VERSION@", version)
        .replace("@MAJOR@", major)
        .replace("@SOVERSION@", ABI_MAJOR)
        .replace("@STATIC_LIBS@", &STATIC_LIBS.join(" "))
        .replace("@STATIC_LIBS_CMAKE@", &STATIC_LIBS.join(";"));
    match text.split_once('@') {
        Some((_, rest)) => {
            Err(format!("a template has an unknown word: @{}", &rest[..rest.len().min(20)]))
        }
        None => Ok(text),
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<PathBuf, String> {
    if !from.exists() {
        return Err(format!(
            "{} is not there; build it with `cargo build --release`",
            from.display()
        ));
    }
    replace(to, |file| fs::copy(from, file).map(drop))
}

fn link(target: &str, to: &Path) -> Result<PathBuf, String> {
    replace(to, |file| symlink(target, file))
}

/// Makes a file beside its place and renames it there.
fn replace(
    place: &Path,
    make: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<PathBuf, String> {
    let attempt = || {
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut beside = place.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let _ = fs::remove_file(&beside);
        make(&beside)?;
        fs::rename(&beside, place)
    };
    match attempt() {
        Ok(()) => Ok(place.to_path_buf()),
        Err(error) => Err(format!("{}: {error}", place.display())),
    }
}

//! `ucm rebuild`: a manifest is a cache of the trailers; where it is gone it is written anew from them.
//!
//! The engine rebuilds the manifests of writers that have none (`ucm::posix::rebuild`). This decides for
//! whom: manifests that cannot be read are moved out of the way first, unless their writer still runs.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use ucm::io::backend::{Backend, BackendConfig};
use ucm::posix::host::{Life, life_of, random_id, this_process};
use ucm::posix::names::dead_name;
use ucm::posix::rebuild::{Depth, Unproven, rebuild};

use crate::namespace::{self, Manifest, Namespace};

/// How long a directory may take to answer at first.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether anything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Only say what would be done.
    DryRun,
    /// Write.
    Write,
}

/// Rebuilds what is missing in all namespaces of a directory. True if something could not be.
pub fn run(directory: &Path, mode: Mode, depth: Depth, unproven: Unproven) -> Result<bool, String> {
    let folders = namespace::find(directory)?;
    if folders.is_empty() {
        return Err(format!("{}: no namespace to rebuild", directory.display()));
    }
    let mut wrong = false;
    for folder in folders {
        let namespace = Namespace::read(&folder)?;
        let broken: Vec<&Manifest> = namespace
            .manifests
            .iter()
            .filter(|m| m.is_unreadable() && has_segments(&namespace, m))
            .collect();
        if let Some(manifest) = broken.iter().find(|manifest| is_alive(manifest)) {
            println!("{}: its writer still runs; stop it, then rebuild", manifest.path.display());
            wrong = true;
            continue;
        }
        let orphans = orphans(&namespace);
        if orphans.is_empty() {
            println!("{}: every segment has a manifest; nothing to do", folder.display());
            continue;
        }
        if mode == Mode::DryRun {
            println!(
                "{}: would write the manifests of {} writers",
                folder.display(),
                orphans.len()
            );
            continue;
        }
        broken.iter().try_for_each(|manifest| set_aside(manifest))?;
        wrong |= one(&folder, depth, unproven)?;
    }
    Ok(wrong)
}

fn one(folder: &Path, depth: Depth, unproven: Unproven) -> Result<bool, String> {
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Err(format!("{}: not a namespace's folder", folder.display()));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let backend = Backend::open(parent, &BackendConfig::default(), Instant::now() + PATIENCE)
        .map_err(|error| error.to_string())?;
    let done = rebuild(&backend, &name.to_string_lossy(), depth, unproven);
    backend.stop(Instant::now() + PATIENCE);
    let done = done.map_err(|error| error.to_string())?;
    println!(
        "{}: wrote {} manifests with {} parts, from {} segments; {} parts damaged, {} segments unreadable",
        folder.display(),
        done.manifests,
        done.parts,
        done.segments,
        done.damaged,
        done.unreadable
    );
    if done.unproven > 0 {
        println!(
            "  {} parts were saved without a checksum and are left out, since nothing tells that they are whole; \
             --unproven lists them too",
            done.unproven
        );
    }
    Ok(done.damaged + done.unproven + done.unreadable > 0)
}

/// Writers that have segments but no manifest that can be read.
fn orphans(namespace: &Namespace) -> BTreeSet<u64> {
    let readable: BTreeSet<u64> = namespace
        .manifests
        .iter()
        .filter(|manifest| !manifest.is_unreadable())
        .map(|manifest| manifest.name.writer)
        .collect();
    let writers = namespace.segments.keys().map(|name| name.writer);
    writers.filter(|writer| !readable.contains(writer)).collect()
}

fn has_segments(namespace: &Namespace, manifest: &Manifest) -> bool {
    namespace.segments.keys().any(|name| name.writer == manifest.name.writer)
}

fn is_alive(manifest: &Manifest) -> bool {
    let header = manifest.header.as_ref();
    header.is_ok_and(|header| life_of(&this_process(), &header.process) == Life::Alive)
}

/// Gives a manifest that cannot be read a dead name: its bytes stay for whoever wants to look.
fn set_aside(manifest: &Manifest) -> Result<(), String> {
    let name = manifest.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    std::fs::rename(&manifest.path, manifest.path.with_file_name(dead_name(&name, random_id())))
        .map_err(|error| format!("{}: {error}", manifest.path.display()))
}

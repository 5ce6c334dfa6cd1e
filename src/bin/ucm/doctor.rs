//! `ucm doctor`: what is offered, what is missing, what that costs, and the exact cure.

use std::path::Path;
use std::time::{Duration, Instant};

use ucm::io::backend::{Backend, BackendConfig};
use ucm::mem::arena::Arena;

use crate::{machine, show};

/// How long a directory may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Arena that is mapped and registered to see whether that works: beyond the usual limit of 8 MiB.
const TRIAL_ARENA: usize = 32 << 20;

/// One thing that was looked at.
pub struct Finding {
    what: String,
    state: String,
    /// Cost and remedy, where something is missing.
    trouble: Option<(String, String)>,
}

impl Finding {
    /// As it should be.
    pub fn good(what: &str, state: String) -> Self {
        Self { what: what.into(), state, trouble: None }
    }

    /// Not as it should be.
    pub fn missing(what: &str, state: String, cost: &str, remedy: &str) -> Self {
        Self { what: what.into(), state, trouble: Some((cost.into(), remedy.into())) }
    }

    fn print(&self) {
        let mark = if self.trouble.is_some() { "!!" } else { "ok" };
        println!("{mark}  {:<15}{}", self.what, self.state);
        if let Some((cost, remedy)) = &self.trouble {
            println!("    {:<15}cost:   {cost}", "");
            println!("    {:<15}remedy: {remedy}", "");
        }
    }
}

/// Looks at the machine, and at a directory if one is given. True if something is missing.
pub fn run(directory: Option<&Path>) -> Result<bool, String> {
    println!("ucm {}", env!("CARGO_PKG_VERSION"));
    let mut findings = machine::findings();
    if let Some(directory) = directory {
        findings.extend(probe(directory)?);
    }
    findings.iter().for_each(Finding::print);
    if directory.is_none() {
        println!("give a directory of storage_backends to probe it: ucm doctor DIR");
    }
    let missing = findings.iter().filter(|finding| finding.trouble.is_some()).count();
    if missing > 0 {
        println!(
            "{missing} things are not as they should be; UCM works without them, at the cost named"
        );
    }
    Ok(missing > 0)
}

/// What a store would find in this directory, by the same probe.
fn probe(directory: &Path) -> Result<Vec<Finding>, String> {
    if !directory.is_dir() {
        return Err(format!(
            "{}: not a directory; make it, or mount its file system, before a store opens it",
            directory.display()
        ));
    }
    let backend = Backend::open(directory, &BackendConfig::default(), Instant::now() + PATIENCE)
        .map_err(|error| error.to_string())?;
    let arena = Arena::map(TRIAL_ARENA, None).map_err(|error| error.to_string())?;
    // A refusal is a fallback, and so in the report.
    let _ = backend.register_memory(arena.base(), arena.len());
    let report = backend.report();
    let mut findings = vec![
        Finding::good(
            "directory",
            format!(
                "{}: {}{}",
                directory.display(),
                report.file_system,
                if report.local {
                    ""
                } else {
                    ", on another machine (or FUSE): loads go through the arena"
                }
            ),
        ),
        Finding::good("engine", format!("{} ({})", report.engine, report.features.join(", "))),
    ];
    if report.direct {
        findings.push(Finding::good("direct I/O", "works".into()));
    }
    if report.registered_bytes > 0 {
        let text = format!("{} registered and given back", show::size(report.registered_bytes));
        findings.push(Finding::good("fixed buffers", text));
    }
    for fallback in &report.fallbacks {
        findings.push(Finding::missing(
            "fallback",
            fallback.what.clone(),
            &fallback.cost,
            &fallback.remedy,
        ));
    }
    match backend.files().space(directory) {
        Ok(space) => findings.push(Finding::good(
            "space",
            format!("{} of {} free", show::size(space.available), show::size(space.total)),
        )),
        Err(error) => findings.push(Finding::missing(
            "space",
            error.to_string(),
            "saves may fail",
            "check the mount",
        )),
    }
    let _ = backend.unregister_memory(arena.base());
    backend.stop(Instant::now() + PATIENCE);
    Ok(findings)
}

//! Devices against the fake drivers: order, arguments, failures, leaks. The fakes abort on misuse, so
//! that a test passes only if nothing was touched too early, too late or after its end.

mod choice;
mod copies;
mod failures;
#[path = "../fakes/mod.rs"]
mod fakes;
mod order;
mod rig;
mod round_trip;
#[path = "../shards/mod.rs"]
mod shards;

use std::process::{Command, Output};

/// In the child: which of [`fakes::ALL`] it is for.
const CHILD: &str = "UCM_TEST_CHILD_KIND";

/// The driver that this process was started for by [`child`], where it was.
fn child_kind() -> Option<fakes::Kind> {
    let index = std::env::var(CHILD).ok()?;
    Some(fakes::ALL[index.parse::<usize>().unwrap()])
}

/// Runs one test, for one of [`fakes::ALL`], in a process of its own, which it may end.
fn child(test: &str, index: usize, variables: &[(&str, &str)]) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, index.to_string())
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

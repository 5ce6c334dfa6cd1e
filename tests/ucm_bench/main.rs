//! `ucm-bench` as a person runs it: the built program, its flags and files, what it prints and leaves behind.

#[path = "../fakes/mod.rs"]
mod fakes;
mod rig;

mod comparisons;
mod interrupts;
mod jobs;
mod refusals;
mod sweeps;
mod traces;

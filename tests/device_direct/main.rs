//! GPUDirect Storage against the fake libcufile and the fake libcuda: bytes, damage, refusals, failures, leaks. The
//! fakes abort on misuse; device memory cannot be seen by the CPU, so that an engine which reads it dies.

mod checksums;
#[path = "../common/mod.rs"]
mod common;
mod failures;
#[path = "../fakes/mod.rs"]
mod fakes;
mod refusals;
mod round_trip;
mod world;

//! Whole stores on the fake drivers: layers, failures, and blocks that go from one make of device to the other.

#[cfg(feature = "tools")]
mod bench;
#[path = "../common/mod.rs"]
mod common;
mod failures;
#[path = "../fakes/mod.rs"]
mod fakes;
mod layers;
mod platforms;
mod reuse;
mod told;

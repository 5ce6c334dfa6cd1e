//! The Posix tier: segments, manifests and the index over them, in every storage backend.
//!
//! Knows files and parts; knows no devices, no slots and no tasks. See `docs/format.md`.

mod abandoned;
mod capacity;
mod catalog;
pub mod checksum;
mod description;
pub mod format;
mod home;
pub mod host;
mod image;
pub mod index;
mod manifest;
pub mod names;
mod open_files;
mod pages;
pub mod rebuild;
mod reclaim;
mod recover;
mod refresh;
mod reply;
mod saver;
mod segment;
mod stats;
mod tail;
mod tier;

#[cfg(test)]
mod tests;

pub use checksum::{Claim, Wanted};
pub use format::Trailer;
pub use home::TierConfig;
pub use index::{Found, Location};
pub use recover::Recovered;
pub use saver::Extent;
pub use stats::{BackendStats, TierStats};
pub use tier::{Scope, Tail, Taken, Tier};

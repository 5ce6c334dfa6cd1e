//! Tests of the whole tier, over real files and over the seeded disk.

mod bounded;
mod crash;
mod faults;
mod fencing;
mod housekeeping;
mod lost_manifests;
mod manifest_damage;
mod recovery;
mod restart;
mod round_trip;
mod sample;
mod telling;
mod world;

//! Tests of the whole tier, over real files and over the seeded disk.

mod recovery;
mod round_trip;
mod world;

//! Memory: the arena, its NUMA placement, and its limits. Knows no blocks: slots are the cache's.

pub mod arena;
pub mod huge;
pub mod limits;
pub mod numa;
pub mod runs;
pub mod stream;

#[cfg(test)]
mod arena_tests;

pub use arena::{Arena, ArenaRequest, PageKind};

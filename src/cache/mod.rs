//! The DRAM tier: which slot holds which part, what is evicted next, and the table that lets lookup-only
//! stores of the host see DRAM hits.

mod ghost;
pub mod policy;
pub mod shared;
pub mod slots;

#[cfg(test)]
mod policy_tests;

pub use policy::S3Fifo;
pub use shared::{SharedReaders, SharedScope, SharedTable};
pub use slots::Slots;

//! UCM: a KV-cache storage engine. Servers save the KV blocks of a prompt to storage that every
//! node reaches, and load them back instead of recomputing them.
//!
//! The C ABI (`capi`, `include/ucm.h`) is the product; this crate is what stands behind it. Words and
//! rooms are explained in `docs/architecture.md`.

pub mod block;
pub mod cache;
pub mod capi;
pub mod clock;
pub mod completion;
pub mod config;
mod copy;
pub mod cufile;
pub mod device;
pub mod error;
pub mod hash;
pub mod io;
mod layout;
pub mod log;
pub mod mem;
pub mod metrics;
mod parts;
pub mod posix;
#[cfg(test)]
mod reference;
pub mod store;
pub mod task;
mod xxh3;

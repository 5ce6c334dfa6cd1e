//! The table of what is in the DRAM of a transferring store, in shared memory, so that lookup-only stores of
//! the host see DRAM hits: in an inference server the scheduler looks up and the workers transfer, in
//! processes of their own.
//!
//! A [`SharedTable`] alone writes its table; a [`SharedReaders`] maps the tables of its namespace and
//! instance read-only. Readers make no system call for a key; one `poll` a [`View`] tells whether the
//! writers live. A dead or closed writer's table says nothing any more, and the next writer of
//! the user removes it. Knows keys, not slots or bytes.

mod process;
mod reader;
mod table;
mod writer;

#[cfg(test)]
mod tests;

use crate::block::Namespace;

pub use reader::{SharedReaders, View};
pub use writer::SharedTable;

/// Where tables lie: memory, not a disk, whatever `/tmp` is.
const DIRECTORY: &str = "/dev/shm";

/// Whose tables a store reads and writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedScope {
    /// [`crate::block::Namespace::fingerprint`]: the bytes in DRAM have an order.
    pub fingerprint: [u8; 16],
    /// The engine instance (`unique_id`): another one's DRAM is of no use here.
    pub instance: String,
}

impl SharedScope {
    /// Of the stores of a namespace in one engine instance.
    pub fn new(namespace: &Namespace, instance: &str) -> Self {
        Self { fingerprint: namespace.fingerprint(), instance: instance.to_owned() }
    }

    /// How the file names of this scope begin.
    fn prefix(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("ucm 2026 shared cache table v1");
        hasher.update(&self.fingerprint);
        hasher.update(self.instance.as_bytes());
        format!("{}{}-", user_prefix(), &hasher.finalize().to_hex()[..32])
    }
}

/// How the file names of this user begin.
fn user_prefix() -> String {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let user = unsafe { libc::geteuid() };
    format!("ucm-cache-{user}-")
}

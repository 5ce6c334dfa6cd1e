//! The store: the one door to the engine. Lookup, prefetch, save, load.
//!
//! `mod.rs` is the door: it checks arguments and answers from memory. `engine.rs` carries out what the
//! part table decides, `read.rs` its reads and `save.rs` its saves; `submit.rs` turns a batch into a task, `hold.rs` keeps blocks in
//! DRAM for a while, `direct.rs` moves bytes straight between registered caller memory and the drive,
//! `open.rs` and `close.rs` are the two ends of its life.

mod close;
mod device_hash;
mod direct;
mod engine;
mod fresh;
mod gpu_direct;
mod hold;
mod lookup;
mod open;
mod read;
mod regions;
mod save;
mod slots;
mod stats;
mod submit;

use std::ffi::c_void;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub use open::Platform;
pub use stats::Stats;
pub use submit::Batch;

use crate::block::{BlockId, Promise};
use crate::completion::Completion;
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::log::{self, Level};
use crate::task::{Kind, Task};
use engine::Engine;

/// An open store. Dropping it closes it.
pub struct Store {
    engine: Arc<Engine>,
}

impl Store {
    /// Opens the store that `config` describes. Blocks for the probe of the backends and the first read
    /// of their manifests, `timeout_ms` at most.
    ///
    /// # Errors
    /// `InvalidConfig`, `OutOfMemory` (arena), `Device`, and whatever the backends answer: `Permission`,
    /// `NoSpace`, `Io`, `Timeout` on a mount that hangs.
    pub fn open(config: Config) -> Result<Arc<Self>> {
        Self::open_on(config, Platform::default())
    }

    /// As [`Store::open`], on backends or a device that the caller brings (tests, simulations).
    pub fn open_on(config: Config, platform: Platform) -> Result<Arc<Self>> {
        let engine = open::open(config, platform)?;
        Ok(Arc::new(Self { engine }))
    }

    /// The configuration it was opened with.
    pub fn config(&self) -> &Config {
        &self.engine.config
    }

    /// Sets `found[i]` to 1 where every part of `blocks[i]` is present, else to 0.
    ///
    /// Answers from memory. Where the index is older than `lookup_refresh_ms` the call first waits, for
    /// a bounded time, for a refresh that it shares with its like.
    pub fn lookup(&self, blocks: &[BlockId], found: &mut [u8]) -> Result<()> {
        self.engine.check_open()?;
        if blocks.len() != found.len() {
            let text = format!("found: {} places for {} blocks", found.len(), blocks.len());
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let begun = Instant::now();
        self.engine.freshen();
        let hits = self.engine.find_present(blocks, found) as u64;
        self.engine.count_lookup(begun, blocks.len() as u64, hits);
        Ok(())
    }

    /// The length of the longest prefix of `blocks` of which every part is present.
    pub fn lookup_prefix(&self, blocks: &[BlockId]) -> Result<usize> {
        self.engine.check_open()?;
        let begun = Instant::now();
        self.engine.freshen();
        let hits = self.engine.find_prefix(blocks);
        self.engine.count_lookup(begun, blocks.len() as u64, hits as u64);
        Ok(hits)
    }

    /// A hint: brings this store's parts of the blocks into the Cache tier, as far as there is room.
    pub fn prefetch(&self, blocks: &[BlockId]) -> Result<()> {
        self.engine.check_open()?;
        self.engine.prefetch(blocks);
        Ok(())
    }

    /// Brings this store's parts of the blocks into the Cache tier, verified, and keeps them there until the
    /// task's handle is released ([`Task::release_handle`]) or the store is closed: a load of a block that is
    /// held is a copy from memory. Returns at once; stage LOADED says that every block is held. `timeout_ms`
    /// as in a [`Batch`].
    ///
    /// Blocks that do not fit into the half of the slots that may be held fail with `Busy`, at once.
    ///
    /// # Errors
    /// `Unsupported` (no Cache tier, lookup-only store), `InvalidArgument` (no blocks, or too many), `Busy`
    /// (queues full), `Closed`. No task exists then.
    pub fn hold(&self, blocks: &[BlockId], timeout_ms: i64) -> Result<Arc<Task>> {
        self.engine.hold(blocks, timeout_ms)
    }

    /// Tells all stores that these blocks, though promised, will not be saved under this promise. Returns at
    /// once; the records follow as publishes do.
    pub fn abandon(&self, blocks: &[BlockId], promise: Promise) -> Result<()> {
        self.engine.check_open()?;
        if let Some(tier) =
            self.engine.tier.as_ref().filter(|_| !self.engine.config.is_lookup_only())
        {
            let told = |result: Result<()>| {
                if let Err(error) = result {
                    let text = format_args!("blocks could not be announced as abandoned: {error}");
                    log::once(Level::Warning, "abandon", text);
                }
            };
            tier.abandon(blocks, promise, Box::new(told));
        }
        Ok(())
    }

    /// Sets `found[i]` to 1 where some writer has abandoned `blocks[i]` under this promise. Refreshes like a
    /// lookup.
    pub fn lookup_abandoned(
        &self,
        blocks: &[BlockId],
        promise: Promise,
        found: &mut [u8],
    ) -> Result<()> {
        self.engine.check_open()?;
        self.engine.freshen();
        let tier = self.engine.tier.as_ref();
        for (block, found) in blocks.iter().zip(found) {
            *found = u8::from(tier.is_some_and(|tier| tier.is_abandoned(block, promise)));
        }
        Ok(())
    }

    /// Saves a batch; returns at once.
    ///
    /// # Errors
    /// `InvalidArgument`, `Unsupported` (lookup-only store), `Busy` (queues full), `Device` (event),
    /// `Closed`. No task exists then.
    ///
    /// # Safety
    /// The addresses are valid for reading the slices' spans, and nobody writes there, until stage COPIED
    /// succeeds or the task is RELEASED; `wait_event` is null or a live event of the store's device.
    pub unsafe fn save(&self, batch: &Batch<'_>) -> Result<Arc<Task>> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.engine.submit(Kind::Save, batch) }
    }

    /// Loads a batch; returns at once.
    ///
    /// # Errors
    /// As [`Store::save`].
    ///
    /// # Safety
    /// The addresses are valid for writing the slices' spans, and nobody else touches them, until stage
    /// LOADED succeeds or the task is RELEASED; `wait_event` as for `save`.
    pub unsafe fn load(&self, batch: &Batch<'_>) -> Result<Arc<Task>> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.engine.submit(Kind::Load, batch) }
    }

    /// Makes a device stream wait for a task's copies. Of a load: blocks until every entry is verified and its
    /// copy enqueued, and returns the first error without ordering anything. Of a save: what the stream does
    /// afterwards may overwrite the memory of every entry, however it ends. Blocks until stage ENQUEUED.
    ///
    /// # Safety
    /// `stream` is a live stream of the store's device, or null for its default stream.
    pub unsafe fn stream_wait(&self, task: &Task, stream: *mut c_void) -> Result<()> {
        let markers = task.wait_enqueued()?;
        // SAFETY: the caller vouches for the stream.
        unsafe { self.engine.device.stream_wait(stream, &markers) }
    }

    /// A descriptor that is readable while completions wait to be reaped. It stays the store's.
    pub fn completion_fd(&self) -> Result<RawFd> {
        self.engine.check_open()?;
        Ok(self.engine.completions.fd())
    }

    /// Takes up to `capacity` completions of tasks that asked for them.
    pub fn reap(&self, capacity: usize) -> Result<Vec<Completion>> {
        self.engine.check_open()?;
        Ok(self.engine.completions.reap(capacity))
    }

    /// Brings the index up to date with all writers. `None`: no limit of time.
    pub fn refresh(&self, timeout: Option<Duration>) -> Result<()> {
        self.engine.check_open()?;
        self.engine.refresh(timeout)
    }

    /// Lets the engine move bytes straight from and to this host memory, where alignment allows.
    ///
    /// # Safety
    /// The memory stays mapped until `unregister_memory` has returned Ok, or the store is closed.
    pub unsafe fn register_memory(&self, base: *mut c_void, length: usize) -> Result<()> {
        self.engine.check_open()?;
        self.engine.register_memory(base.cast(), length)
    }

    /// Undoes `register_memory`; `Busy` while an operation uses the memory.
    pub fn unregister_memory(&self, base: *mut c_void) -> Result<()> {
        self.engine.check_open()?;
        self.engine.unregister_memory(base.cast())
    }

    /// Writes the ids of the full blocks of `tokens` to `ids`, chained from `parent` (`None`: the
    /// namespace's root); returns how many.
    pub fn hash_tokens(
        &self,
        tokens: &[u32],
        block_tokens: usize,
        parent: Option<&BlockId>,
        extra: &[u8],
        ids: &mut [BlockId],
    ) -> Result<usize> {
        self.engine.check_open()?;
        check_hash(tokens, block_tokens, ids)?;
        Ok(self.engine.hasher.tokens(tokens, block_tokens, parent, extra, ids))
    }

    /// As [`Store::hash_tokens`], with extra bytes for each block.
    pub fn hash_blocks(
        &self,
        tokens: &[u32],
        block_tokens: usize,
        parent: Option<&BlockId>,
        extras: &[&[u8]],
        ids: &mut [BlockId],
    ) -> Result<usize> {
        self.engine.check_open()?;
        check_hash(tokens, block_tokens, ids)?;
        let blocks = tokens.len() / block_tokens;
        if extras.len() < blocks {
            let text = format!("extras: {} for {blocks} blocks; give one a block", extras.len());
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        Ok(self.engine.hasher.blocks(tokens, block_tokens, parent, extras, ids))
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Result<Stats> {
        self.engine.check_open()?;
        Ok(self.engine.stats())
    }

    /// The same and more as Prometheus text.
    pub fn metrics(&self) -> Result<String> {
        self.engine.check_open()?;
        Ok(self.engine.metrics_text())
    }

    /// Finishes or cancels what is in flight, within `timeout_ms`, and closes. Later calls answer
    /// `Closed`, also those on its tasks. May be called from any thread, more than once.
    pub fn close(&self) {
        close::close(&self.engine);
    }
}

fn check_hash(tokens: &[u32], block_tokens: usize, ids: &[BlockId]) -> Result<()> {
    let bad = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
    if block_tokens == 0 {
        return bad("block_tokens: 0; a block has at least one token".into());
    }
    let blocks = tokens.len() / block_tokens;
    if ids.len() < blocks {
        return bad(format!("capacity: room for {} ids, {blocks} are needed", ids.len()));
    }
    Ok(())
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

impl Engine {
    fn check_open(&self) -> Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Closed, "the store is closed"));
        }
        Ok(())
    }
}

//! The Posix tier: the one door to segments and manifests of a namespace in all its backends.
//!
//! Owns the catalog, one saver a home, the refresher and the open files, and carries parts between memory
//! and extents. Knows no slots, no devices and no tasks; callers own the memory.

mod house;
mod notice;
mod open;
mod reads;
mod saves;
mod verdict;

pub use saves::Taken;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::block::{BlockId, PartKey};
use crate::clock::Clock;
use crate::error::Result;
use crate::io::Done;
use crate::posix::capacity::Capacity;
use crate::posix::catalog::Catalog;
use crate::posix::home::Layout;
use crate::posix::index::Found;
use crate::posix::open_files::OpenFiles;
use crate::posix::reclaim::Reclaim;
use crate::posix::refresh::Refresher;
use crate::posix::reply::Reply;
use crate::posix::saver::Saver;
use crate::posix::stats::{BackendStats, TierStats};

/// Which manifests a store reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Those that can hold its own parts.
    Own,
    /// All.
    All,
}

/// What a store does in a namespace.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The parts it saves; empty for a store that only looks up.
    pub parts: Range<u16>,
    /// Which manifests it reads.
    pub tail: Tail,
}

/// A refresh waits this long for a backend, or the tier's timeout if that is shorter.
const REFRESH_PATIENCE: Duration = Duration::from_secs(10);

/// The tier.
pub struct Tier {
    layout: Arc<Layout>,
    savers: Vec<Arc<Saver>>,
    catalog: Arc<Catalog>,
    files: Arc<OpenFiles>,
    refresher: Arc<Refresher>,
    clock: Arc<Clock>,
    capacity: Arc<Capacity>,
    reclaim: Arc<Reclaim>,
    turn: AtomicU64,
    writing: Arc<AtomicUsize>,
    closed: Mutex<bool>,
}

impl Tier {
    /// Where a part is. Memory only.
    pub fn find(&self, key: &PartKey) -> Option<Found> {
        self.catalog.index.find(key)
    }

    /// Where parts are, in the order of `keys`. Memory only, and faster than one by one.
    pub fn find_many<'a>(&self, keys: impl Iterator<Item = &'a PartKey>) -> Vec<Option<Found>> {
        let mut found = Vec::with_capacity(keys.size_hint().0);
        self.catalog
            .index
            .find_many(keys.map(|key| (&key.block, key.part)), |_, part| found.push(part));
        found
    }

    /// Whether all parts of a block can be found. Memory only.
    pub fn contains_block(&self, block: &BlockId) -> bool {
        self.catalog.contains_block(block)
    }

    /// For each block 1 where all its parts can be found, else 0. Memory only, and faster than one by one.
    ///
    /// # Panics
    /// If `found` is shorter than `blocks`.
    pub fn contains_blocks(&self, blocks: &[BlockId], found: &mut [u8]) {
        self.catalog.contains_blocks(blocks, found);
    }

    /// From now on reads the manifests of all parts, from the next refresh on.
    pub fn widen(&self) {
        self.refresher.widen();
    }

    /// Whether it reads the manifests of all parts.
    pub fn is_wide(&self) -> bool {
        self.refresher.is_wide()
    }

    /// Brings the index up to date: `done` comes after a round over all manifests that began after this
    /// call, on a thread that may block.
    pub fn refresh(&self, done: Done) {
        self.refresher.refresh(Reply::boxed(done));
    }

    /// Time since the last completed refresh began.
    pub fn refresh_age(&self) -> Duration {
        self.refresher.age()
    }

    /// Bytes of an extent: payload padded to pages, then the trailer page.
    pub fn extent_bytes(&self) -> u64 {
        self.layout.extent_bytes()
    }

    /// Takes no more saves, waits for those on their way, seals and trims; idempotent. What does not end by
    /// `deadline` is left to the next open.
    pub fn close(&self, deadline: Instant) {
        if std::mem::replace(&mut *self.closed.lock(), true) {
            return;
        }
        let writers: Vec<_> = self.savers.iter().map(|saver| (saver, saver.stop())).collect();
        while self.writing.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(CLOSE_POLL);
        }
        let (sender, ended) = std::sync::mpsc::channel();
        let mut left = 0;
        for (saver, writer) in writers {
            let Some(writer) = writer else { continue };
            let (sender, saver) = (sender.clone(), Arc::clone(saver));
            let reply = Reply::new(move |result: Result<()>| drop(sender.send(result)));
            let home = Arc::clone(&saver.home);
            reply.run_on(&home.backend, move |reply| saver.close_writer(&writer, reply));
            left += 1;
        }
        for _ in 0..left {
            let patience = deadline.saturating_duration_since(Instant::now());
            match ended.recv_timeout(patience) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => crate::log::warning(format_args!("closing: {error}")),
                Err(_) => break,
            }
        }
        self.clock.stop();
        self.files.clear();
    }

    /// What the tier holds and what happened to it.
    pub fn stats(&self) -> TierStats {
        let catalog = &self.catalog;
        let (manifests, live) = self.refresher.manifests();
        let counters = &self.refresher.counters;
        let backend = |saver: &Arc<Saver>| BackendStats {
            directory: saver.home.backend.directory().to_path_buf(),
            direct: saver.home.is_direct(),
            holds_manifests: saver.home.can_hold(),
            failure: saver.failure().map(|error| error.to_string()),
        };
        TierStats {
            parts: catalog.index.len() as u64,
            index_bytes: catalog.index.bytes() as u64,
            segments: catalog.segment_count() as u64,
            segment_bytes: self.capacity.used(),
            capacity_bytes: self.capacity.limit(),
            open_files: self.files.count() as u64,
            writers: manifests as u64,
            live_writers: live as u64,
            bad_records: catalog.counters.bad_records.load(Ordering::Relaxed),
            misfit_records: catalog.counters.misfits.load(Ordering::Relaxed),
            quarantined: catalog.counters.quarantined.load(Ordering::Relaxed),
            refreshes: counters.rounds.load(Ordering::Relaxed),
            refreshes_left_behind: counters.left_behind.load(Ordering::Relaxed),
            manifests_unreadable: counters.unreadable.load(Ordering::Relaxed),
            backends: self.savers.iter().map(backend).collect(),
        }
    }

    /// The savers, for tests that look inside.
    #[cfg(test)]
    pub(crate) fn savers(&self) -> &[Arc<Saver>] {
        &self.savers
    }
}

/// How often a close looks whether the saves on their way have ended.
const CLOSE_POLL: Duration = Duration::from_millis(1);

impl Drop for Tier {
    fn drop(&mut self) {
        self.close(Instant::now() + self.layout.config.timeout.min(REFRESH_PATIENCE));
    }
}

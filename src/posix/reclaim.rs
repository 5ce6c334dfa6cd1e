//! Keeping a namespace below its bound: which segments go, and how they go without harming a reader.
//!
//! Owns the choice of victims and the two steps of freeing one: RETIRE now, rename and free after a grace.
//! Segments that were read since the last round get a second chance. Knows no index entry by content.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use crate::clock::Clock;
use crate::error::{ErrorKind, Result};
use crate::posix::capacity::Capacity;
use crate::posix::catalog::Catalog;
use crate::posix::format::{Kind, Record};
use crate::posix::home::Home;
use crate::posix::host::{random_id, wall_ms};
use crate::posix::manifest::{Item, Urgency};
use crate::posix::names::SegmentName;
use crate::posix::open_files::OpenFiles;
use crate::posix::recover::remove;
use crate::posix::refresh::Refresher;
use crate::posix::reply::Reply;
use crate::posix::saver::Saver;
use crate::posix::tail::Growth;

/// What reclaim works with.
#[derive(Clone)]
pub struct Reclaim {
    /// The index and the segment table.
    pub catalog: Arc<Catalog>,
    /// Open segments.
    pub files: Arc<OpenFiles>,
    /// What is known of other writers.
    pub refresher: Arc<Refresher>,
    /// Runs the second step.
    pub clock: Arc<Clock>,
    /// The bound.
    pub capacity: Arc<Capacity>,
    /// One a home.
    pub savers: Vec<Arc<Saver>>,
}

/// A segment that may go.
struct Victim {
    saver: Arc<Saver>,
    name: SegmentName,
    handle: u32,
    bytes: u64,
    /// Reads since the last round.
    reads: u32,
    /// When its writer began, then its number: older ones go first.
    age: (u64, u32),
}

impl Reclaim {
    /// One round: counts bytes, and where they are over the high watermark retires segments down to the
    /// low one. Returns the bytes that will be freed. Blocks; on a path pool only.
    pub fn round(&self) -> Result<u64> {
        let Some(limit) = self.capacity.limit() else { return Ok(0) };
        let Some(first) = self.savers.first() else { return Ok(0) };
        let gc = &first.home.layout.config.gc;
        let mut used = 0;
        let mut victims = Vec::new();
        for saver in &self.savers {
            let (bytes, found) = self.survey(saver)?;
            used += bytes;
            victims.extend(found);
        }
        self.capacity.set(used);
        let pending = self.capacity.pending();
        let held = used.saturating_sub(pending);
        // Below the watermark there may still be too little room for one more segment: that is full, too.
        let room = limit.saturating_sub(first.home.layout.segment_bytes_max());
        let high = ((limit as f64 * gc.high_watermark) as u64).min(room);
        if !gc.enabled || held <= high {
            return Ok(0);
        }
        let target = ((limit as f64 * gc.low_watermark) as u64).min(high);
        for victim in &mut victims {
            victim.reads = self.files.take_reads(victim.handle);
        }
        victims.sort_by_key(|victim| (victim.reads > 0, victim.age));
        let mut freed = 0;
        for victim in victims {
            if held - freed <= target {
                break;
            }
            freed += victim.bytes;
            self.retire(victim);
        }
        Ok(freed)
    }

    /// Bytes of all segments of a home, and those among them that this process may free: its own that are
    /// sealed, and those of writers that have ended.
    fn survey(&self, saver: &Arc<Saver>) -> Result<(u64, Vec<Victim>)> {
        let home = &saver.home;
        let known = self.refresher.known(home.number);
        let growing: HashSet<u64> =
            known.iter().filter(|k| k.growth != Growth::Final).map(|k| k.name.writer).collect();
        let mut used = 0;
        let mut victims = Vec::new();
        for listed in home.backend.files().list(&home.segments)? {
            let Some(name) = listed.to_str().and_then(SegmentName::parse) else { continue };
            let path = home.segments.join(name.to_string());
            let Ok(metadata) = home.backend.files().metadata(&path) else { continue };
            let bytes = metadata.allocated.max(metadata.length);
            used += bytes;
            let handle = self.catalog.intern(home.number, name);
            let began = known
                .iter()
                .find(|known| known.name.writer == name.writer)
                .map(|known| known.header.map_or(0, |header| header.created_ms));
            let began = match began {
                Some(began) if !growing.contains(&name.writer) => began,
                _ if saver.is_sealed(handle) => u64::MAX,
                _ => continue,
            };
            let retired = self.catalog.segment(handle).is_none_or(|segment| segment.retired);
            if !retired {
                let age = (began, name.number);
                let saver = Arc::clone(saver);
                victims.push(Victim { saver, name, handle, bytes, reads: 0, age });
            }
        }
        Ok((used, victims))
    }

    /// The first step: a RETIRE record, after which nobody begins to read it, and a grace.
    fn retire(&self, victim: Victim) {
        let Some(writer) = victim.saver.writer() else { return };
        self.capacity.add_pending(victim.bytes);
        let record = Record {
            segment: victim.name.number,
            generation: victim.name.generation,
            checksum: victim.name.writer,
            ..Record::of(Kind::Retire, wall_ms())
        };
        let this = self.clone();
        let reply = Reply::new(move |recorded: Result<()>| match recorded {
            Ok(()) => this.wait_and_free(victim),
            Err(_) => this.capacity.end_pending(victim.bytes),
        });
        writer.manifest.push(Item { record, data: None, reply }, Urgency::Now);
    }

    fn wait_and_free(self, victim: Victim) {
        let config = &victim.saver.home.layout.config;
        let grace = config.lookup_refresh + config.timeout;
        let clock = Arc::clone(&self.clock);
        // Removing from the index walks all of it: not on the thread that completes commits.
        let backend = Arc::clone(&victim.saver.home.backend);
        let catalog = Arc::clone(&self.catalog);
        let handle = victim.handle;
        let _ = backend.run(Box::new(move || {
            catalog.retire(&HashSet::from([handle]));
        }));
        clock.at(Instant::now() + grace, move || {
            let backend = Arc::clone(&victim.saver.home.backend);
            let bytes = victim.bytes;
            let capacity = Arc::clone(&self.capacity);
            let reply = Reply::new(move |freed: Result<()>| {
                capacity.end_pending(bytes);
                match freed {
                    Ok(()) => capacity.give(bytes),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => crate::log::warning(format_args!("reclaim: {error}")),
                }
            });
            reply.run_on(&backend, move |reply| reply.send(self.free(&victim)));
        });
    }

    /// The second step: the rename decides who frees it.
    fn free(&self, victim: &Victim) -> Result<()> {
        let home: &Home = &victim.saver.home;
        self.files.remove(victim.handle);
        victim.saver.forget_segment(victim.handle);
        let files = &**home.backend.files();
        remove(files, &home.segments, &victim.name.to_string(), random_id(), home)
    }
}

//! Notices: blocks that were announced and will not come.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::open::timeout;
use super::{REFRESH_PATIENCE, Tier};
use crate::block::{BlockId, Promise};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Done;
use crate::posix::format::{Kind, Record};
use crate::posix::host::wall_ms;
use crate::posix::manifest::{Item, Urgency};
use crate::posix::reply::{Join, Reply};
use crate::posix::saver::{Saver, Writer};

impl Tier {
    /// Tells everyone that promised blocks will not come. A store that never saved becomes a writer for it.
    pub fn abandon(self: &Arc<Self>, blocks: &[BlockId], promise: Promise, done: Done) {
        blocks.iter().for_each(|block| self.catalog.abandon(*block, promise));
        let reply = Reply::boxed(done);
        if blocks.is_empty() {
            return reply.send(Ok(()));
        }
        if self.layout.parts.is_empty() {
            return reply.send(Err(Error::new(
                ErrorKind::Unsupported,
                "a store that only looks up announces nothing",
            )));
        }
        // Any backend will do: first those that it saves in already, and not those that do not work.
        let mut savers: Vec<Arc<Saver>> = self.savers.clone();
        savers.sort_by_key(|saver| (saver.failure().is_some(), saver.writer().is_none()));
        self.announce(savers.into(), blocks.into(), promise, reply);
    }

    fn announce(
        self: &Arc<Self>,
        mut savers: VecDeque<Arc<Saver>>,
        blocks: Arc<[BlockId]>,
        promise: Promise,
        reply: Reply<()>,
    ) {
        let Some(saver) = savers.pop_front() else {
            return reply.send(Err(Error::new(
                ErrorKind::InvalidConfig,
                "storage_backends: none is given",
            )));
        };
        let (tier, again) = (Arc::clone(self), Arc::clone(&blocks));
        let attempt = Reply::new(move |result: Result<()>| match result {
            Err(error) if error.kind() != ErrorKind::Closed && !savers.is_empty() => {
                tier.announce(savers, again, promise, reply);
            }
            result => reply.send(result),
        });
        let patience = self.layout.config.timeout.min(REFRESH_PATIENCE);
        let late = timeout("announcing abandoned blocks");
        let attempt = attempt.by(&self.clock, Instant::now() + patience, late);
        saver.with_writer(Reply::new(move |writer: Result<Arc<Writer>>| match writer {
            Err(error) => attempt.send(Err(error)),
            Ok(writer) => {
                let join = Join::new(blocks.len(), attempt);
                for block in blocks.iter() {
                    let record = abandoned(*block, promise);
                    let join = Arc::clone(&join);
                    let reply = Reply::new(move |result| join.ended(result));
                    writer.manifest.push(Item { record, data: None, reply }, Urgency::Now);
                }
            }
        }));
    }

    /// Whether a promised block will not come.
    pub fn is_abandoned(&self, block: &BlockId, promise: Promise) -> bool {
        self.catalog.is_abandoned(block, promise)
    }
}

fn abandoned(block: BlockId, promise: Promise) -> Record {
    Record { block, checksum: promise.0, ..Record::of(Kind::Abandoned, wall_ms()) }
}

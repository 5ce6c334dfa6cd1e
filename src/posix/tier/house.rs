//! Housekeeping: recovery after dead writers, and reclaim, at open and at every interval.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::Tier;
use crate::error::Result;
use crate::posix::recover::{self, Recovered};
use crate::posix::reply::{Join, Reply};

impl Tier {
    /// Cleans up after dead writers, in all backends; `done` gets what was done. Stores that only look up
    /// need not: those that save do it when they open.
    pub fn recover(&self, done: Box<dyn FnOnce(Result<Recovered>) + Send>) {
        let sum = Arc::new(Mutex::new(Recovered::default()));
        let total = Arc::clone(&sum);
        let reply = Reply::new(move |result: Result<()>| {
            let sum = *total.lock();
            done(result.map(|()| sum));
        });
        let join = Join::new(self.savers.len(), reply);
        for saver in &self.savers {
            let (join, sum) = (Arc::clone(&join), Arc::clone(&sum));
            let (catalog, refresher) = (Arc::clone(&self.catalog), Arc::clone(&self.refresher));
            let home = Arc::clone(&saver.home);
            let backend = Arc::clone(&home.backend);
            let reply = Reply::new(move |result| join.ended(result));
            reply.run_on(&backend, move |reply| {
                let recovered = recover::recover(&home, &catalog, &refresher);
                reply.send(recovered.map(|recovered| sum.lock().add(&recovered)));
            });
        }
    }

    /// One round of reclaim; `done` gets the bytes that will be freed after the grace. Stores that only look
    /// up reclaim nothing.
    pub fn reclaim(&self, done: Box<dyn FnOnce(Result<u64>) + Send>) {
        self.reclaim.round(Reply::boxed(done));
    }

    /// Recovery and reclaim run on the path pools, apart from everything else, at open and at every interval.
    pub(super) fn keep_house(self: &Arc<Self>) {
        if self.layout.parts.is_empty() {
            return;
        }
        self.recover(Box::new(|result| {
            if let Err(error) = result {
                crate::log::warning(format_args!("cleaning up after dead writers: {error}"));
            }
        }));
        self.reclaim(Box::new(|result| {
            if let Err(error) = result {
                crate::log::warning(format_args!("reclaim: {error}"));
            }
        }));
        let tier = Arc::downgrade(self);
        self.clock.at(Instant::now() + self.layout.config.gc.interval, move || {
            let Some(tier) = tier.upgrade() else { return };
            // Who died and who ended is known from reading manifests, which an idle store does not do.
            let house = Arc::downgrade(&tier);
            tier.refresh(Box::new(move |_| {
                if let Some(tier) = house.upgrade() {
                    tier.keep_house();
                }
            }));
        });
    }
}

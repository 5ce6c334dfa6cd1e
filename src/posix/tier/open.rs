//! Opening a tier: folders, the first reading of all manifests, and the parts it is made of.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use parking_lot::Mutex;

use super::{REFRESH_PATIENCE, Scope, Tail, Tier};
use crate::block::Namespace;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Done;
use crate::io::backend::Backend;
use crate::posix::capacity::Capacity;
use crate::posix::catalog::Catalog;
use crate::posix::format::ProcessIdentity;
use crate::posix::home::{Home, Layout, TierConfig};
use crate::posix::host::this_process;
use crate::posix::open_files::OpenFiles;
use crate::posix::reclaim::Reclaim;
use crate::posix::refresh::{self, Refresher};
use crate::posix::reply::Reply;
use crate::posix::saver::Saver;

/// Of the time to open, one part in so many is for a backend that makes no folders while others do.
const FOLDERS_SHARE: u32 = 4;

impl Tier {
    /// Opens a namespace in `backends`: creates what is missing, reads all manifests once. Backends that
    /// fail are left out of saves and told; an error only where none works.
    pub fn open(
        namespace: &Namespace,
        scope: Scope,
        backends: Vec<Arc<Backend>>,
        config: TierConfig,
        deadline: Instant,
    ) -> Result<Arc<Self>> {
        Self::open_as(this_process(), namespace, scope, backends, config, deadline)
    }

    /// As [`Tier::open`], in the name of `process`.
    pub(crate) fn open_as(
        process: ProcessIdentity,
        namespace: &Namespace,
        scope: Scope,
        backends: Vec<Arc<Backend>>,
        config: TierConfig,
        deadline: Instant,
    ) -> Result<Arc<Self>> {
        let part_count = u16::try_from(namespace.part_count).map_err(|_| {
            Error::new(ErrorKind::InvalidConfig, "part_count: more parts than 65535")
        })?;
        let patience = config.timeout.min(REFRESH_PATIENCE);
        let layout = Arc::new(Layout {
            fingerprint: namespace.fingerprint(),
            part_bytes: namespace.part_bytes,
            part_count,
            parts: scope.parts.clone(),
            config,
            process,
        });
        let catalog = Arc::new(Catalog::new(layout.part_bytes, part_count));
        let files = Arc::new(OpenFiles::default());
        let clock = Arc::new(Clock::default());
        let capacity = Arc::new(Capacity::new(layout.config.capacity_bytes));
        let saver = |(number, backend)| {
            let home = Home::new(number, backend, namespace, Arc::clone(&layout));
            let (catalog, files) = (Arc::clone(&catalog), Arc::clone(&files));
            Saver::new(Arc::new(home), catalog, files, Arc::clone(&clock), Arc::clone(&capacity))
        };
        let savers: Vec<Arc<Saver>> = (0u16..).zip(backends).map(saver).collect();
        create_folders(&savers, deadline)?;
        let wide = scope.tail == Tail::All || scope.parts.is_empty();
        let reading = if wide { refresh::Scope::All } else { refresh::Scope::Own };
        // The first round reads everything there is, which may take longer than any later one; the rest of the
        // time is for the answer, should a backend hang.
        let first = deadline.saturating_duration_since(Instant::now()) / 4 * 3;
        let (index, alarm) = (Arc::clone(&catalog), Arc::clone(&clock));
        let refresher = Refresher::new(&savers, index, alarm, reading, first);
        let reclaim = Arc::new(Reclaim {
            catalog: Arc::clone(&catalog),
            files: Arc::clone(&files),
            refresher: Arc::clone(&refresher),
            clock: Arc::clone(&clock),
            capacity: Arc::clone(&capacity),
            savers: savers.clone(),
            state: Mutex::default(),
        });
        let tier = Arc::new(Self {
            layout,
            savers,
            catalog,
            files,
            refresher,
            clock,
            capacity,
            reclaim,
            turn: AtomicU64::new(0),
            writing: Arc::default(),
            closed: Mutex::new(false),
        });
        wait(deadline, "reading the manifests", |done| tier.refresh(done))?;
        tier.refresher.set_patience(patience);
        let house = Arc::downgrade(&tier);
        tier.capacity.set_alarm(move || {
            if let Some(tier) = house.upgrade() {
                tier.reclaim(Box::new(|_| ()));
            }
        });
        tier.keep_house();
        Ok(tier)
    }
}

/// Creates the folders of all homes; an error only where none could be. One that does not answer is given a
/// part of the time while others do: opening goes on without it.
fn create_folders(savers: &[Arc<Saver>], deadline: Instant) -> Result<()> {
    let (sender, created) = std::sync::mpsc::channel();
    for saver in savers {
        let sender = sender.clone();
        let reply = Reply::new(move |result: Result<()>| drop(sender.send(result)));
        let home = Arc::clone(&saver.home);
        let backend = Arc::clone(&home.backend);
        reply.run_on(&backend, move |reply| reply.send(home.create_folders()));
    }
    let now = Instant::now();
    let patience = deadline.saturating_duration_since(now);
    let early = now + patience / FOLDERS_SHARE;
    let mut succeeded = 0;
    let mut error = Error::new(ErrorKind::InvalidConfig, "storage_backends: none is given");
    for _ in savers {
        let until = if succeeded > 0 { early } else { deadline };
        match created.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Ok(())) => succeeded += 1,
            Ok(Err(failure)) => {
                crate::log::warning(format_args!("a storage backend is left out: {failure}"));
                error = failure;
            }
            Err(_) => {
                error = timeout("creating the namespace's folders");
                crate::log::warning(format_args!("a storage backend is left out: {error}"));
                break;
            }
        }
    }
    if succeeded > 0 { Ok(()) } else { Err(error) }
}

/// Waits for one answer.
fn wait(deadline: Instant, what: &str, ask: impl FnOnce(Done)) -> Result<()> {
    let (sender, answer) = std::sync::mpsc::channel();
    ask(Box::new(move |result| drop(sender.send(result))));
    match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(result) => result,
        Err(_) => Err(timeout(what)),
    }
}

/// What hangs is the mount.
pub(super) fn timeout(what: &str) -> Error {
    Error::new(
        ErrorKind::Timeout,
        format!("{what} did not end in time; check that the mount of storage_backends answers"),
    )
}

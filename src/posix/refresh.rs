//! Refreshing: one round over all manifests of all homes, shared by everyone who asked before it began.
//!
//! Owns the tails of other writers' manifests. A caller always gets a round that began after its call. A
//! home that does not answer in time is left behind, and joins again when its calls return.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::clock::{Clock, Ticket};
use crate::error::{Error, ErrorKind, Result};
use crate::posix::catalog::Catalog;
use crate::posix::format::ManifestHeader;
use crate::posix::home::Home;
use crate::posix::host::boot_time;
use crate::posix::names::ManifestName;
use crate::posix::reply::Reply;
use crate::posix::saver::Saver;
use crate::posix::tail::{Growth, ManifestTail, Says};

/// Listings in which a manifest must be missing before its parts are forgotten: a listing that races with a
/// rename may show neither name.
const MISSING_MAX: u32 = 2;

/// Listings of one round.
const LISTINGS_MAX: u32 = 3;

/// Which manifests are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those that can hold the store's own parts.
    Own,
    /// All.
    All,
}

/// A manifest by what a rename does not change.
type Key = (u64, u32);

#[derive(Default)]
struct Tails {
    tails: HashMap<Key, ManifestTail>,
    missing: HashMap<Key, u32>,
}

/// One home, seen by the refresher.
pub struct Reader {
    home: Arc<Home>,
    saver: Arc<Saver>,
    tails: Mutex<Tails>,
    /// A round is in it, perhaps hanging.
    entered: AtomicBool,
}

struct Rounds {
    waiting: Vec<Reply<()>>,
    running: bool,
    /// When the last completed round had begun.
    completed: Option<Instant>,
}

/// Counts of rounds.
#[derive(Default)]
pub struct RefreshCounters {
    /// Rounds completed.
    pub rounds: AtomicU64,
    /// Homes that a round left behind.
    pub left_behind: AtomicU64,
    /// Manifests that could not be read in a round.
    pub unreadable: AtomicU64,
}

/// What is known of a manifest.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its name.
    pub name: ManifestName,
    /// Whether it can grow.
    pub growth: Growth,
    /// Its header, once read.
    pub header: Option<ManifestHeader>,
    /// Records of it that could not be read.
    pub bad_records: u64,
    /// How long it has been read again and again without change.
    pub unchanged: Duration,
    /// How long it has been known to be final; zero while it is not.
    pub ended: Duration,
    /// What it says about others.
    pub says: Says,
}

/// Refreshes a catalog.
pub struct Refresher {
    readers: Vec<Arc<Reader>>,
    catalog: Arc<Catalog>,
    clock: Arc<Clock>,
    all: AtomicBool,
    patience: Mutex<Duration>,
    rounds: Mutex<Rounds>,
    /// What happened.
    pub counters: RefreshCounters,
}

/// One round: whoever ends it, its last home or its deadline, ends it once.
struct Round {
    refresher: Arc<Refresher>,
    began: Instant,
    state: Mutex<Option<RoundState>>,
}

struct RoundState {
    replies: Vec<Reply<()>>,
    left: usize,
    succeeded: usize,
    error: Option<Error>,
    deadline: Option<Ticket>,
}

impl Refresher {
    /// Over `homes` and their savers; a round waits for a home at most `patience`.
    pub fn new(
        savers: &[Arc<Saver>],
        catalog: Arc<Catalog>,
        clock: Arc<Clock>,
        scope: Scope,
        patience: Duration,
    ) -> Arc<Self> {
        let reader = |saver: &Arc<Saver>| {
            Arc::new(Reader {
                home: Arc::clone(&saver.home),
                saver: Arc::clone(saver),
                tails: Mutex::default(),
                entered: AtomicBool::new(false),
            })
        };
        Arc::new(Self {
            readers: savers.iter().map(reader).collect(),
            catalog,
            clock,
            all: AtomicBool::new(scope == Scope::All),
            patience: Mutex::new(patience),
            rounds: Mutex::new(Rounds { waiting: Vec::new(), running: false, completed: None }),
            counters: RefreshCounters::default(),
        })
    }

    /// From now on reads the manifests of all parts.
    pub fn widen(&self) {
        self.all.store(true, Ordering::Relaxed);
    }

    /// How long rounds that begin from now on wait for a home.
    pub fn set_patience(&self, patience: Duration) {
        *self.patience.lock() = patience;
    }

    /// Whether the manifests of all parts are read.
    pub fn is_wide(&self) -> bool {
        self.all.load(Ordering::Relaxed)
    }

    /// Time since the last completed round began.
    pub fn age(&self) -> Duration {
        self.rounds.lock().completed.map_or(Duration::MAX, |began| began.elapsed())
    }

    /// Answers after a round that begins after this call.
    pub fn refresh(self: &Arc<Self>, reply: Reply<()>) {
        let mut rounds = self.rounds.lock();
        rounds.waiting.push(reply);
        if rounds.running {
            return;
        }
        rounds.running = true;
        let replies = std::mem::take(&mut rounds.waiting);
        drop(rounds);
        self.begin(replies);
    }

    fn begin(self: &Arc<Self>, replies: Vec<Reply<()>>) {
        let began = Instant::now();
        let state = RoundState {
            replies,
            left: self.readers.len(),
            succeeded: 0,
            error: None,
            deadline: None,
        };
        let round =
            Arc::new(Round { refresher: Arc::clone(self), began, state: Mutex::new(Some(state)) });
        let late = Arc::downgrade(&round);
        let deadline = self.clock.at(began + *self.patience.lock(), move || {
            if let Some(round) = late.upgrade() {
                round.expire();
            }
        });
        if let Some(state) = round.state.lock().as_mut() {
            state.deadline = Some(deadline);
        }
        for reader in &self.readers {
            let ended = Arc::clone(&round);
            let reply = Reply::new(move |result: Result<()>| ended.home_ended(result));
            if reader.entered.swap(true, Ordering::AcqRel) {
                reply.send(Err(Error::new(
                    ErrorKind::Timeout,
                    "the storage does not answer an earlier refresh; check the mount",
                )
                .at(reader.home.backend.directory())));
                continue;
            }
            let (inside, refresher) = (Arc::clone(reader), Arc::clone(self));
            let left = Arc::clone(reader);
            let reply = Reply::new(move |result| {
                left.entered.store(false, Ordering::Release);
                reply.send(result);
            });
            reply.run_on(&reader.home.backend, move |reply| {
                let result = inside.poll_all(&refresher);
                reply.send(result);
            });
        }
    }

    fn completed(self: &Arc<Self>, began: Instant, state: RoundState) {
        self.counters.rounds.fetch_add(1, Ordering::Relaxed);
        if let Some(deadline) = state.deadline {
            self.clock.cancel(deadline);
        }
        let result = match (state.succeeded, state.error) {
            (0, Some(error)) => Err(error),
            _ => Ok(()),
        };
        let mut rounds = self.rounds.lock();
        if result.is_ok() {
            rounds.completed = Some(began);
        }
        let next = std::mem::take(&mut rounds.waiting);
        rounds.running = !next.is_empty();
        drop(rounds);
        state.replies.into_iter().for_each(|reply| reply.send(result.clone()));
        if !next.is_empty() {
            self.begin(next);
        }
    }

    /// The manifests that are known of a home.
    pub fn known(&self, home: u16) -> Vec<Known> {
        let mut known = Vec::new();
        for reader in self.readers.iter().filter(|reader| reader.home.number == home) {
            let tails = reader.tails.lock();
            known.extend(tails.tails.values().map(|tail| Known {
                name: tail.name,
                growth: tail.growth,
                header: tail.header,
                bad_records: tail.bad_records,
                unchanged: tail.unchanged(),
                ended: match tail.growth {
                    Growth::Final => boot_time().saturating_sub(tail.final_at),
                    Growth::Live | Growth::Unreadable => Duration::ZERO,
                },
                says: tail.says.clone(),
            }));
        }
        known
    }

    /// A manifest was renamed by this process: reads it to its end under its new name. Blocks.
    pub fn renamed(&self, home: u16, name: ManifestName) -> Result<()> {
        for reader in self.readers.iter().filter(|reader| reader.home.number == home) {
            let mut tails = reader.tails.lock();
            if let Some(tail) = tails.tails.get_mut(&(name.writer, name.epoch)) {
                tail.renamed(&reader.home, name);
                reader.poll(self, tail)?;
            }
        }
        Ok(())
    }

    /// Reads one writer's manifests of a home again; says whether any is there. An error where one is known
    /// and cannot be read now. Blocks.
    pub fn poll_writer(&self, home: u16, writer: u64) -> Result<bool> {
        let mut stands = false;
        for reader in self.readers.iter().filter(|reader| reader.home.number == home) {
            let mut tails = reader.tails.lock();
            for tail in tails.tails.values_mut().filter(|tail| tail.name.writer == writer) {
                match reader.poll(self, tail) {
                    Ok(()) => stands = true,
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(stands)
    }

    /// How many manifests are known, and how many of them are still read.
    pub fn manifests(&self) -> (usize, usize) {
        let mut counts = (0, 0);
        for reader in &self.readers {
            // A hung round holds its lock: stats must not hang with it.
            if let Some(tails) = reader.tails.try_lock() {
                counts.0 += tails.tails.len();
                counts.1 += tails.tails.values().filter(|t| t.growth == Growth::Live).count();
            }
        }
        counts
    }
}

impl Round {
    fn home_ended(self: &Arc<Self>, result: Result<()>) {
        let mut guard = self.state.lock();
        let Some(state) = guard.as_mut() else { return };
        state.left -= 1;
        match result {
            Ok(()) => state.succeeded += 1,
            Err(error) => state.error = Some(error),
        }
        if state.left > 0 {
            return;
        }
        let state = guard.take();
        drop(guard);
        if let Some(state) = state {
            self.refresher.completed(self.began, state);
        }
    }

    fn expire(self: &Arc<Self>) {
        let state = self.state.lock().take();
        if let Some(mut state) = state {
            let left = state.left as u64;
            self.refresher.counters.left_behind.fetch_add(left, Ordering::Relaxed);
            state.error = Some(Error::new(
                ErrorKind::Timeout,
                "the storage did not answer a refresh in time; check the mount",
            ));
            self.refresher.completed(self.began, state);
        }
    }
}

impl Reader {
    /// A listed name that is gone was renamed meanwhile (fenced, say): it is under its new name in the next
    /// listing, and what it publishes must be found by this round.
    fn poll_all(&self, refresher: &Refresher) -> Result<()> {
        for _ in 1..LISTINGS_MAX {
            if self.poll_listed(refresher)? == 0 {
                return Ok(());
            }
        }
        self.poll_listed(refresher).map(drop)
    }

    /// Reads every manifest in a fresh listing; returns how many names were gone by the time they were read.
    fn poll_listed(&self, refresher: &Refresher) -> Result<usize> {
        let home = &self.home;
        let mut vanished = 0;
        let listed = home.backend.files().list(&home.manifests)?;
        let names: HashMap<Key, ManifestName> = listed
            .iter()
            .filter_map(|name| ManifestName::parse(name.to_str()?))
            .filter(|name| !self.saver.is_own(name.writer))
            .filter(|name| refresher.is_wide() || name.overlaps(&home.layout.parts))
            .map(|name| ((name.writer, name.epoch), name))
            .collect();
        let mut tails = self.tails.lock();
        let Tails { tails, missing } = &mut *tails;
        for (key, name) in &names {
            let tail = tails.entry(*key).or_insert_with(|| ManifestTail::new(home, *name));
            if tail.name.fence != name.fence {
                tail.renamed(home, *name);
            }
            if let Err(error) = self.poll(refresher, tail) {
                if error.kind() == ErrorKind::NotFound {
                    vanished += 1;
                } else {
                    refresher.counters.unreadable.fetch_add(1, Ordering::Relaxed);
                    crate::log::once(
                        crate::log::Level::Warning,
                        &format!("manifest {key:?}"),
                        format_args!("a manifest cannot be read: {error}"),
                    );
                }
            }
        }
        missing.retain(|key, _| !names.contains_key(key));
        for key in tails.keys().filter(|key| !names.contains_key(*key)) {
            *missing.entry(*key).or_default() += 1;
        }
        let gone: Vec<Key> =
            missing.iter().filter(|(_, times)| **times >= MISSING_MAX).map(|(k, _)| *k).collect();
        for key in gone {
            missing.remove(&key);
            tails.remove(&key);
            self.forget(refresher, key, tails.keys().any(|other| other.0 == key.0));
        }
        Ok(vanished)
    }

    fn poll(&self, refresher: &Refresher, tail: &mut ManifestTail) -> Result<()> {
        let mut intake = refresher.catalog.intake(self.home.number, tail.name.writer);
        let bad = tail.bad_records;
        let polled = tail.poll(&self.home, &mut intake);
        let counter = &refresher.catalog.counters.bad_records;
        counter.fetch_add(tail.bad_records - bad, Ordering::Relaxed);
        polled
    }

    /// A manifest is gone. Where a successor stands it named all that lives; else nothing of it does.
    fn forget(&self, refresher: &Refresher, key: Key, has_successor: bool) {
        if has_successor {
            return;
        }
        let segments = refresher.catalog.segments_of(self.home.number, key.0);
        let handles: HashSet<u32> = segments.into_iter().map(|(handle, _)| handle).collect();
        refresher.catalog.forget(&handles);
    }
}

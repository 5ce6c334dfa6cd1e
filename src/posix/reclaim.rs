//! Keeping a namespace below its bound: which segments go, and how they go without harming a reader.
//!
//! Owns the choice of victims and the two steps of freeing one: RETIRE now, rename and free after a grace.
//! Segments that were read since the last round get a second chance. Knows no index entry by content.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
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
use crate::posix::reply::{Join, Reply};
use crate::posix::saver::{Saver, Writer};
use crate::posix::tail::Growth;

/// A round waits at most this long for one home.
const PATIENCE_MAX: Duration = Duration::from_secs(10);

/// What reclaim works with.
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
    /// Who waits for rounds, and what was found out in them.
    pub state: Mutex<State>,
}

/// Rounds, and what they know.
#[derive(Default)]
pub struct State {
    running: bool,
    waiting: Vec<Reply<u64>>,
    /// Segments that are being retired or freed by this process.
    leaving: HashSet<(u16, SegmentName)>,
    /// Homes that are being surveyed, perhaps hanging.
    entered: HashSet<u16>,
    /// Bytes of each home when it was last surveyed: what counts of one that does not answer.
    bytes: HashMap<u16, u64>,
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

/// What one home holds.
#[derive(Default)]
struct Survey {
    bytes: u64,
    /// Bytes among them that are retired already, by whomever.
    leaving: u64,
    victims: Vec<Victim>,
    /// Retired long ago by this process or by one that died, and still there.
    overdue: Vec<Victim>,
}

impl Reclaim {
    /// One round: counts bytes, and where they are over the high watermark retires segments down to the
    /// low one. Answers with the bytes that will be freed. Rounds run one at a time; whoever asks during one
    /// gets the next.
    pub fn round(self: &Arc<Self>, reply: Reply<u64>) {
        let mut state = self.state.lock();
        state.waiting.push(reply);
        if state.running {
            return;
        }
        state.running = true;
        let replies = std::mem::take(&mut state.waiting);
        drop(state);
        self.begin(replies);
    }

    fn begin(self: &Arc<Self>, replies: Vec<Reply<u64>>) {
        let surveys: Arc<Mutex<Vec<Survey>>> = Arc::default();
        let (this, found) = (Arc::clone(self), Arc::clone(&surveys));
        let surveyed = Reply::new(move |result: Result<()>| {
            let found = std::mem::take(&mut *found.lock());
            let freed = match result {
                // One of several homes may be away.
                Err(error) if found.is_empty() => Err(error),
                _ => Ok(this.decide(found)),
            };
            replies.into_iter().for_each(|reply| reply.send(freed.clone()));
            this.ended();
        });
        if self.savers.is_empty() {
            return surveyed.send(Ok(()));
        }
        let join = Join::new(self.savers.len(), surveyed);
        for saver in &self.savers {
            let join = Arc::clone(&join);
            self.survey_on_pool(saver, Arc::clone(&surveys), Reply::new(move |r| join.ended(r)));
        }
    }

    fn ended(self: &Arc<Self>) {
        let mut state = self.state.lock();
        let next = std::mem::take(&mut state.waiting);
        state.running = !next.is_empty();
        drop(state);
        if !next.is_empty() {
            self.begin(next);
        }
    }

    /// Surveys a home on its own pool, which may hang: then only it is left out.
    fn survey_on_pool(
        self: &Arc<Self>,
        saver: &Arc<Saver>,
        surveys: Arc<Mutex<Vec<Survey>>>,
        reply: Reply<()>,
    ) {
        let number = saver.home.number;
        let late = || {
            Error::new(ErrorKind::Timeout, "the storage does not answer; it is not reclaimed")
                .at(saver.home.backend.directory())
        };
        if !self.state.lock().entered.insert(number) {
            return reply.send(Err(late()));
        }
        let patience = saver.home.layout.config.timeout.min(PATIENCE_MAX);
        let reply = reply.by(&self.clock, Instant::now() + patience, late());
        let this = Arc::clone(self);
        let reply = Reply::new(move |survey: Result<Survey>| {
            let mut state = this.state.lock();
            state.entered.remove(&number);
            let result = survey.map(|survey| {
                state.bytes.insert(number, survey.bytes);
                surveys.lock().push(survey);
            });
            drop(state);
            reply.send(result);
        });
        let (this, saver) = (Arc::clone(self), Arc::clone(saver));
        let backend = Arc::clone(&saver.home.backend);
        reply.run_on(&backend, move |reply| reply.send(this.survey(&saver)));
    }

    /// Chooses who goes. Touches no file.
    fn decide(self: &Arc<Self>, surveys: Vec<Survey>) -> u64 {
        let used: u64 = self.state.lock().bytes.values().sum();
        self.capacity.set(used);
        let (mut leaving, mut victims) = (0, Vec::new());
        for survey in surveys {
            leaving += survey.leaving;
            victims.extend(survey.victims);
            survey.overdue.into_iter().for_each(|victim| self.free_on_pool(victim));
        }
        let (Some(limit), Some(first)) = (self.capacity.limit(), self.savers.first()) else {
            return 0;
        };
        let gc = &first.home.layout.config.gc;
        let held = used.saturating_sub(leaving);
        // Below the watermark there may still be too little room for one more segment: that is full, too.
        let room = limit.saturating_sub(first.home.layout.segment_bytes_max());
        let high = ((limit as f64 * gc.high_watermark) as u64).min(room);
        if !gc.enabled || held <= high {
            return 0;
        }
        let target = ((limit as f64 * gc.low_watermark) as u64).min(high);
        for victim in &mut victims {
            victim.reads = self.files.take_reads(victim.handle);
        }
        victims.sort_by_key(|victim| (victim.reads > 0, victim.age));
        let mut freed = 0;
        for victim in victims {
            if held.saturating_sub(freed) <= target {
                break;
            }
            freed += victim.bytes;
            self.retire(victim);
        }
        freed
    }

    /// Bytes of all segments of a home, and those among them that this process may free: its own that are
    /// sealed, and those of writers that have ended. Blocks.
    fn survey(&self, saver: &Arc<Saver>) -> Result<Survey> {
        let home = &saver.home;
        let known = self.refresher.known(home.number);
        let growing: HashSet<u64> =
            known.iter().filter(|k| k.growth != Growth::Final).map(|k| k.name.writer).collect();
        let began: HashMap<u64, u64> = known
            .iter()
            .filter(|known| !growing.contains(&known.name.writer))
            .map(|known| (known.name.writer, known.header.map_or(0, |header| header.created_ms)))
            .collect();
        let grace = grace(home);
        let mut survey = Survey::default();
        for listed in home.backend.files().list(&home.segments)? {
            let Some(name) = listed.to_str().and_then(SegmentName::parse) else { continue };
            let path = home.segments.join(name.to_string());
            let Ok(metadata) = home.backend.files().metadata(&path) else { continue };
            let bytes = metadata.allocated.max(metadata.length);
            survey.bytes += bytes;
            let handle = self.catalog.intern(home.number, name);
            let segment = self.catalog.segment(handle);
            let age = match began.get(&name.writer) {
                Some(began) => Some(*began),
                None => saver.is_sealed(handle).then_some(u64::MAX),
            };
            let victim = |began| {
                let (saver, age) = (Arc::clone(saver), (began, name.number));
                Victim { saver, name, handle, bytes, reads: 0, age }
            };
            let is_leaving = self.state.lock().leaving.contains(&(home.number, name));
            if is_leaving || segment.is_none_or(|segment| segment.is_retired()) {
                survey.leaving += bytes;
                // Twice the grace: whoever retired it is given time to free it.
                let overdue = segment.is_some_and(|segment| segment.is_retired_for(grace * 2));
                survey.overdue.extend(age.filter(|_| overdue && !is_leaving).map(victim));
            } else {
                survey.victims.extend(age.map(victim));
            }
        }
        Ok(survey)
    }

    /// The first step: a RETIRE record, after which nobody begins to read it, and a grace.
    fn retire(self: &Arc<Self>, victim: Victim) {
        self.state.lock().leaving.insert(victim.id());
        let (this, saver) = (Arc::clone(self), Arc::clone(&victim.saver));
        saver.with_writer(Reply::new(move |writer: Result<Arc<Writer>>| match writer {
            Ok(writer) => this.record(&writer, victim),
            Err(error) => this.stays(&victim, &error),
        }));
    }

    fn record(self: &Arc<Self>, writer: &Writer, victim: Victim) {
        let record = Record {
            segment: victim.name.number,
            generation: victim.name.generation,
            checksum: victim.name.writer,
            ..Record::of(Kind::Retire, wall_ms())
        };
        let this = Arc::clone(self);
        let reply = Reply::new(move |recorded: Result<()>| match recorded {
            Ok(()) => this.wait_and_free(victim),
            Err(error) => this.stays(&victim, &error),
        });
        writer.manifest.push(Item { record, data: None, reply }, Urgency::Now);
    }

    fn stays(&self, victim: &Victim, error: &Error) {
        self.state.lock().leaving.remove(&victim.id());
        crate::log::warning(format_args!("{} is not reclaimed: {error}", victim.name));
    }

    fn wait_and_free(self: &Arc<Self>, victim: Victim) {
        let grace = grace(&victim.saver.home);
        // Removing from the index walks all of it: not on the thread that completes commits.
        let catalog = Arc::clone(&self.catalog);
        let handle = victim.handle;
        let _ = victim.saver.home.backend.run(Box::new(move || {
            catalog.retire(&HashSet::from([handle]));
        }));
        let this = Arc::clone(self);
        self.clock.at(Instant::now() + grace, move || this.free_on_pool(victim));
    }

    /// The second step: the rename decides who frees it.
    fn free_on_pool(self: &Arc<Self>, victim: Victim) {
        self.state.lock().leaving.insert(victim.id());
        let backend = Arc::clone(&victim.saver.home.backend);
        let (this, id, bytes) = (Arc::clone(self), victim.id(), victim.bytes);
        let reply = Reply::new(move |freed: Result<()>| {
            this.state.lock().leaving.remove(&id);
            match freed {
                Ok(()) => this.capacity.give(bytes),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => crate::log::warning(format_args!("reclaim: {error}")),
            }
        });
        let this = Arc::clone(self);
        reply.run_on(&backend, move |reply| reply.send(this.free(&victim)));
    }

    fn free(&self, victim: &Victim) -> Result<()> {
        let home: &Home = &victim.saver.home;
        self.files.remove(victim.handle);
        let files = &**home.backend.files();
        remove(files, &home.segments, &victim.name.to_string(), random_id(), home)?;
        victim.saver.forget_segment(victim.handle);
        Ok(())
    }
}

impl Victim {
    fn id(&self) -> (u16, SegmentName) {
        (self.saver.home.number, self.name)
    }
}

/// After this time nobody reads any more what was retired before.
fn grace(home: &Home) -> Duration {
    home.layout.config.lookup_refresh + home.layout.config.timeout
}

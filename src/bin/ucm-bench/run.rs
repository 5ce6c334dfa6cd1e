//! A run: jobs in groups, each group measured as a whole.
//!
//! A group is the jobs between two stonewalls; they run together. For each job: its data set is laid out,
//! the store reopened (so that memory is cold), its threads started; then the clock starts.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use crate::abi::Store;
use crate::calls::{self, Copies};
use crate::device;
use crate::ground::{After, Ground};
use crate::job::{Job, Workload};
use crate::memory::Pages;
use crate::meter::{Cost, Mark, Syscalls};
use crate::model::Shape;
use crate::options;
use crate::progress::Progress;
use crate::source::{Arrivals, Source};
use crate::tally::Tally;
use crate::transfer::{Bench, Shared, Transfer, pages_needed};
use crate::writers::Writers;

/// How often the main thread looks at Ctrl-C. Seldom, because its system calls are counted too.
const TICK: Duration = Duration::from_millis(250);
/// How often it looks while a data set is laid out.
const LAYOUT_TICK: Duration = Duration::from_millis(5);
/// Blocks of a task, and blocks in flight, while a data set is laid out.
const LAYOUT_BATCH: u32 = 16;
const LAYOUT_DEPTH: u32 = 64;
/// Bytes that the layout may have in flight.
const LAYOUT_BYTES: u64 = 256 << 20;

/// What a job saw.
#[derive(Clone, Debug)]
pub struct JobResult {
    /// Its settings.
    pub job: Job,
    /// Bytes of its blocks.
    pub block_bytes: u64,
    /// All its threads together.
    pub tally: Tally,
    /// From the start of the clock to the end of its last thread.
    pub elapsed: Duration,
    /// The store's own counters at the end.
    pub metrics: String,
}

/// What a group of jobs that ran together saw and cost.
#[derive(Clone, Debug)]
pub struct GroupResult {
    /// In the order given.
    pub jobs: Vec<JobResult>,
    /// Of the whole process while they ran.
    pub cost: Cost,
}

/// What a run needs from outside.
pub struct Context {
    /// Set by Ctrl-C.
    pub interrupted: Arc<AtomicBool>,
    /// Counter of system calls.
    pub syscalls: Syscalls,
    /// Whether progress is shown.
    pub progress: bool,
}

impl Context {
    /// Whether Ctrl-C was pressed.
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// What the steps gave until Ctrl-C. A step that it cut short takes nothing from those before: its error
    /// is returned only where there is nothing else to report.
    pub fn each<S, T>(
        &self,
        steps: impl IntoIterator<Item = S>,
        mut take: impl FnMut(S) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let mut results = Vec::new();
        for step in steps {
            if self.is_interrupted() {
                break;
            }
            match take(step) {
                Err(_) if self.is_interrupted() && !results.is_empty() => break,
                result => results.push(result?),
            }
        }
        Ok(results)
    }

    /// What was measured to its end; an error where Ctrl-C cut it short, because half a round of one side
    /// compares with nothing.
    pub fn whole<T>(&self, measured: T) -> Result<T, String> {
        if self.is_interrupted() {
            return Err(
                "interrupted before the first round ended; there is nothing to report".into()
            );
        }
        Ok(measured)
    }

    /// Nobody presses Ctrl-C, and nothing is shown.
    #[cfg(test)]
    pub fn for_test() -> Self {
        Self { interrupted: Arc::default(), syscalls: Syscalls::start(), progress: false }
    }
}

/// Runs all jobs, group by group, in folders of their own. After Ctrl-C: what there is so far.
pub fn run(jobs: &[Job], context: &Context) -> Result<Vec<GroupResult>, String> {
    for job in jobs {
        job.validate()?;
    }
    context.each(jobs.chunk_by(|_, next| !next.stonewall), |group| run_group(group, context))
}

/// Runs jobs together in folders of their own.
pub fn run_group(jobs: &[Job], context: &Context) -> Result<GroupResult, String> {
    let needed: u64 = jobs.iter().map(footprint).sum::<Result<u64, _>>()?;
    let mut directories: Vec<PathBuf> = Vec::new();
    for job in jobs.iter().filter(|job| job.uses_storage()) {
        for directory in &job.directories {
            if !directories.contains(directory) {
                directories.push(directory.clone());
            }
        }
    }
    let after = if jobs.iter().any(|job| job.keep) { After::Keep } else { After::Remove };
    let ground = Ground::new(&directories, needed, after)?;
    let folders_of = |job: &Job| -> Vec<PathBuf> {
        let place = |d: &PathBuf| directories.iter().position(|other| other == d);
        job.directories.iter().filter_map(place).map(|at| ground.folders()[at].clone()).collect()
    };
    let mut ready = Vec::new();
    for job in jobs {
        ready.push(Ready::new(job, folders_of(job), Layout::Needed, None, context)?);
    }
    let result = measure(&ready, context);
    // Stores are closed before their files go.
    drop(ready);
    drop(ground);
    result
}

/// Whether a data set must be saved first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Save what the job needs.
    Needed,
    /// An earlier run in these folders did.
    Done,
}

/// Runs jobs together in folders that the caller made and keeps, with stores that are opened for it.
pub fn run_in(
    jobs: &[Job],
    folders: &[PathBuf],
    layout: Layout,
    context: &Context,
) -> Result<GroupResult, String> {
    let mut ready = Vec::new();
    for job in jobs {
        ready.push(Ready::new(job, folders.to_vec(), layout, None, context)?);
    }
    measure(&ready, context)
}

/// Runs jobs together on one store, the first job's: as a server loads and saves.
pub fn run_sharing(
    jobs: &[Job],
    folders: &[PathBuf],
    context: &Context,
) -> Result<GroupResult, String> {
    let mut ready: Vec<Ready<'_>> = Vec::new();
    for job in jobs {
        let store = ready.first().map(|first| Arc::clone(&first.stores[0]));
        ready.push(Ready::new(job, folders.to_vec(), Layout::Needed, store, context)?);
    }
    measure(&ready, context)
}

/// Bytes a job may put on storage: parts with their trailers and padding.
pub fn footprint(job: &Job) -> Result<u64, String> {
    if !job.uses_storage() || job.rw == Workload::Idle {
        return Ok(0);
    }
    let extent = job.shape()?.bytes().next_multiple_of(4096) + 4096;
    let saves = match job.rw {
        Workload::Mixed => 2.0 - job.rwmixload,
        _ => 1.0,
    };
    Ok((job.block_count()? as f64 * extent as f64 * saves) as u64)
}

/// Seed of the ids of a job's data set. The name is not in it: jobs of one shape share their data, as a
/// save job and the load job after it do.
/// Blocks saved with `verify` have other ids than those without, because only they hold the pattern.
pub fn data_seed(job: &Job) -> u64 {
    crate::random::mix(job.randseed ^ (u64::from(job.verify) << 63))
}

/// A job that can start.
struct Ready<'a> {
    job: &'a Job,
    shape: Shape,
    blocks: u64,
    folders: Vec<PathBuf>,
    /// One store, or one a thread (open loops wait on the store's completion descriptor, which is one).
    stores: Vec<Arc<Store>>,
    pages: Vec<Pages>,
    /// Memory of `memcpy`.
    copies: Option<Copies>,
    _writers: Option<Writers>,
}

impl<'a> Ready<'a> {
    fn new(
        job: &'a Job,
        folders: Vec<PathBuf>,
        data: Layout,
        lent: Option<Arc<Store>>,
        context: &Context,
    ) -> Result<Self, String> {
        let shape = job.shape()?;
        let blocks = job.block_count()?;
        let told = |failure: crate::abi::Failure| format!("job {}: {failure}", job.name);
        let options = options::of(job, &folders)?;
        let mut ready = Self {
            job,
            shape,
            blocks,
            folders,
            stores: Vec::new(),
            pages: Vec::new(),
            copies: None,
            _writers: None,
        };
        if job.rw == Workload::Memcpy {
            ready.copies = Some(Copies::new(job, &ready.shape)?);
            return Ok(ready);
        }
        if let Some(store) = lent {
            ready.stores.push(store);
            ready.make_pages()?;
            return Ok(ready);
        }
        let first = Store::open(&options).map_err(told)?;
        if job.rw.needs_data() && data == Layout::Needed {
            layout(job, &ready.shape, blocks, &first, context)?;
        }
        let first = if job.warm_cache || !job.uses_storage() {
            first
        } else {
            drop(first);
            Store::open(&options).map_err(told)?
        };
        first.refresh().map_err(told)?;
        ready.stores.push(Arc::new(first));
        if job.arrivals()?.is_some() {
            for _ in 1..job.numjobs {
                ready.stores.push(Arc::new(Store::open(&options).map_err(told)?));
            }
        }
        if job.writers > 0 {
            ready._writers = Some(Writers::start(job.writers, &options)?);
        }
        ready.make_pages()?;
        Ok(ready)
    }

    fn make_pages(&mut self) -> Result<(), String> {
        let inserts = self.job.insert_rate > 0.0;
        if !self.job.rw.moves_bytes() && !inserts {
            return Ok(());
        }
        let allocate = device::allocator(&self.job.device, self.job.device_id)?;
        for clone in 0..self.job.numjobs as usize {
            let count = if inserts { calls::INSERT_DEPTH as usize } else { pages_needed(self.job) };
            let pages = Pages::filled(&self.shape, count, allocate.as_ref(), clone)?;
            if self.job.register {
                let (base, length) = pages.span();
                let store = self.store_of(clone);
                // SAFETY: the pages are dropped after the stores (see the order in `drop`).
                unsafe { store.register(base, length) }
                    .map_err(|failure| format!("job {}: register: {failure}", self.job.name))?;
            }
            self.pages.push(pages);
        }
        Ok(())
    }

    fn store_of(&self, clone: usize) -> &Store {
        &self.stores[clone % self.stores.len()]
    }
}

impl Drop for Ready<'_> {
    fn drop(&mut self) {
        // Stores first: they may still use registered pages.
        self.stores.clear();
    }
}

/// Saves the data set of a job, as fast as it goes, and waits until all of it is persisted.
fn layout(
    job: &Job,
    shape: &Shape,
    blocks: u64,
    store: &Store,
    context: &Context,
) -> Result<(), String> {
    let depth = (LAYOUT_BYTES / shape.bytes()).clamp(1, u64::from(LAYOUT_DEPTH)) as u32;
    let filling = Job {
        rw: Workload::Save,
        iodepth: depth,
        batch: depth.min(LAYOUT_BATCH),
        numjobs: 1,
        rate: None,
        rate_blocks: None,
        insert_rate: 0.0,
        time_based: false,
        ..job.clone()
    };
    let allocate = device::allocator(&job.device, job.device_id)?;
    let pages = Pages::filled(shape, pages_needed(&filling), allocate.as_ref(), 0)?;
    let shared = Shared::default();
    shared.counting.store(true, Ordering::Relaxed);
    let bench = Bench { job: &filling, shape, store, seed: data_seed(job), shared: &shared };
    let progress =
        Progress::new(context.progress, &format!("{}: laying out", job.name), Some(blocks));
    let tally = std::thread::scope(|scope| {
        let (bench, pages) = (&bench, &pages);
        let mut source = Source::new(&filling, blocks, 0);
        let thread =
            scope.spawn(move || Transfer::new(bench, pages).run(&mut || source.next(), None));
        while !thread.is_finished() {
            if context.is_interrupted() {
                shared.stop.store(true, Ordering::Relaxed);
            }
            progress.show(&[&shared], None);
            std::thread::sleep(LAYOUT_TICK);
        }
        thread.join()
    });
    progress.end();
    let tally = tally.map_err(|_| String::from("the layout thread panicked"))?;
    if context.is_interrupted() {
        return Err(
            "interrupted while the data set was laid out; there is nothing to report yet".into()
        );
    }
    match tally.errors.iter().next() {
        None => Ok(()),
        Some((name, error)) => Err(format!(
            "job {}: the data set could not be laid out: {} of {blocks} blocks failed with {name}: {}",
            job.name, error.count, error.example
        )),
    }
}

/// Starts all threads of all jobs, and counts.
fn measure(jobs: &[Ready<'_>], context: &Context) -> Result<GroupResult, String> {
    let shared: Vec<Shared> = jobs.iter().map(|_| Shared::default()).collect();
    let total = jobs.iter().map(|ready| total_blocks(ready)).sum::<Option<u64>>();
    let names: Vec<&str> = jobs.iter().map(|ready| ready.job.name.as_str()).collect();
    let progress = Progress::new(context.progress, &names.join(", "), total);
    let runtime = jobs.iter().filter_map(|ready| ready.job.runtime).max();
    let ramp = jobs.iter().map(|ready| ready.job.ramp).max().unwrap_or_default();
    let counts = ramp.is_zero();
    for shared in &shared {
        shared.counting.store(counts, Ordering::Relaxed);
    }
    let mut mark = Mark::now(&context.syscalls);
    let mut begin = Instant::now();
    let (results, inserts, cost) = std::thread::scope(|scope| {
        let (mut threads, mut inserting) = (Vec::new(), Vec::new());
        let (ended, ends) = std::sync::mpsc::channel::<()>();
        for (ready, shared) in jobs.iter().zip(&shared) {
            for clone in 0..ready.job.numjobs {
                let ended = ended.clone();
                threads.push(scope.spawn(move || {
                    // Dropped at the thread's end, also when it panics.
                    let _ended = ended;
                    one_thread(ready, shared, clone)
                }));
            }
            let inserts = ready.job.insert_rate > 0.0;
            inserting.push(inserts.then(|| scope.spawn(move || insert_thread(ready, shared))));
        }
        drop(ended);
        let mut ramping = !counts;
        let mut next = Duration::ZERO;
        while let Err(RecvTimeoutError::Timeout) = ends.recv_timeout(next) {
            if ramping && begin.elapsed() >= ramp {
                ramping = false;
                (mark, begin) = (Mark::now(&context.syscalls), Instant::now());
                shared.iter().for_each(|shared| shared.counting.store(true, Ordering::Relaxed));
            }
            for (ready, shared) in jobs.iter().zip(&shared) {
                let over = |runtime| !ramping && begin.elapsed() >= runtime;
                if context.is_interrupted() || ready.job.runtime.is_some_and(over) {
                    shared.stop.store(true, Ordering::Relaxed);
                }
            }
            progress
                .show(&shared.iter().collect::<Vec<_>>(), runtime.map(|r| (begin.elapsed(), r)));
            next = next_look(jobs, ramping.then_some(ramp), begin.elapsed());
        }
        let cost = mark.cost(&context.syscalls);
        // The threads that insert run as long as the others.
        shared.iter().for_each(|shared| shared.stop.store(true, Ordering::Relaxed));
        let inserts = inserting.into_iter().map(|thread| thread.map(|thread| thread.join()));
        let inserts = inserts.collect::<Vec<_>>();
        (threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>(), inserts, cost)
    });
    progress.end();
    gather(jobs, results, inserts, begin, cost)
}

/// How long the main thread may sleep: to the next end of a ramp or of a runtime, or one tick.
fn next_look(jobs: &[Ready<'_>], ramp: Option<Duration>, elapsed: Duration) -> Duration {
    let runtimes = jobs.iter().filter_map(|ready| ready.job.runtime);
    let ends = ramp.into_iter().chain(runtimes);
    let left = ends.filter(|end| *end > elapsed).map(|end| end - elapsed).min();
    left.unwrap_or(TICK).clamp(Duration::from_micros(100), TICK)
}

fn gather(
    jobs: &[Ready<'_>],
    results: Vec<std::thread::Result<(Tally, Instant)>>,
    inserts: Vec<Option<std::thread::Result<Tally>>>,
    begin: Instant,
    cost: Cost,
) -> Result<GroupResult, String> {
    let mut results = results.into_iter();
    let mut out = Vec::new();
    for (ready, inserted) in jobs.iter().zip(inserts) {
        let mut tally = Tally::default();
        let mut end = begin;
        for result in results.by_ref().take(ready.job.numjobs as usize) {
            let (seen, ended) =
                result.map_err(|_| format!("a thread of {} panicked", ready.job.name))?;
            tally.add(&seen);
            end = end.max(ended);
        }
        if let Some(inserted) = inserted {
            let inserted =
                inserted.map_err(|_| format!("the inserts of {} panicked", ready.job.name))?;
            tally.add(&inserted);
        }
        let metrics =
            ready.stores.first().and_then(|store| store.metrics().ok()).unwrap_or_default();
        out.push(JobResult {
            job: ready.job.clone(),
            block_bytes: ready.shape.bytes(),
            tally,
            elapsed: end.duration_since(begin),
            metrics,
        });
    }
    Ok(GroupResult { jobs: out, cost })
}

fn total_blocks(ready: &Ready<'_>) -> Option<u64> {
    let ends =
        ready.job.rw.moves_bytes() && !ready.job.time_based && ready.job.rw != Workload::Memcpy;
    ends.then_some(ready.blocks)
}

fn one_thread(ready: &Ready<'_>, shared: &Shared, clone: u32) -> (Tally, Instant) {
    let none = Store::none();
    let store = if ready.stores.is_empty() { &none } else { ready.store_of(clone as usize) };
    let bench =
        Bench { job: ready.job, shape: &ready.shape, store, seed: data_seed(ready.job), shared };
    let transfers = ready.job.rw.moves_bytes() && ready.job.rw != Workload::Memcpy;
    let tally = if transfers {
        let mut source = Source::new(ready.job, ready.blocks, clone);
        let arrivals = ready.job.arrivals().ok().flatten();
        let arrivals = arrivals.map(|rate| Arrivals::new(ready.job, rate, ready.job.batch, clone));
        Transfer::new(&bench, &ready.pages[clone as usize]).run(&mut || source.next(), arrivals)
    } else {
        calls::run(&bench, ready.blocks, clone, &ready.folders, ready.copies.as_ref())
    };
    (tally, Instant::now())
}

fn insert_thread(ready: &Ready<'_>, shared: &Shared) -> Tally {
    let store = &ready.stores[0];
    let bench =
        Bench { job: ready.job, shape: &ready.shape, store, seed: data_seed(ready.job), shared };
    calls::insert(&bench, &ready.pages[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: Ctrl-C in a later step, which then fails, leaves what the steps before gave.
    #[test]
    fn ctrl_c_discarded_the_results_before_it() {
        let cut = |at: u32| {
            let context = Context::for_test();
            context.each(0..9, |step| {
                if step == at {
                    context.interrupted.store(true, Ordering::Relaxed);
                    return Err(format!("cut at {step}"));
                }
                Ok(step)
            })
        };
        assert_eq!(cut(3), Ok(vec![0, 1, 2]));
        assert_eq!(cut(0), Err("cut at 0".into()));
        let failed = Context::for_test()
            .each(0..9, |step| if step == 3 { Err(String::from("no space")) } else { Ok(step) });
        assert_eq!(failed, Err("no space".into()));
    }
}

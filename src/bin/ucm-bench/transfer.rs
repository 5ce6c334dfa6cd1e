//! One thread's saves and loads: a window of tasks kept full (closed loop), or fed by arrivals (open loop).
//!
//! Latency of a closed loop counts from submission, of an open loop from the arrival, so that a store that
//! stalls cannot hide the requests that stood in line.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::abi::{self, Batch, Direction, Failure, Store, Task};
use crate::job::Job;
use crate::memory::Pages;
use crate::model::Shape;
use crate::pattern::block_id;
use crate::source::{Arrivals, Work};
use crate::tally::Tally;

/// How long a wait goes on before stop requests are looked at.
const LOOK_UP: Duration = Duration::from_millis(100);
/// How long a submission waits that the queue refused: full of other threads' work, it may wake nobody here.
const RETRY: Duration = Duration::from_micros(100);

/// How a job reports blocks that had arrived and not begun at its end: with Poisson arrivals a few may.
pub const UNSERVED: &str = "UNSERVED";

/// What threads of a run share.
#[derive(Default)]
pub struct Shared {
    /// Submit nothing more.
    pub stop: AtomicBool,
    /// The ramp is over: count.
    pub counting: AtomicBool,
    /// Blocks that ended, for the progress line.
    pub blocks: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
}

/// What a thread works on.
pub struct Bench<'a> {
    /// Settings.
    pub job: &'a Job,
    /// Shape of its blocks.
    pub shape: &'a Shape,
    /// Where they are saved.
    pub store: &'a Store,
    /// Seed of the data set's ids.
    pub seed: u64,
    /// Stop, counters.
    pub shared: &'a Shared,
}

/// Tasks of one batch: one, or one a layer.
struct Unit {
    direction: Direction,
    ids: Vec<[u8; 16]>,
    page: usize,
    start: Instant,
    tasks: VecDeque<Task>,
    layers_left: u32,
    copied: bool,
    /// Worst status of each entry over the tasks that ended.
    statuses: Vec<i32>,
    message: String,
}

impl Unit {
    fn last_stage(&self) -> u32 {
        match self.direction {
            Direction::Save => abi::PERSISTED,
            Direction::Load => abi::LOADED,
        }
    }
}

/// One thread at work.
pub struct Transfer<'a> {
    bench: &'a Bench<'a>,
    pages: &'a Pages,
    free: Vec<usize>,
    units: VecDeque<Unit>,
    tally: Tally,
    addresses: Vec<*mut std::ffi::c_void>,
    shards: Vec<u32>,
    open_loop: bool,
}

/// Pages that a thread of this job needs.
pub fn pages_needed(job: &Job) -> usize {
    (job.iodepth / job.batch).max(1) as usize * job.batch as usize
}

impl<'a> Transfer<'a> {
    /// A thread whose blocks in flight live in `pages` (`pages_needed` of them).
    pub fn new(bench: &'a Bench<'a>, pages: &'a Pages) -> Self {
        let job = bench.job;
        let batch = job.batch as usize;
        let free = (0..pages_needed(job) / batch).rev().map(|unit| unit * batch).collect();
        Self {
            bench,
            pages,
            free,
            units: VecDeque::new(),
            tally: Tally::default(),
            addresses: Vec::new(),
            shards: Vec::new(),
            open_loop: false,
        }
    }

    /// Works until `next` has no more or `stop` is set; then lets what is in flight end.
    pub fn run(
        mut self,
        next: &mut dyn FnMut() -> Option<Work>,
        mut arrivals: Option<Arrivals>,
    ) -> Tally {
        self.open_loop = arrivals.is_some();
        let begin = Instant::now();
        let mut through = false;
        let mut stopped = None;
        loop {
            let stop = self.bench.shared.stop.load(Ordering::Relaxed);
            if stop {
                stopped.get_or_insert_with(|| begin.elapsed());
            }
            while !through && !stop && !self.refused() {
                let start = match &mut arrivals {
                    Some(arrivals) if begin + arrivals.due() > Instant::now() => break,
                    Some(arrivals) if !self.free.is_empty() => {
                        let due = begin + arrivals.due();
                        arrivals.advance();
                        due
                    }
                    None if !self.free.is_empty() => Instant::now(),
                    _ => break,
                };
                match next() {
                    Some(work) => self.begin(work, start),
                    None => through = true,
                }
            }
            if self.units.is_empty() && (through || stop) {
                break;
            }
            let due = arrivals.as_ref().filter(|_| !through && !stop).map(|a| begin + a.due());
            self.wait(due.map(|due| self.wake_at(due, Instant::now())));
            self.collect();
        }
        if let (Some(arrivals), false) = (&mut arrivals, through) {
            // They stood in line when the run was stopped: to leave them out would flatter the store.
            let unserved = arrivals.passed_by(stopped.unwrap_or_else(|| begin.elapsed()))
                * u64::from(self.bench.job.batch);
            if unserved > 0 {
                self.tally.error(UNSERVED.into(), unserved, || {
                    "blocks still in line at the end: the rate is more than the store carries"
                        .into()
                });
            }
        }
        self.tally
    }

    /// When an open loop looks again at the latest; completions wake it before. An arrival that is overdue
    /// cannot begin while nothing is free, so it is no reason to wake.
    fn wake_at(&self, due: Instant, now: Instant) -> Instant {
        if self.refused() {
            now + RETRY
        } else if self.free.is_empty() {
            now + LOOK_UP
        } else {
            due
        }
    }

    /// Whether the last unit has layers that the queue refused for now.
    fn refused(&self) -> bool {
        self.units.back().is_some_and(|unit| unit.layers_left > 0)
    }

    fn begin(&mut self, work: Work, start: Instant) {
        let bench = self.bench;
        let Some(page) = self.free.pop() else { return };
        let ids: Vec<_> = work.numbers.iter().map(|&n| block_id(bench.seed, n)).collect();
        if bench.job.verify {
            for (entry, id) in ids.iter().enumerate() {
                match work.direction {
                    Direction::Save => self.pages.fill(page + entry, id),
                    Direction::Load => self.pages.clear(page + entry),
                }
            }
        }
        let layers = if bench.job.layerwise { bench.shape.layers } else { 1 };
        self.units.push_back(Unit {
            direction: work.direction,
            statuses: vec![0; ids.len()],
            ids,
            page,
            start: if self.open_loop { start } else { Instant::now() },
            tasks: VecDeque::with_capacity(layers as usize),
            layers_left: layers,
            copied: false,
            message: String::new(),
        });
        self.submit();
    }

    /// Submits what is left of the newest unit, until the queue refuses.
    fn submit(&mut self) {
        let (bench, pages) = (self.bench, self.pages);
        let Some(unit) = self.units.back_mut() else { return };
        while unit.layers_left > 0 {
            let layer = bench.job.layerwise.then(|| bench.shape.layers - unit.layers_left);
            self.addresses.clear();
            for entry in 0..unit.ids.len() {
                pages.addresses(unit.page + entry, layer, &mut self.addresses);
            }
            self.shards.clear();
            if let Some(layer) = layer {
                self.shards.resize(unit.ids.len(), layer);
            }
            let batch = Batch {
                blocks: &unit.ids,
                shards: &self.shards,
                addresses: &self.addresses,
                notify: self.open_loop,
            };
            // SAFETY: the pages outlive the store's tasks (the run waits for RELEASED before it reuses or
            // frees them), and a page belongs to one unit at a time.
            match unsafe { bench.store.submit(unit.direction, &batch) } {
                Ok(task) => {
                    unit.tasks.push_back(task);
                    unit.layers_left -= 1;
                }
                Err(failure) if failure.status == abi::BUSY => {
                    self.tally.busy += 1;
                    return;
                }
                Err(failure) => return Self::refuse(unit, &failure),
            }
        }
    }

    fn refuse(unit: &mut Unit, failure: &Failure) {
        unit.layers_left = 0;
        unit.message.clone_from(&failure.message);
        unit.statuses.fill(failure.status);
    }

    /// Sleeps until something may have ended, or an arrival is due.
    fn wait(&mut self, due: Option<Instant>) {
        if let Some(due) = due {
            let at_most = due.saturating_duration_since(Instant::now()).min(LOOK_UP);
            if self.bench.store.sleep_for_completions(at_most).is_err() {
                std::thread::sleep(at_most);
            }
            return;
        }
        let milliseconds = LOOK_UP.as_millis() as i64;
        let uncopied = self
            .units
            .iter()
            .filter(|unit| unit.direction == Direction::Save && !unit.copied)
            .find_map(|unit| unit.tasks.back().map(|task| (task, abi::COPIED)));
        let oldest = || {
            let unit = self.units.front()?;
            unit.tasks.front().map(|task| (task, unit.last_stage()))
        };
        match uncopied.or_else(oldest) {
            Some((task, stage)) => {
                let status = task.wait(stage, milliseconds);
                if status != 0 && status != abi::PENDING {
                    task.wait(abi::RELEASED, milliseconds);
                }
            }
            // Nothing of ours is in flight, but the queue is full of other threads' work.
            None if self.refused() => std::thread::sleep(RETRY),
            None => {}
        }
    }

    /// Looks at all tasks in flight, and ends the units that are through.
    fn collect(&mut self) {
        let mut at = 0;
        while at < self.units.len() {
            if Self::look(&mut self.units[at], &mut self.tally, self.bench) {
                if let Some(unit) = self.units.remove(at) {
                    self.end(&unit);
                }
            } else {
                at += 1;
            }
        }
        if self.refused() {
            self.submit();
        }
    }

    /// Whether a unit is through.
    fn look(unit: &mut Unit, tally: &mut Tally, bench: &Bench<'_>) -> bool {
        if unit.direction == Direction::Save && !unit.copied && unit.layers_left == 0 {
            let pending = |task: &Task| task.poll(abi::COPIED) == abi::PENDING;
            if !unit.tasks.iter().rev().any(pending) {
                unit.copied = true;
                if bench.shared.counting.load(Ordering::Relaxed) {
                    tally.latency("copied", unit.start.elapsed(), unit.ids.len() as u64);
                }
            }
        }
        while let Some(task) = unit.tasks.front() {
            let status = task.poll(unit.last_stage());
            if status == abi::PENDING {
                return false;
            }
            if status != 0 {
                if task.poll(abi::RELEASED) == abi::PENDING {
                    return false;
                }
                unit.message = task.error();
                let statuses = task.statuses().unwrap_or_else(|f| vec![f.status; task.entries()]);
                for (worst, status) in unit.statuses.iter_mut().zip(statuses) {
                    *worst = if *worst == 0 { status } else { *worst };
                }
            }
            unit.tasks.pop_front();
        }
        unit.layers_left == 0
    }

    fn end(&mut self, unit: &Unit) {
        self.free.push(unit.page);
        let latency = unit.start.elapsed();
        let good = unit.statuses.iter().filter(|&&status| status == 0).count() as u64;
        let bytes = good * self.bench.shape.bytes();
        self.bench.shared.blocks.fetch_add(good, Ordering::Relaxed);
        self.bench.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        if self.bench.job.verify && unit.direction == Direction::Load {
            self.verify(unit);
        }
        if !self.bench.shared.counting.load(Ordering::Relaxed) {
            return;
        }
        let stage = match unit.direction {
            Direction::Save => "persisted",
            Direction::Load => "loaded",
        };
        if good > 0 {
            self.tally.latency(stage, latency, good);
        }
        self.tally.blocks += good;
        self.tally.bytes += bytes;
        if unit.direction == Direction::Load {
            self.tally.asked += unit.ids.len() as u64;
            self.tally.present += good;
        }
        for &status in unit.statuses.iter().filter(|&&status| status != 0) {
            self.tally.error(abi::status_name(status), 1, || unit.message.clone());
        }
    }

    fn verify(&mut self, unit: &Unit) {
        for (entry, id) in unit.ids.iter().enumerate() {
            if unit.statuses[entry] != 0 {
                continue;
            }
            if let Some(offset) = self.pages.check(unit.page + entry, id) {
                self.tally.wrong += 1;
                self.tally.error("WRONG_BYTES".into(), 0, || {
                    format!("block {} differs at byte {offset}", hex(id))
                });
            }
        }
    }
}

fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: with all slots in use, an overdue arrival does not turn the wait into a spin.
    #[test]
    fn full_open_loop_spun() {
        let job = Job { iodepth: 1, block_size: 4096, ..Job::default() };
        let (shape, store, shared) = (job.shape().unwrap(), Store::none(), Shared::default());
        let bench = Bench { job: &job, shape: &shape, store: &store, seed: 0, shared: &shared };
        let pages = Pages::new(&shape, pages_needed(&job), None).unwrap();
        let mut transfer = Transfer::new(&bench, &pages);
        let now = Instant::now();
        assert_eq!(transfer.wake_at(now, now), now);
        transfer.free.clear();
        assert_eq!(transfer.wake_at(now, now), now + LOOK_UP);
    }
}

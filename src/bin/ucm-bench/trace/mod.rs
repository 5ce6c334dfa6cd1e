//! `ucm-bench trace`: traffic as a server sees it, replayed against a store.
//!
//! For each request, at its time: a prefix lookup, a load of what is there, and a save of what is not (the
//! model's computing takes the time that `--prefill-rate` says, or none). Time lost to storage is what a
//! request waits, from its arrival, until its prefix is in memory.

#![forbid(unsafe_code)]

pub mod format;
pub mod generate;

use std::collections::{HashSet, VecDeque};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches, Command, value_parser};

use self::format::{Request, TOKENS_PER_ID};
use crate::abi::{Direction, Store};
use crate::cli;
use crate::device;
use crate::ground::{After, Ground};
use crate::job::{Job, Workload};
use crate::memory::Pages;
use crate::meter::Mark;
use crate::options;
use crate::pattern::block_id;
use crate::progress::Progress;
use crate::report::{self, REQUEST_READY};
use crate::run::{self, Context, GroupResult, JobResult};
use crate::source::Work;
use crate::tally::Tally;
use crate::transfer::{Bench, Shared, Transfer, pages_needed};

/// How often the main thread looks at Ctrl-C while it waits for an arrival.
const TICK: Duration = Duration::from_millis(10);

/// The subcommand.
pub fn command() -> Command {
    let replay = cli::with_output(cli::with_settings(
        Command::new("replay").about("Replays a trace; --numjobs requests are worked on at a time"),
    ))
    .arg(Arg::new("file").required(true).help("Trace: JSON lines as in the Mooncake traces"))
    .arg(
        Arg::new("speedup")
            .long("speedup")
            .default_value("1.0")
            .value_parser(value_parser!(f64))
            .help("Let time pass that much faster"),
    )
    .arg(
        Arg::new("prefill-rate")
            .long("prefill-rate")
            .value_name("TOKENS")
            .value_parser(value_parser!(f64))
            .help(
                "Tokens a second that the model computes, before their blocks are saved [at once]",
            ),
    );
    Command::new("trace")
        .about("Replays requests with arrival times and shared prefixes, or makes such a trace")
        .subcommand_required(true)
        .subcommand(replay)
        .subcommand(generate::command())
}

/// A request that has arrived.
struct Arrived<'a> {
    request: &'a Request,
    at: Instant,
}

/// Requests that wait for a thread.
#[derive(Default)]
struct Line<'a> {
    waiting: Mutex<(VecDeque<Arrived<'a>>, bool)>,
    news: Condvar,
}

impl<'a> Line<'a> {
    fn push(&self, arrived: Arrived<'a>) {
        if let Ok(mut waiting) = self.waiting.lock() {
            waiting.0.push_back(arrived);
        }
        self.news.notify_one();
    }

    fn end(&self) {
        if let Ok(mut waiting) = self.waiting.lock() {
            waiting.1 = true;
        }
        self.news.notify_all();
    }

    fn take(&self) -> Option<Arrived<'a>> {
        let mut waiting = self.waiting.lock().ok()?;
        loop {
            if let Some(arrived) = waiting.0.pop_front() {
                return Some(arrived);
            }
            if waiting.1 {
                return None;
            }
            waiting = self.news.wait(waiting).ok()?;
        }
    }
}

/// `ucm-bench trace replay`.
pub fn main(matches: &ArgMatches, context: &Context) -> Result<ExitCode, String> {
    let format = crate::format(matches)?;
    let path = matches.get_one::<String>("file").cloned().unwrap_or_default();
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let trace = self::format::parse(&text, &path)?;
    let mut job = Job { name: "trace".into(), batch: 8, numjobs: 4, ..Job::default() };
    job = Job { rw: Workload::Trace, ..cli::single(matches, job)? };
    job.validate()?;
    refuse_ignored(&job)?;
    let tokens = u64::from(job.block_tokens);
    let fits = |a: u64, b: u64| a != 0 && b.is_multiple_of(a);
    if !fits(tokens, TOKENS_PER_ID) && !fits(TOKENS_PER_ID, tokens) {
        return Err(format!(
            "block-tokens={tokens} neither divides {TOKENS_PER_ID} nor is a multiple of it"
        ));
    }
    let speedup = matches.get_one::<f64>("speedup").copied().unwrap_or(1.0);
    if speedup <= 0.0 {
        return Err("speedup is above 0".into());
    }
    let rate = matches.get_one::<f64>("prefill-rate").copied();
    let replay = Replay { trace: &trace, speedup, prefill_rate: rate };
    let result = replay.run(&job, context)?;
    let failures: u64 = result.jobs.iter().map(|job| job.tally.failures()).sum();
    crate::write(matches, &report::render(&[result], context.is_interrupted(), format))?;
    Ok(crate::status_of(failures))
}

/// Refuses settings that a replay would take and not heed.
fn refuse_ignored(job: &Job) -> Result<(), String> {
    let ignored = [
        (
            job.rate.is_some() || job.rate_blocks.is_some(),
            "rate",
            "the trace says when; see --speedup",
        ),
        (job.register, "register", "a replay stages its blocks through the arena"),
        (job.insert_rate > 0.0, "insert-rate", "the trace says what is saved"),
    ];
    match ignored.into_iter().find(|(given, ..)| *given) {
        None => Ok(()),
        Some((_, name, why)) => {
            Err(format!("trace replay does not heed --{name}; leave it out ({why})"))
        }
    }
}

struct Replay<'t> {
    trace: &'t [Request],
    speedup: f64,
    prefill_rate: Option<f64>,
}

impl<'t> Replay<'t> {
    fn run(&self, job: &Job, context: &Context) -> Result<GroupResult, String> {
        let tokens = u64::from(job.block_tokens);
        let shape = job.shape()?;
        let distinct: HashSet<u64> =
            self.trace.iter().flat_map(|request| self::format::blocks(request, tokens)).collect();
        let bytes = distinct.len() as u64 * (shape.bytes() + 8192);
        let after = if job.keep { After::Keep } else { After::Remove };
        let ground = Ground::new(&job.directories, bytes, after)?;
        let store = Store::open(&options::of(job, ground.folders())?)
            .map_err(|failure| failure.to_string())?;
        let allocate = device::allocator(&job.device, job.device_id)?;
        let pages: Vec<Pages> = (0..job.numjobs as usize)
            .map(|thread| Pages::filled(&shape, pages_needed(job), allocate.as_ref(), thread))
            .collect::<Result<_, _>>()?;
        let shared = Shared::default();
        shared.counting.store(true, Ordering::Relaxed);
        let bench =
            Bench { job, shape: &shape, store: &store, seed: run::data_seed(job), shared: &shared };
        let line = Line::default();
        let begin = Instant::now();
        let mark = Mark::now(&context.syscalls);
        let tallies = std::thread::scope(|scope| {
            let threads: Vec<_> =
                pages.iter().map(|pages| scope.spawn(|| self.work(&line, &bench, pages))).collect();
            let progress = Progress::new(context.progress, "trace", None);
            self.feed(&line, begin, &bench, context, &progress);
            line.end();
            while !threads.iter().all(|thread| thread.is_finished()) {
                self.tick(TICK, begin, &bench, context, &progress);
            }
            progress.end();
            threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
        });
        let (cost, elapsed) = (mark.cost(&context.syscalls), begin.elapsed());
        let mut tally = Tally::default();
        for seen in tallies {
            tally.add(&seen.map_err(|_| String::from("a thread of the replay panicked"))?);
        }
        let metrics = store.metrics().unwrap_or_default();
        // Before its pages.
        drop(store);
        let result =
            JobResult { job: job.clone(), block_bytes: shape.bytes(), tally, elapsed, metrics };
        Ok(GroupResult { jobs: vec![result], cost })
    }

    /// When a request arrives, from the begin of the replay.
    fn arrival(&self, request: &Request) -> Duration {
        let first = self.trace.first().map_or(0.0, |request| request.timestamp);
        Duration::from_secs_f64((request.timestamp - first) * 1e-3 / self.speedup)
    }

    /// Sleeps, no longer than a tick, having shown the progress; Ctrl-C ends the replay.
    fn tick(
        &self,
        left: Duration,
        begin: Instant,
        bench: &Bench<'_>,
        context: &Context,
        progress: &Progress,
    ) {
        if context.is_interrupted() {
            bench.shared.stop.store(true, Ordering::Relaxed);
        }
        let end = self.trace.last().map_or(Duration::ZERO, |last| self.arrival(last));
        progress.show(&[bench.shared], Some((begin.elapsed(), end)));
        std::thread::sleep(left.min(TICK));
    }

    /// Lets requests arrive at their times, until Ctrl-C.
    fn feed(
        &self,
        line: &Line<'t>,
        begin: Instant,
        bench: &Bench<'_>,
        context: &Context,
        progress: &Progress,
    ) {
        for request in self.trace {
            let due = begin + self.arrival(request);
            while !stopped(bench) && Instant::now() < due {
                let left = due.saturating_duration_since(Instant::now());
                self.tick(left, begin, bench, context, progress);
            }
            // Its time is when it was due: a late feeder must not flatter the store.
            line.push(Arrived { request, at: due });
        }
    }

    fn work(&self, line: &Line<'t>, bench: &Bench<'_>, pages: &Pages) -> Tally {
        let mut tally = Tally::default();
        while let Some(arrived) = line.take().filter(|_| !stopped(bench)) {
            self.one(&arrived, bench, pages, &mut tally);
        }
        tally
    }

    /// Lets the time pass that the model computes, until Ctrl-C.
    fn prefill(&self, blocks: usize, bench: &Bench<'_>) {
        let Some(rate) = self.prefill_rate else { return };
        let tokens = blocks as f64 * f64::from(bench.job.block_tokens);
        let end = Instant::now() + Duration::from_secs_f64(tokens / rate / self.speedup);
        while !stopped(bench) && Instant::now() < end {
            std::thread::sleep(end.saturating_duration_since(Instant::now()).min(TICK));
        }
    }

    fn one(&self, arrived: &Arrived<'_>, bench: &Bench<'_>, pages: &Pages, tally: &mut Tally) {
        let numbers = self::format::blocks(arrived.request, u64::from(bench.job.block_tokens));
        let ids: Vec<_> = numbers.iter().map(|&n| block_id(bench.seed, n)).collect();
        tally.latency("request queued", arrived.at.elapsed(), 1);
        let start = Instant::now();
        let hits = match bench.store.lookup_prefix(&ids) {
            Ok(hits) => hits,
            Err(failure) => {
                tally.error(crate::abi::status_name(failure.status), 1, || failure.message);
                0
            }
        };
        tally.latency("lookup", start.elapsed(), 1);
        let (present, missing) = numbers.split_at(hits.min(numbers.len()));
        let loaded = transfer(bench, pages, Direction::Load, present);
        // A load that Ctrl-C cut short has a latency that says nothing.
        if !stopped(bench) {
            tally.latency(REQUEST_READY, arrived.at.elapsed(), 1);
        }
        self.prefill(missing.len(), bench);
        let start = Instant::now();
        let saved = transfer(bench, pages, Direction::Save, missing);
        if !missing.is_empty() && !stopped(bench) {
            tally.latency("request saved", start.elapsed(), 1);
        }
        for mut part in [loaded, saved] {
            // Hits are those of the lookup; a load finds what the lookup found.
            (part.asked, part.present) = (0, 0);
            tally.add(&part);
        }
        tally.asked += numbers.len() as u64;
        tally.present += hits as u64;
    }
}

fn stopped(bench: &Bench<'_>) -> bool {
    bench.shared.stop.load(Ordering::Relaxed)
}

fn transfer(bench: &Bench<'_>, pages: &Pages, direction: Direction, numbers: &[u64]) -> Tally {
    let mut batches = numbers.chunks(bench.job.batch as usize);
    let mut next = || batches.next().map(|batch| Work { direction, numbers: batch.to_vec() });
    Transfer::new(bench, pages).run(&mut next, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what a replay does not heed is refused instead of ignored.
    #[test]
    fn rate_and_register_were_ignored() {
        assert_eq!(refuse_ignored(&Job::default()), Ok(()));
        let rate = Job { rate: Some(1e9), ..Job::default() };
        assert!(refuse_ignored(&rate).unwrap_err().contains("--rate"));
        let register = Job { register: true, ..Job::default() };
        assert!(refuse_ignored(&register).unwrap_err().contains("--register"));
    }
}

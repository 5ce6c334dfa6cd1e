//! A backend: one storage directory, the reactors that transfer in it and the pool that may block on it.
//!
//! Two backends share nothing, so a mount that hangs stops only itself. Knows nothing of what the files
//! mean.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::carrier::Carrier;
use super::engine::{Io, Registration};
use super::files::OsFiles;
use super::pool::{Job, Pool};
use super::probe::{self, Findings};
use super::reactor::{Drained, Reactor, ReactorConfig};
use super::report::{Counters, Fallback, Report, tell_once};
use super::thread::Stack;
use super::{DirectIo, DmaSlice, Files, IoEngine, Request};
use crate::error::{Error, ErrorKind, Result};

/// With several reactors, neighbouring runs of this many bytes of a file go to different ones: long
/// enough to coalesce in, short enough that one busy segment loads all reactors.
const STRIPE_BYTES: u64 = 8 << 20;
/// A backend that is dropped without [`Backend::stop`] drains for this long.
const DROP_PATIENCE: Duration = Duration::from_secs(5);

/// How a backend transfers.
#[derive(Clone, Debug)]
pub struct BackendConfig {
    /// `io_engine`.
    pub engine: IoEngine,
    /// `io_direct`.
    pub direct: DirectIo,
    /// Reactors (`io_threads`).
    pub threads: usize,
    /// Operations in flight in each (`io_depth`).
    pub depth: u32,
    /// Largest single operation (`io_size_kb`).
    pub io_bytes: usize,
    /// CPUs to pin reactors to, in turn; empty: not pinned (`cpu_affinity_cores`).
    pub affinity: Vec<usize>,
    /// Requests that may wait in each reactor and class (`waiting_queue_depth`).
    pub queue_depth: usize,
    /// Who carries transfers in place of the kernel; every directory must suit it.
    pub carrier: Option<Arc<dyn Carrier>>,
}

impl Default for BackendConfig {
    /// One reactor, 32 operations of up to 4 MiB in flight.
    fn default() -> Self {
        Self {
            engine: IoEngine::Auto,
            direct: DirectIo::Auto,
            threads: 1,
            depth: 32,
            io_bytes: 4 << 20,
            affinity: Vec::new(),
            queue_depth: 8192,
            carrier: None,
        }
    }
}

/// One storage directory, open for transfers.
pub struct Backend {
    directory: PathBuf,
    files: Arc<dyn Files>,
    reactors: Vec<Reactor>,
    pool: Pool,
    direct: bool,
    local: bool,
    /// Base and length of registered memory.
    registered: Mutex<Vec<(usize, usize)>>,
    /// What does not change, and the fallbacks, which registrations may add to.
    facts: Mutex<Report>,
}

impl Backend {
    /// Probes the directory (creating it if it is missing) and starts the reactors. A mount that does not
    /// answer by `deadline` ends with `Timeout`.
    pub fn open(directory: &Path, config: &BackendConfig, deadline: Instant) -> Result<Arc<Self>> {
        // The program may change its current directory while the store is open.
        let directory = &std::path::absolute(directory)
            .map_err(|error| Error::io("find the current directory", Some(directory), &error))?;
        let files = OsFiles::new();
        // It tries the carrier out.
        let stack = config.carrier.as_ref().map_or(Stack::Engine, |carrier| carrier.stack());
        let pool = Pool::new("ucm-path", stack);
        files.close_on(pool.clone());
        let (sender, receiver) = sync_channel(1);
        let probing = (directory.to_path_buf(), config.clone(), Arc::clone(&files));
        pool.run(Box::new(move || {
            let (directory, config, files) = probing;
            let found = probe::probe(&directory, &config, &files);
            // A carrier that was refused is down when the caller knows it.
            drop(config);
            let _ = sender.send(found);
        }))?;
        let patience = deadline.saturating_duration_since(Instant::now());
        let findings = receiver.recv_timeout(patience).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::new(
                ErrorKind::Timeout,
                "the directory did not answer in time; check that its file system is mounted and its \
                 server is up, or raise timeout_ms",
            )
            .at(directory),
            RecvTimeoutError::Disconnected => {
                Error::new(ErrorKind::Internal, "the probe of a directory panicked").at(directory)
            }
        })??;
        for fallback in &findings.fallbacks {
            tell_once(fallback);
        }
        Self::assemble(directory, files, findings, config, pool)
    }

    /// A backend of given parts: for `sim` and tests.
    ///
    /// # Panics
    /// If a thread cannot be started.
    pub fn with_parts(
        directory: &Path,
        files: Arc<dyn Files>,
        io: Vec<Box<dyn Io>>,
        config: &BackendConfig,
    ) -> Arc<Self> {
        let findings = Findings {
            direct: config.direct != DirectIo::Off,
            local: true,
            file_system: "given".into(),
            engines: io,
            fallbacks: Vec::new(),
        };
        Self::assemble(directory, files, findings, config, Pool::new("ucm-path", Stack::Engine))
            .expect("threads can be started")
    }

    fn assemble(
        directory: &Path,
        files: Arc<dyn Files>,
        findings: Findings,
        config: &BackendConfig,
        pool: Pool,
    ) -> Result<Arc<Self>> {
        let facts = Report {
            engine: findings.engines.first().map_or("none", |io| io.name()).into(),
            features: findings.engines.first().map(|io| io.features()).unwrap_or_default(),
            direct: findings.direct,
            local: findings.local,
            file_system: findings.file_system,
            threads: findings.engines.len(),
            depth: findings.engines.first().map_or(0, |io| io.depth()),
            fallbacks: findings.fallbacks,
            ..Report::default()
        };
        let mut reactors: Vec<Reactor> = Vec::new();
        for (index, io) in findings.engines.into_iter().enumerate() {
            let cpu = config.affinity.get(index % config.affinity.len().max(1)).copied();
            let reactor = ReactorConfig {
                name: format!("ucm-io-{index}"),
                cpu,
                io_bytes: config.io_bytes,
                queue_depth: config.queue_depth,
            };
            match Reactor::start(io, &reactor) {
                Ok(reactor) => reactors.push(reactor),
                Err(error) => {
                    reactors.iter().for_each(Reactor::ask_to_stop);
                    return Err(error);
                }
            }
        }
        Ok(Arc::new(Self {
            directory: directory.to_path_buf(),
            files,
            reactors,
            pool,
            direct: findings.direct,
            local: findings.local,
            registered: Mutex::default(),
            facts: Mutex::new(facts),
        }))
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Path operations, to be called in [`Backend::run`].
    pub fn files(&self) -> &Arc<dyn Files> {
        &self.files
    }

    /// Queues a request. Never blocks; where the queue is full its `done` gets `Busy` on this thread, so no
    /// lock may be held that `done` takes.
    pub fn submit(&self, request: Request) {
        self.reactor_of(&request).submit([request]);
    }

    /// Queues requests with one wake-up; neighbours coalesce. Otherwise as [`Backend::submit`].
    pub fn submit_all(&self, requests: Vec<Request>) {
        if let [reactor] = &self.reactors[..] {
            return reactor.submit(requests);
        }
        let mut shares: Vec<Vec<Request>> = self.reactors.iter().map(|_| Vec::new()).collect();
        for request in requests {
            shares[self.index_of(&request)].push(request);
        }
        for (reactor, share) in self.reactors.iter().zip(shares) {
            if !share.is_empty() {
                reactor.submit(share);
            }
        }
    }

    fn reactor_of(&self, request: &Request) -> &Reactor {
        &self.reactors[self.index_of(request)]
    }

    fn index_of(&self, request: &Request) -> usize {
        let stripe = request.offset / STRIPE_BYTES + request.file.id().number();
        (stripe % self.reactors.len() as u64) as usize
    }

    /// Runs a job that may block on the file system, on one of a few threads; `Busy` where too many wait.
    pub fn run(&self, job: Job) -> Result<()> {
        self.pool.run(job)
    }

    /// Whether files are to be opened past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether the file system keeps its data on this machine.
    pub fn is_local(&self) -> bool {
        self.local
    }

    /// What runs here, what was refused, and what was done.
    pub fn report(&self) -> Report {
        let counters = self.reactors.iter().map(Reactor::counters);
        let registered = self.reactors.iter().map(Reactor::registered_bytes);
        Report {
            counters: counters.fold(Counters::default(), Counters::plus),
            registered_bytes: registered.max().unwrap_or(0),
            broken: self.reactors.iter().find_map(Reactor::broken).map(|error| error.to_string()),
            ..self.facts.lock().clone()
        }
    }

    /// Has transfers inside this memory use fixed buffers. What the system refuses is told in the report and
    /// is not an error: transfers work without. The memory stays valid until [`Backend::unregister_memory`]
    /// or [`Backend::stop`].
    pub fn register_memory(&self, base: *mut u8, length: usize) -> Result<()> {
        for (index, reactor) in self.reactors.iter().enumerate() {
            match reactor.register_memory(DmaSlice { pointer: base, length }) {
                Ok(Registration::Fixed | Registration::NotUsed) => {}
                Ok(Registration::Refused(errno)) => self.note(registration_fallback(length, errno)),
                Err(error) => {
                    for earlier in &self.reactors[..index] {
                        let _ = earlier.unregister_memory(base, length);
                    }
                    return Err(error);
                }
            }
        }
        self.registered.lock().push((base as usize, length));
        Ok(())
    }

    /// Undoes [`Backend::register_memory`]; `Busy` while a request that has not ended uses the memory.
    pub fn unregister_memory(&self, base: *mut u8) -> Result<()> {
        let known =
            self.registered.lock().iter().copied().find(|(start, _)| *start == base as usize);
        let Some((start, length)) = known else {
            let text =
                "the memory is not registered here; give the base address that was registered";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        };
        self.reactors.iter().try_for_each(|reactor| reactor.unregister_memory(base, length))?;
        self.registered.lock().retain(|(other, _)| *other != start);
        Ok(())
    }

    /// Adds to the report something that was refused.
    pub fn note(&self, fallback: Fallback) {
        tell_once(&fallback);
        let mut facts = self.facts.lock();
        if !facts.fallbacks.contains(&fallback) {
            facts.fallbacks.push(fallback);
        }
    }

    /// Ends what has not begun with `Closed`, waits until `deadline` for what has, and gives the threads
    /// back. What does not end by then is leaked with all it uses.
    pub fn stop(&self, deadline: Instant) -> Drained {
        self.reactors.iter().for_each(Reactor::ask_to_stop);
        let ends = self.reactors.iter().map(|reactor| reactor.stop(deadline)).collect::<Vec<_>>();
        self.pool.close();
        if ends.contains(&Drained::Leaked) { Drained::Leaked } else { Drained::Yes }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if super::thread::is_reactor() {
            // The last owner was a `done`: a reactor cannot wait for its own end.
            self.reactors.iter().for_each(Reactor::ask_to_stop);
            self.pool.close();
            return;
        }
        self.stop(Instant::now() + DROP_PATIENCE);
    }
}

fn registration_fallback(length: usize, errno: i32) -> Fallback {
    let reason = Error::os("io_uring_register", None, None, errno);
    Fallback {
        what: format!(
            "{length} bytes of memory could not be registered with io_uring ({reason}); transfers pin pages one by one"
        ),
        cost: "1.6 to 4.6 times the CPU per GB".into(),
        remedy: match errno {
            libc::ENOSYS => "run on Linux 5.19 or newer".into(),
            libc::ENOSPC => "register less memory: a ring has room for 4 TiB".into(),
            _ => probe::memlock_remedy(),
        },
    }
}

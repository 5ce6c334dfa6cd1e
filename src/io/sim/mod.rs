//! `sim`: a disk in memory that lies, for tests of everything above it.
//!
//! One [`SimDisk`] gives both halves of a backend: [`Files`](super::Files) and engines
//! ([`Io`](super::engine::Io)). Transfers take time, overtake each other, end short and fail as told;
//! space runs out; at a chosen step the power goes, and [`SimDisk::reboot`] shows what a real disk could
//! have kept: what was flushed, and any part of what was not.
//!
//! What befalls an operation depends on the seed, on what the operation is and on how often it came
//! before, not on the order in which threads happen to run: the same seed gives the same faults.

mod content;
mod engine;
mod faults;
mod files;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

pub use self::content::Survival;
pub use self::faults::{Call, Effect, Fault, Occasion};

use self::content::Content;
use self::engine::SimIo;
use self::faults::Fates;
use super::backend::{Backend, BackendConfig};
use super::engine::Io;
use super::{File, Files};

/// One in so many.
pub type OneIn = u64;

/// How a disk behaves while no [`Fault`] says otherwise.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Everything random comes from it.
    pub seed: u64,
    /// A transfer takes up to this time. Zero: it ends at the next wait, still out of order.
    pub delay_max: Duration,
    /// One transfer in so many ends short; `None`: never.
    pub short: Option<OneIn>,
    /// Space in bytes.
    pub space_bytes: u64,
    /// The power goes in the middle of this step (see [`SimDisk::steps`]).
    pub crash_at: Option<u64>,
}

impl Default for SimConfig {
    /// A fast, honest disk of 1 TiB.
    fn default() -> Self {
        Self {
            seed: 0,
            delay_max: Duration::ZERO,
            short: None,
            space_bytes: 1 << 40,
            crash_at: None,
        }
    }
}

/// A disk in memory.
pub struct SimDisk {
    this: Weak<Self>,
    state: Mutex<State>,
}

struct State {
    content: Content,
    fates: Fates,
    config: SimConfig,
    /// Operations so far that change what is on the disk.
    steps: u64,
    /// The power is gone: everything fails.
    dark: bool,
}

impl SimDisk {
    /// An empty disk.
    pub fn new(config: SimConfig) -> Arc<Self> {
        Self::with_content(config, Content::default())
    }

    fn with_content(config: SimConfig, content: Content) -> Arc<Self> {
        let fates = Fates::new(config.seed);
        let state = State { content, fates, config, steps: 0, dark: false };
        Arc::new_cyclic(|this| Self { this: this.clone(), state: Mutex::new(state) })
    }

    /// Its path operations.
    pub fn files(&self) -> Arc<dyn Files> {
        self.this.upgrade().expect("a method runs, so the disk lives")
    }

    /// An engine that transfers on it.
    pub fn engine(&self, depth: u32) -> Box<dyn Io> {
        let disk = self.this.upgrade().expect("a method runs, so the disk lives");
        Box::new(SimIo::new(disk, depth))
    }

    /// A backend on it.
    pub fn backend(&self, directory: &Path, config: &BackendConfig) -> Arc<Backend> {
        let engines = (0..config.threads.max(1)).map(|_| self.engine(config.depth)).collect();
        self.files().create_dir_all(directory).expect("a fresh disk makes directories");
        Backend::with_parts(directory, self.files(), engines, config)
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        self.state.lock().fates.inject(fault);
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        self.state.lock().fates.heal();
    }

    /// Operations so far that change what is on the disk: writes, flushes, and changes of names and
    /// lengths. Run once to learn the number, then again with `crash_at` at each.
    pub fn steps(&self) -> u64 {
        self.state.lock().steps
    }

    /// How often `call` came so far, to place a fault with [`Occasion::Nth`].
    pub fn calls(&self, call: Call) -> u64 {
        self.state.lock().fates.calls(call)
    }

    /// The power goes now: from here on everything fails with EIO.
    pub fn pull_plug(&self) {
        self.state.lock().dark = true;
    }

    /// Whether the power is gone.
    pub fn is_dark(&self) -> bool {
        self.state.lock().dark
    }

    /// The disk as it could be found after a crash at this moment. This one is left as it is. `config`
    /// rules the new disk; its seed also chooses what survives.
    pub fn reboot(&self, survival: Survival, config: SimConfig) -> Arc<Self> {
        let content = self.state.lock().content.after_crash(survival, config.seed);
        Self::with_content(config, content)
    }

    /// The bytes of a file as readers see them now; `None` if there is no such file.
    pub fn peek(&self, path: &Path) -> Option<Vec<u8>> {
        self.state.lock().content.peek(path)
    }

    /// Overwrites bytes behind everybody's back: rot.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn poke(&self, path: &Path, offset: u64, bytes: &[u8]) {
        self.state.lock().content.poke(path, offset, bytes);
    }

    /// All files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.state.lock().content.paths()
    }

    /// Space in use, and open descriptors: for tests that look for leaks.
    pub fn usage(&self) -> (u64, usize) {
        let state = self.state.lock();
        (state.content.allocated(), state.content.open_files())
    }

    fn file(&self, raw: i32, path: &Path) -> File {
        File::new(raw, path, self.files())
    }
}

/// A step that changes the disk, seen by the crash counter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It happens.
    Whole,
    /// The power goes in its middle.
    Torn,
}

impl State {
    /// Counts a step; `Err(EIO)` in the dark.
    fn step(&mut self) -> std::result::Result<Step, i32> {
        self.lit()?;
        self.steps += 1;
        if self.config.crash_at == Some(self.steps) {
            self.dark = true;
            return Ok(Step::Torn);
        }
        Ok(Step::Whole)
    }

    fn lit(&self) -> std::result::Result<(), i32> {
        if self.dark { Err(libc::EIO) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;

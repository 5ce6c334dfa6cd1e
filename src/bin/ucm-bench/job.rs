//! A job: everything that one `[section]` of a job file, or the flags, decide.
//!
//! Owns the settings and their defaults; `keys` owns how they are written; knows no store and no thread.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use crate::model::{self, Shape};

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Saves new blocks, one after another.
    Save,
    /// Loads the blocks of the data set in the order they were saved.
    Load,
    /// Loads them in random order, each once per pass.
    RandLoad,
    /// Saves new blocks and loads old ones.
    Mixed,
    /// Asks for single blocks, present and absent.
    Lookup,
    /// Asks for the longest present prefix of a chain.
    Prefix,
    /// Hashes tokens to block ids.
    Hash,
    /// Opens the store and makes a first lookup, again and again.
    Open,
    /// Opens the store and does nothing.
    Idle,
    /// Requests of a trace; not a value of `rw`, but of `ucm-bench trace`.
    Trace,
    /// No store: copies the blocks from memory to memory, on this thread.
    Memcpy,
}

impl Workload {
    /// All, with their names.
    pub const ALL: [(&'static str, Self); 10] = [
        ("save", Self::Save),
        ("load", Self::Load),
        ("randload", Self::RandLoad),
        ("mixed", Self::Mixed),
        ("lookup", Self::Lookup),
        ("prefix", Self::Prefix),
        ("hash", Self::Hash),
        ("open", Self::Open),
        ("idle", Self::Idle),
        ("memcpy", Self::Memcpy),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, workload)| *workload == self).map_or("trace", |(name, _)| name)
    }

    /// Whether the blocks must have been saved before the clock starts.
    pub fn needs_data(self) -> bool {
        matches!(
            self,
            Self::Load | Self::RandLoad | Self::Mixed | Self::Lookup | Self::Prefix | Self::Open
        )
    }

    /// Whether bytes of blocks move.
    pub fn moves_bytes(self) -> bool {
        matches!(self, Self::Save | Self::Load | Self::RandLoad | Self::Mixed | Self::Memcpy)
    }
}

/// How open-loop arrivals are spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateProcess {
    /// At even gaps.
    Linear,
    /// At exponential gaps.
    Poisson,
}

/// The settings of one job.
#[derive(Clone, Debug)]
pub struct Job {
    /// Section name.
    pub name: String,
    /// What it does.
    pub rw: Workload,
    /// Directories the blocks are spread over.
    pub directories: Vec<PathBuf>,
    /// Bytes of the data set.
    pub size: u64,
    /// Blocks of the data set, instead of `size`.
    pub blocks: Option<u64>,
    /// End after this time.
    pub runtime: Option<Duration>,
    /// Go on over the data set until `runtime` is over.
    pub time_based: bool,
    /// Do not count the first stretch.
    pub ramp: Duration,
    /// Blocks in flight, per thread.
    pub iodepth: u32,
    /// Blocks of a task (or of a lookup).
    pub batch: u32,
    /// Threads.
    pub numjobs: u32,
    /// Begin when the jobs before have ended.
    pub stonewall: bool,
    /// Model that gives the shape.
    pub model: Option<String>,
    /// Tensor-parallel ranks; the shape is that of one.
    pub tp: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of an element of the KV cache.
    pub element_bytes: u32,
    /// Bytes of a block, where no model is given.
    pub block_size: u64,
    /// Layers of a block, where no model is given.
    pub layers: u32,
    /// Tensor slices of a layer, where no model is given.
    pub slices: u32,
    /// One task per layer.
    pub layerwise: bool,
    /// Share of the operations of `mixed` that load.
    pub rwmixload: f64,
    /// Share of the keys of `lookup` that are present; for `prefix`, of the chain.
    pub hit: f64,
    /// Blocks a second that another thread saves while this job runs.
    pub insert_rate: f64,
    /// Other stores, in another process, that have the namespace open for saving.
    pub writers: u32,
    /// Open loop: bytes a second.
    pub rate: Option<f64>,
    /// Open loop: blocks a second.
    pub rate_blocks: Option<f64>,
    /// Spacing of arrivals.
    pub rate_process: RateProcess,
    /// Fill and compare every byte.
    pub verify: bool,
    /// Register the job's memory with the store, so that nothing is staged.
    pub register: bool,
    /// Memory the blocks live in.
    pub device: String,
    /// Ordinal of the device.
    pub device_id: u32,
    /// Seed of ids, orders and arrivals.
    pub randseed: u64,
    /// Leave the data where it is, and use what is there.
    pub keep: bool,
    /// Store again what the layout would find in memory.
    pub warm_cache: bool,
    /// Settings of the store, by their YAML keys, in order.
    pub store: Vec<(String, String)>,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            name: String::from("job"),
            rw: Workload::Load,
            directories: Vec::new(),
            size: 1 << 30,
            blocks: None,
            runtime: None,
            time_based: false,
            ramp: Duration::ZERO,
            iodepth: 32,
            batch: 1,
            numjobs: 1,
            stonewall: false,
            model: None,
            tp: 1,
            block_tokens: 128,
            element_bytes: 2,
            block_size: 1 << 20,
            layers: 1,
            slices: 1,
            layerwise: false,
            rwmixload: 0.5,
            hit: 0.5,
            insert_rate: 0.0,
            writers: 0,
            rate: None,
            rate_blocks: None,
            rate_process: RateProcess::Poisson,
            verify: false,
            register: false,
            device: String::from("host"),
            device_id: 0,
            randseed: 1,
            keep: false,
            warm_cache: false,
            store: Vec::new(),
        }
    }
}

impl Job {
    /// The shape of a block of this job.
    pub fn shape(&self) -> Result<Shape, String> {
        if let Some(name) = &self.model {
            return model::find(name)?.shape(self.tp, self.block_tokens, self.element_bytes);
        }
        let pieces = u64::from(self.layers) * u64::from(self.slices);
        if pieces == 0 || self.block_size == 0 || !self.block_size.is_multiple_of(pieces) {
            return Err(format!(
                "block-size={} cannot be cut into {} layers of {} slices",
                self.block_size, self.layers, self.slices
            ));
        }
        Ok(Shape {
            layers: self.layers,
            layer_slices: vec![self.block_size / pieces; self.slices as usize],
        })
    }

    /// Blocks of the data set.
    pub fn block_count(&self) -> Result<u64, String> {
        if let Some(blocks) = self.blocks {
            return if blocks == 0 { Err("blocks=0: at least one".into()) } else { Ok(blocks) };
        }
        let bytes = self.shape()?.bytes();
        if self.size < bytes {
            return Err(format!(
                "size={} is less than one block of {bytes} bytes; give at least that",
                self.size
            ));
        }
        Ok(self.size / bytes)
    }

    /// Blocks that arrive in a second, over all threads, where the loop is open.
    pub fn arrivals(&self) -> Result<Option<f64>, String> {
        Ok(match (self.rate_blocks, self.rate) {
            (Some(blocks), _) => Some(blocks),
            (None, Some(bytes)) => Some(bytes / self.shape()?.bytes() as f64),
            (None, None) => None,
        })
    }

    /// The value of a setting of the store, if this job gives one.
    pub fn store_setting(&self, key: &str) -> Option<&str> {
        self.store.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Sets a setting of the store; a later one wins.
    pub fn set_store(&mut self, key: &str, value: impl Into<String>) {
        self.store.retain(|(name, _)| name != key);
        self.store.push((key.to_owned(), value.into()));
    }

    /// Whether the pipeline keeps blocks on storage.
    pub fn uses_storage(&self) -> bool {
        self.store_setting("store_pipeline").unwrap_or("Cache|Posix").contains("Posix")
            && !matches!(self.rw, Workload::Hash | Workload::Memcpy)
    }

    /// Checks the settings against each other; each message names one and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        let told = |message: String| Err(format!("job {}: {message}", self.name));
        if self.iodepth == 0 || self.batch == 0 || self.numjobs == 0 {
            return told("iodepth, batch and numjobs are at least 1".into());
        }
        if self.uses_storage() && self.directories.is_empty() {
            return told(
                "no --directory: name the directory whose storage is to be measured".into(),
            );
        }
        if self.time_based && self.runtime.is_none() {
            return told("time_based needs runtime, as --runtime=30s".into());
        }
        if self.rw == Workload::Mixed && self.time_based {
            return told(
                "rw=mixed saves new blocks on every pass, and with time_based would fill the drive; \
                 leave time_based out and give size for the time, as --size=100g"
                    .into(),
            );
        }
        if self.insert_rate > 0.0 && self.rw.moves_bytes() {
            return told("insert_rate saves beside lookups; rw=mixed saves beside loads".into());
        }
        if self.rw == Workload::Memcpy && self.numjobs > 1 {
            return told("rw=memcpy is measured on one thread; leave numjobs out".into());
        }
        if self.rw == Workload::Idle && self.runtime.is_none() {
            return told("rw=idle needs runtime, as --runtime=30s".into());
        }
        if self.batch > self.iodepth && self.rw.moves_bytes() && self.rw != Workload::Memcpy {
            return told(format!(
                "batch={} is more than iodepth={}, the blocks in flight; raise iodepth",
                self.batch, self.iodepth
            ));
        }
        if !matches!(self.device.as_str(), "host" | "cuda" | "ascend") {
            return told(format!("device={}: host, cuda or ascend", self.device));
        }
        if self.rate.is_some_and(|rate| rate <= 0.0) || self.rate_blocks.is_some_and(|r| r <= 0.0) {
            return told("a rate is above 0".into());
        }
        if let Err(message) =
            self.shape().and_then(|_| self.block_count()).and_then(|_| self.arrivals())
        {
            return told(message);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the data set is counted in whole blocks of the model's shape.
    #[test]
    fn counts_blocks() {
        let job = Job { model: Some("deepseek-v3".into()), size: 1 << 30, ..Job::default() };
        assert_eq!(job.block_count(), Ok((1 << 30) / (61 * (144 << 10))));
        let small = Job { size: 10, ..Job::default() };
        assert!(small.block_count().unwrap_err().contains("size=10"));
    }

    /// Goal: the room that a job needs is known before it begins.
    #[test]
    fn time_based_mixed_filled_the_drive() {
        let job = Job { directories: vec!["/tmp".into()], rw: Workload::Mixed, ..Job::default() };
        let job = Job { runtime: Some(Duration::from_secs(1)), ..job };
        assert_eq!(job.validate(), Ok(()));
        let endless = Job { time_based: true, ..job };
        assert!(endless.validate().unwrap_err().contains("size"));
    }

    /// Goal: contradictions are refused with the setting to change.
    #[test]
    fn contradictions() {
        let job = Job { directories: vec!["/tmp".into()], ..Job::default() };
        assert_eq!(job.validate(), Ok(()));
        let cases = [
            (Job { directories: vec![], ..job.clone() }, "--directory"),
            (Job { batch: 64, ..job.clone() }, "iodepth"),
            (Job { time_based: true, ..job.clone() }, "runtime"),
            (Job { insert_rate: 1.0, ..job.clone() }, "rw=mixed"),
            (Job { device: "tpu".into(), ..job.clone() }, "tpu"),
            (Job { block_size: 100, layers: 3, ..job.clone() }, "block-size"),
        ];
        for (job, word) in cases {
            let message = job.validate().unwrap_err();
            assert!(message.contains(word), "{message}");
        }
    }
}

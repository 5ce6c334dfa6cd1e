//! The settings of a job by name: one table that flags, job files and `--help` share.
//!
//! Names are fio's where fio has the thing; `-` and `_` are the same.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::job::{Job, RateProcess, Workload};
use crate::units::{count, percent, size, switch, time};

/// Whether a setting takes a value on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// `--key=value`.
    Value,
    /// `--key` or `--key=1`.
    Switch,
}

/// One setting.
pub struct Key {
    /// Its name, with `-`.
    pub name: &'static str,
    /// Other names, fio's spelling where it differs.
    pub aliases: &'static [&'static str],
    /// Heading in `--help`.
    pub group: &'static str,
    /// What the value looks like.
    pub hint: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// Value or switch.
    pub arity: Arity,
    /// Applies a value.
    pub set: fn(&mut Job, &str) -> Result<(), String>,
}

const WHAT: &str = "What to do";
const SHAPE: &str = "Shape of a block";
const LOAD: &str = "How hard";
const STORE: &str = "The store";

macro_rules! key {
    ($name:literal $(| $alias:literal)*, $group:expr, $hint:literal, $help:expr, $set:expr) => {
        Key { name: $name, aliases: &[$($alias),*], group: $group, hint: $hint, help: $help,
              arity: Arity::Value, set: $set }
    };
}

macro_rules! switch {
    ($name:literal $(| $alias:literal)*, $group:expr, $help:expr, $field:ident) => {
        Key { name: $name, aliases: &[$($alias),*], group: $group, hint: "0|1", help: $help,
              arity: Arity::Switch, set: |job, value| { job.$field = switch(value)?; Ok(()) } }
    };
}

/// A setting that the store reads under its own YAML key.
macro_rules! store_key {
    ($name:literal $(| $alias:literal)*, $key:literal, $hint:literal, $help:expr) => {
        key!($name $(| $alias)*, STORE, $hint, $help, |job, value| {
            job.set_store($key, value);
            Ok(())
        })
    };
}

fn number(value: &str) -> Result<u32, String> {
    u32::try_from(count(value)?).map_err(|_| format!("`{value}` is too large"))
}

/// All settings, in the order of `--help`.
pub static KEYS: &[Key] = &[
    key!(
        "rw" | "readwrite",
        WHAT,
        "KIND",
        "save, load, randload, mixed, lookup, prefix, hash, open (restart), idle, memcpy",
        |job, value| {
            job.rw =
                Workload::ALL.iter().find(|(name, _)| *name == value).map(|(_, w)| *w).ok_or_else(
                    || {
                        let names: Vec<_> = Workload::ALL.iter().map(|(name, _)| *name).collect();
                        format!("`{value}` is none of {}", names.join(", "))
                    },
                )?;
            Ok(())
        }
    ),
    key!(
        "directory",
        WHAT,
        "DIR[:DIR]",
        "Directories to measure; blocks are spread over them. A folder of the bench's own is made inside and removed at the end",
        |job, value| {
            job.directories =
                value.split(':').filter(|d| !d.is_empty()).map(PathBuf::from).collect();
            Ok(())
        }
    ),
    key!(
        "size" | "filesize",
        WHAT,
        "BYTES",
        "Bytes of the data set, for each job [1g]",
        |job, value| {
            job.size = size(value)?;
            job.blocks = None;
            Ok(())
        }
    ),
    key!(
        "blocks",
        WHAT,
        "N",
        "Blocks of the data set, instead of --size; 1m is a million",
        |job, value| {
            job.blocks = Some(count(value)?);
            Ok(())
        }
    ),
    key!(
        "runtime",
        WHAT,
        "TIME",
        "End after this time, if the data set is not through before",
        |job, value| {
            job.runtime = Some(time(value)?);
            Ok(())
        }
    ),
    switch!(
        "time-based",
        WHAT,
        "Go over the data set again until --runtime is over (loads; a save of what is present costs nothing)",
        time_based
    ),
    key!("ramp-time", WHAT, "TIME", "Run this long before anything is counted", |job, value| {
        job.ramp = time(value)?;
        Ok(())
    }),
    switch!(
        "verify",
        WHAT,
        "Fill blocks with a pattern that depends on block and position, and compare every byte loaded",
        verify
    ),
    switch!(
        "stonewall" | "wait-for-previous",
        WHAT,
        "Begin when the jobs above have ended; without it jobs run together",
        stonewall
    ),
    switch!(
        "keep",
        WHAT,
        "Leave the data in the directory (as `ucm-bench-keep`), and use what an earlier --keep left there",
        keep
    ),
    key!("randseed", WHAT, "N", "Seed of ids, orders and arrivals [1]", |job, value| {
        job.randseed = count(value)?;
        Ok(())
    }),
    key!("model", SHAPE, "NAME", "Shape of a known model (`ucm-bench models`)", |job, value| {
        crate::model::find(value)?;
        job.model = Some(value.to_owned());
        Ok(())
    }),
    key!("tp", SHAPE, "N", "Tensor-parallel ranks; the job plays one of them [1]", |job, value| {
        job.tp = number(value)?;
        Ok(())
    }),
    key!("block-tokens", SHAPE, "N", "Tokens of a block [128]", |job, value| {
        job.block_tokens = number(value)?;
        Ok(())
    }),
    key!(
        "element-bytes",
        SHAPE,
        "N",
        "Bytes of an element: 2 for bf16, 1 for fp8 [2]",
        |job, value| {
            job.element_bytes = number(value)?;
            Ok(())
        }
    ),
    key!(
        "block-size" | "bs" | "blocksize",
        SHAPE,
        "BYTES",
        "Bytes of a block where no model is given [1m]",
        |job, value| {
            job.block_size = size(value)?;
            job.model = None;
            Ok(())
        }
    ),
    key!("layers", SHAPE, "N", "Layers of a block where no model is given [1]", |job, value| {
        job.layers = number(value)?;
        Ok(())
    }),
    key!(
        "slices",
        SHAPE,
        "N",
        "Tensor slices of a layer where no model is given [1]",
        |job, value| {
            job.slices = number(value)?;
            Ok(())
        }
    ),
    switch!("layerwise", SHAPE, "Transfer layer by layer, one task a layer", layerwise),
    key!("iodepth", LOAD, "N", "Blocks in flight, for each thread [32]", |job, value| {
        job.iodepth = number(value)?;
        Ok(())
    }),
    key!(
        "batch" | "iodepth-batch",
        LOAD,
        "N",
        "Blocks of one task, or keys of one lookup [1]",
        |job, value| {
            job.batch = number(value)?;
            Ok(())
        }
    ),
    key!("numjobs", LOAD, "N", "Threads that run this job, on one store [1]", |job, value| {
        job.numjobs = number(value)?;
        Ok(())
    }),
    key!(
        "rate",
        LOAD,
        "BYTES",
        "Open loop: bytes a second that arrive whether or not the store keeps up; latency counts from the arrival",
        |job, value| {
            job.rate = Some(size(value)? as f64);
            Ok(())
        }
    ),
    key!("rate-blocks" | "rate-iops", LOAD, "N", "Open loop: blocks a second", |job, value| {
        job.rate_blocks = Some(count(value)? as f64);
        Ok(())
    }),
    key!(
        "rate-process",
        LOAD,
        "KIND",
        "poisson or linear gaps between arrivals [poisson]",
        |job, value| {
            job.rate_process = match value {
                "poisson" => RateProcess::Poisson,
                "linear" => RateProcess::Linear,
                _ => return Err(format!("`{value}` is neither poisson nor linear")),
            };
            Ok(())
        }
    ),
    key!(
        "rwmixload" | "rwmixread",
        LOAD,
        "PERCENT",
        "Share of loads in rw=mixed [50]",
        |job, value| {
            job.rwmixload = percent(value)?;
            Ok(())
        }
    ),
    key!(
        "hit",
        LOAD,
        "PERCENT",
        "Share of the looked-up keys that are present [50]",
        |job, value| {
            job.hit = percent(value)?;
            Ok(())
        }
    ),
    key!(
        "insert-rate",
        LOAD,
        "N",
        "Blocks a second that another thread saves during lookups [0]",
        |job, value| {
            job.insert_rate = count(value)? as f64;
            Ok(())
        }
    ),
    key!(
        "writers",
        LOAD,
        "N",
        "Other stores, in a process of their own, that have the namespace open [0]",
        |job, value| {
            job.writers = number(value)?;
            Ok(())
        }
    ),
    switch!(
        "register",
        LOAD,
        "Register the job's memory with the store: no staging copy",
        register
    ),
    switch!(
        "warm-cache",
        LOAD,
        "Measure hits of the Cache tier: do not reopen the store between layout and loads",
        warm_cache
    ),
    store_key!(
        "pipeline",
        "store_pipeline",
        "TIERS",
        "Cache|Posix, Posix, Cache|Empty, Empty [Cache|Posix]"
    ),
    key!("cache-size", STORE, "BYTES", "Arena of the store [256m]", |job, value| {
        let gb = size(value)? as f64 / (1_u64 << 30) as f64;
        job.set_store("cache_buffer_capacity_gb", gb.to_string());
        Ok(())
    }),
    store_key!("io-engine" | "ioengine", "io_engine", "KIND", "auto, io_uring, psync [auto]"),
    key!(
        "io-direct" | "direct",
        STORE,
        "KIND",
        "auto, true, false; 1 and 0 as in fio [auto]",
        |job, value| {
            job.set_store(
                "io_direct",
                match value {
                    "1" => "true",
                    "0" => "false",
                    other => other,
                },
            );
            Ok(())
        }
    ),
    store_key!("io-threads", "io_threads", "N", "Reactors [1]"),
    store_key!("io-queue-depth" | "io-depth", "io_depth", "N", "Depth of each reactor's ring"),
    store_key!("io-size-kb", "io_size_kb", "N", "Largest single I/O"),
    store_key!("durability", "durability", "KIND", "none, ordered, durable [none]"),
    store_key!("checksum", "checksum", "KIND", "full, off [full]"),
    store_key!("segment-size-mb", "segment_size_mb", "N", "Size of a segment file"),
    store_key!("timeout-ms", "timeout_ms", "N", "Deadline of a task [30000]"),
    key!(
        "device",
        STORE,
        "KIND",
        "Memory that blocks live in: host, cuda, ascend [host]",
        |job, value| {
            job.device = value.to_owned();
            Ok(())
        }
    ),
    key!("device-id", STORE, "N", "Ordinal of the device [0]", |job, value| {
        job.device_id = number(value)?;
        Ok(())
    }),
    key!(
        "option" | "o",
        STORE,
        "KEY=VALUE",
        "Any other setting of the store, by its YAML key; may be repeated",
        |job, value| {
            let (key, value) =
                value.split_once('=').ok_or_else(|| format!("`{value}` is not KEY=VALUE"))?;
            job.set_store(key.trim(), value.trim());
            Ok(())
        }
    ),
];

/// Finds a setting by any of its names.
pub fn find(name: &str) -> Result<&'static Key, String> {
    let name = name.trim().replace('_', "-").to_ascii_lowercase();
    KEYS.iter().find(|key| key.name == name || key.aliases.contains(&name.as_str())).ok_or_else(
        || {
            let nearest = KEYS
                .iter()
                .max_by(|a, b| {
                    strsim::jaro_winkler(a.name, &name)
                        .total_cmp(&strsim::jaro_winkler(b.name, &name))
                })
                .map_or("", |key| key.name);
            format!("unknown setting `{name}`; did you mean `{nearest}`?")
        },
    )
}

/// Applies `name=value`; the message of a refusal names the setting.
pub fn apply(job: &mut Job, name: &str, value: &str) -> Result<(), String> {
    let key = find(name)?;
    (key.set)(job, value.trim()).map_err(|message| format!("{}: {message}", key.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: fio's spellings work, and a value that makes no sense is refused under the setting's name.
    #[test]
    fn fio_spellings() {
        let mut job = Job::default();
        for (name, value) in [
            ("bs", "4m"),
            ("rw", "randload"),
            ("direct", "1"),
            ("io_engine", "psync"),
            ("iodepth", "8"),
        ] {
            apply(&mut job, name, value).unwrap();
        }
        assert_eq!((job.block_size, job.iodepth, job.rw), (4 << 20, 8, Workload::RandLoad));
        assert_eq!(job.store_setting("io_engine"), Some("psync"));
        assert!(apply(&mut job, "iodepth", "deep").unwrap_err().starts_with("iodepth"));
        assert!(apply(&mut job, "iodeth", "1").unwrap_err().contains("`iodepth`"));
        assert!(apply(&mut job, "rw", "read").unwrap_err().contains("randload"));
    }

    /// Goal: no two settings share a name.
    #[test]
    fn names_are_unique() {
        let mut seen = std::collections::HashSet::new();
        for key in KEYS {
            for name in std::iter::once(&key.name).chain(key.aliases) {
                assert!(seen.insert(*name), "{name}");
            }
        }
    }
}

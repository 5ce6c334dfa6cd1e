//! The bound on the bytes of a namespace: how many segments of it take, and whether another one fits.
//!
//! Counts bytes only; who frees some is `reclaim`.

#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::posix::segment::over_capacity;

/// Bytes of the namespace's segments against their bound.
pub struct Capacity {
    limit: Option<u64>,
    used: AtomicU64,
    alarm: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Capacity {
    /// A bound, or none.
    pub fn new(limit: Option<u64>) -> Self {
        Self { limit, used: AtomicU64::new(0), alarm: OnceLock::new() }
    }

    /// `alarm` is called whenever a segment does not fit.
    pub fn set_alarm(&self, alarm: impl Fn() + Send + Sync + 'static) {
        let _ = self.alarm.set(Box::new(alarm));
    }

    /// The bound.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Bytes in use, as last counted and changed since.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Sets what a walk over all segments has counted.
    pub fn set(&self, bytes: u64) {
        self.used.store(bytes, Ordering::Relaxed);
    }

    /// Takes `bytes` for a new segment; `NoSpace` where that is over the bound.
    pub fn take(&self, bytes: u64) -> Result<()> {
        let Some(limit) = self.limit else {
            self.used.fetch_add(bytes, Ordering::Relaxed);
            return Ok(());
        };
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(()),
            Err(_) => {
                if let Some(alarm) = self.alarm.get() {
                    alarm();
                }
                Err(over_capacity(limit))
            }
        }
    }

    /// Gives `bytes` back.
    pub fn give(&self, bytes: u64) {
        let sub = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sub);
    }
}

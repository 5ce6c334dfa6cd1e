//! The Posix tier: segments, manifests and the index over them, in every storage backend.
//! (Signatures only: the tier itself lands next.)
#![allow(missing_docs)]
use crate::{block::*, config::*, error::*, io::backend::Backend, io::*};
use std::{ops::Range, sync::Arc, time::*};
#[derive(Clone, Copy, Debug)]
pub struct Found {
    pub location: Location,
    pub checksum: u64,
}
#[derive(Clone, Copy, Debug)]
pub struct Location {
    pub segment: u32,
    pub page: u32,
}
pub struct Extent;
pub struct Tier;
#[derive(Clone, Debug)]
pub struct TierStats;
pub struct TierConfig {
    pub segment_bytes: u64,
    pub durability: Durability,
    pub checksum: Checksum,
    pub lookup_refresh: Duration,
    pub timeout: Duration,
    pub lease: Duration,
    pub capacity_bytes: Option<u64>,
    pub gc: GcConfig,
}
pub struct Scope {
    pub parts: Range<u16>,
    pub tail: Tail,
}
pub enum Tail {
    Own,
    All,
}
impl Tier {
    pub fn open(
        _n: &Namespace,
        _s: Scope,
        _b: Vec<Arc<Backend>>,
        _c: TierConfig,
        _d: Instant,
    ) -> Result<Arc<Tier>> {
        Ok(Arc::new(Tier))
    }
    pub fn find(&self, _k: &PartKey) -> Option<Found> {
        None
    }
    pub fn contains_block(&self, _b: &BlockId) -> bool {
        false
    }
    pub fn widen(&self) {}
    pub fn refresh(&self, d: Done) {
        d(Ok(()))
    }
    pub fn refresh_age(&self) -> Duration {
        Duration::ZERO
    }
    pub fn read(
        &self,
        _k: &PartKey,
        _f: &Found,
        _r: Range<u64>,
        _p: Vec<DmaSlice>,
        _c: Class,
        _e: Option<Instant>,
        _d: Done,
    ) {
    }
    /// # Safety
    /// The memory is valid.
    pub unsafe fn verify(&self, _k: &PartKey, _f: &Found, _p: &[DmaSlice]) -> Result<()> {
        Ok(())
    }
    pub fn read_failed(
        &self,
        _k: &PartKey,
        _f: &Found,
        e: Error,
        d: Box<dyn FnOnce(Error) + Send>,
    ) {
        d(e)
    }
    pub fn reserve(
        &self,
        _k: &PartKey,
        _e: Option<Instant>,
        d: Box<dyn FnOnce(Result<Extent>) + Send>,
    ) {
        d(Ok(Extent))
    }
    /// # Safety
    /// The memory is valid.
    pub unsafe fn seal(&self, _e: &Extent, _p: &[DmaSlice], _s: u64, _t: *mut u8) {}
    pub fn write(&self, _e: Extent, _p: Vec<DmaSlice>, _c: Class, _x: Option<Instant>, _d: Done) {}
    pub fn close(&self, _d: Instant) {}
    pub fn stats(&self) -> TierStats {
        TierStats
    }
}

//! Caller memory that was registered: where the engine may point the drive, and how many operations do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;

use super::engine::Engine;
use crate::block::PAGE;
use crate::error::{Error, ErrorKind, Result};

struct Region {
    base: usize,
    length: usize,
    users: Arc<AtomicUsize>,
}

/// Registered regions, disjoint.
#[derive(Default)]
pub(super) struct Regions(RwLock<Vec<Region>>);

/// Keeps regions from being unregistered while an operation uses them.
pub(super) struct Claim(Vec<Arc<AtomicUsize>>);

impl Drop for Claim {
    fn drop(&mut self) {
        for users in &self.0 {
            users.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Regions {
    pub(super) fn is_empty(&self) -> bool {
        self.0.read().is_empty()
    }

    /// Claims the regions that hold these ranges; `None` where one of them is not registered whole.
    pub(super) fn claim(&self, ranges: impl Iterator<Item = (usize, usize)>) -> Option<Claim> {
        let regions = self.0.read();
        let mut claim = Claim(Vec::new());
        for (address, length) in ranges {
            let end = address.checked_add(length)?;
            let region =
                regions.iter().find(|it| it.base <= address && end <= it.base + it.length)?;
            region.users.fetch_add(1, Ordering::AcqRel);
            claim.0.push(Arc::clone(&region.users));
        }
        Some(claim)
    }

    fn add(&self, base: usize, length: usize) -> Result<()> {
        let mut regions = self.0.write();
        if let Some(other) =
            regions.iter().find(|it| base < it.base + it.length && it.base < base + length)
        {
            let text = format!(
                "base: {base:#x}..{:#x} overlaps memory registered at {:#x}; unregister that first",
                base + length,
                other.base
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        regions.push(Region { base, length, users: Arc::default() });
        Ok(())
    }

    /// Returns the length.
    fn remove(&self, base: usize) -> Result<usize> {
        let mut regions = self.0.write();
        let Some(index) = regions.iter().position(|it| it.base == base) else {
            let text = format!("base: no memory is registered at {base:#x}");
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        };
        let users = regions[index].users.load(Ordering::Acquire);
        if users > 0 {
            let text =
                format!("base: {users} operations use the memory at {base:#x}; wait for RELEASED");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        Ok(regions.swap_remove(index).length)
    }
}

impl Engine {
    pub(super) fn register_memory(&self, base: *mut u8, length: usize) -> Result<()> {
        let address = base.addr();
        let bad = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
        if base.is_null() || length == 0 || address.checked_add(length).is_none() {
            return bad(format!("base, length: {address:#x}, {length} is not a range of memory"));
        }
        if !address.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
            return bad(format!(
                "base, length: {address:#x}, {length} are not multiples of {PAGE}"
            ));
        }
        if !self.device.is_host() {
            let text = "only host memory can be registered; there is no direct path from the drive to device memory";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        self.regions.add(address, length)?;
        for backend in &self.backends {
            if let Err(error) = backend.register_memory(base, length) {
                let _ = self.regions.remove(address);
                for backend in &self.backends {
                    let _ = backend.unregister_memory(base);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn unregister_memory(&self, base: *mut u8) -> Result<()> {
        let length = self.regions.remove(base.addr())?;
        let mut outcome = Ok(());
        for backend in &self.backends {
            match backend.unregister_memory(base) {
                // It was this one's turn in an earlier try already.
                Err(error) if error.kind() == ErrorKind::InvalidArgument => {}
                Err(error) => outcome = Err(error),
                Ok(()) => {}
            }
        }
        // What a backend still knows can be tried again, and must not be registered twice meanwhile.
        outcome.inspect_err(|_: &Error| drop(self.regions.add(base.addr(), length)))
    }
}

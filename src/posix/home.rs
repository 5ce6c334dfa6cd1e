//! A home: the folder of the namespace in one storage backend, and what all homes of a tier share.
//!
//! Owns paths and numbers; knows no manifest and no segment by content.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::block::{Namespace, PAGE, PartKey};
use crate::config::{Checksum, Durability, GcConfig};
use crate::error::Result;
use crate::io::backend::Backend;
use crate::io::{Access, Create, OpenHow};
use crate::posix::catalog::extent_pages;
use crate::posix::checksum::Identity;
use crate::posix::description;
use crate::posix::format::ProcessIdentity;
use crate::posix::names::{MANIFESTS, SEGMENTS};

/// What a tier is told about itself.
#[derive(Clone, Debug)]
pub struct TierConfig {
    /// Size of a segment file; rounded to whole extents.
    pub segment_bytes: u64,
    /// What PERSISTED promises.
    pub durability: Durability,
    /// Whether parts are verified.
    pub checksum: Checksum,
    /// How stale the index may be.
    pub lookup_refresh: Duration,
    /// Deadline of a task.
    pub timeout: Duration,
    /// After this time without a sign of life a writer counts as dead.
    pub lease: Duration,
    /// Bound on the bytes of the namespace in its backends.
    pub capacity_bytes: Option<u64>,
    /// When and how far to reclaim.
    pub gc: GcConfig,
}

/// Numbers that all homes share.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Fingerprint of the namespace.
    pub fingerprint: [u8; 16],
    /// Bytes of a part.
    pub part_bytes: u64,
    /// Parts of a block.
    pub part_count: u16,
    /// Parts that this store saves.
    pub parts: Range<u16>,
    /// The configuration.
    pub config: TierConfig,
    /// This process.
    pub process: ProcessIdentity,
}

impl Layout {
    /// Pages of an extent.
    pub fn extent_pages(&self) -> u32 {
        extent_pages(self.part_bytes)
    }

    /// Bytes of an extent: padded payload and trailer.
    pub fn extent_bytes(&self) -> u64 {
        u64::from(self.extent_pages()) * PAGE as u64
    }

    /// What the checksum of `key` in a segment of `generation` is bound to.
    pub fn identity(&self, key: &PartKey, generation: u32) -> Identity {
        Identity { fingerprint: self.fingerprint, key: *key, generation }
    }

    /// Bytes of the largest segments.
    pub fn segment_bytes_max(&self) -> u64 {
        PAGE as u64 + u64::from(self.extents_of(u32::MAX)) * self.extent_bytes()
    }

    /// Extents of segment `number`: the first ones of a writer are smaller, so that a store that saves
    /// little takes little, and tests and small disks work as they are.
    pub fn extents_of(&self, number: u32) -> u32 {
        let full = (self.config.segment_bytes.saturating_sub(PAGE as u64) / self.extent_bytes())
            .clamp(1, u64::from(u32::MAX / self.extent_pages()) - 1);
        let first = (full >> RAMP_STEPS).max(FIRST_SEGMENT_BYTES / self.extent_bytes()).max(1);
        (first << number.min(RAMP_STEPS)).min(full) as u32
    }
}

/// The first segment has this power of two less room than a full one.
const RAMP_STEPS: u32 = 4;
/// But at least this.
const FIRST_SEGMENT_BYTES: u64 = 8 << 20;

/// The folder of the namespace in one backend.
pub struct Home {
    /// Place of the backend in the configuration.
    pub number: u16,
    /// The backend.
    pub backend: Arc<Backend>,
    /// What it is the home of.
    pub namespace: Namespace,
    /// Shared numbers.
    pub layout: Arc<Layout>,
    /// Where manifests are.
    pub manifests: PathBuf,
    /// Where segments are.
    pub segments: PathBuf,
}

impl Home {
    /// The home of `namespace` in `backend`. Touches no file.
    pub fn new(
        number: u16,
        backend: Arc<Backend>,
        namespace: &Namespace,
        layout: Arc<Layout>,
    ) -> Self {
        let folder = backend.directory().join(namespace.folder());
        Self {
            number,
            manifests: folder.join(MANIFESTS),
            segments: folder.join(SEGMENTS),
            namespace: namespace.clone(),
            backend,
            layout,
        }
    }

    /// Creates the folders and says in plain words what they are for. Blocks; on a path pool only.
    pub fn create_folders(&self) -> Result<()> {
        let files = self.backend.files();
        files.create_dir_all(&self.manifests)?;
        files.create_dir_all(&self.segments)?;
        description::write_once(self, &self.namespace)?;
        // Whoever made them may have died before they were flushed.
        if self.layout.config.durability == Durability::Durable && !self.layout.parts.is_empty() {
            self.folder().map_or(Ok(()), |folder| files.sync_dir(folder))?;
            files.sync_dir(self.backend.directory())?;
        }
        Ok(())
    }

    /// The folder of the namespace.
    pub fn folder(&self) -> Option<&Path> {
        self.manifests.parent()
    }

    /// Whether files of this home bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.backend.is_direct()
    }

    /// How an existing file is opened.
    pub fn open_how(&self, access: Access) -> OpenHow {
        OpenHow { access, create: Create::No, direct: self.is_direct() }
    }

    /// Whether a held descriptor sees what other nodes append: a direct one does, a buffered one only on a
    /// local file system.
    pub fn can_hold(&self) -> bool {
        self.is_direct() || self.backend.is_local()
    }
}

//! What the tier tells about itself.

#![forbid(unsafe_code)]

use std::path::PathBuf;

/// One backend, as the tier sees it.
#[derive(Clone, Debug, Default)]
pub struct BackendStats {
    /// Its directory.
    pub directory: PathBuf,
    /// Whether files bypass the page cache.
    pub direct: bool,
    /// Whether manifests are read on held descriptors; if not they are opened at every refresh.
    pub holds_manifests: bool,
    /// Why it takes no saves now, if so.
    pub failure: Option<String>,
}

/// Counts of a tier, all since it was opened or as of now.
#[derive(Clone, Debug, Default)]
pub struct TierStats {
    /// Parts that can be found.
    pub parts: u64,
    /// Memory of the index.
    pub index_bytes: u64,
    /// Segments that are known and not retired.
    pub segments: u64,
    /// Bytes of the namespace's segments, as last counted.
    pub segment_bytes: u64,
    /// Their bound.
    pub capacity_bytes: Option<u64>,
    /// Open segment files.
    pub open_files: u64,
    /// Manifests of other writers that are known.
    pub writers: u64,
    /// Those among them that may still grow.
    pub live_writers: u64,
    /// Records that failed their checksum or stood in the wrong place.
    pub bad_records: u64,
    /// Records of parts that do not fit the namespace.
    pub misfit_records: u64,
    /// Extents that failed verification.
    pub quarantined: u64,
    /// Rounds of refreshing.
    pub refreshes: u64,
    /// Homes that a round left behind because they did not answer.
    pub refreshes_left_behind: u64,
    /// Times that a manifest could not be read.
    pub manifests_unreadable: u64,
    /// The backends.
    pub backends: Vec<BackendStats>,
}

//! What is stored: block ids, the geometry of a block in a store, and the namespace that says which
//! servers share.
//!
//! Knows no file, no device and no configuration text.

#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};

/// Every offset and length in a segment or a manifest is a multiple of this, whatever `statx` says.
pub const PAGE: usize = 4096;

/// The most parts a block may have (tensor-parallel ranks of one model instance).
pub const PART_COUNT_MAX: u32 = 1024;

/// The largest part, in bytes. A part's length is stored in 32 bits.
pub const PART_BYTES_MAX: u64 = 1 << 31;

/// The name of a block: the chained hash of its tokens and of everything before them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(transparent)]
pub struct BlockId(pub [u8; 16]);

impl std::fmt::Debug for BlockId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Display for BlockId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// The number of a promise to save blocks, chosen by whoever promises. A block that was promised twice may be
/// given up under the one promise and come under the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Promise(pub u64);

impl Promise {
    /// No promise in particular: all of them where a block is given up, any of them where somebody asks.
    pub const ANY: Self = Self(0);
}

/// One part of one block: what an extent and a slot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PartKey {
    /// The block.
    pub block: BlockId,
    /// Which of its parts, below the namespace's `part_count`.
    pub part: u16,
}

/// One tensor slice of a shard: a run of bytes, repeated along dimensions with strides.
///
/// The saved bytes of the slice are its runs in order, the outermost dimension first; in device memory
/// run `(i, j, ..)` begins at `base + i * stride_0 + j * stride_1 + ..`. No dimensions: one contiguous run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceShape {
    /// Bytes that are contiguous in device memory.
    pub run_bytes: u64,
    /// `(count, stride in bytes)`, outermost first. The product of the counts times `run_bytes` is the
    /// length of the slice in the shard.
    pub dimensions: Vec<(u64, u64)>,
}

impl SliceShape {
    /// A contiguous slice.
    pub fn contiguous(bytes: u64) -> Self {
        Self { run_bytes: bytes, dimensions: Vec::new() }
    }

    /// Length of the slice in the shard, in bytes.
    pub fn bytes(&self) -> u64 {
        self.dimensions
            .iter()
            .fold(self.run_bytes, |bytes, (count, _)| bytes.saturating_mul(*count))
    }

    /// Bytes of device memory from the base address to the end of the last run.
    pub fn span(&self) -> u64 {
        self.dimensions.iter().fold(self.run_bytes, |span, (count, stride)| {
            span.saturating_add(stride.saturating_mul(count.saturating_sub(1)))
        })
    }

    /// Whether the slice is one run.
    pub fn is_contiguous(&self) -> bool {
        self.dimensions.is_empty()
    }
}

/// How the bytes of a block are cut, seen from one store.
///
/// The parts that a store owns lie end to end; a shard is slice `index` of `shard_bytes` of that run. A
/// shard lies inside one part, or covers whole parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one part, the same for all parts of the namespace.
    pub part_bytes: u64,
    /// Parts of a block.
    pub part_count: u32,
    /// First part that this store saves and loads.
    pub part_index: u32,
    /// How many parts it owns.
    pub parts_owned: u32,
    /// Bytes of one shard.
    pub shard_bytes: u64,
    /// The tensor slices of one shard, in the order of their bytes; each shard has the same.
    pub slices: Vec<SliceShape>,
}

impl Geometry {
    /// Bytes of the parts this store owns (`block_size`).
    pub fn owned_bytes(&self) -> u64 {
        self.part_bytes * u64::from(self.parts_owned)
    }

    /// Shards of the owned parts: shard indexes are below this.
    pub fn shard_count(&self) -> u32 {
        (self.owned_bytes() / self.shard_bytes) as u32
    }

    /// Shards of one part; 1 where a shard covers one part or more.
    pub fn shards_per_part(&self) -> u32 {
        (self.part_bytes / self.shard_bytes).max(1) as u32
    }

    /// Whether a part is transferred in more than one shard.
    pub fn is_layerwise(&self) -> bool {
        self.shards_per_part() > 1
    }

    /// Bytes of a part in a slot and in a segment, up to its trailer page.
    pub fn payload_bytes(&self) -> u64 {
        self.part_bytes.next_multiple_of(PAGE as u64)
    }

    /// Bytes of an extent and of a slot: payload and one trailer page.
    pub fn extent_bytes(&self) -> u64 {
        self.payload_bytes() + PAGE as u64
    }

    /// Checks the numbers against each other; every message names the option to change.
    pub fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(Error::new(ErrorKind::InvalidConfig, message));
        if self.part_bytes == 0 || self.part_bytes > PART_BYTES_MAX {
            return bad(format!(
                "block_size: a part has {} bytes; allowed are 1 to {PART_BYTES_MAX}",
                self.part_bytes
            ));
        }
        if self.part_count == 0 || self.part_count > PART_COUNT_MAX {
            return bad(format!("part_count: {} is not in 1 to {PART_COUNT_MAX}", self.part_count));
        }
        if self.parts_owned == 0
            || u64::from(self.part_index) + u64::from(self.parts_owned) > u64::from(self.part_count)
        {
            return bad(format!(
                "part_index {} with parts_owned {} does not lie inside part_count {}",
                self.part_index, self.parts_owned, self.part_count
            ));
        }
        if self.shard_bytes == 0 || !self.owned_bytes().is_multiple_of(self.shard_bytes) {
            return bad(format!(
                "shard_size: {} does not divide block_size {}",
                self.shard_bytes,
                self.owned_bytes()
            ));
        }
        if !self.part_bytes.is_multiple_of(self.shard_bytes)
            && !self.shard_bytes.is_multiple_of(self.part_bytes)
        {
            return bad(format!(
                "shard_size: {} neither divides a part of {} bytes (block_size / parts_owned) nor covers whole parts",
                self.shard_bytes, self.part_bytes
            ));
        }
        if self.is_layerwise() && !self.shard_bytes.is_multiple_of(PAGE as u64) {
            return bad(format!(
                "shard_size: {} is not a multiple of {PAGE}, which layer-wise transfers need",
                self.shard_bytes
            ));
        }
        let sliced: u64 = self.slices.iter().map(SliceShape::bytes).fold(0, u64::saturating_add);
        if sliced != self.shard_bytes {
            return bad(format!(
                "tensor_size_list: the slices have {sliced} bytes together, shard_size is {}",
                self.shard_bytes
            ));
        }
        Ok(())
    }
}

/// What must agree for servers to share KV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Fingerprint of the model, by whoever opens the store.
    pub model_id: String,
    /// Element type of the KV cache.
    pub dtype: String,
    /// Tokens of a block; 0 where the caller did not say.
    pub block_tokens: u32,
    /// Anything else that decides content.
    pub extra: String,
    /// Parts of a block.
    pub part_count: u32,
    /// Bytes of a part.
    pub part_bytes: u64,
    /// Name of the order of bytes inside a part.
    pub order: String,
}

/// Major version of the format on storage; part of every fingerprint.
pub const FORMAT_MAJOR: u32 = 1;

impl Namespace {
    /// Hash of everything that decides content, without the byte order: equal for servers that could
    /// share after a conversion.
    pub fn logical_fingerprint(&self) -> [u8; 16] {
        let mut hasher =
            blake3::Hasher::new_derive_key("ucm 2026 namespace logical fingerprint v1");
        hasher.update(&FORMAT_MAJOR.to_le_bytes());
        for text in [&self.model_id, &self.dtype, &self.extra] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.update(&self.block_tokens.to_le_bytes());
        hasher.update(&self.part_count.to_le_bytes());
        hasher.update(&self.part_bytes.to_le_bytes());
        truncate(&hasher)
    }

    /// Hash of the logical fingerprint and the byte order: seeds every checksum.
    pub fn fingerprint(&self) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_derive_key("ucm 2026 namespace fingerprint v1");
        hasher.update(&self.logical_fingerprint());
        hasher.update(self.order.as_bytes());
        truncate(&hasher)
    }

    /// Name of the namespace's folder in each storage backend.
    pub fn folder(&self) -> String {
        let hex: String =
            self.logical_fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("ucm{FORMAT_MAJOR}-{hex}-{}", self.order)
    }
}

fn truncate(hasher: &blake3::Hasher) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    out
}

//! The checksum of a part: XXH3-64, seeded with what the bytes are claimed to be.
//!
//! Right bytes under a wrong name (another block, part, namespace or generation of a segment) fail like
//! wrong bytes do. Knows no file; reads the memory it is given.

use crate::block::{BlockId, PAGE, PartKey};
use crate::io::DmaSlice;
use crate::posix::format::{NO_CHECKSUM, TRAILER_SHARDS_MAX};
use twox_hash::xxhash3_64::Hasher;

/// What a checksum is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Fingerprint of the namespace.
    pub fingerprint: [u8; 16],
    /// The part.
    pub key: PartKey,
    /// Generation of the segment that holds it.
    pub generation: u32,
}

/// Checksums of a part and of the units it was written in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartChecksums {
    /// Of the whole part.
    pub part: u64,
    /// Bytes of a unit.
    pub unit_bytes: u64,
    /// One a unit; empty where the part is one unit.
    pub units: Vec<u64>,
}

impl Identity {
    fn seed(&self, unit: u32) -> u64 {
        let BlockId(block) = self.key.block;
        let mut bytes = [0; 42];
        bytes[..16].copy_from_slice(&block);
        bytes[16..32].copy_from_slice(&self.fingerprint);
        bytes[32..34].copy_from_slice(&self.key.part.to_le_bytes());
        bytes[34..38].copy_from_slice(&self.generation.to_le_bytes());
        bytes[38..].copy_from_slice(&unit.to_le_bytes());
        Hasher::oneshot(&bytes)
    }

    /// Checksum of a whole part of `bytes` bytes that lies in `pieces`, end to end (padding may follow).
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile.
    pub unsafe fn part(&self, pieces: &[DmaSlice], bytes: u64) -> u64 {
        // SAFETY: as promised by the caller.
        unsafe { hash(self.seed(PART_UNIT), pieces, 0, bytes) }
    }

    /// Checksum of a whole part that lies in ordinary memory.
    pub fn part_in(&self, bytes: &[u8]) -> u64 {
        nonzero(Hasher::oneshot_with_seed(self.seed(PART_UNIT), bytes))
    }

    /// Checksum of unit `unit`, which begins `skip` bytes into `pieces`.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile.
    pub unsafe fn unit(&self, unit: u32, pieces: &[DmaSlice], skip: u64, bytes: u64) -> u64 {
        // SAFETY: as promised by the caller.
        unsafe { hash(self.seed(unit), pieces, skip, bytes) }
    }

    /// All checksums of a part that is written in shards of `shard_bytes`.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile.
    pub unsafe fn all(
        &self,
        pieces: &[DmaSlice],
        part_bytes: u64,
        shard_bytes: u64,
    ) -> PartChecksums {
        let unit_bytes = unit_bytes(part_bytes, shard_bytes);
        // SAFETY: as promised by the caller.
        let part = unsafe { self.part(pieces, part_bytes) };
        let count = part_bytes.div_ceil(unit_bytes);
        let units = match count {
            1 => Vec::new(),
            _ => (0..count)
                .map(|unit| {
                    let skip = unit * unit_bytes;
                    let bytes = unit_bytes.min(part_bytes - skip);
                    // SAFETY: as promised by the caller.
                    unsafe { self.unit(unit as u32, pieces, skip, bytes) }
                })
                .collect(),
        };
        PartChecksums { part, unit_bytes, units }
    }
}

/// The unit number that stands for the whole part.
const PART_UNIT: u32 = u32::MAX;

/// Bytes that one checksum of the trailer covers: a shard, or as many as it takes for all to fit in a page.
/// A shard size that is no page multiple (never layer-wise) makes the part one unit.
pub fn unit_bytes(part_bytes: u64, shard_bytes: u64) -> u64 {
    if shard_bytes == 0 || shard_bytes >= part_bytes || !shard_bytes.is_multiple_of(PAGE as u64) {
        return part_bytes;
    }
    let shards = part_bytes.div_ceil(shard_bytes);
    shard_bytes * shards.div_ceil(TRAILER_SHARDS_MAX as u64)
}

/// Hashes `bytes` bytes from `skip` on. Zero is kept for "no checksum", so it reads as one.
///
/// # Safety
/// The pieces are valid for reading and nobody writes them meanwhile.
unsafe fn hash(seed: u64, pieces: &[DmaSlice], skip: u64, bytes: u64) -> u64 {
    let mut skip = skip as usize;
    let mut left = bytes as usize;
    let mut streamed: Option<Hasher> = None;
    for piece in pieces {
        if skip >= piece.length {
            skip -= piece.length;
            continue;
        }
        let take = (piece.length - skip).min(left);
        // SAFETY: `skip + take` is at most the piece's length, and the caller vouches for the piece.
        let slice =
            unsafe { std::slice::from_raw_parts(piece.pointer.add(skip).cast_const(), take) };
        if take == left && streamed.is_none() {
            return nonzero(Hasher::oneshot_with_seed(seed, slice));
        }
        let hasher = streamed.get_or_insert_with(|| Hasher::with_seed(seed));
        std::hash::Hasher::write(hasher, slice);
        skip = 0;
        left -= take;
        if left == 0 {
            break;
        }
    }
    // Fewer bytes than asked for can match no checksum that was taken of all of them.
    match (left, streamed) {
        (0, Some(hasher)) => nonzero(std::hash::Hasher::finish(&hasher)),
        _ => NO_CHECKSUM,
    }
}

fn nonzero(hash: u64) -> u64 {
    if hash == NO_CHECKSUM { 1 } else { hash }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let key = PartKey { block: BlockId([1; 16]), part: 2 };
        Identity { fingerprint: [3; 16], key, generation: 4 }
    }

    fn slices(bytes: &mut [u8], cuts: &[usize]) -> Vec<DmaSlice> {
        let mut at = 0;
        let mut out = Vec::new();
        for end in cuts.iter().copied().chain([bytes.len()]) {
            out.push(DmaSlice { pointer: bytes[at..].as_mut_ptr(), length: end - at });
            at = end;
        }
        out
    }

    /// However a part is cut into pieces of memory, its checksum is the same; padding does not count.
    #[test]
    fn pieces_do_not_matter() {
        let mut bytes: Vec<u8> = (0..40_000u32).map(|i| (i * 7) as u8).collect();
        let id = identity();
        let one = slices(&mut bytes, &[]);
        let many = slices(&mut bytes, &[1, 4096, 5000, 20_000]);
        // SAFETY: `bytes` lives to the end of the test and is not written.
        unsafe {
            assert_eq!(id.part(&one, 39_000), id.part(&many, 39_000));
            assert_ne!(id.part(&one, 39_000), id.part(&many, 38_999));
            assert_eq!(id.unit(1, &one, 4096, 8192), id.unit(1, &many, 4096, 8192));
            assert_ne!(id.unit(1, &one, 4096, 8192), id.unit(2, &many, 4096, 8192));
            assert_eq!(id.part(&one, 40_001), NO_CHECKSUM);
            let whole = id.part(&many, 40_000);
            assert_eq!(whole, id.part_in(&bytes));
        }
    }

    /// The same bytes under another block, part, fingerprint or generation have another checksum.
    #[test]
    fn checksums_are_bound_to_identity() {
        let mut bytes = vec![5; 8192];
        let pieces = slices(&mut bytes, &[]);
        let id = identity();
        let other_key = |block, part| Identity { key: PartKey { block, part }, ..id };
        let others = [
            other_key(BlockId([2; 16]), 2),
            other_key(BlockId([1; 16]), 3),
            Identity { fingerprint: [4; 16], ..id },
            Identity { generation: 5, ..id },
        ];
        // SAFETY: `bytes` lives to the end of the test and is not written.
        unsafe {
            let sum = id.part(&pieces, 8192);
            others.iter().for_each(|other| assert_ne!(other.part(&pieces, 8192), sum));
        }
    }

    /// However many shards a part has, their checksums fit in one trailer page.
    #[test]
    fn units_fit_in_a_page() {
        for shards in [1, 2, 61, 496, 497, 5000] {
            let part = shards * 4096;
            let unit = unit_bytes(part, 4096);
            assert!(part.div_ceil(unit) <= TRAILER_SHARDS_MAX as u64 && unit.is_multiple_of(4096));
        }
        assert_eq!(unit_bytes(1000, 100), 1000);
        assert_eq!(unit_bytes(4096 * 61, 4096), 4096);
    }

    /// Pinned values: the checksum is part of the format and may never change.
    #[test]
    fn checksum_is_pinned() {
        let mut bytes: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
        let pieces = slices(&mut bytes, &[]);
        // SAFETY: `bytes` lives to the end of the test and is not written.
        let sums = unsafe { identity().all(&pieces, 8192, 4096) };
        assert_eq!(format!("{:016x} {:016x?}", sums.part, sums.units), PINNED);
    }
    /// Taken once; both numbers would have to stay the same in any other implementation.
    const PINNED: &str = "53c5ba53ead63409 [c9b97d0c523b419b, 1b97ca14d32e0fe2]";
}

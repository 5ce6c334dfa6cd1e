//! The checksum of a part: XXH3-64, seeded with what the bytes are claimed to be.
//!
//! Right bytes under a wrong name (another block, part, namespace or generation of a segment) fail like
//! wrong bytes do. Knows no file; reads the memory it is given.

use crate::block::{BlockId, PAGE, PartKey};
use crate::io::DmaSlice;
use crate::mem::runs::Runs;
use crate::mem::stream::RUN_MIN;
use crate::posix::format::{NO_CHECKSUM, TRAILER_SHARDS_MAX};
use crate::xxh3::{Sink, Xxh3};
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

/// Bytes of a part whose checksum is wanted, from whoever can read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// From the first byte of the part.
    pub from: u64,
    /// Bytes.
    pub bytes: u64,
    /// Seed of the XXH3-64.
    pub seed: u64,
}

/// A checksum that bytes of a part must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The bytes.
    pub wanted: Wanted,
    sum: u64,
}

impl Claim {
    /// Whether bytes with this XXH3-64 are the right ones.
    pub fn holds(&self, hash: u64) -> bool {
        self.sum != NO_CHECKSUM && nonzero(hash) == self.sum
    }

    /// Whether the bytes that `pieces` begin with, end to end, are the right ones; copies them to `along` in the
    /// same pass.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile; the runs are valid for writing, and
    /// overlap no piece.
    pub unsafe fn holds_along(&self, pieces: &[DmaSlice], along: &mut Runs<'_>) -> bool {
        let Wanted { bytes, seed, .. } = self.wanted;
        // SAFETY: as promised by the caller.
        let hash = unsafe { hash(seed, pieces, bytes, along) };
        hash != NO_CHECKSUM && self.holds(hash)
    }
}

impl PartChecksums {
    /// Those of a part that is saved without.
    pub fn none(part_bytes: u64) -> Self {
        PartChecksums { part: NO_CHECKSUM, unit_bytes: part_bytes, units: Vec::new() }
    }

    /// Those of a part that is written in shards of `shard_bytes`, from the hashes that [`Identity::wanted`] asks
    /// for.
    ///
    /// # Panics
    /// If there is none.
    pub fn of_hashes(part_bytes: u64, shard_bytes: u64, hashes: &[u64]) -> Self {
        let (part, units) = hashes.split_first().expect("the first is that of the whole part");
        PartChecksums {
            part: nonzero(*part),
            unit_bytes: unit_bytes(part_bytes, shard_bytes),
            units: units.iter().map(|hash| nonzero(*hash)).collect(),
        }
    }
}

impl Identity {
    /// The bytes whose hashes make the checksums of a part that is written in shards of `shard_bytes`: the whole
    /// part first, then its units where it has several.
    pub fn wanted(&self, part_bytes: u64, shard_bytes: u64) -> Vec<Wanted> {
        let unit_bytes = unit_bytes(part_bytes, shard_bytes);
        let mut wanted = vec![Wanted { from: 0, bytes: part_bytes, seed: self.seed(PART_UNIT) }];
        let count = part_bytes.div_ceil(unit_bytes);
        if count > 1 {
            wanted.extend((0..count).map(|unit| {
                let from = unit * unit_bytes;
                let bytes = unit_bytes.min(part_bytes - from);
                Wanted { from, bytes, seed: self.seed(unit as u32) }
            }));
        }
        wanted
    }

    /// The checksum that a whole part must have.
    pub fn claim_part(&self, part_bytes: u64, sum: u64) -> Claim {
        Claim { wanted: Wanted { from: 0, bytes: part_bytes, seed: self.seed(PART_UNIT) }, sum }
    }

    /// The checksum that the unit which begins at `from` must have.
    pub fn claim_unit(&self, unit: u32, from: u64, bytes: u64, sum: u64) -> Claim {
        Claim { wanted: Wanted { from, bytes, seed: self.seed(unit) }, sum }
    }

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
        unsafe { self.part_along(pieces, bytes, &mut Runs::nowhere()) }
    }

    /// As [`Identity::part`]; copies the bytes to `along` in the same pass.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile; the runs are valid for writing, and
    /// overlap no piece.
    pub unsafe fn part_along(&self, pieces: &[DmaSlice], bytes: u64, along: &mut Runs<'_>) -> u64 {
        // SAFETY: as promised by the caller.
        unsafe { hash(self.seed(PART_UNIT), pieces, bytes, along) }
    }

    /// Checksum of a whole part that lies in ordinary memory.
    pub fn part_in(&self, bytes: &[u8]) -> u64 {
        nonzero(Hasher::oneshot_with_seed(self.seed(PART_UNIT), bytes))
    }

    /// Checksum of unit `unit` of `bytes` bytes, with which `pieces` begin; copies them to `along` in the same pass.
    ///
    /// # Safety
    /// As for [`Identity::part_along`].
    pub unsafe fn unit_along(
        &self,
        unit: u32,
        pieces: &[DmaSlice],
        bytes: u64,
        along: &mut Runs<'_>,
    ) -> u64 {
        // SAFETY: as promised by the caller.
        unsafe { hash(self.seed(unit), pieces, bytes, along) }
    }

    /// All checksums of a part that is written in shards of `shard_bytes`, in one pass over its bytes.
    ///
    /// # Safety
    /// The pieces are valid for reading and nobody writes them meanwhile.
    pub unsafe fn all(
        &self,
        pieces: &[DmaSlice],
        part_bytes: u64,
        shard_bytes: u64,
    ) -> PartChecksums {
        let mut sums = Sums::new(*self, part_bytes, shard_bytes);
        for (source, length) in stretches(pieces, part_bytes) {
            // SAFETY: as promised by the caller.
            unsafe { sums.feed(source, length, Sink::Nowhere) };
        }
        sums.finish()
    }

    /// As [`Identity::all`], of a part that one pass brings from `runs` to `staging` and hashes; it is one unit.
    ///
    /// # Safety
    /// The runs are valid for reading `part_bytes` bytes and `staging` for writing them; they do not overlap, and
    /// nobody writes the runs or touches `staging` meanwhile.
    ///
    /// # Panics
    /// Where the runs have fewer bytes.
    pub unsafe fn gathered(
        &self,
        runs: &mut Runs<'_>,
        staging: *mut u8,
        part_bytes: u64,
    ) -> PartChecksums {
        let mut sums = Sums::new(*self, part_bytes, part_bytes);
        let mut at = 0;
        while at < part_bytes as usize {
            let to = staging.wrapping_add(at);
            let left = part_bytes as usize - at;
            // SAFETY: as promised by the caller; `left` bytes of staging begin at `to`.
            at += unsafe { gather(&mut sums, runs, to, left) };
        }
        sums.finish()
    }
}

/// Brings some of the next `length` bytes to `staging` and adds them to the checksums; returns how many.
///
/// # Safety
/// As for [`Identity::gathered`].
unsafe fn gather(sums: &mut Sums, runs: &mut Runs<'_>, staging: *mut u8, length: usize) -> usize {
    if runs.run_bytes() < RUN_MIN {
        // Short runs are not worth a call each: they are hashed where they have come to.
        let length = length.min(CHUNK);
        // SAFETY: as promised by the caller.
        unsafe {
            runs.gather(staging, length);
            sums.feed(staging, length, Sink::Nowhere);
        }
        return length;
    }
    let streamed = runs.is_streamed();
    let run = runs.next(length);
    assert!(!run.memory.is_null(), "the slices of a part have all of its bytes");
    let sink = if streamed { Sink::Uncached(staging) } else { Sink::Memory(staging) };
    // SAFETY: the run has `run.length` bytes and `staging` as many; the rest is the caller's promise.
    unsafe { sums.feed(run.memory, run.length, sink) };
    run.length
}

/// The checksums of a part whose bytes come one after the other.
struct Sums {
    identity: Identity,
    part_bytes: u64,
    unit_bytes: u64,
    whole: Xxh3,
    /// The unit whose bytes are coming, and those before it; none where the part is one unit.
    unit: Option<Xxh3>,
    fed: u64,
    units: Vec<u64>,
}

impl Sums {
    fn new(identity: Identity, part_bytes: u64, shard_bytes: u64) -> Self {
        let unit_bytes = unit_bytes(part_bytes, shard_bytes);
        let whole = Xxh3::new(identity.seed(PART_UNIT), part_bytes as usize);
        let mut sums =
            Self { identity, part_bytes, unit_bytes, whole, unit: None, fed: 0, units: Vec::new() };
        if unit_bytes < part_bytes {
            sums.unit = Some(sums.next_unit());
        }
        sums
    }

    fn next_unit(&self) -> Xxh3 {
        let bytes = self.unit_bytes.min(self.part_bytes - self.fed);
        Xxh3::new(self.identity.seed(self.units.len() as u32), bytes as usize)
    }

    /// # Safety
    /// `source` is valid for reading `length` bytes, which nobody writes meanwhile, and the sink for writing them.
    unsafe fn feed(&mut self, source: *const u8, length: usize, sink: Sink) {
        let mut at = 0;
        while at < length {
            let unit_left = (self.unit_bytes - self.fed % self.unit_bytes) as usize;
            // What is gone over once need not come in chunks.
            let chunk = if self.unit.is_some() { CHUNK } else { usize::MAX };
            let take = (length - at).min(unit_left).min(chunk);
            // SAFETY: `at + take` is at most `length`; the second pass over a chunk finds it in the cache.
            unsafe {
                self.whole.feed(source.add(at), take, sink.advance(at));
                if let Some(unit) = &mut self.unit {
                    unit.feed(source.add(at), take, Sink::Nowhere);
                }
            }
            at += take;
            self.fed += take as u64;
            if take == unit_left || self.fed == self.part_bytes {
                self.end_unit();
            }
        }
    }

    fn end_unit(&mut self) {
        let Some(unit) = self.unit.take() else { return };
        self.units.push(unit.finish().map_or(NO_CHECKSUM, nonzero));
        if self.fed < self.part_bytes {
            self.unit = Some(self.next_unit());
        }
    }

    fn finish(self) -> PartChecksums {
        let part = self.whole.finish().map_or(NO_CHECKSUM, nonzero);
        PartChecksums { part, unit_bytes: self.unit_bytes, units: self.units }
    }
}

/// The unit number that stands for the whole part.
const PART_UNIT: u32 = u32::MAX;

/// Bytes that are gone over twice while they are in the cache that is nearest to the processor.
const CHUNK: usize = 8 << 10;

/// Bytes that one checksum of the trailer covers: a shard, or as many as it takes for all to fit in a page.
/// A shard size that is no page multiple (never layer-wise) makes the part one unit.
pub fn unit_bytes(part_bytes: u64, shard_bytes: u64) -> u64 {
    if shard_bytes == 0 || shard_bytes >= part_bytes || !shard_bytes.is_multiple_of(PAGE as u64) {
        return part_bytes;
    }
    let shards = part_bytes.div_ceil(shard_bytes);
    shard_bytes * shards.div_ceil(TRAILER_SHARDS_MAX as u64)
}

/// The memory of the first `bytes` bytes of `pieces`, run by run.
fn stretches(pieces: &[DmaSlice], bytes: u64) -> impl Iterator<Item = (*const u8, usize)> + '_ {
    let mut left = bytes as usize;
    pieces.iter().map_while(move |piece| {
        let length = piece.length.min(left);
        left -= length;
        (length > 0 || left > 0).then_some((piece.pointer.cast_const(), length))
    })
}

/// Hashes the first `bytes` bytes and copies them to `along`. Zero is kept for "no checksum", so it reads as one.
///
/// # Safety
/// The pieces are valid for reading and nobody writes them meanwhile; the runs are valid for writing, and overlap
/// no piece.
unsafe fn hash(seed: u64, pieces: &[DmaSlice], bytes: u64, along: &mut Runs<'_>) -> u64 {
    let mut hasher = Xxh3::new(seed, bytes as usize);
    for (source, length) in stretches(pieces, bytes) {
        let mut at = 0;
        while at < length {
            // SAFETY: `at` and what is taken from there are inside the stretch; the rest is the caller's promise.
            at += unsafe { feed(&mut hasher, source.add(at), length - at, along) };
        }
    }
    // Fewer bytes than asked for can match no checksum that was taken of all of them.
    hasher.finish().map_or(NO_CHECKSUM, nonzero)
}

/// Hashes some of the next `length` bytes and copies them to where they go; returns how many.
///
/// # Safety
/// As for `hash`.
unsafe fn feed(hasher: &mut Xxh3, source: *const u8, length: usize, along: &mut Runs<'_>) -> usize {
    if along.run_bytes() < RUN_MIN {
        // Short runs are not worth a call each: they are copied from the cache, a chunk later.
        let length = length.min(CHUNK);
        // SAFETY: as promised by the caller.
        unsafe {
            hasher.feed(source, length, Sink::Nowhere);
            along.scatter(source, length);
        }
        return length;
    }
    let streamed = along.is_streamed();
    let run = along.next(length);
    let sink = match streamed {
        _ if run.memory.is_null() => Sink::Nowhere,
        true => Sink::Uncached(run.memory),
        false => Sink::Memory(run.memory),
    };
    // SAFETY: `run.length` is at most `length`, and the run is as long; the rest is the caller's promise.
    unsafe { hasher.feed(source, run.length, sink) };
    run.length
}

fn nonzero(hash: u64) -> u64 {
    if hash == NO_CHECKSUM { 1 } else { hash }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::SliceShape;

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
            let unit = |unit, pieces| id.unit_along(unit, pieces, 8192, &mut Runs::nowhere());
            assert_eq!(unit(1, &one[..]), unit(1, &many[..]));
            assert_ne!(unit(1, &one[..]), unit(2, &many[..]));
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

    /// The checksums of a part that come from one pass are those of the part and of each unit by itself, however the
    /// part is cut into pieces.
    #[test]
    fn one_pass_takes_the_checksums_of_part_and_units() {
        let mut bytes: Vec<u8> = (0..50_000u32).map(|i| ((i * 7) >> 1) as u8).collect();
        let id = identity();
        for (part, shard) in [(49_152, 4096), (49_152, 12_288), (40_000, 20_480), (40_000, 40_000)]
        {
            let mut units = Vec::new();
            let unit = unit_bytes(part, shard);
            for (number, at) in (0..part).step_by(unit as usize).enumerate() {
                let end = part.min(at + unit) as usize;
                let seed = id.seed(number as u32);
                units.push(Hasher::oneshot_with_seed(seed, &bytes[at as usize..end]));
            }
            let whole = id.part_in(&bytes[..part as usize]);
            for cuts in [&[][..], &[1, 4096, 5000, 20_000], &[8192, 16_384]] {
                let pieces = slices(&mut bytes, cuts);
                // SAFETY: `bytes` lives to the end of the test and is not written.
                let sums = unsafe { id.all(&pieces, part, shard) };
                let expected = if units.len() == 1 { &[][..] } else { &units };
                assert_eq!((sums.part, &sums.units[..]), (whole, expected));
            }
        }
    }

    /// Bytes that are copied while they are hashed arrive where they go, and the checksum is that of the source.
    #[test]
    fn bytes_that_go_along_arrive() {
        let mut bytes: Vec<u8> = (0..200_000u32).map(|i| ((i * 7) >> 1) as u8 | 1).collect();
        let id = identity();
        let long = SliceShape::contiguous(100_000);
        let short = SliceShape { run_bytes: 250, dimensions: vec![(100, 300)] };
        let mut memory = vec![0; 200_000];
        let mut runs = Runs::nowhere();
        runs.push_slice(memory.as_mut_ptr(), &long);
        runs.push_gap(5000);
        runs.push_slice(memory[110_000..].as_mut_ptr(), &short);
        let pieces = slices(&mut bytes, &[64_000]);
        // SAFETY: the slices' spans are inside `memory`; both vectors live to the end of the test.
        let sum = unsafe { id.part_along(&pieces, 199_999, &mut runs) };
        assert_eq!(sum, id.part_in(&bytes[..199_999]));
        assert_eq!(memory[..100_000], bytes[..100_000]);
        for run in 0..100 {
            let (to, from) = (110_000 + run * 300, 105_000 + run * 250);
            assert_eq!(memory[to..to + 250], bytes[from..from + 250]);
            assert!(memory[to + 250..to + 300].iter().all(|byte| *byte == 0));
        }
    }

    /// Goal: hashes that somebody else computed of what is wanted make the checksums that are computed here, and
    /// claims of those hold for these hashes and for no other.
    #[test]
    fn hashes_from_elsewhere_make_the_same_checksums() {
        let mut bytes: Vec<u8> = (0..20_480u32).map(|i| (i * 13) as u8).collect();
        let (id, part_bytes) = (identity(), 20_480);
        for shard_bytes in [4096, 8192, part_bytes] {
            // SAFETY: `bytes` lives to the end of the test and is not written.
            let here = unsafe { id.all(&slices(&mut bytes, &[]), part_bytes, shard_bytes) };
            let wanted = id.wanted(part_bytes, shard_bytes);
            let hash = |w: &Wanted| {
                Hasher::oneshot_with_seed(w.seed, &bytes[w.from as usize..][..w.bytes as usize])
            };
            let hashes: Vec<u64> = wanted.iter().map(hash).collect();
            assert_eq!(PartChecksums::of_hashes(part_bytes, shard_bytes, &hashes), here);
            let part = id.claim_part(part_bytes, here.part);
            assert!(
                part.wanted == wanted[0] && part.holds(hashes[0]) && !part.holds(hashes[0] ^ 1)
            );
            for ((unit, sum), (wanted, hash)) in
                (0..).zip(&here.units).zip(wanted[1..].iter().zip(&hashes[1..]))
            {
                let claim = id.claim_unit(unit, wanted.from, wanted.bytes, *sum);
                assert!(claim.wanted == *wanted && claim.holds(*hash) && !claim.holds(*hash ^ 1));
            }
        }
        assert!(
            !id.claim_unit(9, 0, 4096, NO_CHECKSUM).holds(NO_CHECKSUM),
            "a unit that is not there"
        );
    }

    /// A part that is gathered and hashed in one pass is in its slot, with the checksums that are taken there.
    #[test]
    fn gathered_parts_have_the_checksums_of_their_bytes() {
        let mut memory: Vec<u8> = (0..200_000u32).map(|i| ((i * 7) >> 1) as u8).collect();
        let id = identity();
        let shapes = [
            SliceShape::contiguous(70_001),
            SliceShape { run_bytes: 250, dimensions: vec![(100, 300)] },
            SliceShape { run_bytes: 1500, dimensions: vec![(2, 4000), (2, 1600)] },
        ];
        let mut expected = vec![0; 101_001];
        let mut slot = expected.clone();
        let (mut gathering, mut plain) = (Runs::nowhere(), Runs::nowhere());
        for runs in [&mut gathering, &mut plain] {
            for (index, shape) in shapes.iter().enumerate() {
                runs.push_slice(memory[index * 71_000..].as_mut_ptr(), shape);
            }
        }
        // SAFETY: the slices' spans are inside `memory`, and both targets have room for all of their bytes.
        let sums = unsafe {
            plain.gather(expected.as_mut_ptr(), 101_001);
            id.gathered(&mut gathering, slot.as_mut_ptr(), 101_001)
        };
        assert!(slot == expected, "the bytes are not those of the slices");
        let taken_there = id.part_in(&expected);
        assert_eq!(sums, PartChecksums { part: taken_there, unit_bytes: 101_001, units: vec![] });
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

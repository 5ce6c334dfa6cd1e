//! XXH3-64 of bytes that may be copied while they are hashed.
//!
//! Bytes that a drive has just written are in no cache, so the first pass over them costs as much as a copy
//! does, and two passes cost it twice. Here one pass hashes and copies: each stripe is loaded once, from a line
//! that was asked for well ahead, mixed into the hash, and stored where it goes, past the caches if so wished.
//! Crates that hash do neither; the short inputs, where nothing of it matters, are left to one. So is everything
//! where there is no AVX2: elsewhere the crate hashes with NEON or SSE2 a piece that a copy then finds in the cache.
//!
//! How many bytes there will be is told at the start: XXH3 treats the last stripe apart.

#[cfg(target_arch = "x86_64")]
mod one_pass;
#[cfg(target_arch = "x86_64")]
mod stripes;

use std::hash::Hasher as _;
use std::ptr;

use twox_hash::xxhash3_64::Hasher;

#[cfg(target_arch = "x86_64")]
use one_pass::OnePass;

/// Bytes that are hashed before they are copied, where that is not one pass: they are in the nearest cache then.
const CHUNK: usize = 8 << 10;

/// Where bytes go while they are hashed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sink {
    /// They are only hashed.
    Nowhere,
    /// Here.
    Memory(*mut u8),
    /// Here, past the caches, where the processor and the address allow it: the lines are not read first.
    Uncached(*mut u8),
}

impl Sink {
    fn memory(self) -> Option<*mut u8> {
        match self {
            Sink::Nowhere => None,
            Sink::Memory(memory) | Sink::Uncached(memory) => Some(memory),
        }
    }

    /// What begins so many bytes behind it.
    pub(crate) fn advance(self, bytes: usize) -> Self {
        match self {
            Sink::Nowhere => Sink::Nowhere,
            Sink::Memory(memory) => Sink::Memory(memory.wrapping_add(bytes)),
            Sink::Uncached(memory) => Sink::Uncached(memory.wrapping_add(bytes)),
        }
    }
}

/// A hash under way.
pub(crate) enum Xxh3 {
    /// Ours.
    #[cfg(target_arch = "x86_64")]
    OnePass(OnePass),
    /// The crate's, and the bytes that are to come.
    Crate(Hasher, usize),
}

impl Xxh3 {
    /// Begins to hash `length` bytes.
    pub(crate) fn new(seed: u64, length: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(hash) = OnePass::new(seed, length) {
            return Self::OnePass(hash);
        }
        Self::of_crate(seed, length)
    }

    fn of_crate(seed: u64, length: usize) -> Self {
        Self::Crate(Hasher::with_seed(seed), length)
    }

    /// Hashes the next `length` bytes and copies them to `sink`.
    ///
    /// # Safety
    /// `source` is valid for reading `length` bytes and a sink's memory for writing them; they do not overlap,
    /// and nobody writes the source meanwhile.
    ///
    /// # Panics
    /// Where more comes than was said at the start.
    pub(crate) unsafe fn feed(&mut self, source: *const u8, length: usize, sink: Sink) {
        let (hasher, left) = match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller's promise is the same.
            Self::OnePass(hash) => return unsafe { hash.feed(source, length, sink) },
            Self::Crate(hasher, left) => (hasher, left),
        };
        assert!(length <= *left, "more bytes than there were to be");
        *left -= length;
        for at in (0..length).step_by(CHUNK) {
            let count = CHUNK.min(length - at);
            // SAFETY: `at + count` is at most `length`; the rest is the caller's promise.
            unsafe {
                hasher.write(std::slice::from_raw_parts(source.add(at), count));
                if let Some(memory) = sink.memory() {
                    ptr::copy_nonoverlapping(source.add(at), memory.add(at), count);
                }
            }
        }
    }

    /// The hash; `None` where fewer bytes came than were to be.
    pub(crate) fn finish(self) -> Option<u64> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::OnePass(hash) => hash.finish(),
            Self::Crate(hasher, left) => (left == 0).then(|| hasher.finish()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What becomes of a piece of the input.
    #[derive(Clone, Copy, Debug)]
    enum Way {
        Hashed,
        Copied,
        Streamed,
    }

    fn ways() -> impl Strategy<Value = Way> {
        prop_oneof![Just(Way::Hashed), Just(Way::Copied), Just(Way::Streamed)]
    }

    /// Feeds `bytes` in pieces, each its own way, to targets that begin `shift` bytes off alignment; returns
    /// the hash and where the copies differ from the bytes.
    fn run(seed: u64, bytes: &[u8], cuts: &[(usize, Way)], shift: usize) -> (Option<u64>, usize) {
        let ours = run_in(Xxh3::new(seed, bytes.len()), bytes, cuts, shift);
        assert_eq!(run_in(Xxh3::of_crate(seed, bytes.len()), bytes, cuts, shift), ours);
        ours
    }

    fn run_in(
        mut hash: Xxh3,
        bytes: &[u8],
        cuts: &[(usize, Way)],
        shift: usize,
    ) -> (Option<u64>, usize) {
        let mut target = vec![0xEE_u8; bytes.len() + 128];
        let mut expected = target.clone();
        let shift = target.as_ptr().align_offset(64) + shift;
        let mut at = 0;
        let rest = (bytes.len(), Way::Copied);
        for &(length, way) in cuts.iter().chain([&rest]) {
            let length = length.min(bytes.len() - at);
            let memory = target[shift + at..].as_mut_ptr();
            let sink = match way {
                Way::Hashed => Sink::Nowhere,
                Way::Copied => Sink::Memory(memory),
                Way::Streamed => Sink::Uncached(memory),
            };
            if !matches!(way, Way::Hashed) {
                let piece = &bytes[at..at + length];
                expected[shift + at..shift + at + length].copy_from_slice(piece);
            }
            // SAFETY: `length` bytes of `bytes` and as many of `target`, which has room for all and is another.
            unsafe { hash.feed(bytes[at..].as_ptr(), length, sink) };
            at += length;
        }
        let differing = target.iter().zip(&expected).filter(|(is, should)| is != should).count();
        (hash.finish(), differing)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 400 }))]

        /// Goal: however the bytes come and wherever they go, the hash is the one that another implementation
        /// takes in one go, and copies are whole and touch nothing else.
        #[test]
        fn any_way_of_feeding_gives_the_same_hash(
            seed in any::<u64>(),
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..700),
                proptest::collection::vec(any::<u8>(), 0..9000),
            ],
            cuts in proptest::collection::vec((0..2500_usize, ways()), 0..12),
            shift in 0..64_usize,
        ) {
            let expected = Hasher::oneshot_with_seed(seed, &bytes);
            prop_assert_eq!(run(seed, &bytes, &cuts, shift), (Some(expected), 0));
        }
    }

    /// Goal: lengths at which something begins or ends inside XXH3, one by one.
    #[test]
    fn lengths_around_stripes_and_blocks() {
        let bytes: Vec<u8> = (0..4200_u32).map(|i| ((i * 31) >> 3) as u8).collect();
        for length in (0..600).chain(960..1200).chain(1980..2180).chain(4030..4200) {
            let expected = Hasher::oneshot_with_seed(length as u64, &bytes[..length]);
            let cuts = [(length / 3, Way::Streamed)];
            assert_eq!(run(length as u64, &bytes[..length], &cuts, 0), (Some(expected), 0));
        }
    }

    /// Goal: bytes that never came give no hash.
    #[test]
    fn too_few_bytes_have_no_hash() {
        for length in [100, 1000] {
            for mut hash in [Xxh3::new(1, length), Xxh3::of_crate(1, length)] {
                // SAFETY: one byte less than the vector has.
                unsafe { hash.feed(vec![7; length].as_ptr(), length - 1, Sink::Nowhere) };
                assert_eq!(hash.finish(), None);
            }
        }
    }
}

//! XXH3-64 of bytes that may be copied while they are hashed.
//!
//! Bytes that a drive has just written are in no cache, so the first pass over them costs as much as a copy
//! does, and two passes cost it twice. Here one pass hashes and copies: each stripe is loaded once, from a line
//! that was asked for well ahead, mixed into the hash, and stored where it goes, past the caches if so wished.
//! Crates that hash do neither; the short inputs, where nothing of it matters, are left to one.
//!
//! How many bytes there will be is told at the start: XXH3 treats the last stripe apart.

mod stripes;

use std::ptr;

use twox_hash::xxhash3_64::{Hasher, SecretBuffer};

pub(crate) use stripes::Sink;
use stripes::{Accumulator, STRIPE};

/// Up to that many bytes XXH3 is another function.
const SHORT_MAX: usize = 240;
/// Bytes of a secret.
const SECRET: usize = 192;
/// Where in the secret the last stripe and the final mix begin.
const SECRET_LAST: usize = SECRET - STRIPE - 7;
const SECRET_MERGE: usize = 11;

const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const AVALANCHE: u64 = 0x1656_6791_9E37_79F9;

/// A hash under way.
pub(crate) struct Xxh3 {
    seed: u64,
    /// Bytes that there will be, and that were fed.
    length: usize,
    fed: usize,
    accumulator: Accumulator,
    /// The stripe before the next, and the bytes of the next one that are there: the last stripe of all is the
    /// last 64 bytes, which may lie in both. All bytes of a short input.
    window: [u8; SHORT_MAX],
    /// Bytes of the next stripe that are there; all 64 only of the last.
    carried: usize,
}

impl Xxh3 {
    /// Begins to hash `length` bytes.
    pub(crate) fn new(seed: u64, length: usize) -> Self {
        let secret = SecretBuffer::with_seed(seed, [0; SECRET]).map(SecretBuffer::into_secret);
        let secret = secret.unwrap_or_else(|_| unreachable!("a buffer of the length of a secret"));
        let accumulator = Accumulator::new(secret);
        Self { seed, length, fed: 0, accumulator, window: [0; SHORT_MAX], carried: 0 }
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
        assert!(length <= self.length - self.fed, "more bytes than there were to be");
        if self.length <= SHORT_MAX {
            // SAFETY: the caller's promise; the window has room for all bytes of a short input.
            return unsafe { self.keep(self.fed, source, length, sink) };
        }
        let mut at = 0;
        if self.carried > 0 {
            at = length.min(STRIPE - self.carried);
            // SAFETY: at most `length` bytes of the source and the sink; the second stripe of the window has
            // room for the rest of a stripe.
            unsafe { self.keep(STRIPE + self.carried, source, at, sink) };
            self.carried += at;
            if self.carried < STRIPE || self.fed == self.length {
                return;
            }
            self.accumulator.add_kept(&self.window[STRIPE..2 * STRIPE]);
            self.window.copy_within(STRIPE..2 * STRIPE, 0);
            self.carried = 0;
        }
        // The last stripe is left for the end, also where it is whole.
        let count = (length - at).min(self.length - self.fed - 1) / STRIPE;
        if count > 0 {
            // SAFETY: `count` stripes lie inside the `length` bytes of source and sink, and the last of them
            // ends `count * STRIPE` bytes behind `at`.
            unsafe {
                let from = source.add(at);
                self.accumulator.add(from, count, sink.advance(at));
                at += count * STRIPE;
                ptr::copy_nonoverlapping(source.add(at - STRIPE), self.window.as_mut_ptr(), STRIPE);
            }
            self.fed += count * STRIPE;
        }
        if at < length {
            self.carried = length - at;
            debug_assert!(self.carried <= STRIPE);
            // SAFETY: the rest of source and sink, at most a stripe.
            unsafe { self.keep(STRIPE, source.add(at), length - at, sink.advance(at)) };
        }
    }

    /// Keeps bytes in the window and copies them to the sink.
    ///
    /// # Safety
    /// As for `feed`; `at + length` is inside the window.
    unsafe fn keep(&mut self, at: usize, source: *const u8, length: usize, sink: Sink) {
        let kept = &mut self.window[at..at + length];
        // SAFETY: `kept` has `length` bytes of our own; source and sink are the caller's promise.
        unsafe {
            ptr::copy_nonoverlapping(source, kept.as_mut_ptr(), length);
            if let Some(memory) = sink.memory() {
                ptr::copy_nonoverlapping(kept.as_ptr(), memory, length);
            }
        }
        self.fed += length;
    }

    /// The hash; `None` where fewer bytes came than were to be.
    pub(crate) fn finish(mut self) -> Option<u64> {
        if self.fed < self.length {
            return None;
        }
        if self.length <= SHORT_MAX {
            return Some(Hasher::oneshot_with_seed(self.seed, &self.window[..self.length]));
        }
        let last = &self.window[self.carried..self.carried + STRIPE];
        self.accumulator.add_last(last, SECRET_LAST);
        let mixed = (self.length as u64).wrapping_mul(PRIME64_1);
        Some(avalanche(self.accumulator.merge(SECRET_MERGE, mixed)))
    }
}

fn avalanche(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 37)).wrapping_mul(AVALANCHE);
    hash ^ (hash >> 32)
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
        let mut target = vec![0xEE_u8; bytes.len() + 128];
        let mut expected = target.clone();
        let shift = target.as_ptr().align_offset(64) + shift;
        let mut hash = Xxh3::new(seed, bytes.len());
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
            let mut hash = Xxh3::new(1, length);
            // SAFETY: one byte less than the vector has.
            unsafe { hash.feed(vec![7; length].as_ptr(), length - 1, Sink::Nowhere) };
            assert_eq!(hash.finish(), None);
        }
    }
}

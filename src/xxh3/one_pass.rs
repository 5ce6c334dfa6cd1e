//! The hash in one pass: bytes become stripes, whatever pieces they come in, and the last stripe is taken apart.
//!
//! Only on x86-64 with AVX2, see the stripes.

use std::ptr;

use twox_hash::xxhash3_64::{Hasher, SecretBuffer};

use super::Sink;
use super::stripes::{Accumulator, SECRET, STRIPE};

/// Up to that many bytes XXH3 is another function.
const SHORT_MAX: usize = 240;
/// Where in the secret the last stripe and the final mix begin.
const SECRET_LAST: usize = SECRET - STRIPE - 7;
const SECRET_MERGE: usize = 11;

const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const AVALANCHE: u64 = 0x1656_6791_9E37_79F9;

/// A hash under way.
pub(crate) struct OnePass {
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

impl OnePass {
    /// Begins to hash `length` bytes; `None` where this processor cannot.
    pub(super) fn new(seed: u64, length: usize) -> Option<Self> {
        if !Accumulator::is_possible() {
            return None;
        }
        let secret = SecretBuffer::with_seed(seed, [0; SECRET]).map(SecretBuffer::into_secret);
        let secret = secret.unwrap_or_else(|_| unreachable!("a buffer of the length of a secret"));
        let accumulator = Accumulator::new(secret);
        Some(Self { seed, length, fed: 0, accumulator, window: [0; SHORT_MAX], carried: 0 })
    }

    /// Hashes the next `length` bytes and copies them to `sink`.
    ///
    /// # Safety
    /// `source` is valid for reading `length` bytes and a sink's memory for writing them; they do not overlap,
    /// and nobody writes the source meanwhile.
    ///
    /// # Panics
    /// Where more comes than was said at the start.
    pub(super) unsafe fn feed(&mut self, source: *const u8, length: usize, sink: Sink) {
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
            // ends `count * STRIPE` bytes behind `at`. `new` has seen that the processor can.
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
    pub(super) fn finish(mut self) -> Option<u64> {
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

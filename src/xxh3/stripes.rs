//! Stripes of 64 bytes on their way into the eight lanes of XXH3, and to a copy of theirs.
//!
//! Knows nothing of how the bytes came to be whole stripes. Many at once go through AVX2, single ones need not.

use std::arch::x86_64::*;

use super::Sink;
use crate::mem::stream::PREFETCH_BYTES;

/// Bytes of the secret.
pub(super) const SECRET: usize = 192;
/// Bytes of a stripe.
pub(super) const STRIPE: usize = 64;
/// Stripes of a block: after each the lanes are scrambled.
const BLOCK_STRIPES: usize = (SECRET - STRIPE) / 8;
/// Where in the secret the scramble's key begins.
const SECRET_SCRAMBLE: usize = SECRET - STRIPE;

const PRIME32_1: u64 = 0x9E37_79B1;
/// What the lanes begin with.
const BEGIN: [u64; 8] = [
    0xC2B2_AE3D,
    0x9E37_79B1_85EB_CA87,
    0xC2B2_AE3D_27D4_EB4F,
    0x1656_67B1_9E37_79F9,
    0x85EB_CA77_C2B2_AE63,
    0x85EB_CA77,
    0x27D4_EB2F_1656_67C5,
    0x9E37_79B1,
];

/// The lanes, the secret they are keyed with, and where in a block the next stripe stands.
pub(super) struct Accumulator {
    lanes: [u64; 8],
    secret: [u8; SECRET],
    stripe: usize,
}

impl Accumulator {
    pub(super) fn new(secret: [u8; SECRET]) -> Self {
        Self { lanes: BEGIN, secret, stripe: 0 }
    }

    /// Whether the processor can.
    pub(super) fn is_possible() -> bool {
        is_x86_feature_detected!("avx2")
    }

    /// Adds `count` stripes and copies them to `sink`.
    ///
    /// # Safety
    /// `source` is valid for reading the stripes and the sink's memory for writing them; they do not overlap.
    /// The processor can, see `is_possible`.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn add(&mut self, source: *const u8, count: usize, sink: Sink) {
        // SAFETY: the caller's promise; a streamed target is aligned to a vector.
        unsafe {
            match sink {
                Sink::Uncached(to) if to.addr().is_multiple_of(size_of::<__m256i>()) => {
                    run::<STREAMED>(self, source, count, to);
                    // Such stores are seen by others in no order, until here.
                    _mm_sfence();
                }
                Sink::Uncached(to) | Sink::Memory(to) => run::<COPIED>(self, source, count, to),
                Sink::Nowhere => run::<HASHED>(self, source, count, std::ptr::null_mut()),
            }
        }
    }

    /// Adds one stripe that lies in memory of ours.
    pub(super) fn add_kept(&mut self, stripe: &[u8]) {
        self.mix(stripe, self.stripe * 8);
        self.stripe += 1;
        if self.stripe == BLOCK_STRIPES {
            self.stripe = 0;
            for (lane, key) in self.lanes.iter_mut().zip(words(&self.secret[SECRET_SCRAMBLE..])) {
                *lane = (*lane ^ (*lane >> 47) ^ key).wrapping_mul(PRIME32_1);
            }
        }
    }

    /// Adds the last 64 bytes, with the key at `key` of the secret.
    pub(super) fn add_last(&mut self, stripe: &[u8], key: usize) {
        self.mix(stripe, key);
    }

    fn mix(&mut self, stripe: &[u8], key: usize) {
        let keys = words(&self.secret[key..key + STRIPE]);
        for (lane, (word, key)) in words(stripe).zip(keys).enumerate() {
            let keyed = word ^ key;
            self.lanes[lane ^ 1] = self.lanes[lane ^ 1].wrapping_add(word);
            let product = (keyed & 0xFFFF_FFFF) * (keyed >> 32);
            self.lanes[lane] = self.lanes[lane].wrapping_add(product);
        }
    }

    /// The lanes in one word, with the key at `key` of the secret.
    pub(super) fn merge(&self, key: usize, begin: u64) -> u64 {
        let mut keys = words(&self.secret[key..key + STRIPE]);
        let mut key = || keys.next().expect("eight keys for eight lanes");
        self.lanes.chunks_exact(2).fold(begin, |sum, pair| {
            let (left, right) = (u128::from(pair[0] ^ key()), u128::from(pair[1] ^ key()));
            let product = left * right;
            sum.wrapping_add(product as u64 ^ (product >> 64) as u64)
        })
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
}

/// What a stripe is besides hashed.
const HASHED: u8 = 0;
const COPIED: u8 = 1;
const STREAMED: u8 = 2;

/// # Safety
/// `source` is valid for reading `count` stripes; `to`, unless `WAY` is `HASHED`, for writing them, and
/// aligned to a vector if `WAY` is `STREAMED`.
#[target_feature(enable = "avx2")]
unsafe fn run<const WAY: u8>(into: &mut Accumulator, source: *const u8, count: usize, to: *mut u8) {
    let lanes = into.lanes.as_mut_ptr().cast::<__m256i>();
    let secret = into.secret.as_ptr();
    // SAFETY: two vectors are the eight lanes. A key of a stripe begins at most `SECRET_SCRAMBLE - 8` bytes
    // into the secret and that of the scramble at `SECRET_SCRAMBLE`, so 64 bytes from there are inside. Stripe
    // `index < count` of source and target is the caller's promise; a prefetch may have any address, and
    // names one of the source.
    unsafe {
        let mut low = _mm256_loadu_si256(lanes);
        let mut high = _mm256_loadu_si256(lanes.add(1));
        let mut index = 0;
        let last = count.saturating_sub(1) * STRIPE;
        while index < count {
            let end = count.min(index + BLOCK_STRIPES - into.stripe);
            for (index, key) in (index..end).zip((into.stripe * 8..).step_by(8)) {
                let at = index * STRIPE;
                let ahead = source.wrapping_add(last.min(at + PREFETCH_BYTES));
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                let from = source.add(at).cast::<__m256i>();
                let (left, right) = (_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1)));
                let key = secret.add(key).cast::<__m256i>();
                low = mix(low, left, _mm256_loadu_si256(key));
                high = mix(high, right, _mm256_loadu_si256(key.add(1)));
                let to = to.wrapping_add(at).cast::<__m256i>();
                match WAY {
                    COPIED => {
                        _mm256_storeu_si256(to, left);
                        _mm256_storeu_si256(to.add(1), right);
                    }
                    STREAMED => {
                        _mm256_stream_si256(to, left);
                        _mm256_stream_si256(to.add(1), right);
                    }
                    _ => {}
                }
            }
            into.stripe += end - index;
            index = end;
            if into.stripe == BLOCK_STRIPES {
                into.stripe = 0;
                let key = secret.add(SECRET_SCRAMBLE).cast::<__m256i>();
                low = scramble(low, _mm256_loadu_si256(key));
                high = scramble(high, _mm256_loadu_si256(key.add(1)));
            }
        }
        _mm256_storeu_si256(lanes, low);
        _mm256_storeu_si256(lanes.add(1), high);
    }
}

/// Four lanes and four words of a stripe: each lane gets its neighbour's word and a product of its own.
#[target_feature(enable = "avx2")]
fn mix(lanes: __m256i, words: __m256i, keys: __m256i) -> __m256i {
    let keyed = _mm256_xor_si256(words, keys);
    let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
    let neighbours = _mm256_shuffle_epi32::<0b01_00_11_10>(words);
    _mm256_add_epi64(lanes, _mm256_add_epi64(neighbours, product))
}

#[target_feature(enable = "avx2")]
fn scramble(lanes: __m256i, keys: __m256i) -> __m256i {
    let mixed = _mm256_xor_si256(lanes, _mm256_srli_epi64::<47>(lanes));
    let keyed = _mm256_xor_si256(mixed, keys);
    let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
    let low = _mm256_mul_epu32(keyed, prime);
    let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(keyed), prime);
    _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: many stripes at once add up to the same lanes as one after the other, and arrive where they go.
    #[test]
    fn stripes_at_once_give_the_same_lanes() {
        if !Accumulator::is_possible() {
            return;
        }
        let bytes: Vec<u8> = (0..STRIPE as u32 * 50).map(|i| ((i * 7) >> 2) as u8).collect();
        let secret: [u8; SECRET] = std::array::from_fn(|i| (i * 37) as u8);
        let (mut one, mut other) = (Accumulator::new(secret), Accumulator::new(secret));
        bytes.chunks(STRIPE).for_each(|stripe| one.add_kept(stripe));
        let mut copies = vec![[0; STRIPE]; 50];
        for (first, count) in [(0, 3), (3, 20), (23, 27)] {
            let source = bytes[first * STRIPE..].as_ptr();
            let to = copies[first..].as_mut_ptr().cast();
            // SAFETY: `count` stripes from `first` on are inside the 50 of both; the processor can.
            unsafe { other.add(source, count, Sink::Memory(to)) };
        }
        assert_eq!((one.lanes, one.stripe), (other.lanes, other.stripe));
        assert_eq!(copies.concat(), bytes);
    }
}

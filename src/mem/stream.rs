//! Copies that leave the caches alone: lines of the source are asked for ahead, those of the target written
//! whole and never read.
//!
//! What a block's bytes displace is worth more than the bytes, which whoever asked for them reads once and much
//! later. On a Xeon it takes two thirds of the time of `memcpy`, on an EPYC seven tenths. Other processors than
//! x86-64 get `memcpy`: none was there to measure on.

use std::ptr;

/// Where so many bytes are copied together, they do not fit into the nearest caches anyway.
pub const TOGETHER_MIN: usize = 64 << 10;
/// A run of fewer bytes gains nothing: the lines at its ends are written in part.
pub const RUN_MIN: usize = 1 << 10;
/// A line is asked for so many bytes before it is needed. A page: prefetchers of the processor stop where one
/// ends. With a hash beside the copy 2 KiB cost a sixth more on a Xeon, none 1.6 times as much, 8 KiB gained nothing.
#[cfg(target_arch = "x86_64")]
pub(crate) const PREFETCH_BYTES: usize = 4096;

/// Copies `length` bytes.
///
/// # Safety
/// `source` is valid for reading so many bytes and `to` for writing them; they do not overlap.
pub unsafe fn copy(source: *const u8, to: *mut u8, length: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if length >= RUN_MIN && is_x86_feature_detected!("avx") {
        // Up to the first address of the target that is aligned to a vector, and from the last.
        let head = to.align_offset(avx::VECTOR).min(length);
        let body = (length - head) / avx::LINE * avx::LINE;
        let tail = head + body;
        // SAFETY: the processor has AVX; head, body and tail are the `length` bytes of the caller's promise, and
        // the body's target is aligned.
        unsafe {
            ptr::copy_nonoverlapping(source, to, head);
            avx::copy(source.add(head), to.add(head), body);
            ptr::copy_nonoverlapping(source.add(tail), to.add(tail), length - tail);
        }
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { ptr::copy_nonoverlapping(source, to, length) }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod avx {
    use std::arch::x86_64::*;

    use super::PREFETCH_BYTES;

    pub(super) const VECTOR: usize = size_of::<__m256i>();
    pub(super) const LINE: usize = 2 * VECTOR;

    /// # Safety
    /// As for `super::copy`, on a processor with AVX; `to` is aligned to a vector and `length` whole lines.
    #[target_feature(enable = "avx")]
    pub(super) unsafe fn copy(source: *const u8, to: *mut u8, length: usize) {
        let last = length.saturating_sub(LINE);
        for at in (0..length).step_by(LINE) {
            let ahead = source.wrapping_add(last.min(at + PREFETCH_BYTES));
            // SAFETY: the line at `at` lies inside the `length` bytes of both; a prefetch may have any address.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                let from = source.add(at).cast::<__m256i>();
                let (left, right) = (_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1)));
                let to = to.add(at).cast::<__m256i>();
                _mm256_stream_si256(to, left);
                _mm256_stream_si256(to.add(1), right);
            }
        }
        // Such stores are seen by others in no order, until here.
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: whatever the length and the alignment of either side, the bytes arrive and no others change.
    #[test]
    fn copies_are_exact_at_every_alignment() {
        let source: Vec<u8> = (0..5000_u32).map(|i| ((i * 31) >> 3) as u8).collect();
        for from in [0, 1, 31, 64] {
            for shift in 0..65 {
                for length in [0, 1, 63, RUN_MIN - 1, RUN_MIN, RUN_MIN + 1, 2047, 4096, 4900] {
                    let mut target = vec![0xEE; length + 200];
                    let at = target.as_ptr().align_offset(64) + shift;
                    // SAFETY: `from + length` is inside the source, `at + length` inside the target.
                    unsafe { copy(source[from..].as_ptr(), target[at..].as_mut_ptr(), length) };
                    assert_eq!(target[at..at + length], source[from..from + length]);
                    let others = target[..at].iter().chain(&target[at + length..]);
                    assert!(others.into_iter().all(|byte| *byte == 0xEE));
                }
            }
        }
    }
}

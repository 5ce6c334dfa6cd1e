//! What the bench writes and expects to read: every 8-byte word depends on the block, and on its position
//! in the block, so that a block in another's place, a shifted run or a stale page is seen.

#![forbid(unsafe_code)]

use crate::random::mix;

/// An odd multiplier: word `i` of a block is `key + i * STEP`, so no two positions of a block are alike.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The id of block `number` of a run with this seed.
pub fn block_id(seed: u64, number: u64) -> [u8; 16] {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&mix(seed ^ mix(number)).to_le_bytes());
    id[8..].copy_from_slice(&mix(seed.rotate_left(32) ^ mix(!number)).to_le_bytes());
    id
}

fn key(id: &[u8; 16]) -> u64 {
    let word = |half: &[u8]| half.iter().rev().fold(0, |n, &byte| (n << 8) | u64::from(byte));
    mix(word(&id[..8]) ^ word(&id[8..]).rotate_left(17))
}

/// Fills `memory` with the bytes that begin at `offset` (a multiple of 8) of the block.
pub fn fill(id: &[u8; 16], offset: u64, memory: &mut [u8]) {
    let mut word = key(id).wrapping_add((offset / 8).wrapping_mul(STEP));
    let mut chunks = memory.chunks_exact_mut(8);
    for chunk in &mut chunks {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(STEP);
    }
    let rest = chunks.into_remainder();
    rest.copy_from_slice(&word.to_le_bytes()[..rest.len()]);
}

/// The offset in the block of the first byte of `memory` that is wrong.
pub fn check(id: &[u8; 16], offset: u64, memory: &[u8]) -> Option<u64> {
    let mut word = key(id).wrapping_add((offset / 8).wrapping_mul(STEP));
    let mut wrong = 0_u64;
    let mut chunks = memory.chunks_exact(8);
    for chunk in &mut chunks {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(chunk);
        // One branch at the end, so that the loop stays a few vector instructions.
        wrong |= u64::from_le_bytes(bytes) ^ word;
        word = word.wrapping_add(STEP);
    }
    let rest = chunks.remainder();
    if wrong == 0 && *rest == word.to_le_bytes()[..rest.len()] {
        return None;
    }
    let mut expected = vec![0; memory.len()];
    fill(id, offset, &mut expected);
    let position = memory.iter().zip(&expected).position(|(a, b)| a != b)?;
    Some(offset + position as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a block filled in pieces is a block filled at once, and one flipped bit is found where it is.
    #[test]
    fn position_dependent() {
        let id = block_id(1, 2);
        let mut whole = vec![0; 4099];
        fill(&id, 0, &mut whole);
        let mut tail = vec![0; 4099 - 1024];
        fill(&id, 1024, &mut tail);
        assert_eq!(whole[1024..], tail);
        assert_eq!(check(&id, 0, &whole), None);
        whole[2777] ^= 1;
        assert_eq!(check(&id, 0, &whole), Some(2777));
        assert_eq!(check(&id, 2048, &whole[2048..]), Some(2777));
    }

    /// Goal: another block's bytes, or the right bytes 8 further on, never pass.
    #[test]
    fn neighbours_differ() {
        let (a, b) = (block_id(1, 2), block_id(1, 3));
        assert_ne!(a, b);
        let mut bytes = vec![0; 64];
        fill(&a, 0, &mut bytes);
        assert!(check(&b, 0, &bytes).is_some());
        assert!(check(&a, 8, &bytes).is_some());
    }
}

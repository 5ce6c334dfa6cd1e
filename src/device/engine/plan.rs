//! From tensor slices to pieces: the fewest copies that move a shard's bytes.
//!
//! Knows numbers only: nothing here reads memory.

#![forbid(unsafe_code)]

use crate::block::SliceShape;
use crate::error::{Error, ErrorKind, Result};

/// Strided dimensions that one piece can have; a slice with more is cut into several pieces.
pub(in crate::device) const DIMENSIONS_MAX: usize = 3;

/// Runs of equal length in caller memory that lie end to end in staging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) struct Piece {
    /// Address of the first run in caller memory.
    pub(in crate::device) memory: usize,
    /// Address of the first byte in staging.
    pub(in crate::device) staging: usize,
    /// Bytes of one run.
    pub(in crate::device) run: u64,
    /// How many runs, outermost dimension first; 1 where a dimension is not used.
    pub(in crate::device) counts: [u64; DIMENSIONS_MAX],
    /// Bytes from one run to the next in each dimension.
    pub(in crate::device) strides: [u64; DIMENSIONS_MAX],
}

impl Piece {
    /// One run.
    pub(in crate::device) fn contiguous(memory: usize, staging: usize, bytes: u64) -> Self {
        Self { memory, staging, run: bytes, counts: [1; 3], strides: [0; 3] }
    }

    /// Bytes of the piece in staging.
    pub(in crate::device) fn bytes(&self) -> u64 {
        self.run * self.runs()
    }

    /// Runs of the piece.
    pub(in crate::device) fn runs(&self) -> u64 {
        self.counts.iter().product()
    }

    /// Bytes from the first byte of the first run to the last byte of the last.
    pub(in crate::device) fn span(&self) -> u64 {
        let steps = self.counts.iter().zip(self.strides);
        self.run + steps.map(|(count, stride)| (count - 1) * stride).sum::<u64>()
    }

    /// The address behind the piece in caller memory; an error where there can be no such memory.
    pub(in crate::device) fn memory_end(&self) -> Result<usize> {
        let end = self.memory.checked_add(self.span() as usize);
        end.filter(|_| self.memory != 0).ok_or_else(|| {
            let text = format!("address {:#x} is not one of a tensor slice", self.memory);
            Error::new(ErrorKind::InvalidArgument, text)
        })
    }

    /// Whether the piece is one run.
    pub(in crate::device) fn is_contiguous(&self) -> bool {
        self.runs() == 1
    }

    /// The starts of the piece's rows: each row is `counts[2]` runs, `strides[2]` apart. Gives the memory
    /// offset and the staging offset of each.
    pub(in crate::device) fn rows(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let row_bytes = self.run * self.counts[2];
        (0..self.counts[0]).flat_map(move |i| {
            (0..self.counts[1]).map(move |j| {
                let row = i * self.counts[1] + j;
                (i * self.strides[0] + j * self.strides[1], row * row_bytes)
            })
        })
    }

    /// The largest power of two, at most 16, that divides the address in caller memory, the run and every stride.
    pub(in crate::device) fn alignment(&self) -> u64 {
        let mut bits = self.memory as u64 | self.run | 16;
        for (count, stride) in self.counts.iter().zip(self.strides) {
            if *count > 1 {
                bits |= stride;
            }
        }
        1 << bits.trailing_zeros()
    }
}

/// Appends the pieces of a shard to `pieces`: slices end to end from `staging`, contiguous neighbours
/// merged.
pub(in crate::device) fn pieces_of(
    addresses: impl Iterator<Item = usize>,
    slices: &[SliceShape],
    staging: usize,
    pieces: &mut Vec<Piece>,
) {
    let first = pieces.len();
    let mut staged = staging;
    for (address, shape) in addresses.zip(slices) {
        if shape.is_contiguous() {
            push(pieces, first, Piece::contiguous(address, staged, shape.run_bytes));
        } else {
            push_strided(pieces, first, address, staged, shape);
        }
        staged += shape.bytes() as usize;
    }
}

/// Appends a piece, or lengthens the last one where both ends meet.
fn push(pieces: &mut Vec<Piece>, first: usize, piece: Piece) {
    if piece.bytes() == 0 {
        return;
    }
    if pieces.len() > first
        && let Some(last) = pieces.last_mut()
        && last.is_contiguous()
        && piece.is_contiguous()
        && last.memory + last.run as usize == piece.memory
        && last.staging + last.run as usize == piece.staging
    {
        last.run += piece.run;
        return;
    }
    pieces.push(piece);
}

/// Folds dimensions that are contiguous, and cuts what is left into pieces of at most
/// [`DIMENSIONS_MAX`] dimensions.
fn push_strided(
    pieces: &mut Vec<Piece>,
    first: usize,
    address: usize,
    staged: usize,
    shape: &SliceShape,
) {
    let mut run = shape.run_bytes;
    let mut folded: Vec<(u64, u64)> = Vec::with_capacity(shape.dimensions.len());
    for &(count, stride) in shape.dimensions.iter().rev() {
        if count == 1 {
            continue;
        }
        match folded.last_mut() {
            None if stride == run => run *= count,
            Some((inner, inner_stride)) if stride == *inner * *inner_stride => *inner *= count,
            _ => folded.push((count, stride)),
        }
    }
    // Innermost first: the last DIMENSIONS_MAX dimensions make a piece, the outer ones are walked.
    let inner = folded.len().min(DIMENSIONS_MAX);
    let (inside, outside) = folded.split_at(inner);
    let mut piece = Piece::contiguous(address, staged, run);
    for (slot, &(count, stride)) in (0..DIMENSIONS_MAX).rev().zip(inside) {
        piece.counts[slot] = count;
        piece.strides[slot] = stride;
    }
    let bytes = piece.bytes();
    let outer_runs: u64 = outside.iter().map(|(count, _)| count).product();
    for index in 0..outer_runs {
        let (mut rest, mut offset) = (index, 0);
        for &(count, stride) in outside {
            offset += rest % count * stride;
            rest /= count;
        }
        let mut copy = piece;
        copy.memory += offset as usize;
        copy.staging += (index * bytes) as usize;
        push(pieces, first, copy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every (memory, staging) byte pair of a slice, by the definition of `SliceShape`.
    fn naive(address: usize, shape: &SliceShape, staging: usize) -> Vec<(usize, usize)> {
        let runs: u64 = shape.dimensions.iter().map(|(count, _)| count).product();
        let mut pairs = Vec::new();
        for index in 0..runs {
            let (mut rest, mut offset) = (index, 0);
            for (count, stride) in shape.dimensions.iter().rev() {
                offset += rest % count * stride;
                rest /= count;
            }
            for byte in 0..shape.run_bytes {
                pairs.push((
                    address + (offset + byte) as usize,
                    staging + (index * shape.run_bytes + byte) as usize,
                ));
            }
        }
        pairs
    }

    fn bytes_of(pieces: &[Piece]) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        for piece in pieces {
            for (memory, staged) in piece.rows() {
                for k in 0..piece.counts[2] {
                    for byte in 0..piece.run {
                        pairs.push((
                            piece.memory + (memory + k * piece.strides[2] + byte) as usize,
                            piece.staging + (staged + k * piece.run + byte) as usize,
                        ));
                    }
                }
            }
        }
        pairs
    }

    /// Goal: neighbours in both memories become one copy, strangers stay apart.
    #[test]
    fn contiguous_slices_merge() {
        let slices = vec![SliceShape::contiguous(64); 4];
        let mut pieces = Vec::new();
        pieces_of([1000, 1064, 5000, 5064].into_iter(), &slices, 0, &mut pieces);
        assert_eq!(pieces, [Piece::contiguous(1000, 0, 128), Piece::contiguous(5000, 128, 128)]);
    }

    /// Goal: dimensions without gaps fold into one run, so a dense tensor is one copy.
    #[test]
    fn dense_dimensions_fold() {
        let shape = SliceShape { run_bytes: 16, dimensions: vec![(2, 128), (1, 7), (8, 16)] };
        let mut pieces = Vec::new();
        pieces_of([4096].into_iter(), &[shape], 0, &mut pieces);
        assert_eq!(pieces, [Piece::contiguous(4096, 0, 256)]);
    }

    /// Goal: pieces of two jobs are never merged, because each job is reported alone.
    #[test]
    fn jobs_stay_apart() {
        let slices = [SliceShape::contiguous(64)];
        let mut pieces = Vec::new();
        pieces_of([1000].into_iter(), &slices, 0, &mut pieces);
        pieces_of([1064].into_iter(), &slices, 64, &mut pieces);
        assert_eq!(pieces.len(), 2);
    }

    proptest! {
        /// Goal: whatever the shape, the pieces move exactly the bytes that its definition names.
        #[test]
        fn pieces_move_the_shape(
            run in 1u64..5,
            dimensions in proptest::collection::vec((1u64..4, 1u64..40), 0..6),
        ) {
            let shape = SliceShape { run_bytes: run, dimensions };
            let mut pieces = Vec::new();
            pieces_of([10_000].into_iter(), std::slice::from_ref(&shape), 500, &mut pieces);
            prop_assert_eq!(bytes_of(&pieces), naive(10_000, &shape, 500));
            prop_assert!(pieces.iter().all(|p| p.span() <= shape.span()));
        }
    }
}

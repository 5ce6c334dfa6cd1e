//! How an entry of a batch maps to parts: which part and shard, and which runs of caller memory.
//!
//! A shard that lies inside one part is one *unit*. A shard that covers several whole parts is one unit
//! for each, and its contiguous tensor slices are cut where a part ends.

#![forbid(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use crate::block::{BlockId, Geometry, PartKey, SliceShape};
use crate::error::{Error, ErrorKind, Result};
use crate::task::{Address, UnitSpec};

/// Where a cut slice begins: the tensor slice of the shard, and the bytes of it that came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub slice: usize,
    pub offset: usize,
}

/// The slices of one unit of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub slices: Arc<[SliceShape]>,
    pub origins: Vec<Origin>,
}

/// The mapping, made once for a store.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    geometry: Geometry,
    pieces: Vec<Piece>,
    /// The largest address at which every slice still ends before the end of all memory.
    address_max: usize,
}

impl Layout {
    /// Cuts the geometry's slices where parts end.
    pub(crate) fn new(geometry: &Geometry) -> Result<Self> {
        let piece_bytes = geometry.shard_bytes.min(geometry.part_bytes);
        let mut pieces = vec![(Vec::new(), Vec::new())];
        let mut room = piece_bytes;
        for (slice, shape) in geometry.slices.iter().enumerate() {
            let (mut offset, mut left) = (0, shape.bytes());
            while left > 0 {
                if room == 0 {
                    pieces.push((Vec::new(), Vec::new()));
                    room = piece_bytes;
                }
                let taken = left.min(room);
                let (shapes, origins) = pieces.last_mut().expect("at least one piece");
                if taken == shape.bytes() {
                    shapes.push(shape.clone());
                } else if shape.is_contiguous() {
                    shapes.push(SliceShape::contiguous(taken));
                } else {
                    return Err(straddles(slice, geometry));
                }
                origins.push(Origin { slice, offset: offset as usize });
                (offset, left, room) = (offset + taken, left - taken, room - taken);
            }
        }
        let pieces = pieces.into_iter();
        let pieces =
            pieces.map(|(slices, origins)| Piece { slices: slices.into(), origins }).collect();
        let span_max = geometry.slices.iter().map(SliceShape::span).max().unwrap_or(0);
        let address_max = u64::MAX.saturating_sub(span_max) as usize;
        Ok(Self { geometry: geometry.clone(), pieces, address_max })
    }

    /// Copies a batch's addresses. Fails where one is null, or so large that its slice would reach beyond the
    /// end of all memory.
    pub(crate) fn addresses(&self, given: &[*mut c_void]) -> Result<Vec<Address>> {
        let mut good = true;
        // Thousands in a batch, on the caller's thread: one pass, one comparison each, no branch. Null wraps
        // around to what is never below the limit.
        let addresses = given.iter().map(|address| {
            let address = address.expose_provenance();
            good &= address.wrapping_sub(1) < self.address_max;
            Address(address)
        });
        let addresses = addresses.collect();
        if good { Ok(addresses) } else { self.check_each(given).map(|()| addresses) }
    }

    /// Says which address is none. All may be good: a slice shorter than the longest may lie nearer to the end.
    fn check_each(&self, given: &[*mut c_void]) -> Result<()> {
        let slices = &self.geometry.slices;
        for (index, address) in given.iter().enumerate() {
            let (entry, slice) = (index / slices.len(), index % slices.len());
            let bad = |text: String| {
                let text = format!("addresses[{index}] is {text} (entry {entry}, slice {slice})");
                Err(Error::new(ErrorKind::InvalidArgument, text))
            };
            if address.is_null() {
                return bad("NULL".into());
            }
            let span = slices[slice].span();
            if (address.addr() as u64).checked_add(span).is_none() {
                return bad(format!("{address:p}, where no slice of {span} bytes can lie"));
            }
        }
        Ok(())
    }

    /// Units of one entry.
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Tensor slices of one shard: addresses of one entry.
    pub(crate) fn slices_per_shard(&self) -> usize {
        self.geometry.slices.len()
    }

    /// Unit `piece` of an entry.
    pub(crate) fn unit(&self, block: BlockId, shard: u32, piece: usize) -> UnitSpec {
        let first_byte =
            u64::from(shard) * self.geometry.shard_bytes + piece as u64 * self.geometry.part_bytes;
        let part = self.geometry.part_index + (first_byte / self.geometry.part_bytes) as u32;
        let within = first_byte % self.geometry.part_bytes;
        let shard = (within / self.geometry.shard_bytes) as u32;
        UnitSpec { key: PartKey { block, part: part as u16 }, shard }
    }

    /// Offset of a unit's bytes in its part.
    pub(crate) fn offset(&self, unit: &UnitSpec) -> usize {
        (u64::from(unit.shard) * self.geometry.shard_bytes) as usize
    }
}

fn straddles(slice: usize, geometry: &Geometry) -> Error {
    let text = format!(
        "tensor_shape_list: strided slice {slice} lies in two parts of {} bytes; cut it there, or use a shard_size that divides a part",
        geometry.part_bytes
    );
    Error::new(ErrorKind::InvalidConfig, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(part_bytes: u64, parts_owned: u32, shard_bytes: u64, slices: &[u64]) -> Geometry {
        let slices = slices.iter().map(|&bytes| SliceShape::contiguous(bytes)).collect();
        Geometry { part_bytes, part_count: 8, part_index: 2, parts_owned, shard_bytes, slices }
    }

    /// Goal: shards inside parts are numbered part by part.
    #[test]
    fn shards_are_numbered_part_by_part() {
        let layout = Layout::new(&geometry(8192, 2, 4096, &[1024, 3072])).unwrap();
        assert_eq!(layout.pieces().len(), 1);
        let unit = layout.unit(BlockId([1; 16]), 3, 0);
        assert_eq!((unit.key.part, unit.shard), (3, 1));
        assert_eq!(layout.offset(&unit), 4096);
    }

    /// Goal: a shard over two parts becomes two units, and a slice is cut where the first part ends.
    #[test]
    fn a_shard_over_two_parts_is_cut_where_a_part_ends() {
        let layout = Layout::new(&geometry(8192, 2, 16384, &[4096, 8192, 4096])).unwrap();
        assert_eq!(layout.pieces().len(), 2);
        let (first, second) = (&layout.pieces()[0], &layout.pieces()[1]);
        assert_eq!(first.origins, [Origin { slice: 0, offset: 0 }, Origin { slice: 1, offset: 0 }]);
        assert_eq!(
            second.origins,
            [Origin { slice: 1, offset: 4096 }, Origin { slice: 2, offset: 0 }]
        );
        assert_eq!(layout.unit(BlockId([1; 16]), 0, 1).key.part, 3);
    }

    /// Goal: null and what is too near to the end of memory are refused by place, for each slice by its own
    /// length; everything else is copied as it is.
    #[test]
    fn addresses_without_room_are_refused_by_place() {
        let layout = Layout::new(&geometry(8192, 1, 8192, &[4096, 4000, 96])).unwrap();
        let at = |numbers: [usize; 6]| {
            let given = numbers.map(std::ptr::without_provenance_mut);
            layout.addresses(&given).map(|copied| copied.iter().map(|a| a.0).collect::<Vec<_>>())
        };
        let end = usize::MAX;
        let good = [1, 2, 3, end - 4096, end - 4000, end - 96];
        assert_eq!(at(good).unwrap(), good);
        let null = at([1, 1, 1, 1, 0, 1]).unwrap_err().to_string();
        assert!(null.contains("addresses[4] is NULL (entry 1, slice 1)"), "{null}");
        let far = at([1, 1, 1, end - 4095, 1, 1]).unwrap_err().to_string();
        assert!(far.contains("addresses[3]") && far.contains("4096 bytes"), "{far}");
    }

    /// Goal: a strided slice that lies in two parts is refused by name.
    #[test]
    fn a_strided_slice_in_two_parts_is_refused() {
        let mut geometry = geometry(8192, 2, 16384, &[16384]);
        geometry.slices = vec![SliceShape { run_bytes: 256, dimensions: vec![(64, 512)] }];
        let error = Layout::new(&geometry).unwrap_err();
        assert!(error.to_string().contains("tensor_shape_list"), "{error}");
    }
}

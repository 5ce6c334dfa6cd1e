//! How sizes and shapes become a [`Geometry`]: defaults, cross-checks, and the refusal of slices that
//! would write one byte twice.

use crate::block::{Geometry, SliceShape};
use crate::error::{Error, ErrorKind, Result};

use super::options::Options;

/// Most dimensions of a strided slice.
const DIMENSIONS_MAX: usize = 6;
/// Up to so many runs an irregular slice is checked run by run.
const RUNS_CHECKED_MAX: u64 = 1 << 16;

type Text<T> = std::result::Result<T, String>;

/// Reads the compact form: run bytes, then `count:stride` for each dimension, outermost first, all
/// separated by commas.
pub(super) fn parse_shape_text(text: &str) -> Text<SliceShape> {
    let mut fields = text.split(',').map(str::trim);
    let number = |text: &str| {
        text.parse::<u64>().map_err(|_| format!("\"{text}\" is not a number of bytes or a count"))
    };
    let run = number(fields.next().unwrap_or_default())?;
    let (mut counts, mut strides) = (Vec::new(), Vec::new());
    for field in fields {
        let (count, stride) =
            field.split_once(':').ok_or_else(|| format!("\"{field}\" is not count:stride"))?;
        counts.push(number(count.trim())?);
        strides.push(number(stride.trim())?);
    }
    shape_from_fields(run, &counts, &strides)
}

/// A shape of its parts; refuses one that names a byte twice.
pub(super) fn shape_from_fields(run: u64, counts: &[u64], strides: &[u64]) -> Text<SliceShape> {
    const BYTES_MAX: u64 = 1 << 48;
    if counts.len() != strides.len() {
        return Err(format!("{} counts but {} strides", counts.len(), strides.len()));
    }
    if counts.len() > DIMENSIONS_MAX {
        return Err(format!("{} dimensions; at most {DIMENSIONS_MAX}", counts.len()));
    }
    if run == 0 || counts.contains(&0) {
        return Err("a run or a count is 0".into());
    }
    let dimensions: Vec<_> = counts.iter().copied().zip(strides.iter().copied()).collect();
    let shape = SliceShape { run_bytes: run, dimensions };
    if shape.bytes() > BYTES_MAX || shape.span() > BYTES_MAX {
        return Err("the slice spans more than 2^48 bytes".into());
    }
    check_overlap(&shape)?;
    Ok(merged(shape))
}

/// Whether the runs of a slice are apart from each other. Nested strides are decided by arithmetic;
/// anything else run by run, while there are few.
fn check_overlap(shape: &SliceShape) -> Text<()> {
    let mut dimensions: Vec<_> =
        shape.dimensions.iter().copied().filter(|(count, _)| *count > 1).collect();
    dimensions.sort_by_key(|(_, stride)| *stride);
    let mut reach = shape.run_bytes;
    let mut nested = true;
    for (count, stride) in &dimensions {
        nested &= *stride >= reach;
        reach = reach.saturating_add(stride.saturating_mul(count - 1));
    }
    if nested {
        return Ok(());
    }
    let overlap = || {
        "its runs overlap, so that a load would write one byte twice; a stride must be at least the bytes it steps over".to_owned()
    };
    let runs = dimensions.iter().fold(1_u64, |runs, (count, _)| runs.saturating_mul(*count));
    if runs > RUNS_CHECKED_MAX {
        return Err(overlap());
    }
    let mut starts = vec![0_u64];
    for (count, stride) in &dimensions {
        starts = (0..*count).flat_map(|i| starts.iter().map(move |s| s + i * stride)).collect();
    }
    starts.sort_unstable();
    match starts.windows(2).any(|pair| pair[1] - pair[0] < shape.run_bytes) {
        true => Err(overlap()),
        false => Ok(()),
    }
}

/// The same slice with dimensions of one step dropped and runs that touch made one.
fn merged(mut shape: SliceShape) -> SliceShape {
    shape.dimensions.retain(|(count, _)| *count > 1);
    while let Some((count, stride)) = shape.dimensions.last().copied() {
        if stride != shape.run_bytes {
            break;
        }
        shape.run_bytes *= count;
        shape.dimensions.pop();
    }
    shape
}

/// The geometry that the options describe.
pub(super) fn build(options: &Options, lookup_only: bool) -> Result<Geometry> {
    let parts_owned = options.integer("parts_owned") as u32;
    let sizes = Sizes::derive(options, parts_owned)?;
    let geometry = Geometry {
        part_bytes: sizes.block / u64::from(parts_owned),
        part_count: options.integer("part_count") as u32,
        part_index: options.integer("part_index") as u32,
        parts_owned,
        shard_bytes: sizes.shard,
        slices: sizes.slices,
    };
    if !lookup_only {
        geometry.validate()?;
        return Ok(geometry);
    }
    // A lookup needs no slices; what is given of them is not looked at.
    let whole = geometry.part_bytes;
    let geometry =
        Geometry { shard_bytes: whole, slices: vec![SliceShape::contiguous(whole)], ..geometry };
    geometry.validate()?;
    Ok(geometry)
}

struct Sizes {
    block: u64,
    shard: u64,
    slices: Vec<SliceShape>,
}

impl Sizes {
    fn derive(options: &Options, parts_owned: u32) -> Result<Sizes> {
        let given = |name| options.given_integer(name).map(|bytes| bytes as u64);
        let listed = listed_slices(options)?;
        let listed_bytes = listed.as_ref().map(|slices| total(slices));
        let block_given = given("block_size");
        if let Some(block) = block_given
            && block % u64::from(parts_owned) != 0
        {
            return Err(bad(format!(
                "block_size: {block} is not a multiple of parts_owned {parts_owned}"
            )));
        }
        let shard = given("shard_size")
            .or(listed_bytes)
            .or(block_given.map(|block| block / u64::from(parts_owned)))
            .ok_or_else(|| {
                bad("block_size: missing; give the bytes of the parts this store owns (or shard_size, or tensor_size_list)".into())
            })?;
        let block = block_given.unwrap_or(shard);
        if block % u64::from(parts_owned) != 0 {
            return Err(bad(format!(
                "block_size: {block} (taken from shard_size) is not a multiple of parts_owned {parts_owned}"
            )));
        }
        let slices = match (listed, given("tensor_size")) {
            (Some(slices), _) => slices,
            (None, Some(size)) if shard % size == 0 => {
                vec![SliceShape::contiguous(size); slice_count(shard / size)?]
            }
            (None, Some(size)) => {
                return Err(bad(format!("tensor_size: {size} does not divide shard_size {shard}")));
            }
            (None, None) => vec![SliceShape::contiguous(shard)],
        };
        Ok(Sizes { block, shard, slices })
    }
}

/// The slices that `tensor_shape_list` or `tensor_size_list` name, checked against each other.
fn listed_slices(options: &Options) -> Result<Option<Vec<SliceShape>>> {
    let sizes = options.integers("tensor_size_list").filter(|sizes| !sizes.is_empty());
    let shapes = options.shapes("tensor_shape_list");
    if let (Some(sizes), Some(size)) = (sizes, options.given_integer("tensor_size"))
        && sizes.iter().any(|listed| *listed != size as u64)
    {
        return Err(bad(format!(
            "tensor_size: {size} contradicts tensor_size_list; give one of the two"
        )));
    }
    let Some(shapes) = shapes else {
        return Ok(sizes.map(|sizes| sizes.iter().map(|s| SliceShape::contiguous(*s)).collect()));
    };
    if let Some(sizes) = sizes {
        if sizes.len() != shapes.len() {
            return Err(bad(format!(
                "tensor_shape_list: has {} slices, tensor_size_list has {}",
                shapes.len(),
                sizes.len()
            )));
        }
        for (index, (size, shape)) in sizes.iter().zip(shapes).enumerate() {
            if *size != shape.bytes() {
                return Err(bad(format!(
                    "tensor_shape_list: slice {index} has {} bytes, tensor_size_list says {size}",
                    shape.bytes()
                )));
            }
        }
    }
    Ok(Some(shapes.to_vec()))
}

fn slice_count(count: u64) -> Result<usize> {
    const SLICES_MAX: u64 = 16384;
    if count > SLICES_MAX {
        return Err(bad(format!(
            "tensor_size: a shard would have {count} slices; at most {SLICES_MAX}"
        )));
    }
    Ok(count as usize)
}

fn total(slices: &[SliceShape]) -> u64 {
    slices.iter().map(SliceShape::bytes).fold(0, u64::saturating_add)
}

fn bad(message: String) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

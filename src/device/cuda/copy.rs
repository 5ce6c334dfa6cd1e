//! Enqueueing pieces on a CUDA stream, in the four ways of [`Strategy`].

use std::ffi::c_void;

use super::Cuda;
use super::api::{self, Address, CopyAttributes, Memcpy2D};
use super::kernel::{Linear, PIECE_BYTES_MAX};
use crate::device::Direction;
use crate::device::engine::{Fault, Piece, Registration, Strategy, Stream};
use crate::device::loader::checked;

/// Copies in one call of the driver's batched copy.
const BATCH_MAX: usize = 1024;

/// Bytes of a lane's bounce buffer: large enough that one transfer of it runs at full speed, small
/// beside what a model leaves free.
pub(super) const BOUNCE_BYTES: u64 = 8 << 20;

/// Where a new stretch of staging begins in the bounce buffer.
const BOUNCE_ALIGNMENT: u64 = 256;

/// What one copy stream owns.
pub(in crate::device) struct Lane {
    /// Device memory of [`BOUNCE_BYTES`], where the strategy is in use.
    pub(super) bounce: Option<Address>,
    /// Device ranges seen since the last enqueue, so that one query serves all slices of a tensor.
    pub(super) ranges: std::cell::RefCell<Vec<(usize, usize)>>,
}

/// A contiguous transfer between staging and a bounce buffer.
struct Transfer {
    staging: usize,
    bounce: Address,
    bytes: u64,
}

impl Cuda {
    /// Enqueues the pieces with one strategy; those that it cannot take go piece by piece.
    ///
    /// # Safety
    /// As `Driver::copy`; strategies other than plain need device memory and pinned staging.
    pub(super) unsafe fn copy_with(
        &self,
        strategy: Strategy,
        stream: Stream,
        lane: &Lane,
        direction: Direction,
        pieces: &[Piece],
        staging: Registration,
    ) -> Result<(), Fault> {
        // SAFETY: passed on from the caller in every arm.
        unsafe {
            match (strategy, staging, lane.bounce) {
                (Strategy::Batch, _, _) => self.copy_batched(stream, direction, pieces),
                (Strategy::Kernel, Registration::Pinned { offset }, _) => {
                    self.copy_across(stream, direction, pieces, offset)
                }
                (Strategy::Bounce, Registration::Pinned { .. }, Some(bounce)) => {
                    self.copy_bounced(stream, direction, pieces, bounce)
                }
                _ => pieces.iter().try_for_each(|piece| self.copy_plain(stream, direction, piece)),
            }
        }
    }

    /// One copy for a contiguous piece, one two-dimensional copy for each row of a strided one.
    ///
    /// # Safety
    /// As `Driver::copy`.
    unsafe fn copy_plain(
        &self,
        stream: Stream,
        direction: Direction,
        piece: &Piece,
    ) -> Result<(), Fault> {
        if piece.is_contiguous() {
            // SAFETY: passed on from the caller.
            return unsafe {
                self.copy_bytes(stream, direction, piece.memory, piece.staging, piece.run)
            };
        }
        for (memory, staged) in piece.rows() {
            if piece.strides[2] > api::PITCH_MAX {
                for run in 0..piece.counts[2] {
                    let from = piece.memory + (memory + run * piece.strides[2]) as usize;
                    let to = piece.staging + (staged + run * piece.run) as usize;
                    // SAFETY: passed on from the caller.
                    unsafe { self.copy_bytes(stream, direction, from, to, piece.run)? };
                }
                continue;
            }
            let memory_side = (piece.memory as u64 + memory, piece.strides[2].max(piece.run));
            let staging_side = (piece.staging as u64 + staged, piece.run);
            let (src, dst) = match direction {
                Direction::Gather => (memory_side, staging_side),
                Direction::Scatter => (staging_side, memory_side),
            };
            let copy = Memcpy2D {
                src_x_bytes: 0,
                src_y: 0,
                src_type: api::MEMORY_TYPE_UNIFIED,
                src_host: std::ptr::null(),
                src_device: src.0,
                src_array: std::ptr::null_mut(),
                src_pitch: src.1 as usize,
                dst_x_bytes: 0,
                dst_y: 0,
                dst_type: api::MEMORY_TYPE_UNIFIED,
                dst_host: std::ptr::null_mut(),
                dst_device: dst.0,
                dst_array: std::ptr::null_mut(),
                dst_pitch: dst.1 as usize,
                width_bytes: piece.run as usize,
                height: piece.counts[2] as usize,
            };
            // SAFETY: the descriptor is read before the call returns; memory as vouched by the caller.
            unsafe { checked!(self.api, cuMemcpy2DAsync(&copy, stream.0)) }?;
        }
        Ok(())
    }

    /// # Safety
    /// As `Driver::copy`.
    unsafe fn copy_bytes(
        &self,
        stream: Stream,
        direction: Direction,
        memory: usize,
        staging: usize,
        bytes: u64,
    ) -> Result<(), Fault> {
        let (from, to) = match direction {
            Direction::Gather => (memory, staging),
            Direction::Scatter => (staging, memory),
        };
        // SAFETY: both ranges are valid until the stream has passed the copy, by the caller's word.
        unsafe {
            checked!(self.api, cuMemcpyAsync(to as u64, from as u64, bytes as usize, stream.0))
        }
    }

    /// # Safety
    /// As `Driver::copy`.
    unsafe fn copy_batched(
        &self,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
    ) -> Result<(), Fault> {
        let (mut memory, mut staging, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
        for piece in pieces {
            if !piece.is_contiguous() {
                // Its rows one by one took a hundred times as long as two-dimensional copies (H100, rows
                // of 256 bytes).
                // SAFETY: passed on from the caller.
                unsafe { self.copy_plain(stream, direction, piece)? };
                continue;
            }
            memory.push(piece.memory as u64);
            staging.push(piece.staging as u64);
            sizes.push(piece.run as usize);
            if sizes.len() == BATCH_MAX {
                // SAFETY: passed on from the caller.
                unsafe {
                    self.batch(stream, direction, &mut memory, &mut staging, &mut sizes)?;
                }
            }
        }
        // SAFETY: passed on from the caller.
        unsafe { self.batch(stream, direction, &mut memory, &mut staging, &mut sizes) }
    }

    /// Enqueues and empties the lists.
    ///
    /// # Safety
    /// As `Driver::copy`.
    unsafe fn batch(
        &self,
        stream: Stream,
        direction: Direction,
        memory: &mut Vec<Address>,
        staging: &mut Vec<Address>,
        sizes: &mut Vec<usize>,
    ) -> Result<(), Fault> {
        let Some(copy) = self.api.functions.cuMemcpyBatchAsync else { return Ok(()) };
        if sizes.is_empty() {
            return Ok(());
        }
        let (sources, targets) = match direction {
            Direction::Gather => (&mut *memory, &mut *staging),
            Direction::Scatter => (&mut *staging, &mut *memory),
        };
        let mut attributes = CopyAttributes {
            src_access_order: api::SRC_ACCESS_ORDER_STREAM,
            ..CopyAttributes::default()
        };
        let (mut first, mut failed) = (0usize, usize::MAX);
        // SAFETY: the arrays have `sizes.len()` elements and are read before the call returns; one
        // attribute serves all copies, from index 0; memory as vouched by the caller.
        let status = unsafe {
            copy(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                sizes.as_mut_ptr(),
                sizes.len(),
                &mut attributes,
                &mut first,
                1,
                &mut failed,
                stream.0,
            )
        };
        memory.clear();
        staging.clear();
        sizes.clear();
        self.api.check("cuMemcpyBatchAsync", status)
    }

    /// # Safety
    /// As `Driver::copy`; staging is pinned, `offset` from its host address.
    unsafe fn copy_across(
        &self,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
        offset: usize,
    ) -> Result<(), Fault> {
        let Some(kernels) = &self.kernels else { return Ok(()) };
        let (small, large): (Vec<Piece>, Vec<Piece>) =
            pieces.iter().partition(|piece| piece.bytes() <= PIECE_BYTES_MAX);
        // SAFETY: passed on from the caller; pinned staging is mapped for the device.
        unsafe {
            large.iter().try_for_each(|piece| self.copy_plain(stream, direction, piece))?;
            kernels.launch(&self.api, stream, direction, &small, Linear::Across, |at| {
                small[at].staging.wrapping_add(offset) as u64
            })
        }
    }

    /// Where both sides are memory of the device, one kernel moves all pieces; without kernels, copies do.
    ///
    /// # Safety
    /// As `Driver::copy`; memory and staging are memory of this device.
    pub(super) unsafe fn copy_on_device(
        &self,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
    ) -> Result<(), Fault> {
        let fits = |piece: &&Piece| self.kernels.is_some() && piece.bytes() <= PIECE_BYTES_MAX;
        let (small, large): (Vec<Piece>, Vec<Piece>) = pieces.iter().partition(fits);
        // SAFETY: passed on from the caller.
        unsafe {
            large.iter().try_for_each(|piece| self.copy_plain(stream, direction, piece))?;
            let Some(kernels) = &self.kernels else { return Ok(()) };
            kernels.launch(&self.api, stream, direction, &small, Linear::Local, |at| {
                small[at].staging as u64
            })
        }
    }

    /// # Safety
    /// As `Driver::copy`; `bounce` is the lane's buffer, used by this stream alone, in its order.
    unsafe fn copy_bounced(
        &self,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
        bounce: Address,
    ) -> Result<(), Fault> {
        let (mut held, mut places) = (Vec::new(), Vec::new());
        let (mut transfers, mut used) = (Vec::<Transfer>::new(), 0u64);
        for piece in pieces {
            let bytes = piece.bytes();
            if bytes > BOUNCE_BYTES {
                // SAFETY: passed on from the caller.
                unsafe { self.copy_plain(stream, direction, piece)? };
                continue;
            }
            let follows = transfers
                .last()
                .is_some_and(|last: &Transfer| last.staging + last.bytes as usize == piece.staging);
            let mut at = if follows { used } else { used.next_multiple_of(BOUNCE_ALIGNMENT) };
            let mut lengthens = follows;
            if at + bytes > BOUNCE_BYTES {
                // SAFETY: passed on from the caller.
                unsafe { self.flush(stream, direction, &held, &places, &transfers)? };
                held.clear();
                places.clear();
                transfers.clear();
                (at, lengthens) = (0, false);
            }
            match transfers.last_mut() {
                Some(last) if lengthens => last.bytes += bytes,
                _ => {
                    transfers.push(Transfer { staging: piece.staging, bounce: bounce + at, bytes })
                }
            }
            held.push(*piece);
            places.push(bounce + at);
            used = at + bytes;
        }
        // SAFETY: passed on from the caller.
        unsafe { self.flush(stream, direction, &held, &places, &transfers) }
    }

    /// Moves what the bounce buffer has been planned to hold. The stream's order keeps the next use of
    /// the buffer behind this one.
    ///
    /// # Safety
    /// As [`Cuda::copy_bounced`].
    unsafe fn flush(
        &self,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
        places: &[Address],
        transfers: &[Transfer],
    ) -> Result<(), Fault> {
        let Some(kernels) = &self.kernels else { return Ok(()) };
        let transfer = |transfer: &Transfer| {
            // SAFETY: passed on from the caller; the bounce buffer takes the memory's side.
            unsafe {
                self.copy_bytes(
                    stream,
                    direction,
                    transfer.bounce as usize,
                    transfer.staging,
                    transfer.bytes,
                )
            }
        };
        // SAFETY: as above.
        let launch = || unsafe {
            kernels.launch(&self.api, stream, direction, pieces, Linear::Local, |at| places[at])
        };
        match direction {
            Direction::Gather => {
                launch()?;
                transfers.iter().try_for_each(transfer)
            }
            Direction::Scatter => {
                transfers.iter().try_for_each(transfer)?;
                launch()
            }
        }
    }

    /// Gives a pinned host buffer to measure with.
    pub(super) fn host_buffer(&self, bytes: usize) -> Result<*mut c_void, Fault> {
        let mut buffer = std::ptr::null_mut();
        let flags = api::HOST_PORTABLE | api::HOST_DEVICEMAP;
        // SAFETY: `buffer` is a valid place for the address.
        unsafe { checked!(self.api, cuMemHostAlloc(&mut buffer, bytes, flags)) }.map(|()| buffer)
    }

    /// Gives device memory.
    pub(super) fn device_buffer(&self, bytes: usize) -> Result<Address, Fault> {
        let mut address = 0;
        // SAFETY: `address` is a valid place.
        unsafe { checked!(self.api, cuMemAlloc(&mut address, bytes)) }.map(|()| address)
    }
}

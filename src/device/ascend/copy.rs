//! Enqueueing pieces on an Ascend stream: plain, two-dimensional, batched, and through a pinned buffer
//! where staging is not pinned. Copies of host memory are the CPU's.

use std::ffi::{c_int, c_void};
use std::sync::atomic::Ordering;

use super::Ascend;
use super::api::{self, BatchAttributes, Location};
use crate::device::Direction;
use crate::device::engine::{Driver, Fault, Piece, Strategy, Stream};
use crate::device::loader::checked;

/// Copies in one call of the batched copy.
const BATCH_MAX: usize = 1024;

/// Bytes of the pinned buffer that stands in for staging that is not pinned.
const STAND_IN_BYTES: usize = 8 << 20;

/// Most rows of a two-dimensional copy (public documentation: 5 Mi).
const ROWS_MAX: u64 = 5 << 20;

/// What one copy stream owns.
#[derive(Default)]
pub(in crate::device) struct Lane {
    /// Memory of `aclrtMallocHost`, made when first needed.
    pub(super) stand_in: Option<PinnedBuffer>,
    /// Batches enqueued since the last run of copies was closed.
    pub(super) batches: Vec<Batch>,
}

/// The arrays of one batched copy. The documentation does not say that the runtime has read them when the call
/// returns, so they live until the copies have ended.
pub(in crate::device) struct Batch {
    to: Vec<*mut c_void>,
    room: Vec<usize>,
    from: Vec<*mut c_void>,
    sizes: Vec<usize>,
    attributes: Box<BatchAttributes>,
    first: Box<usize>,
    failed: Box<usize>,
}

// SAFETY: addresses are only kept here, never followed.
unsafe impl Send for Batch {}

impl Batch {
    fn of(stretches: &[Stretch], direction: Direction, device_id: i32) -> Self {
        let ends = |stretch: &Stretch| ends(direction, *stretch);
        let sizes: Vec<_> = stretches.iter().map(|stretch| stretch.bytes).collect();
        let device = Location { id: device_id as u32, kind: api::LOCATION_DEVICE };
        let host = Location { id: 0, kind: api::LOCATION_HOST };
        let (to, from) = match direction {
            Direction::Gather => (host, device),
            Direction::Scatter => (device, host),
        };
        Self {
            to: stretches.iter().map(|stretch| ends(stretch).1).collect(),
            room: sizes.clone(),
            from: stretches.iter().map(|stretch| ends(stretch).0.cast_mut()).collect(),
            sizes,
            attributes: Box::new(BatchAttributes { to, from, reserved: [0; 16] }),
            first: Box::new(0),
            failed: Box::new(usize::MAX),
        }
    }
}

/// Pinned host memory of [`STAND_IN_BYTES`].
pub(super) struct PinnedBuffer(pub(super) *mut u8);

// SAFETY: plain memory with one owner.
unsafe impl Send for PinnedBuffer {}

/// One contiguous copy.
#[derive(Clone, Copy)]
struct Stretch {
    memory: usize,
    staging: usize,
    bytes: usize,
}

/// The contiguous copies of pieces, rows taken apart.
fn stretches(pieces: &[Piece]) -> impl Iterator<Item = Stretch> + '_ {
    pieces.iter().flat_map(|piece| {
        piece.rows().flat_map(move |(offset, staged)| {
            (0..piece.counts[2]).map(move |run| Stretch {
                memory: piece.memory + (offset + run * piece.strides[2]) as usize,
                staging: piece.staging + (staged + run * piece.run) as usize,
                bytes: piece.run as usize,
            })
        })
    })
}

impl Ascend {
    /// Enqueues the pieces; staging is pinned.
    ///
    /// # Safety
    /// As `Driver::copy`.
    pub(super) unsafe fn copy_with(
        &self,
        strategy: Strategy,
        stream: Stream,
        lane: &mut Lane,
        direction: Direction,
        pieces: &[Piece],
    ) -> Result<(), Fault> {
        // SAFETY: passed on from the caller in every call.
        unsafe {
            if strategy == Strategy::Batch && !self.batch_refused.load(Ordering::Relaxed) {
                return self.copy_batched(stream, lane, direction, pieces);
            }
            pieces.iter().try_for_each(|piece| self.copy_plain(stream, direction, piece))
        }
    }

    /// # Safety
    /// As `Driver::copy`.
    unsafe fn copy_plain(
        &self,
        stream: Stream,
        direction: Direction,
        piece: &Piece,
    ) -> Result<(), Fault> {
        let two_dimensional = self
            .api
            .functions
            .aclrtMemcpy2dAsync
            .filter(|_| !piece.is_contiguous() && piece.counts[2] <= ROWS_MAX);
        let Some(copy) = two_dimensional else {
            return stretches(std::slice::from_ref(piece)).try_for_each(|stretch| {
                // SAFETY: passed on from the caller.
                unsafe { self.copy_bytes(stream, direction, stretch) }
            });
        };
        for (offset, staged) in piece.rows() {
            let memory = (piece.memory + offset as usize, piece.strides[2].max(piece.run) as usize);
            let staging = (piece.staging + staged as usize, piece.run as usize);
            let (from, to, kind) = match direction {
                Direction::Gather => (memory, staging, api::MEMCPY_DEVICE_TO_HOST),
                Direction::Scatter => (staging, memory, api::MEMCPY_HOST_TO_DEVICE),
            };
            // SAFETY: `counts[2]` rows of `run` bytes lie in both memories, by the caller's word.
            let status = unsafe {
                copy(
                    to.0 as *mut c_void,
                    to.1,
                    from.0 as *const c_void,
                    from.1,
                    piece.run as usize,
                    piece.counts[2] as usize,
                    kind,
                    stream.0,
                )
            };
            self.api.check("aclrtMemcpy2dAsync", status)?;
        }
        Ok(())
    }

    /// # Safety
    /// As `Driver::copy`.
    unsafe fn copy_bytes(
        &self,
        stream: Stream,
        direction: Direction,
        stretch: Stretch,
    ) -> Result<(), Fault> {
        let (from, to, kind) = ends(direction, stretch);
        // SAFETY: both ranges are valid until the stream has passed the copy, by the caller's word.
        unsafe {
            checked!(
                self.api,
                aclrtMemcpyAsync(to, stretch.bytes, from, stretch.bytes, kind, stream.0)
            )
        }
    }

    /// # Safety
    /// As `Driver::copy`.
    unsafe fn copy_batched(
        &self,
        stream: Stream,
        lane: &mut Lane,
        direction: Direction,
        pieces: &[Piece],
    ) -> Result<(), Fault> {
        let all: Vec<Stretch> = stretches(pieces).collect();
        for batch in all.chunks(BATCH_MAX) {
            // SAFETY: passed on from the caller.
            unsafe { self.batch(stream, lane, direction, batch)? };
        }
        Ok(())
    }

    /// # Safety
    /// As `Driver::copy`.
    unsafe fn batch(
        &self,
        stream: Stream,
        lane: &mut Lane,
        direction: Direction,
        batch: &[Stretch],
    ) -> Result<(), Fault> {
        let Some(copy) = self.api.functions.aclrtMemcpyBatchAsync else { return Ok(()) };
        let mut arrays = Batch::of(batch, direction, self.device_id);
        // SAFETY: the arrays have `batch.len()` elements and live in the lane, then in the run of copies, until
        // the copies have ended; one attribute serves all copies, from index 0; memory as vouched by the caller.
        let status = unsafe {
            copy(
                arrays.to.as_mut_ptr(),
                arrays.room.as_mut_ptr(),
                arrays.from.as_mut_ptr(),
                arrays.sizes.as_mut_ptr(),
                batch.len(),
                &mut *arrays.attributes,
                &mut *arrays.first,
                1,
                &mut *arrays.failed,
                stream.0,
            )
        };
        // The vectors' elements and the boxes stay where they are.
        lane.batches.push(arrays);
        if status == api::ERROR_FEATURE_NOT_SUPPORTED {
            // Refused before anything was enqueued: the chip has no batched copy.
            self.batch_refused.store(true, Ordering::Relaxed);
            return batch.iter().try_for_each(|stretch| {
                // SAFETY: passed on from the caller.
                unsafe { self.copy_bytes(stream, direction, *stretch) }
            });
        }
        self.api.check("aclrtMemcpyBatchAsync", status)
    }

    /// Copies through the lane's pinned buffer, and blocks until the bytes are there. On CANN 8 an
    /// asynchronous copy of memory that is not page-locked may read it after the call; so the buffer's
    /// copies are waited for one by one.
    ///
    /// # Safety
    /// As `Driver::copy`.
    pub(super) unsafe fn copy_through(
        &self,
        stream: Stream,
        lane: &mut Lane,
        direction: Direction,
        pieces: &[Piece],
    ) -> Result<(), Fault> {
        let buffer = self.stand_in(lane)?;
        // SAFETY: passed on from the caller.
        let copied = unsafe { self.copy_in_passes(stream, direction, buffer, pieces) };
        if copied.is_err() {
            // Copies of the buffer may still be under way: another one is made next time.
            lane.stand_in = None;
        }
        copied
    }

    /// # Safety
    /// As [`Ascend::copy_through`]; no copy of the buffer is under way.
    unsafe fn copy_in_passes(
        &self,
        stream: Stream,
        direction: Direction,
        buffer: *mut u8,
        pieces: &[Piece],
    ) -> Result<(), Fault> {
        let mut held: Vec<(Stretch, usize)> = Vec::new();
        let mut used = 0;
        for stretch in stretches(pieces) {
            let mut rest = stretch;
            while rest.bytes > 0 {
                if used == STAND_IN_BYTES {
                    // SAFETY: passed on from the caller.
                    unsafe { self.pass(stream, direction, buffer, &held)? };
                    held.clear();
                    used = 0;
                }
                let bytes = rest.bytes.min(STAND_IN_BYTES - used);
                held.push((Stretch { bytes, ..rest }, used));
                used += bytes;
                rest.memory += bytes;
                rest.staging += bytes;
                rest.bytes -= bytes;
            }
        }
        // SAFETY: passed on from the caller.
        unsafe { self.pass(stream, direction, buffer, &held) }
    }

    /// Moves what the buffer has been planned to hold.
    ///
    /// # Safety
    /// As [`Ascend::copy_through`]; `held` fits the buffer.
    unsafe fn pass(
        &self,
        stream: Stream,
        direction: Direction,
        buffer: *mut u8,
        held: &[(Stretch, usize)],
    ) -> Result<(), Fault> {
        let place = |at: usize| buffer.wrapping_add(at);
        if direction == Direction::Scatter {
            for (stretch, at) in held {
                // SAFETY: staging is valid for the stretch, the buffer for its place; no copy uses the
                // buffer now, because each pass ends with a synchronised stream.
                unsafe {
                    let staging = stretch.staging as *const u8;
                    std::ptr::copy_nonoverlapping(staging, place(*at), stretch.bytes);
                }
            }
        }
        let enqueued = held.iter().try_for_each(|(stretch, at)| {
            let stretch = Stretch { staging: place(*at) as usize, ..*stretch };
            // SAFETY: passed on from the caller; the buffer lives as long as the lane.
            unsafe { self.copy_bytes(stream, direction, stretch) }
        });
        // Also after an error: what was enqueued must end before the buffer is used again.
        self.synchronize(stream)?;
        enqueued?;
        if direction == Direction::Gather {
            for (stretch, at) in held {
                // SAFETY: as above; the copies into the buffer have ended.
                unsafe {
                    let staging = stretch.staging as *mut u8;
                    std::ptr::copy_nonoverlapping(place(*at), staging, stretch.bytes);
                }
            }
        }
        Ok(())
    }

    /// Copies between staging and host memory, which AscendCL does not do asynchronously. Blocks until what the
    /// stream was told to wait for has happened.
    ///
    /// # Safety
    /// As `Driver::copy`; the pieces lie in host memory.
    pub(super) unsafe fn copy_by_cpu(
        &self,
        stream: Stream,
        direction: Direction,
        pieces: Vec<&Piece>,
    ) -> Result<(), Fault> {
        self.synchronize(stream)?;
        for stretch in pieces.into_iter().flat_map(|piece| stretches(std::slice::from_ref(piece))) {
            let (from, to, _) = ends(direction, stretch);
            // SAFETY: both are host memory of so many bytes, by the caller's word, and lie apart: staging is the
            // arena's.
            unsafe {
                std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), stretch.bytes);
            }
        }
        Ok(())
    }

    fn stand_in(&self, lane: &mut Lane) -> Result<*mut u8, Fault> {
        if let Some(buffer) = &lane.stand_in {
            return Ok(buffer.0);
        }
        let buffer = self.host_buffer(STAND_IN_BYTES)?.cast();
        lane.stand_in = Some(PinnedBuffer(buffer));
        Ok(buffer)
    }

    /// Gives pinned host memory.
    pub(super) fn host_buffer(&self, bytes: usize) -> Result<*mut c_void, Fault> {
        let mut buffer = std::ptr::null_mut();
        // SAFETY: `buffer` is a valid place.
        unsafe { checked!(self.api, aclrtMallocHost(&mut buffer, bytes)) }.map(|()| buffer)
    }
}

/// Source, target and kind of a copy.
fn ends(direction: Direction, stretch: Stretch) -> (*const c_void, *mut c_void, c_int) {
    match direction {
        Direction::Gather => (
            stretch.memory as *const c_void,
            stretch.staging as *mut c_void,
            api::MEMCPY_DEVICE_TO_HOST,
        ),
        Direction::Scatter => (
            stretch.staging as *const c_void,
            stretch.memory as *mut c_void,
            api::MEMCPY_HOST_TO_DEVICE,
        ),
    }
}

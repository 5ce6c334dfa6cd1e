//! The gather and scatter kernels: loading them from embedded PTX, and launching them over pieces.
//!
//! `copy.cu` is the source, `copy.ptx` what is embedded, `copy_args.h` the arguments' layout, which the
//! structs here mirror.

use std::ffi::{CString, c_uint, c_void};

use super::api::Api;
use crate::device::Direction;
use crate::device::engine::{Fault, Piece, Stream};

/// The translation of `copy.cu`.
const PTX: &str = include_str!("copy.ptx");

const TILE_BYTES: u64 = 16384;
const RUNS_MAX: usize = 165;
const ROWS_MAX: usize = 62;
const THREADS: c_uint = 256;

/// Bytes of one piece that fit the kernels' 32-bit offsets; longer pieces go to the copy engines.
pub(super) const PIECE_BYTES_MAX: u64 = 1 << 31;

#[repr(C)]
#[derive(Clone, Copy)]
struct Run {
    memory: u64,
    linear: u64,
    bytes: u32,
    first_tile: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Rows {
    memory: u64,
    linear: u64,
    strides: [u64; 3],
    bytes: u32,
    first_tile: u32,
    run: u32,
    count1: u32,
    count2: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    pieces: u32,
    tiles: u32,
    width: u32,
    scatter: u32,
}

#[repr(C)]
struct RunsArgs {
    head: Head,
    pieces: [Run; RUNS_MAX],
}

#[repr(C)]
struct RowsArgs {
    head: Head,
    pieces: [Rows; ROWS_MAX],
}

const _: () = assert!(size_of::<RunsArgs>() == 3976 && size_of::<RowsArgs>() == 3984);

/// The loaded kernels.
pub(super) struct Kernels {
    module: *mut c_void,
    runs: *mut c_void,
    rows: *mut c_void,
    /// Thread blocks of a launch that stays on the device, and of one that crosses the bus.
    blocks_local: c_uint,
    blocks_across: c_uint,
}

// SAFETY: module and function handles may be used from any thread that has the context current.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

/// What the linear side of a launch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Linear {
    /// Memory of the device.
    Local,
    /// Pinned host memory.
    Across,
}

impl Kernels {
    /// Has the driver translate the PTX. The context is current.
    pub(super) fn load(api: &Api, multiprocessors: u32) -> Result<Option<Self>, Fault> {
        let (Some(load), Some(get), Some(_)) = (
            api.functions.cuModuleLoadData,
            api.functions.cuModuleGetFunction,
            api.functions.cuLaunchKernel,
        ) else {
            return Ok(None);
        };
        let Ok(text) = CString::new(PTX) else { return Ok(None) };
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is NUL-terminated PTX text and outlives the call.
        api.check("cuModuleLoadData", unsafe { load(&mut module, text.as_ptr().cast()) })?;
        let mut kernels = Self {
            module,
            runs: std::ptr::null_mut(),
            rows: std::ptr::null_mut(),
            // Half of the multiprocessors saturate the device's memory; across the bus a dozen blocks
            // hold as much in flight as it takes.
            blocks_local: (multiprocessors / 2).max(1),
            blocks_across: (multiprocessors / 6).clamp(1, 24),
        };
        for name in [c"ucm_copy_runs", c"ucm_copy_rows"] {
            let mut function = std::ptr::null_mut();
            // SAFETY: the module is loaded, the name NUL-terminated, `function` a valid place.
            let status = unsafe { get(&mut function, module, name.as_ptr()) };
            if let Err(fault) = api.check("cuModuleGetFunction", status) {
                kernels.unload(api);
                return Err(fault);
            }
            if name == c"ucm_copy_runs" {
                kernels.runs = function;
            } else {
                kernels.rows = function;
            }
        }
        Ok(Some(kernels))
    }

    /// Unloads the module. No launch is in flight, and the context is current.
    pub(super) fn unload(&self, api: &Api) {
        if let Some(unload) = api.functions.cuModuleUnload {
            // SAFETY: the module was loaded by `load` and is unloaded once, by the owner's drop.
            let _ = unsafe { unload(self.module) };
        }
    }

    /// Enqueues kernels that move all pieces; `linear_of` gives the device's address of a piece's
    /// staging side.
    ///
    /// # Safety
    /// The device can reach every piece's memory and linear side until the stream has passed the launch.
    pub(super) unsafe fn launch(
        &self,
        api: &Api,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
        linear: Linear,
        mut linear_of: impl FnMut(usize) -> u64,
    ) -> Result<(), Fault> {
        let mut at = 0;
        while at < pieces.len() {
            let strided = !pieces[at].is_contiguous();
            let limit = if strided { ROWS_MAX } else { RUNS_MAX };
            let end = pieces[at..]
                .iter()
                .take(limit)
                .position(|piece| piece.is_contiguous() == strided)
                .map_or((at + limit).min(pieces.len()), |length| at + length);
            let chunk = &pieces[at..end];
            let linears = (at..end).map(&mut linear_of);
            // SAFETY: passed on from the caller.
            unsafe {
                if strided {
                    self.launch_rows(api, stream, direction, chunk, linear, linears)?;
                } else {
                    self.launch_runs(api, stream, direction, chunk, linear, linears)?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// # Safety
    /// As [`Kernels::launch`]; at most `RUNS_MAX` contiguous pieces.
    unsafe fn launch_runs(
        &self,
        api: &Api,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
        linear: Linear,
        linears: impl Iterator<Item = u64>,
    ) -> Result<(), Fault> {
        let empty = Run { memory: 0, linear: 0, bytes: 0, first_tile: 0 };
        let mut args = RunsArgs { head: head(direction), pieces: [empty; RUNS_MAX] };
        for ((slot, piece), linear) in args.pieces.iter_mut().zip(pieces).zip(linears) {
            *slot = Run {
                memory: piece.memory as u64,
                linear,
                bytes: piece.bytes() as u32,
                first_tile: args.head.add(piece, linear),
            };
        }
        // SAFETY: `args` is the argument that the kernel declares; memory as vouched by the caller.
        unsafe {
            self.start(api, stream, self.runs, linear, args.head.tiles, (&raw mut args).cast())
        }
    }

    /// # Safety
    /// As [`Kernels::launch`]; at most `ROWS_MAX` pieces.
    unsafe fn launch_rows(
        &self,
        api: &Api,
        stream: Stream,
        direction: Direction,
        pieces: &[Piece],
        linear: Linear,
        linears: impl Iterator<Item = u64>,
    ) -> Result<(), Fault> {
        let empty = Rows {
            memory: 0,
            linear: 0,
            strides: [0; 3],
            bytes: 0,
            first_tile: 0,
            run: 1,
            count1: 1,
            count2: 1,
            unused: 0,
        };
        let mut args = RowsArgs { head: head(direction), pieces: [empty; ROWS_MAX] };
        for ((slot, piece), linear) in args.pieces.iter_mut().zip(pieces).zip(linears) {
            *slot = Rows {
                memory: piece.memory as u64,
                linear,
                strides: piece.strides,
                bytes: piece.bytes() as u32,
                first_tile: args.head.add(piece, linear),
                run: piece.run as u32,
                count1: piece.counts[1] as u32,
                count2: piece.counts[2] as u32,
                unused: 0,
            };
        }
        // SAFETY: `args` is the argument that the kernel declares; memory as vouched by the caller.
        unsafe {
            self.start(api, stream, self.rows, linear, args.head.tiles, (&raw mut args).cast())
        }
    }

    /// # Safety
    /// `args` points at the kernel's one argument; the driver copies it before it returns.
    unsafe fn start(
        &self,
        api: &Api,
        stream: Stream,
        function: *mut c_void,
        linear: Linear,
        tiles: u32,
        args: *mut c_void,
    ) -> Result<(), Fault> {
        let Some(launch) = api.functions.cuLaunchKernel else { return Ok(()) };
        let blocks = match linear {
            Linear::Local => self.blocks_local,
            Linear::Across => self.blocks_across,
        };
        let (mut params, none) = ([args], std::ptr::null_mut());
        // SAFETY: the function lives with the module; one parameter as declared; passed on from above.
        let status = unsafe {
            launch(
                function,
                blocks.min(tiles),
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream.0,
                params.as_mut_ptr(),
                none,
            )
        };
        api.check("cuLaunchKernel", status)
    }
}

fn head(direction: Direction) -> Head {
    Head { pieces: 0, tiles: 0, width: 16, scatter: u32::from(direction == Direction::Scatter) }
}

impl Head {
    /// Counts a piece in and gives its first tile.
    fn add(&mut self, piece: &Piece, linear: u64) -> u32 {
        let first = self.tiles;
        self.pieces += 1;
        self.tiles += piece.bytes().div_ceil(TILE_BYTES) as u32;
        let linear_alignment = 1u64 << (linear | 16).trailing_zeros();
        self.width = self.width.min(piece.alignment().min(linear_alignment) as u32);
        first
    }
}

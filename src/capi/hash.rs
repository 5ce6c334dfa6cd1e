//! Block ids of token sequences.

use std::ffi::c_void;

use super::boundary::enter;
use super::lookup::ucm_block_id_t;
use super::pointers::{
    UCM_BYTES_MAX, UCM_COUNT_MAX, UCM_TOKENS_MAX, check, invalid, put, slice, slice_mut,
};
use super::status::ucm_status_t;
use super::store::{store_of, ucm_store_t};
use crate::block::BlockId;
use crate::error::Result;
use crate::store::Store;

/// Arguments that both functions share.
struct Request {
    tokens: *const u32,
    count: usize,
    block_tokens: u32,
    parent: *const ucm_block_id_t,
    ids: *mut ucm_block_id_t,
    capacity: usize,
    written: *mut usize,
}

/// What a hash function of the engine is given.
type Compute<'a> =
    dyn FnMut(&Store, &[u32], Option<&BlockId>, &mut [BlockId]) -> Result<usize> + 'a;

impl Request {
    /// Full blocks of the tokens.
    fn blocks(&self) -> Result<usize> {
        if self.block_tokens == 0 {
            return Err(invalid("block_tokens is 0; a block has at least one token"));
        }
        Ok(self.count / self.block_tokens as usize)
    }

    /// Checks, converts and computes.
    ///
    /// # Safety
    /// The pointers are what the comment of [`ucm_hash_tokens`] says.
    unsafe fn run(&self, store: *mut ucm_store_t, compute: &mut Compute<'_>) -> Result<()> {
        check("written", self.written)?;
        // SAFETY: checked; the caller vouches for it, here and below.
        unsafe { put(self.written, 0) };
        let store = store_of(store)?;
        let blocks = self.blocks()?;
        if self.capacity < blocks {
            return Err(invalid(format!(
                "capacity is {}; {} tokens have {blocks} full blocks of {}",
                self.capacity, self.count, self.block_tokens
            )));
        }
        // SAFETY: the caller vouches for tokens, parent and ids. The parent is copied, because it may be
        // one of the ids.
        let (tokens, parent, ids) = unsafe {
            let tokens = slice("tokens", self.tokens, self.count, UCM_TOKENS_MAX)?;
            let parent = self.parent.cast::<BlockId>().as_ref().copied();
            let ids = slice_mut("ids", self.ids.cast::<BlockId>(), blocks, UCM_COUNT_MAX)?;
            (tokens, parent, ids)
        };
        let written = compute(&store, tokens, parent.as_ref(), ids)?;
        // SAFETY: as above.
        unsafe { put(self.written, written) };
        Ok(())
    }
}

/// The block ids of a token sequence: one for each full block, chained from parent.
///
/// A keyed BLAKE3 hash of parent, tokens, extra and the store's namespace: equal on every machine, in
/// every process and release. Does not block; under a microsecond per block of 128 tokens.
///
/// @param store handle: gives the namespace
/// @param tokens count token ids; may be NULL when count is 0
/// @param count 0 to UCM_TOKENS_MAX. Tokens after the last full block are left out
/// @param block_tokens tokens of a block, at least 1
/// @param parent id of the block before the first token; NULL: the namespace's root
/// @param extra bytes that salt every id (LoRA, multimodal content, cache salt); may be NULL when extra_length is 0
/// @param extra_length bytes of extra, 0 to UCM_BYTES_MAX
/// @param ids receives the ids
/// @param capacity ids that fit; at least count / block_tokens
/// @param written receives how many ids there are; 0 on failure
/// @return UCM_STATUS_OK, or
///         UCM_STATUS_INVALID_ARGUMENT (NULL, misaligned, block_tokens 0, too large, capacity too small,
///         no handle), UCM_STATUS_CLOSED
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_hash_tokens(
    store: *mut ucm_store_t,
    tokens: *const u32,
    count: usize,
    block_tokens: u32,
    parent: *const ucm_block_id_t,
    extra: *const c_void,
    extra_length: usize,
    ids: *mut ucm_block_id_t,
    capacity: usize,
    written: *mut usize,
) -> ucm_status_t {
    enter(|| {
        let request = Request { tokens, count, block_tokens, parent, ids, capacity, written };
        // SAFETY: the caller keeps the contract above.
        unsafe {
            let extra = slice("extra", extra.cast::<u8>(), extra_length, UCM_BYTES_MAX)?;
            request.run(store, &mut |store, tokens, parent, ids| {
                store.hash_tokens(tokens, block_tokens as usize, parent, extra, ids)
            })
        }
    })
}

/// As ucm_hash_tokens, with extra bytes of its own for each block.
///
/// The ids of blocks with equal extra bytes are those of ucm_hash_tokens. Does not block.
///
/// @param store handle: gives the namespace
/// @param tokens count token ids; may be NULL when count is 0
/// @param count 0 to UCM_TOKENS_MAX. Tokens after the last full block are left out
/// @param block_tokens tokens of a block, at least 1
/// @param parent id of the block before the first token; NULL: the namespace's root
/// @param extras count / block_tokens pointers, one a full block; one may be NULL where its length is 0
/// @param extra_lengths as many lengths in bytes, each 0 to UCM_BYTES_MAX
/// @param ids receives the ids
/// @param capacity ids that fit; at least count / block_tokens
/// @param written receives how many ids there are; 0 on failure
/// @return as ucm_hash_tokens
/// @since 0.1
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn ucm_hash_blocks(
    store: *mut ucm_store_t,
    tokens: *const u32,
    count: usize,
    block_tokens: u32,
    parent: *const ucm_block_id_t,
    extras: *const *const c_void,
    extra_lengths: *const usize,
    ids: *mut ucm_block_id_t,
    capacity: usize,
    written: *mut usize,
) -> ucm_status_t {
    enter(|| {
        let request = Request { tokens, count, block_tokens, parent, ids, capacity, written };
        let blocks = request.blocks()?;
        // SAFETY: the caller keeps the contract above.
        unsafe {
            let pointers = slice("extras", extras, blocks, UCM_COUNT_MAX)?;
            let lengths = slice("extra_lengths", extra_lengths, blocks, UCM_COUNT_MAX)?;
            let extra = |(pointer, length): (&*const c_void, &usize)| {
                slice("an item of extras", pointer.cast::<u8>(), *length, UCM_BYTES_MAX)
            };
            let extras = pointers.iter().zip(lengths).map(extra).collect::<Result<Vec<_>>>()?;
            request.run(store, &mut |store, tokens, parent, ids| {
                store.hash_blocks(tokens, block_tokens as usize, parent, &extras, ids)
            })
        }
    })
}

//! Block ids: the chained hash of a prompt's tokens. Knows the root that a namespace gives, not what a
//! namespace is.
//!
//! The id of a block is the first 16 bytes of BLAKE3 in keyed mode over, in this order and without gaps,
//! all numbers little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | 0: the first block of a prompt; 1: a block with a parent |
//! | 3 | zero |
//! | 4 | tokens of the block |
//! | 8 | bytes of extra |
//! | 16 | id of the parent; zero for the first block |
//! | 4 each | tokens |
//! | any | extra |
//!
//! The key is BLAKE3's derive-key of the root (16 bytes) with the context [`CONTEXT`]. Lengths come before
//! what they measure, so no two inputs have the same bytes. The ids are kept in files and compared between
//! machines: they never change, and `tests/data/hash-vectors.json` holds them to it.

#![forbid(unsafe_code)]

use crate::block::BlockId;

/// What separates these hashes from all others.
pub const CONTEXT: &str = "ucm 2026 block id v1";

const HEADER_BYTES: usize = 32;

/// Hashes prompts of one namespace.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    key: [u8; 32],
}

impl BlockHasher {
    /// For the namespace whose logical fingerprint is `root`: servers with other byte orders share keys.
    pub fn new(root: &[u8; 16]) -> Self {
        Self { key: blake3::derive_key(CONTEXT, root) }
    }

    /// The ids of the full blocks of `tokens`, chained from `parent` (`None`: the beginning of a prompt),
    /// each salted with `extra`. Tokens behind the last full block are left. Returns how many ids were
    /// written: as many as there are blocks, at most the length of `out`; 0 for blocks of 0 tokens.
    pub fn tokens(
        &self,
        tokens: &[u32],
        block_tokens: usize,
        parent: Option<&BlockId>,
        extra: &[u8],
        out: &mut [BlockId],
    ) -> usize {
        self.chain(tokens, block_tokens, parent, |_| Some(extra), out)
    }

    /// As [`BlockHasher::tokens`], with extra bytes of its own for each block. Ends with the extras.
    pub fn blocks(
        &self,
        tokens: &[u32],
        block_tokens: usize,
        parent: Option<&BlockId>,
        extras: &[&[u8]],
        out: &mut [BlockId],
    ) -> usize {
        self.chain(tokens, block_tokens, parent, |index| extras.get(index).copied(), out)
    }

    fn chain<'a>(
        &self,
        tokens: &[u32],
        block_tokens: usize,
        parent: Option<&BlockId>,
        extra: impl Fn(usize) -> Option<&'a [u8]>,
        out: &mut [BlockId],
    ) -> usize {
        if block_tokens == 0 {
            return 0;
        }
        let mut parent = parent.copied();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + block_tokens.min(tokens.len()) * 4);
        let mut written = 0;
        for (block, id) in tokens.chunks_exact(block_tokens).zip(out) {
            let Some(extra) = extra(written) else { break };
            *id = self.block(block, parent.as_ref(), extra, &mut bytes);
            parent = Some(*id);
            written += 1;
        }
        written
    }

    fn block(
        &self,
        tokens: &[u32],
        parent: Option<&BlockId>,
        extra: &[u8],
        bytes: &mut Vec<u8>,
    ) -> BlockId {
        bytes.clear();
        bytes.extend_from_slice(&[u8::from(parent.is_some()), 0, 0, 0]);
        bytes.extend_from_slice(&(tokens.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(extra.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&parent.copied().unwrap_or_default().0);
        bytes.resize(HEADER_BYTES + tokens.len() * 4, 0);
        let words = bytes[HEADER_BYTES..].as_chunks_mut::<4>().0;
        for (word, token) in words.iter_mut().zip(tokens) {
            *word = token.to_le_bytes();
        }
        bytes.extend_from_slice(extra);
        let hash = blake3::keyed_hash(&self.key, bytes);
        let mut id = BlockId::default();
        id.0.copy_from_slice(&hash.as_bytes()[..16]);
        id
    }
}

/// [`BlockHasher::tokens`] in one call.
pub fn hash_tokens(
    root: &[u8; 16],
    tokens: &[u32],
    block_tokens: usize,
    parent: Option<&BlockId>,
    extra: &[u8],
    out: &mut [BlockId],
) -> usize {
    BlockHasher::new(root).tokens(tokens, block_tokens, parent, extra, out)
}

/// [`BlockHasher::blocks`] in one call.
pub fn hash_blocks(
    root: &[u8; 16],
    tokens: &[u32],
    block_tokens: usize,
    parent: Option<&BlockId>,
    extras: &[&[u8]],
    out: &mut [BlockId],
) -> usize {
    BlockHasher::new(root).blocks(tokens, block_tokens, parent, extras, out)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::block::Namespace;

    #[derive(serde::Deserialize)]
    struct Vectors {
        namespaces: Vec<NamespaceVector>,
        chains: Vec<ChainVector>,
    }

    #[derive(serde::Deserialize)]
    struct NamespaceVector {
        model_id: String,
        dtype: String,
        block_tokens: u32,
        namespace_extra: String,
        part_count: u32,
        part_bytes: u64,
        order: String,
        logical_fingerprint: String,
    }

    #[derive(serde::Deserialize)]
    struct ChainVector {
        root: String,
        block_tokens: usize,
        parent: Option<String>,
        tokens: Vec<u32>,
        extras: Vec<String>,
        ids: Vec<String>,
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let digits = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
        digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
    }

    fn sixteen(hex: &str) -> [u8; 16] {
        bytes(hex).try_into().unwrap()
    }

    fn vectors() -> Vectors {
        serde_saphyr::from_str(include_str!("../tests/data/hash-vectors.json")).unwrap()
    }

    fn chain(tokens: &[u32], block_tokens: usize, extra: &[u8]) -> Vec<BlockId> {
        let mut out = vec![BlockId::default(); tokens.len() / block_tokens];
        assert_eq!(hash_tokens(&[7; 16], tokens, block_tokens, None, extra, &mut out), out.len());
        out
    }

    #[test]
    fn ids_match_the_committed_vectors() {
        // Goal: the ids of every release are those of the file, which another program computed.
        let vectors = vectors();
        assert!(vectors.chains.len() >= 6);
        for vector in vectors.chains {
            let parent = vector.parent.as_deref().map(|hex| BlockId(sixteen(hex)));
            let extras: Vec<_> = vector.extras.iter().map(|hex| bytes(hex)).collect();
            let extras: Vec<_> = extras.iter().map(Vec::as_slice).collect();
            let mut out = vec![BlockId::default(); vector.ids.len() + 1];
            let root = sixteen(&vector.root);
            let (tokens, length) = (&vector.tokens, vector.block_tokens);
            let written = hash_blocks(&root, tokens, length, parent.as_ref(), &extras, &mut out);
            let ids: Vec<_> = out[..written].iter().map(BlockId::to_string).collect();
            assert_eq!(ids, vector.ids);
        }
    }

    #[test]
    fn roots_match_the_committed_vectors() {
        // Goal: the root that a namespace gives its ids is stable, and the order of bytes is not in it.
        for vector in vectors().namespaces {
            let mut namespace = Namespace {
                model_id: vector.model_id,
                dtype: vector.dtype,
                block_tokens: vector.block_tokens,
                extra: vector.namespace_extra,
                part_count: vector.part_count,
                part_bytes: vector.part_bytes,
                order: vector.order,
            };
            assert_eq!(namespace.logical_fingerprint(), sixteen(&vector.logical_fingerprint));
            namespace.order += "-other";
            assert_eq!(namespace.logical_fingerprint(), sixteen(&vector.logical_fingerprint));
        }
    }

    #[test]
    fn everything_that_differs_makes_another_id() {
        // Goal: tokens, their number, extra, parent and root each change the id; moving a byte from the
        // tokens to extra does too.
        let tokens: Vec<u32> = (0..8).collect();
        let mut seen = HashSet::new();
        let mut add = |root: u8, tokens: &[u32], parent: Option<BlockId>, extra: &[u8]| {
            let mut out = [BlockId::default()];
            let count = tokens.len();
            assert_eq!(
                hash_tokens(&[root; 16], tokens, count, parent.as_ref(), extra, &mut out),
                1
            );
            assert!(seen.insert(out[0]), "{tokens:?} {parent:?} {extra:?}");
        };
        add(1, &tokens, None, b"");
        add(2, &tokens, None, b"");
        add(1, &tokens[..7], None, b"");
        add(1, &tokens[..7], None, &7_u32.to_le_bytes());
        add(1, &tokens, Some(BlockId::default()), b"");
        add(1, &tokens, Some(BlockId([1; 16])), b"");
        add(1, &tokens, None, b"\0");
        add(1, &tokens, None, b"lora:1");
    }

    #[test]
    fn incomplete_blocks_short_outputs_and_zero_lengths_are_left() {
        // Goal: the edges: a tail of tokens, an output that is too short, blocks of no tokens.
        let tokens: Vec<u32> = (0..10).collect();
        let mut out = [BlockId::default(); 5];
        assert_eq!(hash_tokens(&[0; 16], &tokens, 4, None, b"", &mut out), 2);
        assert_eq!(hash_tokens(&[0; 16], &tokens, 2, None, b"", &mut out[..3]), 3);
        assert_eq!(hash_tokens(&[0; 16], &tokens, 0, None, b"", &mut out), 0);
        assert_eq!(hash_tokens(&[0; 16], &tokens, 11, None, b"", &mut out), 0);
        assert_eq!(hash_blocks(&[0; 16], &tokens, 2, None, &[b"a", b"b"], &mut out), 2);
    }

    proptest! {
        #[test]
        fn a_chain_can_be_cut_anywhere(
            tokens in prop::collection::vec(any::<u32>(), 0..200),
            block_tokens in 1_usize..20,
            cut in any::<prop::sample::Index>(),
            extra in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            // Goal: hashing a prompt in two pieces, the second from the last id of the first, is hashing it
            // whole; one extra for all is the same extra for each.
            let whole = chain(&tokens, block_tokens, &extra);
            if !whole.is_empty() {
                let head = cut.index(whole.len());
                let parent = head.checked_sub(1).map(|last| whole[last]);
                let mut rest = vec![BlockId::default(); whole.len() - head];
                let tail = &tokens[head * block_tokens..];
                let extras = vec![extra.as_slice(); rest.len()];
                let written =
                    hash_blocks(&[7; 16], tail, block_tokens, parent.as_ref(), &extras, &mut rest);
                prop_assert_eq!(written, rest.len());
                prop_assert_eq!(&rest, &whole[head..]);
            }
        }
    }

    #[test]
    fn a_block_of_128_tokens_takes_less_than_a_microsecond() {
        // Goal: the cost of a lookup is not in the hash. Checked in release builds, printed in all.
        let tokens: Vec<u32> = (0..128 * 1024).collect();
        let mut out = vec![BlockId::default(); 1024];
        let hasher = BlockHasher::new(&[3; 16]);
        let best = (0..20)
            .map(|_| {
                let start = Instant::now();
                assert_eq!(hasher.tokens(&tokens, 128, None, b"salt", &mut out), 1024);
                start.elapsed()
            })
            .min()
            .unwrap();
        println!("{:?} per block of 128 tokens", best / 1024);
        if !cfg!(debug_assertions) {
            assert!(best.as_nanos() < 1024 * 1000, "{best:?} for 1024 blocks");
        }
    }
}

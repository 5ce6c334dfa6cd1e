//! Remembers which server saw which prompt prefix. Owns a bounded map from chained hashes of
//! prompt chunks to servers; does not know load or health.
//!
//! The prompt is taken as the client's JSON text (model, salt, tools, then messages or prompt):
//! requests that continue a conversation repeat that text and add to it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};

use crate::body::Fields;

/// Bytes of JSON text a chunk; about 64 tokens of English.
const CHUNK_BYTES: usize = 256;
/// Chunks looked at: a prompt's first 16 KiB tell conversations apart.
const CHUNKS_MAX: usize = 64;
/// Entries of one generation of the map. Two generations of 24-byte entries: a few MiB.
const GENERATION_ENTRIES: usize = 65_536;

/// Chained hashes of a prompt's chunks, the shortest prefix first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixKey(Vec<u64>);

/// Fields that set prompts apart but are no part of one: two requests that share only these share
/// no KV, so no hash is noted for them alone.
const CONTEXT_FIELDS: [&str; 4] = ["model", "cache_salt", "chat_template", "chat_template_kwargs"];
/// Fields whose text becomes the prompt, in the order in which templates put them.
const PROMPT_FIELDS: [&str; 7] =
    ["tools", "instructions", "system", "messages", "input", "prompt", "token_ids"];

impl PrefixKey {
    /// The key of a request.
    pub fn of(fields: &Fields<'_>) -> Self {
        let mut hasher = DefaultHasher::new();
        let mut hashes = Vec::new();
        for name in CONTEXT_FIELDS {
            let text = fields.get(name).unwrap_or_default().as_bytes();
            hasher.write_usize(text.len());
            hasher.write(text);
        }
        for name in PROMPT_FIELDS {
            let text = fields.get(name).unwrap_or_default().as_bytes();
            hasher.write_u8(b',');
            for chunk in text.chunks(CHUNK_BYTES) {
                if hashes.len() == CHUNKS_MAX {
                    return Self(hashes);
                }
                hasher.write(chunk);
                hashes.push(hasher.finish());
            }
        }
        Self(hashes)
    }
}

/// Which server saw a prefix last. When one generation is full the older one is dropped.
#[derive(Default)]
pub struct Affinity {
    young: HashMap<u64, u64>,
    old: HashMap<u64, u64>,
}

impl Affinity {
    /// The servers that saw prefixes of `key`, the longest prefix first.
    pub fn seen_by<'a>(&'a self, key: &'a PrefixKey) -> impl Iterator<Item = u64> + 'a {
        let find = |hash| self.young.get(hash).or_else(|| self.old.get(hash)).copied();
        key.0.iter().rev().filter_map(find)
    }

    /// Notes that `server` computes this prompt now.
    pub fn note(&mut self, key: &PrefixKey, server: u64) {
        for hash in &key.0 {
            if self.young.len() >= GENERATION_ENTRIES {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(*hash, server);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> PrefixKey {
        let body = format!("{{\"model\":\"m\",\"prompt\":\"{text}\"}}");
        PrefixKey::of(&Fields::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn the_longest_prefix_wins_and_the_map_is_bounded() {
        // Goal: a continued prompt finds its server before that of a shorter common prefix.
        let (shared, other) = ("s".repeat(600), "o".repeat(600));
        let mut affinity = Affinity::default();
        affinity.note(&key(&format!("{shared}{other}")), 1);
        affinity.note(&key(&shared), 2);
        let long = key(&format!("{shared}{other} and more"));
        assert_eq!(affinity.seen_by(&long).next(), Some(1));
        assert_eq!(affinity.seen_by(&key(&format!("{shared}xyz"))).next(), Some(2));
        assert_eq!(affinity.seen_by(&key("nothing in common")).next(), None);
        for round in 0..3 * GENERATION_ENTRIES {
            affinity.note(&PrefixKey(vec![round as u64]), 3);
        }
        assert!(affinity.young.len() <= GENERATION_ENTRIES);
        assert!(affinity.old.len() <= GENERATION_ENTRIES);
        assert_eq!(affinity.seen_by(&long).next(), None);
    }
}

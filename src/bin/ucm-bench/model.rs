//! Shapes of the KV cache of well-known models: what a block of tokens weighs, and how it is sliced.
//!
//! Numbers are from the models' published `config.json` (num_hidden_layers, num_key_value_heads, head_dim;
//! for MLA kv_lora_rank + qk_rope_head_dim). Knows no store.

#![forbid(unsafe_code)]

/// What attention keeps of a token, in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Grouped-query attention: a K and a V of `heads * dimension` elements, split over ranks by heads.
    Grouped {
        /// KV heads.
        heads: u32,
        /// Elements of one head.
        dimension: u32,
    },
    /// Multi-head latent attention: one latent of `elements`, which every rank holds alike.
    Latent {
        /// kv_lora_rank + qk_rope_head_dim.
        elements: u32,
    },
}

/// A model's KV cache.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Name on the command line.
    pub name: &'static str,
    /// Layers.
    pub layers: u32,
    /// Kind and size of attention.
    pub attention: Attention,
}

/// How one rank's part of a block is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Layers, that is: shards of a layer-wise transfer.
    pub layers: u32,
    /// Tensor slices of one layer, in bytes (K and V, or one latent).
    pub layer_slices: Vec<u64>,
}

impl Shape {
    /// Bytes of one layer.
    pub fn layer_bytes(&self) -> u64 {
        self.layer_slices.iter().sum()
    }

    /// Bytes of the part.
    pub fn bytes(&self) -> u64 {
        self.layer_bytes() * u64::from(self.layers)
    }
}

const fn grouped(name: &'static str, layers: u32, heads: u32, dimension: u32) -> Model {
    Model { name, layers, attention: Attention::Grouped { heads, dimension } }
}

const fn latent(name: &'static str, layers: u32) -> Model {
    Model { name, layers, attention: Attention::Latent { elements: 512 + 64 } }
}

/// The models known by name.
pub static MODELS: &[Model] = &[
    grouped("qwen2.5-0.5b", 24, 2, 64),
    grouped("qwen2.5-7b", 28, 4, 128),
    grouped("qwen2.5-14b", 48, 8, 128),
    grouped("qwen2.5-32b", 64, 8, 128),
    grouped("qwen2.5-72b", 80, 8, 128),
    grouped("qwen3-8b", 36, 8, 128),
    grouped("qwen3-32b", 64, 8, 128),
    grouped("qwen3-30b-a3b", 48, 4, 128),
    grouped("qwen3-235b-a22b", 94, 4, 128),
    grouped("llama-3-8b", 32, 8, 128),
    grouped("llama-3-70b", 80, 8, 128),
    grouped("llama-3.1-405b", 126, 8, 128),
    grouped("mistral-7b", 32, 8, 128),
    grouped("mixtral-8x7b", 32, 8, 128),
    grouped("glm-4.5", 92, 8, 128),
    latent("deepseek-v2-lite", 27),
    latent("deepseek-v3", 61),
    latent("deepseek-r1", 61),
    latent("kimi-k2", 61),
];

/// Finds a model, or says which name is nearest.
pub fn find(name: &str) -> Result<&'static Model, String> {
    let wanted = name.to_ascii_lowercase();
    MODELS.iter().find(|model| model.name == wanted).ok_or_else(|| {
        let nearest = MODELS
            .iter()
            .max_by(|a, b| {
                strsim::jaro_winkler(a.name, &wanted)
                    .total_cmp(&strsim::jaro_winkler(b.name, &wanted))
            })
            .map_or("", |model| model.name);
        format!("unknown model `{name}`; did you mean {nearest}? `ucm-bench models` lists all")
    })
}

impl Model {
    /// The part that one of `tp` ranks holds of a block of `block_tokens`, at `element_bytes` an element.
    pub fn shape(&self, tp: u32, block_tokens: u32, element_bytes: u32) -> Result<Shape, String> {
        let token = u64::from(block_tokens) * u64::from(element_bytes);
        let layer_slices = match self.attention {
            Attention::Latent { elements } => vec![u64::from(elements) * token],
            Attention::Grouped { heads, dimension } => {
                let split = tp.min(heads);
                if tp == 0 || heads % split != 0 {
                    return Err(format!(
                        "tp={tp}: the {heads} KV heads of {} cannot be split evenly",
                        self.name
                    ));
                }
                vec![u64::from(heads / split) * u64::from(dimension) * token; 2]
            }
        };
        Ok(Shape { layers: self.layers, layer_slices })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the sizes people know by heart: DeepSeek-V3's layer is 144 KiB per 128 tokens, Qwen2.5-7B keeps
    /// 56 KiB a token, and Llama-3-70B at TP 8 one head a rank.
    #[test]
    fn known_sizes() {
        let deepseek = find("deepseek-v3").unwrap().shape(8, 128, 2).unwrap();
        assert_eq!((deepseek.layers, deepseek.layer_bytes()), (61, 144 << 10));
        let qwen = find("Qwen2.5-7B").unwrap().shape(1, 128, 2).unwrap();
        assert_eq!(qwen.bytes(), 128 * (56 << 10));
        let llama = find("llama-3-70b").unwrap().shape(8, 128, 2).unwrap();
        assert_eq!(llama.layer_slices, [128 * 128 * 2; 2]);
    }

    /// Goal: a misspelt model is refused with the right neighbour, an impossible split with its reason.
    #[test]
    fn refusals() {
        assert!(find("lama-3-70b").unwrap_err().contains("llama-3-70b"));
        assert!(find("qwen2.5-7b").unwrap().shape(3, 128, 2).unwrap_err().contains("4 KV heads"));
    }
}

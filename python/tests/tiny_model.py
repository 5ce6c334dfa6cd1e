"""Makes a small Qwen2 model with random weights, for tests; or a hybrid one, of layers with full attention
and layers with a sliding window, as vLLM's Llama can have.

The weights are spread widely enough that greedy output depends on every token of the KV cache, which
vLLM's own dummy weights do not do. Run as ``python tiny_model.py DIRECTORY``; needs torch, safetensors
and tokenizers, which vLLM brings along. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 512
POSITIONS = 8192


@dataclass(frozen=True)
class Size:
    """How large a model is, and how it behaves."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    gain: float
    """What a matrix does to the length of a vector. Far above a trained model's attention is peaked, and
    output depends on every token; so it does on every rounding, and the more the more layers there are."""

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden // self.heads

    @property
    def inner(self) -> int:
        """Elements between the two matrices of a layer's MLP."""
        return 2 * self.hidden

    @property
    def spread(self) -> float:
        """Standard deviation of the weights."""
        return round(self.gain / math.sqrt(self.hidden), 2)


SMALL = Size(hidden=128, layers=4, heads=4, kv_heads=2, gain=3.4)
FOR_GPU = Size(hidden=512, layers=6, heads=8, kv_heads=2, gain=1.4)
"""Its heads are of a size that the kernels of GPUs have. Kernels there round otherwise in other batches,
which this gain does not amplify: it changes the best of the tokens where two are as good as equal, while a
block of zeros in the KV changes most of them."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(size: Size, window: int = 0) -> dict[str, Any]:
    """config.json. ``window``: every layer but the last of four sees so many tokens."""
    made = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if window:
        kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(size.layers)]
        made |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "qkv_bias": True}
        made |= {"sliding_window": window, "layer_types": kinds}
    return made


def weights(size: Size, seed: int) -> dict[str, Any]:
    """The tensors, drawn from one seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    hidden, inner = size.hidden, size.inner

    def draw(*shape: int, spread: float = size.spread) -> Any:
        return (torch.randn(*shape, generator=generator) * spread).to(torch.bfloat16)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    kv = size.kv_heads * size.head_dim
    tensors = {
        "model.embed_tokens.weight": draw(VOCABULARY, hidden, spread=1.0),
        "lm_head.weight": draw(VOCABULARY, hidden, spread=1.0),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = draw(rows, hidden)
            tensors[f"{at}self_attn.{name}_proj.bias"] = draw(rows)
        tensors[at + "self_attn.o_proj.weight"] = draw(hidden, hidden)
        tensors[at + "mlp.gate_proj.weight"] = draw(inner, hidden)
        tensors[at + "mlp.up_proj.weight"] = draw(inner, hidden)
        tensors[at + "mlp.down_proj.weight"] = draw(hidden, inner)
        tensors[at + "input_layernorm.weight"] = ones.clone()
        tensors[at + "post_attention_layernorm.weight"] = ones.clone()
    return tensors


def tokenizer() -> Any:
    """A byte-level tokenizer, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["A block of keys and values is saved once and loaded often.", "What date is today?"]
    made.train_from_iterator(text * 4, trainer)
    return made


def make(directory: str | Path, size: Size = SMALL, seed: int = 0, window: int = 0) -> Path:
    """Writes the model; does nothing where it is already."""
    from safetensors.torch import save_file

    path = Path(directory)
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(path / "tokenizer.json"))
    texts = {
        "config.json": config(size, window),
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": POSITIONS,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in texts.items():
        (path / name).write_text(json.dumps(content, indent=1))
    save_file(weights(size, seed), str(path / "model.safetensors"), metadata={"format": "pt"})
    return path


if __name__ == "__main__":
    print(make(sys.argv[1]))

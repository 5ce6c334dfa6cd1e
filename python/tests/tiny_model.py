"""Makes a small Qwen2 model with random weights, for tests on a machine without a GPU; or a hybrid one, of
layers with full attention and layers with a sliding window, as vLLM's Llama can have.

The weights are spread widely enough that greedy output depends on every token of the KV cache, which
vLLM's own dummy weights do not do. Run as ``python tiny_model.py DIRECTORY``; needs torch, safetensors
and tokenizers, which vLLM brings along. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, KV_HEADS = 128, 4, 4, 2
HEAD_DIM = HIDDEN // HEADS
INNER = 2 * HIDDEN
VOCABULARY = 512
POSITIONS = 8192
SPREAD = 0.3
"""Standard deviation of the weights: far above a trained model's, so that attention is peaked."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(window: int = 0) -> dict[str, Any]:
    """config.json. ``window``: every layer but the last of four sees so many tokens."""
    made = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
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
        kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(LAYERS)]
        made |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "qkv_bias": True}
        made |= {"sliding_window": window, "layer_types": kinds}
    return made


def weights(seed: int) -> dict[str, Any]:
    """The tensors, drawn from one seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, spread: float = SPREAD) -> Any:
        return (torch.randn(*shape, generator=generator) * spread).to(torch.bfloat16)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    kv = KV_HEADS * HEAD_DIM
    tensors = {
        "model.embed_tokens.weight": draw(VOCABULARY, HIDDEN, spread=1.0),
        "lm_head.weight": draw(VOCABULARY, HIDDEN, spread=1.0),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = draw(rows, HIDDEN)
            tensors[f"{at}self_attn.{name}_proj.bias"] = draw(rows)
        tensors[at + "self_attn.o_proj.weight"] = draw(HIDDEN, HIDDEN)
        tensors[at + "mlp.gate_proj.weight"] = draw(INNER, HIDDEN)
        tensors[at + "mlp.up_proj.weight"] = draw(INNER, HIDDEN)
        tensors[at + "mlp.down_proj.weight"] = draw(HIDDEN, INNER)
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


def make(directory: str | Path, seed: int = 0, window: int = 0) -> Path:
    """Writes the model; does nothing where it is already."""
    from safetensors.torch import save_file

    path = Path(directory)
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(path / "tokenizer.json"))
    texts = {
        "config.json": config(window),
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
    save_file(weights(seed), str(path / "model.safetensors"), metadata={"format": "pt"})
    return path


if __name__ == "__main__":
    print(make(sys.argv[1]))

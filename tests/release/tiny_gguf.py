"""A tiny Llama as a GGUF file, laid out as llama.cpp's `convert_hf_to_gguf.py` does."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from med3dvlm.recipes.text import byte_pairs

TEXTS = ["The liver holds a large lesion.", "Which organ holds it? liver", "Is there a cyst? no"]
HEADS, KEY_HEADS, LAYERS = 4, 2, 2
FACTS = {"name": "Tiny Llama", "organization": "Some Lab", "license": "apache-2.0"}
TEMPLATE = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | {
    f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(LAYERS) for ours, theirs in BLOCK.items()
}


def tokenizer() -> Any:
    """Byte pairs of a few sentences; `<|endoftext|>` ends a text."""
    return byte_pairs(TEXTS, 300, 64)


def model(rows: int, tied: bool = True) -> LlamaForCausalLM:
    """Random; larger weights than the initial ones, so that tokens differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, max_position_embeddings=256, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=0, pad_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if "norm" in name else 4 * parameter)
    return made


def stored(source: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Weights under llama.cpp's names. Its rotary positions pair neighbours, so rows of queries and keys move."""
    found = {}
    for name, weight in source.state_dict().items():
        if name == "lm_head.weight" and source.config.tie_word_embeddings:
            continue
        layer = name.removesuffix(".weight")
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(layer.rpartition(".")[2])
        found[f"{NAMES[layer]}.weight"] = (weight if heads is None else _neighbours(weight, heads)).numpy()
    return found


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def write_gguf(
    file: Path,
    source: LlamaForCausalLM,
    weights: dict[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    facts: dict[str, str] | None = None,
) -> Path:
    """`kind`: how matrices are stored; `weights`: other ones than the model's."""
    config, words = source.config, tokenizer()
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in (FACTS if facts is None else facts).items():
        writer.add_string(f"general.{name}", value)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, words)
    for name, weight in (stored(source) if weights is None else weights).items():
        if weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, words: Any) -> None:
    tokens = sorted(words.get_vocab(), key=words.get_vocab().get)
    special = set(words.all_special_tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(words.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_pad_token_id(words.pad_token_id)
    writer.add_unk_token_id(words.eos_token_id)
    writer.add_bos_token_id(words.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)

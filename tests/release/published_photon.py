"""Published Photon folders of random weights, a few thousand numbers in all.

Names, shapes and files are written here by hand from what is known of Photon-S1 and Photon-S2, not with the code
that the tests are about.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from photon.tokenization import SPECIAL_TOKENS

KERNEL = "visual.vision_patch_embed.proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ATP = "model.layers.1.atp"
WIDTH, VISION_WIDTH, DEPTH = 32, 32, 8
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def published_config(tokenizer: Any, tied: bool) -> dict[str, Any]:
    """As transformers 4.51 writes it; what it says of patches is the backbone's."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return {
        "architectures": ["Photon"],
        "auto_map": {"AutoModel": "modeling.Photon"},
        "bos_token_id": 1,
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "image_token_id": ids["<|image_pad|>"],
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": DEPTH,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "rope_theta": 500.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": 2,
            "fullatt_block_indexes": [1],
            "hidden_size": VISION_WIDTH,
            "in_chans": 3,
            "intermediate_size": 40,
            "model_type": "qwen2_5_vl",
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vocab_size": len(tokenizer),
    }


def published_shapes(vocabulary: int, tied: bool, scheduled: bool) -> dict[str, tuple[int, ...]]:
    """Qwen2.5-VL's names of transformers 4.51, Photon's patch embedding, and with S2 its threshold predictor."""
    v, d, merged = VISION_WIDTH, WIDTH, 4 * VISION_WIDTH
    shapes: dict[str, tuple[int, ...]] = {KERNEL: (v, 1, 14, 14, 14)}
    for i in range(2):
        block = f"visual.blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (v,), f"{block}.norm2.weight": (v,)}
        shapes |= {f"{block}.attn.qkv.weight": (3 * v, v), f"{block}.attn.qkv.bias": (3 * v,)}
        shapes |= {f"{block}.attn.proj.weight": (v, v), f"{block}.attn.proj.bias": (v,)}
        for part, shape in {"gate_proj": (40, v), "up_proj": (40, v), "down_proj": (v, 40)}.items():
            shapes |= {f"{block}.mlp.{part}.weight": shape, f"{block}.mlp.{part}.bias": shape[:1]}
    shapes |= {"visual.merger.ln_q.weight": (v,)}
    shapes |= {"visual.merger.mlp.0.weight": (merged, merged), "visual.merger.mlp.0.bias": (merged,)}
    shapes |= {"visual.merger.mlp.2.weight": (d, merged), "visual.merger.mlp.2.bias": (d,)}
    shapes |= {EMBEDDING: (vocabulary, d), "model.norm.weight": (d,)}
    for i in range(DEPTH):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (d,), f"{layer}.post_attention_layernorm.weight": (d,)}
        for part, out in {"q_proj": d, "k_proj": 16, "v_proj": 16}.items():
            shapes |= {f"{layer}.self_attn.{part}.weight": (out, d), f"{layer}.self_attn.{part}.bias": (out,)}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (d, d), f"{layer}.mlp.down_proj.weight": (d, 48)}
        shapes |= {f"{layer}.mlp.gate_proj.weight": (48, d), f"{layer}.mlp.up_proj.weight": (48, d)}
    if not tied:
        shapes |= {HEAD: (vocabulary, d)}
    if scheduled:
        shapes |= {f"{ATP}.predictor.mlp.0.weight": (4, 12), f"{ATP}.predictor.mlp.0.bias": (4,)}
        shapes |= {f"{ATP}.predictor.mlp.2.weight": (1, 4), f"{ATP}.predictor.mlp.2.bias": (1,)}
        shapes |= {f"{ATP}.pos_proj.weight": (4, 3)}
    return shapes


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """In bfloat16 but for the predictor, with a zero of negative sign and a NaN of unusual bits among them."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.2 + ("norm" in key or "ln_q" in key)
        weights[key] = weight if ".atp." in key else weight.bfloat16()
    if f"{ATP}.pos_proj.weight" in weights:
        weights[f"{ATP}.pos_proj.weight"].view(torch.int32)[0, 0] = 0x7FC0BEEF
    weights["model.norm.weight"][0] = -0.0
    return weights


def shard(folder: Path, weights: dict[str, Tensor]) -> None:
    half = len(weights) // 2
    places = {key: SHARDS[i >= half] for i, key in enumerate(weights)}
    for name in SHARDS:
        save_file({k: w for k, w in weights.items() if places[k] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"x": 1}, "weight_map": places}))


def write_published(
    folder: Path, tokenizer: Any, tied: bool = True, scheduled: bool = True, sharded: bool = False
) -> Path:
    """S2's folder, or with ``scheduled=False`` S1's."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published_config(tokenizer, tied)))  # one line, no indent
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.1}')
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    (folder / "README.md").write_text("Photon\r\n")
    weights = random_weights(published_shapes(len(tokenizer), tied, scheduled))
    if sharded:
        shard(folder, weights)
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder

"""Published Med3DVLM folders of random weights, a few thousand numbers in all.

Names, shapes and files are written here by hand from what is known of the authors' code, not with the code that the
tests are about.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTHS, LAYERS, KERNELS = (4, 4, 6, 8, 12), (1, 1, 2, 1, 1), (13, 11, 9, 7)
INPUT = [64, 96, 32]
"""Height, width, depth: 2 x 3 x 1 tokens in the third stage, 1 x 2 x 1 in the fourth."""
TEXT_WIDTH, COMMON, VOCABULARY, WORDS = 64, 10, 40, 16
WIDTH, ROWS = 32, 280


def encoder_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def decomposed(name: str, channels: int, out: int, kernel: int, depthwise: bool) -> None:
        for axis in range(3):
            size = tuple(kernel if i == axis else 1 for i in range(3))
            branch = f"{prefix}encoder.{name}.c{axis + 1}"
            shapes[f"{branch}.0.weight"] = (out, 1 if depthwise else channels, *size)
            shapes[f"{branch}.0.bias"] = (out,)
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{branch}.1.{part}"] = (out,)
            shapes[f"{branch}.1.num_batches_tracked"] = ()

    for i in range(4):
        decomposed(f"s0.0.{i}", WIDTHS[0] if i else 1, WIDTHS[0], 3 if i else 7, depthwise=False)
    for stage in range(1, 5):
        width = WIDTHS[stage]
        for i in range(LAYERS[stage]):
            block = f"s{stage}.{i}"
            if i == 0:
                shapes[f"{prefix}encoder.{block}.proj.weight"] = (width, WIDTHS[stage - 1], 1, 1, 1)
            decomposed(f"{block}.dwconv", width, width, KERNELS[stage - 1], depthwise=True)
            mlp = f"{prefix}encoder.{block}.mlp.mlp"
            shapes |= {f"{mlp}.0.weight": (4 * width, width), f"{mlp}.0.bias": (4 * width,)}
            shapes |= {f"{mlp}.3.weight": (width, 4 * width), f"{mlp}.3.bias": (width,)}
            shapes[f"{prefix}encoder.{block}.scale"] = (width,)
    return shapes


def clip_shapes() -> dict[str, tuple[int, ...]]:
    """DCFormer-SigLIP: DCFormer and a DistilBERT."""
    d, inner = TEXT_WIDTH, 24
    shapes = encoder_shapes("vision_encoder.")
    words = "language_encoder.embeddings"
    shapes |= {f"{words}.word_embeddings.weight": (VOCABULARY, d), f"{words}.position_embeddings.weight": (WORDS, d)}
    shapes |= {f"{words}.LayerNorm.weight": (d,), f"{words}.LayerNorm.bias": (d,)}
    for i in range(2):
        layer = f"language_encoder.transformer.layer.{i}"
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= {f"{layer}.attention.{part}.weight": (d, d), f"{layer}.attention.{part}.bias": (d,)}
        shapes |= {f"{layer}.ffn.lin1.weight": (inner, d), f"{layer}.ffn.lin1.bias": (inner,)}
        shapes |= {f"{layer}.ffn.lin2.weight": (d, inner), f"{layer}.ffn.lin2.bias": (d,)}
        for norm in ("sa_layer_norm", "output_layer_norm"):
            shapes |= {f"{layer}.{norm}.weight": (d,), f"{layer}.{norm}.bias": (d,)}
    shapes |= {"mm_vision_proj.weight": (COMMON, WIDTHS[-1]), "mm_vision_proj.bias": (COMMON,)}
    shapes |= {"mm_language_proj.weight": (COMMON, d), "mm_language_proj.bias": (COMMON,)}
    return shapes | {"t_prime": (), "bias": ()}


def vlm_shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Med3DVLM: DCFormer, two mixers, a Qwen2 with merged adapters."""
    d, kv = WIDTH, 16
    shapes = encoder_shapes("model.vision_tower.vision_tower.")
    for name, tokens, widths in (("low", (6, 5, 4), (8, 16, d)), ("high", (2, 2, 4), (12, 16, d))):
        for i in range(2):
            layer = f"model.mm_projector.{name}_mixer.{i}"
            for norm in ("ln1", "ln2"):
                shapes |= {f"{layer}.{norm}.weight": (widths[i],), f"{layer}.{norm}.bias": (widths[i],)}
            for mlp, sizes in (("mlp1", tokens), ("mlp2", widths)):
                out = sizes[i + 1]
                shapes |= {f"{layer}.{mlp}.mm_projector.0.weight": (out, sizes[i])}
                shapes |= {f"{layer}.{mlp}.mm_projector.0.bias": (out,)}
                shapes |= {f"{layer}.{mlp}.mm_projector.1.1.weight": (out, out)}
                shapes |= {f"{layer}.{mlp}.mm_projector.1.1.bias": (out,)}
    shapes |= {"model.embed_tokens.weight": (ROWS, d), "model.norm.weight": (d,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (d,), f"{layer}.post_attention_layernorm.weight": (d,)}
        for part, out in {"q_proj": d, "k_proj": kv, "v_proj": kv}.items():
            shapes |= {f"{layer}.self_attn.{part}.weight": (out, d), f"{layer}.self_attn.{part}.bias": (out,)}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (d, d), f"{layer}.mlp.down_proj.weight": (d, 48)}
        shapes |= {f"{layer}.mlp.gate_proj.weight": (48, d), f"{layer}.mlp.up_proj.weight": (48, d)}
    return shapes if tied else shapes | {"lm_head.weight": (ROWS, d)}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Variances above 0, counters of 7."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
            continue
        weight = torch.randn(shape, generator=generator) * 0.2
        weights[key] = weight.abs() + 0.5 if "running_var" in key else weight
    return weights


CLIP_CONFIG: dict[str, Any] = {
    "architectures": ["DEC_CLIP"],
    "model_type": "dec_clip",
    "language_model_name_or_path": "medicalai/ClinicalBERT",
    "vision_encoder": "dcformer",
    "input_size": INPUT,
    "dim": 768,
    "hidden_size": COMMON,
    "loss_type": "sigmoid",
    "t_prime": 2.659260036932778,
    "bias": 0.0,
    "torch_dtype": "float32",
    "transformers_version": "4.48.3",
}
VLM_CONFIG: dict[str, Any] = {
    "architectures": ["VLMQwenForCausalLM"],
    "model_type": "vlm_qwen",
    "vision_tower": "dcformer",
    "vision_select_layer": -2,
    "mm_projector_type": "mixer",
    "input_size": INPUT,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500.0,
    "sliding_window": None,
    "torch_dtype": "float32",
    "transformers_version": "4.48.3",
    "use_sliding_window": False,
    "vocab_size": ROWS,
}


def write_clip(folder: Path, tokenizer: Any) -> Path:
    return _write(folder, tokenizer, CLIP_CONFIG, random_weights(clip_shapes()))


def write_vlm(folder: Path, tokenizer: Any, tied: bool = False) -> Path:
    config = {**VLM_CONFIG, "tie_word_embeddings": tied}
    return _write(folder, tokenizer, config, random_weights(vlm_shapes(tied)))


def _write(folder: Path, tokenizer: Any, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # one line, no indent
    (folder / "README.md").write_text("Med3DVLM\r\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder

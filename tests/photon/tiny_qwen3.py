"""Small random models over Qwen3-VL."""

from typing import Any

import torch
from torch import nn

from photon import PhotonConfig, PhotonForConditionalGeneration, PhotonProcessor
from tests.photon.conftest import tiny_config


def qwen3_values(tokenizer: Any) -> dict[str, Any]:
    """Shapes of a Qwen3-VL whose three vision blocks all feed the decoder, of five layers, by deep-stack."""
    known = tiny_config(tokenizer)
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,  # not width / heads, as in Qwen3
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
        "pad_token_id": known.text_config.pad_token_id,
        "eos_token_id": known.text_config.eos_token_id,
    }
    vision = {
        "model_type": "qwen3_vl_vision",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    shared = {name: getattr(known, name) for name in names}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True, **shared}


def enlarge(model: nn.Module) -> None:
    """Larger weights than the initial ones, so that tokens differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "threshold" not in name:
                parameter.mul_(5)
            elif "patch_embed" in name or "deepstack" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def tiny_qwen3(
    tokenizer: Any, seed: int = 0, vision: dict[str, Any] | None = None, **changes: Any
) -> tuple[PhotonForConditionalGeneration, PhotonProcessor]:
    """A model and its processor."""
    torch.manual_seed(seed)
    values = qwen3_values(tokenizer)
    known = tiny_config(tokenizer)
    values["vision_config"] |= vision or {}
    changes.setdefault("scheduling", {"predictor_bias": 0.0})
    config = PhotonConfig(
        **values,
        turn_end_token_id=known.turn_end_token_id,
        user_turn_token_ids=known.user_turn_token_ids,
        **changes,
    )
    model = PhotonForConditionalGeneration(config)
    enlarge(model)
    return model, PhotonProcessor.from_config(config, tokenizer)

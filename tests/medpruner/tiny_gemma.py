"""A small random Gemma 3."""

from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.medpruner.tiny_slicewise import louder

VOCABULARY = 64
SIDE, WINDOW, PATCH = 4, 2, 4
TOKENS = SIDE**2


def gemma(image_token: int = 5, window: int = 24, seed: int = 0, vocabulary: int = VOCABULARY, **vision: Any) -> Any:
    """Three blocks in the tower; three decoder layers, of which two see ``window`` tokens back."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8,
        "sliding_window": window, "max_position_embeddings": 8192, "sliding_window_pattern": 3, "pad_token_id": 0,
    }  # fmt: skip
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": SIDE * WINDOW * PATCH, "patch_size": PATCH, "vision_use_head": False, **vision,
    }  # fmt: skip
    tokens = (tower["image_size"] // tower["patch_size"] // (4 if vision else WINDOW)) ** 2
    config = Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=tokens, image_token_index=image_token
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return louder(model)

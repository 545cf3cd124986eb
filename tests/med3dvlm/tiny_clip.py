"""Small random contrastive models and what they read."""

from typing import Any

import torch
from torch import Tensor

from med3dvlm.configuration_med3dclip import Med3DCLIPConfig
from med3dvlm.modeling_med3dclip import Med3DCLIPModel

SIZE = (32, 64, 96)
"""Of which two tokens are left."""
ENCODER = {"name": "dcformer-nano", "size": list(SIZE), "widths": [4, 4, 6, 8, 10], "layers": [1, 1, 1, 1, 1]}
DISTILBERT = {"model_type": "distilbert", "vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
DISTILBERT |= {"max_position_embeddings": 12}
BERT = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 12}


def tiny_config(**settings: Any) -> Med3DCLIPConfig:
    return Med3DCLIPConfig(**{"encoder": ENCODER, "text_config": DISTILBERT, "projection_dim": 6, **settings})


def tiny_clip(seed: int = 0, **settings: Any) -> Med3DCLIPModel:
    """A model with larger weights than the initial ones, so that pairs differ."""
    torch.manual_seed(seed)
    model = Med3DCLIPModel(tiny_config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
            elif name.endswith(".scale"):
                parameter.fill_(0.5)
    return model


def pairs(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Volumes and texts of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count, 1), generator=generator)
    return {
        "volumes": torch.rand(count, 1, *SIZE, generator=generator),
        "input_ids": torch.randint(1, 40, (count, 8), generator=generator),
        "attention_mask": (torch.arange(8) < lengths).long(),
    }

"""How each kind of model is taken apart: by its public modules, without a copy of its code."""

import importlib
from typing import Any

from torch import nn

from medpruner.backbones.base import Backbone

BACKBONES = {
    "qwen2_5_vl": "qwen:QwenVL",
    "qwen3_vl": "qwen:QwenVL",
    "gemma3": "gemma:Gemma3",
    "hulumed_qwen2": "hulu:HuluMed",
    "hulumed_qwen3": "hulu:HuluMed",
}
"""``model_type`` of a model's configuration -> where it is taken apart."""


def backbone_of(model: nn.Module) -> Backbone:
    """The model's backbone.

    Raises:
        ValueError: a model of this kind can't be pruned.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in BACKBONES:
        raise ValueError(f"model_type {kind!r} can't be pruned (known: {', '.join(BACKBONES)})")
    module, _, name = BACKBONES[kind].partition(":")
    found: Any = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    backbone: Backbone = found(model)
    return backbone

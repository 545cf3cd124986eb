"""What backbones share whose language model has one rotary position for each token, not three.

Legend: as in ``base``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medpruner.backbones.base import Inputs


class FlatPrompt:
    """The side of the prompt of such a backbone; it has a ``model`` and the ``image_token`` that it puts images at."""

    model: Any
    image_token: int

    def embed(self, inputs: Inputs) -> Tensor:
        ids = inputs["input_ids"]
        # The placeholder need not be in the vocabulary.
        embedded: Tensor = self.model.get_input_embeddings()(ids.masked_fill(ids == self.image_token, 0))
        return embedded

    def positions(self, inputs: Inputs) -> Tensor:
        """Those that were given, or as ``generate`` counts them: padding on the left does not count."""
        given: Tensor | None = inputs.get("position_ids")
        if given is not None:
            return given.expand(len(inputs["input_ids"]), -1)
        mask = inputs.get("attention_mask")
        seen = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        return (seen.long().cumsum(-1) - 1).clamp(min=0)

    def stack(self, model: nn.Module, visual: Tensor, deep: list[Tensor]) -> Callable[[], None]:
        return lambda: None


def attention_of(layers: Any, where: str) -> list[nn.Module]:
    """The attention modules of a tower's blocks, with projections ``q_proj`` and ``k_proj`` that can be read.

    Raises:
        ValueError: there are none.
    """
    found = [getattr(layer, "self_attn", None) for layer in layers or []]
    if not found or not all(hasattr(module, "q_proj") and hasattr(module, "k_proj") for module in found):
        raise ValueError(f"{where}: no blocks with self_attn.q_proj and k_proj; its attention can't be read")
    return found  # type: ignore[return-value]


def projections(attention: Any) -> tuple[list[object], dict[str, Tensor]]:
    """Hooks on both projections, and what they saw last, by their names."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    return [getattr(attention, name).register_forward_hook(note(name)) for name in ("q_proj", "k_proj")], seen

"""Gemma 3 of transformers, which MedGemma 1.5 is.

A slice is an image; a volume comes as consecutive images with a label before each ("SLICE 3:"). Gemma's projector
averages windows of patches (4 x 4 of 64 x 64), and such a window is a token: importance and keys are averaged over it.
(The published MedPruner averages 16 patches in raster order instead, a quarter of a row of patches.) Tokens of an
image see each other both ways in the language model; those that stay still do, as the input ``token_type_ids`` goes
along. Its local layers count their window in tokens of the shorter prompt.

Legend: as in ``base``; s images, y, x rows and columns of tokens, k x k = g patches of a token, p pixels of a patch's
side, c colours, H heads.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from medpruner.backbones.base import Columns, Encoded, Inputs
from medpruner.backbones.flat import FlatPrompt, attention_of, projections
from medpruner.slices import Volume, taken, volumes_in
from medpruner.towers import QueriesKeys, Reading, reading


class Gemma3(FlatPrompt):
    """See the file's header."""

    pixel_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    returns_prompt: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.image_token = int(model.config.image_token_id)
        self.projector: Any = model.model.multi_modal_projector
        tower = model.model.vision_tower
        encoder = getattr(getattr(tower, "vision_model", tower), "encoder", None)
        self.attention = attention_of(getattr(encoder, "layers", None), "vision_tower")

    @property
    def depth(self) -> int:
        return len(self.attention)

    @property
    def side(self) -> int:
        """Tokens along a side of an image."""
        return int(self.projector.tokens_per_side)

    @property
    def window(self) -> int:
        """Patches along a side of a token."""
        return int(self.projector.kernel_size)

    # --- where slices are ---------------------------------------------------------------------------------

    def volumes(self, inputs: Inputs, label_tokens: int) -> list[Volume]:
        pixels, size = inputs["pixel_values"], int(self.model.config.vision_config.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[-2:]) != (size, size):
            raise ValueError(f"pixel_values: of shape {tuple(pixels.shape)}; give (images, 3, {size}, {size})")
        grids = [(1, self.side, self.side)] * len(pixels)
        images = [t == 1 for t, _, _ in grids]
        return volumes_in(inputs["input_ids"], self.image_token, grids, images, label_tokens)

    # --- the tower ----------------------------------------------------------------------------------------

    def pixels(self, inputs: Inputs, volumes: Sequence[Volume]) -> list[Tensor]:
        parts = inputs["pixel_values"].split([len(volume) for volume in volumes])
        return [rearrange(part, "s c (y a) (x b) -> s (y x) (c a b)", y=self.side, x=self.side) for part in parts]

    def encode(self, inputs: Inputs, wanted: Sequence[Tensor], blocks: Sequence[int]) -> Encoded:
        shown = taken(inputs["pixel_values"], torch.cat(list(wanted)))
        with reading({b: self.attention[b] for b in blocks}, _watch) as found:
            out = self.model.model.get_image_features(shown, return_dict=True)
        readings = {
            block: Reading(self._windows(r.received).mean(1), self._windows(r.keys).mean(1))
            for block, r in found.blocks.items()
        }
        patches = self._windows(out.last_hidden_state.flatten(0, 1))
        return Encoded(out.pooler_output.flatten(0, 1), [], patches, [], readings, found.seconds)

    def _windows(self, patches: Tensor) -> Tensor:
        """(s * patches of an image, ...) in raster order -> (N, g, ...), the patches of each token."""
        sizes = {"y": self.side, "k": self.window, "x": self.side, "l": self.window}
        return rearrange(patches, "(s y k x l) ... -> (s y x) (k l) ...", **sizes)

    def project(self, patches: Tensor, deep: int | None = None) -> Tensor:
        normed = self.projector.mm_soft_emb_norm(patches.mean(1))
        projected: Tensor = normed @ self.projector.mm_input_projection_weight
        return projected.type_as(patches)

    # --- the prompt ---------------------------------------------------------------------------------------

    def prompt(self, given: Inputs, columns: Columns, visual: Tensor) -> Inputs:
        kinds = given.get("token_type_ids")
        return {} if kinds is None else {"token_type_ids": columns(kinds, 0)}

    def generate(self, own: Callable[..., Any], shorter: Inputs) -> Any:
        """Embeddings reach Gemma's ``generate``, which handles them but does not name them among its arguments."""
        prepare = self.model.prepare_inputs_for_generation

        def named(input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
            return prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)

        self.model.prepare_inputs_for_generation = named
        try:
            return own(**shorter)
        finally:
            del self.model.prepare_inputs_for_generation


def _watch(attention: Any) -> tuple[list[object], Callable[[], QueriesKeys]]:
    """Queries and keys of a block, which has no rotary positions, from its projections (s, patches, V)."""
    handles, seen = projections(attention)

    def give() -> QueriesKeys:
        pair = [seen.pop(name) for name in ("q_proj", "k_proj")]
        queries, keys = (rearrange(x, "s n (h d) -> (s n) h d", h=attention.num_heads) for x in pair)
        images, patches = pair[0].shape[:2]
        return queries, keys, [patches] * images, float(attention.scale)

    return handles, give

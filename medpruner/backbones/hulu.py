"""Hulu-Med, by the names of its public modules; its own code is never loaded here.

``HulumedQwen2ForCausalLM`` (7B, 32B) and ``HulumedQwen3ForCausalLM`` (4B, 14B) come with the model (remote code that
only a user can allow). What is relied on:

- ``model.get_model()`` has ``vision_encoder``, ``mm_projector`` and ``embed_tokens``;
- ``vision_encoder(pixel_values, grid_sizes, merge_sizes)`` gives merged patches (N, V); its ``encoder.layers`` have
  ``self_attn`` with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``, called with ``cu_seqlens`` (where slices
  begin) and ``rotary_pos_emb`` (angles);
- inputs ``pixel_values`` (patches; those of a token side by side), ``grid_sizes`` (frames, rows and columns of
  patches), ``merge_sizes`` and ``modals`` ("image", "video", or "text" for pixels that no prompt shows);
- ``config.image_token_index`` stands for a token; text positions are one-dimensional;
- ``forward`` takes ``inputs_embeds``; ``generate`` does not, and returns new tokens only.

Its rule for dropping tokens of videos (``config.use_token_compression``) is not applied by a pruned model;
``medpruner.HuluL1`` is that rule. Merging (bilinear to half the size) is an average of patches, so that what is merged
in front of the projector can be merged patches: a token has one "patch" here. Its eager attention adds the mask of
slices as a number, so that slices see each other: a model loaded with it is refused.

Legend: as in ``base``; p patches of all slices.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from medpruner.backbones.base import Columns, Encoded, Inputs
from medpruner.backbones.flat import FlatPrompt, attention_of, projections
from medpruner.slices import Volume, taken, volumes_in
from medpruner.towers import QueriesKeys, Reading, reading

SHAPES = ("grid_sizes", "merge_sizes", "modals")
"""Inputs that say what the pixels are."""


class HuluMed(FlatPrompt):
    """See the file's header."""

    pixel_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    returns_prompt: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.image_token = int(model.config.image_token_index)
        inner = model.get_model() if hasattr(model, "get_model") else getattr(model, "model", None)
        self.tower: Any = getattr(inner, "vision_encoder", None)
        self.projector: Any = getattr(inner, "mm_projector", None)
        if self.tower is None or self.projector is None:
            raise ValueError("Hulu-Med: the model has no vision_encoder or no mm_projector")
        if getattr(self.tower.config, "_attn_implementation", None) == "eager":
            raise ValueError("vision_encoder: its eager attention mixes slices; load with attn_implementation='sdpa'")
        self.attention = attention_of(getattr(getattr(self.tower, "encoder", None), "layers", None), "vision_encoder")

    @property
    def depth(self) -> int:
        return len(self.attention)

    # --- where slices are ---------------------------------------------------------------------------------

    def volumes(self, inputs: Inputs, label_tokens: int) -> list[Volume]:
        grid, merge, shown = _shapes(inputs)
        if int(grid.prod(-1).sum()) != len(inputs["pixel_values"]):
            raise ValueError(
                f"pixel_values: {len(inputs['pixel_values'])} patches, {grid.prod(-1).sum()} in grid_sizes"
            )
        if (grid[:, 1:] % merge[:, None]).any():
            raise ValueError("grid_sizes: rows or columns of patches that merge_sizes do not divide")
        grids = [(t, h // m, w // m) for (t, h, w), m in zip(grid[shown].tolist(), merge[shown].tolist(), strict=True)]
        images = [t == 1 for t, _, _ in grids]
        return volumes_in(inputs["input_ids"], self.image_token, grids, images, label_tokens)

    # --- the tower ----------------------------------------------------------------------------------------

    def pixels(self, inputs: Inputs, volumes: Sequence[Volume]) -> list[Tensor]:
        grid, merge, shown = _shapes(inputs)
        patches = inputs["pixel_values"].split(grid.prod(-1).tolist())
        slices = [
            frame
            for index in shown.nonzero()[:, 0].tolist()
            for frame in patches[index].unflatten(0, (int(grid[index, 0]), -1, int(merge[index]) ** 2)).flatten(2)
        ]
        found, start = [], 0
        for volume in volumes:
            found.append(torch.stack(slices[start : start + len(volume)]))
            start += len(volume)
        return found

    def encode(self, inputs: Inputs, wanted: Sequence[Tensor], blocks: Sequence[int]) -> Encoded:
        grid, merge, shown = _shapes(inputs)
        flags = torch.zeros(int(grid[:, 0].sum()), dtype=torch.bool)
        flags[shown.repeat_interleave(grid[:, 0])] = torch.cat(list(wanted))
        patches = grid[:, 1:].prod(-1).repeat_interleave(grid[:, 0])
        counts = torch.stack([of.sum() for of in flags.split(grid[:, 0].tolist())])
        there = counts > 0
        sizes = torch.cat([counts[:, None], grid[:, 1:]], 1)[there]
        device = inputs["pixel_values"].device
        pixels = taken(inputs["pixel_values"], flags.repeat_interleave(patches))
        given = {"grid_sizes": sizes.to(device), "merge_sizes": merge[there].to(device)}
        with reading({b: self.attention[b] for b in blocks}, _watch) as found:
            merged = self.tower(pixel_values=pixels, **given)
        readings = {
            block: Reading(*(_per_token(x, sizes, merge[there]) for x in (r.received, r.keys)))
            for block, r in found.blocks.items()
        }
        return Encoded(self.projector(merged), [], merged[:, None], [], readings, found.seconds)

    def project(self, patches: Tensor, deep: int | None = None) -> Tensor:
        projected: Tensor = self.projector(patches.mean(1))
        return projected

    # --- the prompt ---------------------------------------------------------------------------------------

    def prompt(self, given: Inputs, columns: Columns, visual: Tensor) -> Inputs:
        return dict.fromkeys(SHAPES)

    def generate(self, own: Callable[..., Any], shorter: Inputs) -> Any:
        """That of transformers: the model's own takes no embeddings."""
        given = {k: v for k, v in shorter.items() if k not in ("input_ids", *SHAPES)}
        return GenerationMixin.generate(self.model, **given)


def _shapes(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Grids (n, 3), merge sizes (n) and which of them a prompt shows, bool (n): all on the CPU."""
    missing = [name for name in ("grid_sizes", "merge_sizes") if inputs.get(name) is None]
    if missing:
        raise ValueError(f"{missing[0]}: missing; Hulu-Med's processor gives it with pixel_values")
    grid, merge = (inputs[name].cpu() for name in ("grid_sizes", "merge_sizes"))
    modals = inputs.get("modals") or ["image"] * len(grid)
    if not len(modals) == len(merge) == len(grid):
        raise ValueError(f"modals: {len(modals)} for {len(grid)} grid_sizes and {len(merge)} merge_sizes; give as many")
    return grid, merge, torch.tensor([modal != "text" for modal in modals])


def _per_token(patches: Tensor, grid: Tensor, merge: Tensor) -> Tensor:
    """(p, ...) -> (N, ...): averaged over the patches of each token."""
    parts = zip(patches.split(grid.prod(-1).tolist()), merge.tolist(), strict=True)
    return torch.cat([part.unflatten(0, (-1, m * m)).mean(1) for part, m in parts])


def _watch(attention: Any) -> tuple[list[object], Callable[[], QueriesKeys]]:
    """Queries and keys of a block from its projections (p, V), rotated as the block rotates them."""
    handles, projected = projections(attention)
    seen: dict[str, Tensor] = {}

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Tensor]) -> None:
        seen.update(lengths=kwargs["cu_seqlens"], angles=kwargs["rotary_pos_emb"])

    def give() -> QueriesKeys:
        angles = torch.cat([seen.pop("angles")] * 2, -1)
        pair = (projected.pop(name).unflatten(-1, (attention.num_heads, -1)) for name in ("q_proj", "k_proj"))
        queries, keys = apply_rotary_pos_emb_vision(*pair, angles.cos(), angles.sin())
        return queries, keys, seen.pop("lengths").diff().tolist(), float(attention.scale)

    return [*handles, attention.register_forward_pre_hook(note, with_kwargs=True)], give

"""Qwen2.5-VL and Qwen3-VL of transformers.

A slice is a temporal patch of a video (two frames) or an image. Their towers attend within a slice, so that what they
say of one does not depend on which others are there. Qwen2.5-VL's tower sorts patches by window; everything is brought
back into the order of the prompt here.

Legend: as in ``base``; p patches of all slices, m x m = g patches of a token, H heads.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from medpruner.backbones.base import Columns, Encoded, Inputs
from medpruner.slices import Volume, taken, volumes_in
from medpruner.towers import QueriesKeys, Reading, reading

IMAGE, VIDEO = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")


class QwenVL:
    """See the file's header."""

    pixel_keys: ClassVar[tuple[str, ...]] = (IMAGE[0], VIDEO[0])
    returns_prompt: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)
        self.visual = self.model.model.visual
        self.config = self.model.config
        if not all(hasattr(getattr(block, "attn", None), "qkv") for block in self.visual.blocks):
            raise ValueError("model.visual.blocks: no attn.qkv in them; the tower's attention can't be read")

    @property
    def depth(self) -> int:
        return len(self.visual.blocks)

    @property
    def merge(self) -> int:
        return int(self.visual.spatial_merge_size)

    # --- where slices are ---------------------------------------------------------------------------------

    def volumes(self, inputs: Inputs, label_tokens: int) -> list[Volume]:
        found: list[Volume] = []
        for kind, token in ((IMAGE, self.config.image_token_id), (VIDEO, self.config.video_token_id)):
            if inputs.get(kind[0]) is not None:
                grids = [(t, h // self.merge, w // self.merge) for t, h, w in inputs[kind[1]].tolist()]
                found += volumes_in(inputs["input_ids"], token, grids, [kind is IMAGE] * len(grids), label_tokens)
        return found

    # --- the tower ----------------------------------------------------------------------------------------

    def pixels(self, inputs: Inputs, volumes: Sequence[Volume]) -> list[Tensor]:
        given = [inputs[key] for key in self.pixel_keys if inputs.get(key) is not None]
        found, kind, start = [], 0, 0
        for volume in volumes:
            if start == len(given[kind]):
                kind, start = kind + 1, 0
            shape = (len(volume), volume[0].tokens)
            stop = start + shape[0] * shape[1] * self.merge**2
            found.append(given[kind][start:stop].reshape(*shape, -1))
            start = stop
        return found

    def encode(self, inputs: Inputs, wanted: Sequence[Tensor], blocks: Sequence[int]) -> Encoded:
        parts = []
        for kind in (IMAGE, VIDEO):
            if inputs.get(kind[0]) is not None:
                count, covered = int(inputs[kind[1]][:, 0].sum()), 0
                mine = []
                while covered < count:
                    mine.append(wanted[0])
                    covered, wanted = covered + len(wanted[0]), wanted[1:]
                flags = torch.cat(mine)
                if flags.any():
                    parts.append(self._encode(inputs[kind[0]], inputs[kind[1]], flags, blocks))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _encode(self, pixels: Tensor, grid: Tensor, flags: Tensor, blocks: Sequence[int]) -> Encoded:
        """Of one kind; flags: bool, one for each temporal patch of all grids."""
        patches = grid[:, 1:].prod(-1).repeat_interleave(grid[:, 0])
        shown_pixels = taken(pixels, flags.repeat_interleave(patches.cpu()))
        counts = torch.stack([part.sum() for part in flags.split(grid[:, 0].tolist())]).to(grid)
        shown = torch.cat([counts[:, None], grid[:, 1:]], 1)[counts > 0]
        merged: list[Tensor] = []  # what goes into the merger, and into those of the deep-stack
        deep_mergers = list(getattr(self.visual, "deepstack_merger_list", []))
        handles = [
            module.register_forward_pre_hook(lambda _module, args: merged.append(args[0]))
            for module in (*deep_mergers, self.visual.merger)
        ]
        try:
            with reading({b: self.visual.blocks[b].attn for b in blocks}, _watch) as found:
                out = self.visual(shown_pixels.to(self.visual.dtype), grid_thw=shown)
        finally:
            for handle in handles:
                handle.remove()
        order = self._order(shown)
        *deep_patches, of_tower = [self._grouped(x, order) for x in merged]
        readings = {
            block: Reading(self._grouped(r.received, order).mean(1), self._grouped(r.keys, order).mean(1))
            for block, r in found.blocks.items()
        }
        deep = list(getattr(out, "deepstack_features", None) or [])
        return Encoded(out.pooler_output, deep, of_tower, deep_patches, readings, found.seconds)

    def _grouped(self, patches: Tensor, order: Tensor | None) -> Tensor:
        """(p, ...) in the tower's order -> (N, g, ...) in the prompt's."""
        grouped = patches.unflatten(0, (-1, self.merge**2))
        return grouped if order is None else grouped[order]

    def _order(self, grid: Tensor) -> Tensor | None:
        """Where each token is among the tower's; None if they are in the prompt's order."""
        if not hasattr(self.visual, "window_size"):
            return None
        index, _ = get_vision_window_index(grid, self.merge, self.visual.window_size, self.visual.patch_size)
        return torch.argsort(index).to(self.visual.device)

    def project(self, patches: Tensor, deep: int | None = None) -> Tensor:
        merger = self.visual.merger if deep is None else self.visual.deepstack_merger_list[deep]
        projected: Tensor = merger(patches.flatten(0, 1))
        return projected

    # --- the prompt ---------------------------------------------------------------------------------------

    def embed(self, inputs: Inputs) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(inputs["input_ids"])
        return embedded

    def positions(self, inputs: Inputs) -> Tensor:
        ids = inputs["input_ids"]
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None:
            kinds = (ids == self.config.image_token_id).int() + 2 * (ids == self.config.video_token_id).int()
        names = ("image_grid_thw", "video_grid_thw", "attention_mask", "second_per_grid_ts")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        positions: Tensor = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, **given)[0]
        return positions

    def prompt(self, given: Inputs, columns: Columns, visual: Tensor) -> Inputs:
        return {}

    def generate(self, own: Callable[..., Any], shorter: Inputs) -> Any:
        return own(**shorter)

    def stack(self, model: nn.Module, visual: Tensor, deep: list[Tensor]) -> Callable[[], None]:
        if not deep:
            return lambda: None
        language_model: Any = self.model.model.language_model

        def give(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            shown = kwargs["inputs_embeds"]
            if shown.shape[1] != visual.shape[1]:
                return None  # a further token
            times = len(shown) // len(visual)  # beams and samples of a row follow each other
            rows = visual.repeat_interleave(times, 0)
            owner = visual.nonzero()[:, 0]
            order = torch.cat([(owner == r).nonzero()[:, 0] for r in range(len(visual)) for _ in range(times)])
            stacked = [layer[order] for layer in deep]
            return args, {**kwargs, "visual_pos_masks": rows, "deepstack_visual_embeds": stacked}

        handle = language_model.register_forward_pre_hook(give, with_kwargs=True)
        return lambda: handle.remove()


def _watch(attention: Any) -> tuple[list[object], Callable[[], QueriesKeys]]:
    """Queries and keys of a block's fused projection, rotated as the block rotates them."""
    seen: dict[str, Any] = {}

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(lengths=kwargs["cu_seqlens"], rotary=kwargs["position_embeddings"])

    def project(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["qkv"] = output

    def give() -> QueriesKeys:
        queries, keys, _ = seen.pop("qkv").unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, *seen.pop("rotary"))
        return queries, keys, seen.pop("lengths").diff().tolist(), float(attention.scaling)

    handles = [
        attention.register_forward_pre_hook(note, with_kwargs=True),
        attention.qkv.register_forward_hook(project),
    ]
    return handles, give


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """Images and videos of one call, one after the other."""
    both = list(zip(*((p.deep, p.deep_patches) for p in parts), strict=True))
    return Encoded(
        torch.cat([p.features for p in parts]),
        [torch.cat(layers) for layers in zip(*both[0], strict=True)],
        torch.cat([p.patches for p in parts]),
        [torch.cat(layers) for layers in zip(*both[1], strict=True)],
        {
            b: Reading(*(torch.cat([getattr(p.readings[b], name) for p in parts]) for name in ("received", "keys")))
            for b in parts[0].readings
        },
        sum(p.reading_seconds for p in parts),
    )

"""The backbones' vision towers with a 3D patch embedding and packed attention.

Legend: N patches, X voxels of a patch, V width of the tower, D width of the decoder, M patches of a token.

Differences from the towers of transformers: the patch embedding is a linear map on patches of any size and number
of channels, all windows of a block are attended in few calls instead of one call each, and tokens that are
background may be left out: the others keep their positions and windows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from photon.patch_embedding import PatchEmbedding
from photon.varlen import packed_attention


class PackedAttention(nn.Module):
    """A tower's attention with its own weights; sequences that lie end to end go through ``packed_attention``."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scaling = attention.num_heads, attention.scaling
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``(N, V) -> (N, V)``; ``cu_seqlens`` are the starts of the windows, on the host."""
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(1, 0, 2, 3)
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb_vision(qkv[0], qkv[1], *position_embeddings)
        query, key, value = (x.transpose(0, 1) for x in (query, key, qkv[2]))
        out = packed_attention(query, key, value, cu_seqlens.diff().tolist(), causal=False, scale=self.scaling)
        return self.proj(out.transpose(0, 1).flatten(1))


class _Tower:
    """What both towers share; mixed into their transformers classes."""

    spatial_merge_size: int
    spatial_merge_unit: int
    blocks: nn.ModuleList

    def _prepare(self, config: Any, patch_voxels: int, bias: bool) -> None:
        self.patch_embed = PatchEmbedding(patch_voxels, config.hidden_size, bias)
        plane = config.patch_size
        self.patch_size = plane if isinstance(plane, int) else max(plane)  # only sizes the attention windows
        for block in self.blocks:
            block.attn = PackedAttention(block.attn)

    def encode(
        self, patches: Tensor, grid_thw: Tensor, token_index: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens of all volumes, volume by volume in raster order.

        Args:
            patches: ``(N, X)``; of the tokens in ``token_index`` only, where that is given.
            grid_thw: ``(volumes, 3)``, kept on the host: it only shapes index tables.
            token_index: ``(N / M)`` numbers of the tokens that are there, counted through all volumes' grids.

        Returns:
            ``(N / M, D)`` as the decoder takes them, and as many for each of the decoder's first layers that gets
            deep-stack features (none in Qwen2.5-VL).

        Raises:
            ValueError: patches and ``token_index`` do not fit.
        """
        grid_thw = grid_thw.cpu()
        present = torch.ones(int(grid_thw.prod(1).sum()) // self.spatial_merge_unit, dtype=torch.bool)
        if token_index is not None:
            present = torch.zeros_like(present).scatter_(0, token_index.cpu(), True)
        if int(present.sum()) * self.spatial_merge_unit != len(patches):
            raise ValueError(f"pixel_values_videos: {len(patches)} patches for {int(present.sum())} tokens")
        tables = self._tables(grid_thw, present)
        # Bounds stay on the host, where they become lists of lengths.
        moved = {k: v if "seqlens" in k else v.to(patches.device, non_blocking=True) for k, v in tables.items()}
        output = self(patches, grid_thw=grid_thw, **moved)  # type: ignore[operator]
        return output.pooler_output, list(getattr(output, "deepstack_features", None) or [])

    def _tables(self, grid_thw: Tensor, present: Tensor) -> dict[str, Tensor]:
        """What the forward pass derives from whole grids, for the tokens that are ``present`` (bool)."""
        of_patches = present.repeat_interleave(self.spatial_merge_unit)
        positions = get_vision_position_ids(grid_thw, self.spatial_merge_size)
        slabs = get_vision_cu_seqlens(grid_thw)
        return {"position_ids": positions[of_patches], "cu_seqlens": _bounds_of_present(slabs, of_patches)}


class PhotonVisionTower(_Tower, Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's tower on patches of any size: attention in windows, in some blocks in a whole slab."""

    def __init__(self, config: Any, patch_voxels: int) -> None:
        super().__init__(config)
        self._prepare(config, patch_voxels, bias=False)

    def _tables(self, grid_thw: Tensor, present: Tensor) -> dict[str, Tensor]:
        order, bounds = get_vision_window_index(grid_thw, self.spatial_merge_size, self.window_size, self.patch_size)
        number = present.cumsum(0) - 1  # of a token among those that are there
        stays = present[order]
        return {
            **super()._tables(grid_thw, present),
            "window_index": number[order[stays]],
            "cu_window_seqlens": _bounds_of_present(bounds, stays.repeat_interleave(self.spatial_merge_unit)),
        }


class PhotonQwen3VisionTower(_Tower, Qwen3VLVisionModel):
    """Qwen3-VL's tower on patches of any size: attention in a slab, learned positions, deep-stack features."""

    def __init__(self, config: Any, patch_voxels: int) -> None:
        super().__init__(config)
        self._prepare(config, patch_voxels, bias=True)

    def _tables(self, grid_thw: Tensor, present: Tensor) -> dict[str, Tensor]:
        of_patches = present.repeat_interleave(self.spatial_merge_unit)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=self.num_grid_per_side,
            mode=self.interpolation_mode,
            align_corners=self.interpolation_align_corners,
            spatial_merge_size=self.spatial_merge_size,
        )
        return {
            **super()._tables(grid_thw, present),
            "interp_indices": indices[of_patches],
            "interp_weights": weights[of_patches],
        }


def _bounds_of_present(bounds: Tensor, present: Tensor) -> Tensor:
    """Bounds of sequences that lie end to end once only their ``present`` members are there; none is empty."""
    passed = torch.cat([present.new_zeros(1, dtype=torch.long), present.cumsum(0)])
    return passed[bounds.long()].unique_consecutive().to(bounds.dtype)


TOWERS: dict[str, Any] = {"qwen2_5_vl_vision": PhotonVisionTower, "qwen3_vl_vision": PhotonQwen3VisionTower}
"""By the ``model_type`` of a vision configuration."""

"""Qwen2.5-VL's vision tower with a 3D patch embedding and packed attention.

Differences from ``Qwen2_5_VisionTransformerPretrainedModel``: the patch embedding is a linear map on patches of
any size and number of channels, and all windows of a block are attended in one call instead of one call each.
"""

from typing import Any

from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

from photon.configuration_photon import PhotonConfig
from photon.patch_embedding import PatchEmbedding
from photon.varlen import packed_attention


class PackedVisionAttention(Qwen2_5_VLVisionAttention):
    """The same attention; sequences that lie end to end go through :func:`packed_attention`."""

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


class PhotonVisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """``(N, C d h w)`` patches to ``(N / merge^2, D)`` tokens of the language model's width."""

    def __init__(self, config: Any, patch_voxels: int) -> None:
        super().__init__(config)
        self.patch_embed = PatchEmbedding(patch_voxels, config.hidden_size)
        plane = config.patch_size
        self.patch_size = plane if isinstance(plane, int) else max(plane)  # only sizes the attention windows
        for block in self.blocks:
            block.attn = PackedVisionAttention(config)

    @classmethod
    def from_config(cls, config: PhotonConfig) -> "PhotonVisionTower":
        """The tower of a Photon model."""
        return cls(config.vision_config, config.patches.voxels)

    def encode(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Tokens of all volumes, ``(sum of N / merge^2, D)``, volume by volume in raster order.

        ``grid_thw`` ``(volumes, 3)`` stays on the host: it only shapes index tables.
        """
        return self(patches, grid_thw=grid_thw.cpu()).pooler_output

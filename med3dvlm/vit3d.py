"""The 3D vision transformer of M3D, the baseline encoder of Med3DVLM's Table 5.

Legend: B batch, C channels, D H W voxels, d h w patches along each axis, T tokens (patches), E width, K heads.

Parameter names are those of M3D's checkpoints, whose blocks are MONAI's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from med3dvlm.features import Features, Size3, VolumeEncoder

SIZE: Size3 = (32, 256, 256)
PATCH: Size3 = (4, 16, 16)


class PatchEmbedding(nn.Module):
    """One linear map per patch, and a learned position: ``(B, C, D, H, W) -> (B, T, E)``."""

    def __init__(self, channels: int, grid: Size3, patch: Size3, width: int) -> None:
        super().__init__()
        depth, height, out = patch
        cut = Rearrange("b c (d p) (h q) (w r) -> b (d h w) (p q r c)", p=depth, q=height, r=out)
        self.patch_embeddings = nn.Sequential(cut, nn.Linear(channels * depth * height * out, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, grid[0] * grid[1] * grid[2], width))
        nn.init.trunc_normal_(self.position_embeddings, std=0.02)

    def forward(self, volume: Tensor) -> Tensor:
        return self.patch_embeddings(volume) + self.position_embeddings


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.qkv(x), "b t (n k e) -> n b k t e", n=3, k=self.heads)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(query, key, value), "b k t e -> b t (k e)"))


class Mlp(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside the identity."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT3D(VolumeEncoder):
    """M3D's encoder: 2,048 patches of 32 x 256 x 256 voxels, averaged over 2 x 2 x 2 to 256 tokens.

    The averaging is the first step of M3D's projector; here it belongs to the encoder, so that every encoder gives
    about as many tokens. Both outputs are the same. The class token takes part in attention and is then left out.

    Args:
        size: voxels (depth, height, width). patch: of a patch, likewise. hidden: width inside the MLPs.
        pool: patches along each axis that are averaged; 1 for none.

    Raises:
        ValueError: size, patch and pool do not fit each other, or heads do not divide the width.
    """

    def __init__(
        self,
        size: Sequence[int] = SIZE,
        channels: int = 1,
        patch: Sequence[int] = PATCH,
        width: int = 768,
        hidden: int = 3072,
        layers: int = 12,
        heads: int = 12,
        pool: int = 2,
        name: str = "vit3d",
    ) -> None:
        shape = {"patch": list(patch), "width": width, "hidden": hidden, "layers": layers, "heads": heads, "pool": pool}
        super().__init__(size, channels, {"name": name, "size": list(size), "channels": channels, **shape})
        if len(patch) != 3 or any(n % (p * pool) for n, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"size: {list(size)} is not made of whole groups of {pool} patches of {list(patch)} along each axis"
            )
        if width % heads:
            raise ValueError(f"heads: {heads} does not divide the width {width}")
        self.pool = pool
        depth, height, across = (n // p for n, p in zip(size, patch, strict=True))
        self.grid: Size3 = (depth, height, across)
        self.patch_embedding = PatchEmbedding(channels, self.grid, (patch[0], patch[1], patch[2]), width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.low_shape = self.high_shape = (depth * height * across // pool**3, width)

    def patches(self, volume: Tensor) -> Tensor:
        """All patches before they are averaged: ``(B, C, D, H, W) -> (B, T, E)``."""
        x = self.patch_embedding(volume.to(self.cls_token.dtype))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]

    def encode(self, volume: Tensor) -> Features:
        """Averages of neighbouring patches, twice the same."""
        depth, height, width = (n // self.pool for n in self.grid)
        groups = "b (d i h j w k) e -> b (d h w) (i j k) e"
        sizes = {"d": depth, "h": height, "w": width, "i": self.pool, "j": self.pool, "k": self.pool}
        tokens = rearrange(self.patches(volume), groups, **sizes).mean(2)
        return Features(tokens, tokens)

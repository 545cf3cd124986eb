"""The 3D patch embedding (Photon Sec. 3.1), and how it starts from a backbone's.

Legend: C channels, d h w voxels of a patch, V width of the vision tower, N patches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from photon.geometry import PatchGeometry, Size3


class Scale(NamedTuple):
    """A volume's voxels are ``(x - mean) / std`` of x in [0, 1]."""

    mean: float
    std: float


PixelScale = Sequence[Scale]
"""The same for each channel of a backbone's pixels."""

PIXELS: dict[str, PixelScale] = {
    "qwen2_5_vl_vision": (Scale(0.48145466, 0.26862954), Scale(0.4578275, 0.26130258), Scale(0.40821073, 0.27577711)),
    "qwen3_vl_vision": (Scale(0.5, 0.5),) * 3,
}
"""What the backbones were trained on, by the ``model_type`` of their vision configuration."""


def usual_pixels(channels: int, backbone: str = "qwen2_5_vl_vision") -> PixelScale:
    """Scale of images and videos: the backbone's for its three channels, else [0, 1], as Photon's volumes have it."""
    return PIXELS[backbone] if channels == len(PIXELS[backbone]) else [Scale(0.0, 1.0)] * channels


class PatchEmbedding(nn.Module):
    """One linear map per patch: ``(N, C d h w) -> (N, V)``.

    A convolution whose stride is its kernel is a matrix product on flattened patches; as such it is faster and,
    in bfloat16, free of Conv3d's defects.
    """

    def __init__(self, patch_voxels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_voxels, width, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches.to(self.proj.weight.dtype))


def patchify(volume: Tensor, geometry: PatchGeometry) -> tuple[Tensor, Size3]:
    """Cut a volume into patches, in the order in which the vision tower merges them.

    Args:
        volume: ``(D, H, W)`` in model units, the same for every channel, or ``(C, D, H, W)``. It is padded behind its
            end with its minimum (air) up to whole patches and merge groups, so any size works.

    Returns:
        ``(N, C d h w)`` patches and the grid (depth, height, width) in patches.

    Raises:
        ValueError: the volume has other axes, another number of channels, or no voxels.
    """
    if volume.ndim not in (3, 4):
        raise ValueError(f"volume: {volume.ndim} axes, expected (depth, height, width), channels before them or none")
    volume = volume if volume.ndim == 4 else volume[None]
    if not volume.numel():
        raise ValueError(f"volume: shape {tuple(volume.shape)}, there are no voxels in it")
    if len(volume) not in (1, geometry.channels):
        raise ValueError(f"volume: {len(volume)} channels, expected 1 or {geometry.channels}")
    shape = (volume.shape[1], volume.shape[2], volume.shape[3])
    grid = geometry.grid(shape)
    (depth, height, width), frame = geometry.size, geometry.slices_per_frame
    full = (grid[0] * depth * frame, grid[1] * height, grid[2] * width)
    if shape != full:
        pad = [n for have, want in zip(reversed(shape), reversed(full), strict=True) for n in (0, want - have)]
        volume = F.pad(volume, pad, value=float(volume.min()))
    if frame > 1:
        volume = rearrange(volume, "c (t f) h w -> c t f h w", f=frame).mean(2)
    patches = rearrange(
        volume,
        "c (t d) (gh mh h) (gw mw w) -> (t gh gw mh mw) c (d h w)",
        d=depth, h=height, w=width, mh=geometry.merge, mw=geometry.merge,
    )  # fmt: skip
    return patches.expand(-1, geometry.channels, -1).flatten(1), grid


def inflate(kernel: Tensor, size: Size3, scale: Scale, pixels: PixelScale) -> Tensor:
    """A backbone's patch kernel as one for grey volumes, equal on volumes that do not change within a frame.

    Each of the kernel's frames is spread evenly over its share of the depth, the channels are summed, and the
    difference between the backbone's pixel scale and the volume's is folded in. The constant that the two means
    leave is :func:`inflated_offset`; an embedding without a bias (Qwen2.5-VL) has no place for it.

    Args:
        kernel: ``(V, C, frames, h, w)``. size: (d, h, w) of the new patch.

    Returns:
        ``(V, d h w)``.
    """
    frames = kernel.shape[2]
    grey = torch.einsum("vcfhw,c->vfhw", kernel.float(), kernel.new_tensor([scale.std / p.std for p in pixels]).float())
    owner = torch.arange(size[0]) * frames // size[0]
    spread = F.one_hot(owner, frames).float().T  # (frames, d)
    grey = torch.einsum("vfhw,fd->vdhw", grey, spread / spread.sum(1, keepdim=True).clamp(min=1))
    if grey.shape[-2:] != size[1:]:
        area = grey.shape[-2] * grey.shape[-1] / (size[1] * size[2])
        grey = F.interpolate(grey, size=size[1:], mode="bilinear", align_corners=False) * area
    return grey.flatten(1).to(kernel.dtype)


def inflated_offset(kernel: Tensor, scale: Scale, pixels: PixelScale) -> Tensor:
    """What a volume of zeros (its mean) is to the backbone's kernel: ``(V, C, frames, h, w) -> (V)``."""
    offsets = kernel.new_tensor([(scale.mean - p.mean) / p.std for p in pixels]).float()
    return torch.einsum("vcfhw,c->v", kernel.float(), offsets).to(kernel.dtype)

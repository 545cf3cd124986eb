"""The 3D patch embedding (Photon Sec. 3.1), and how it starts from a backbone's.

Legend: C channels, d h w voxels of a patch, V width of the vision tower, N patches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from photon.geometry import PatchGeometry, Size3

# Deviation of the pixels that Qwen2.5-VL was trained on, by channel.
QWEN_STD = (0.26862954, 0.26130258, 0.27577711)


class PatchEmbedding(nn.Module):
    """One linear map per patch: ``(N, C d h w) -> (N, V)``.

    A convolution whose stride is its kernel is a matrix product on flattened patches; as such it is faster and,
    in bfloat16, free of Conv3d's defects.
    """

    def __init__(self, patch_voxels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_voxels, width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches.to(self.proj.weight.dtype))


def patchify(volume: Tensor, geometry: PatchGeometry) -> tuple[Tensor, Size3]:
    """Cut a volume into patches, in the order in which the vision tower merges them.

    Args:
        volume: ``(D, H, W)`` in model units. It is padded behind its end with its minimum (air) up to whole
            patches and merge groups, so any size works.

    Returns:
        ``(N, C d h w)`` patches and the grid (depth, height, width) in patches.

    Raises:
        ValueError: the volume does not have three axes.
    """
    if volume.ndim != 3:
        raise ValueError(f"volume: {volume.ndim} axes, expected (depth, height, width)")
    grid = geometry.grid((volume.shape[0], volume.shape[1], volume.shape[2]))
    (depth, height, width), frame = geometry.size, geometry.slices_per_frame
    full = (grid[0] * depth * frame, grid[1] * height, grid[2] * width)
    if tuple(volume.shape) != full:
        pad = [n for have, want in zip(reversed(volume.shape), reversed(full), strict=True) for n in (0, want - have)]
        volume = F.pad(volume, pad, value=float(volume.min()))
    if frame > 1:
        volume = rearrange(volume, "(t f) h w -> t f h w", f=frame).mean(1)
    patches = rearrange(
        volume,
        "(t d) (gh mh h) (gw mw w) -> (t gh gw mh mw) 1 (d h w)",
        d=depth, h=height, w=width, mh=geometry.merge, mw=geometry.merge,
    )  # fmt: skip
    return patches.expand(-1, geometry.channels, -1).flatten(1), grid


def inflate(kernel: Tensor, size: Size3, std: float, image_std: Sequence[float] = QWEN_STD) -> Tensor:
    """A backbone's patch kernel as one for grey volumes, equal on volumes that do not change within a frame.

    Each of the kernel's frames is spread evenly over its share of the depth, the channels are summed, and the
    difference between the backbone's pixel scale and the volume's is folded in. (The offset that the two means
    leave is a constant per output channel; it is dropped because the embedding has no bias.)

    Args:
        kernel: ``(V, C, frames, h, w)``. size: (d, h, w) of the new patch.
        std: the volume's voxels are ``(x - mean) / std`` of x in [0, 1].
        image_std: the same deviation for each channel of the backbone's pixels.

    Returns:
        ``(V, d h w)``.
    """
    frames = kernel.shape[2]
    grey = torch.einsum("vcfhw,c->vfhw", kernel.float(), kernel.new_tensor([std / s for s in image_std]).float())
    owner = torch.arange(size[0]) * frames // size[0]
    spread = F.one_hot(owner, frames).float().T  # (frames, d)
    grey = torch.einsum("vfhw,fd->vdhw", grey, spread / spread.sum(1, keepdim=True).clamp(min=1))
    if grey.shape[-2:] != size[1:]:
        area = grey.shape[-2] * grey.shape[-1] / (size[1] * size[2])
        grey = F.interpolate(grey, size=size[1:], mode="bilinear", align_corners=False) * area
    return grey.flatten(1).to(kernel.dtype)

"""Tokens of a volume that are nothing but air outside of the body, which need not enter the vision tower.

Legend: N patches, X numbers of a patch, t h w tokens along depth, height, width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from photon.geometry import Size3

AXES = ((3, 1, 1), (1, 3, 1), (1, 1, 3))


def body_tokens(patches: Tensor, grid: Size3, merge: int, threshold: float) -> Tensor:
    """Which tokens of a volume are not background.

    A token is air if none of its voxels is above ``threshold``. Background is air that is connected, face to face
    through tokens of air, to the in-plane border of the volume. Air inside the body (lungs, bowel) stays, also where
    the first or last slab cuts it open, and so does a table.

    Args:
        patches: ``(N, X)`` as :func:`photon.patch_embedding.patchify` cuts them. grid: in patches.
        merge: patches merged along height and width. threshold: in model units.

    Returns:
        ``(t h w)`` bool in raster order. At least one is True: the brightest of a volume that is all air.
    """
    shape = (grid[0], grid[1] // merge, grid[2] // merge)
    brightest = patches.reshape(shape[0] * shape[1] * shape[2], -1).amax(1)
    air = (brightest <= threshold).view(shape)
    inside = torch.zeros_like(air)
    inside[:, 1:-1, 1:-1] = True
    background = air & ~inside
    while not torch.equal(grown := _dilated(background) & air, background):
        background = grown
    body = ~background.flatten()
    if not body.any():
        body[brightest.argmax()] = True
    return body


def _dilated(mask: Tensor) -> Tensor:
    """``mask`` (t, h, w) and its six neighbours of each place."""
    x = mask[None].float()
    pooled = [F.max_pool3d(x, axis, stride=1, padding=tuple(n // 2 for n in axis)) for axis in AXES]
    return torch.stack(pooled).amax(0)[0] > 0

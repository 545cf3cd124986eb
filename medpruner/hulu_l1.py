"""Hulu-Med's L1 rule, a baseline: a token stays where its pixels differ from those of the frame before.

Legend: S frames, M tokens of a frame, P pixel values of a token.
"""

import torch
from torch import Tensor

MOST_NUMBERS = 2**22
"""Frames compared at once have at most so many numbers: 16 MiB in float32; four times that is slower on a CPU."""


def hulu_l1(pixels_SMP: Tensor, threshold: float = 0.1) -> Tensor:
    """Tokens whose mean absolute difference to the same place in the previous frame exceeds ``threshold``.

    The previous frame is the one before in the volume, whatever stays of it. The first frame stays whole, and of every
    other at least the token with the largest difference, the first of equals.

    Args:
        pixels_SMP: ``(S, M, P)`` normalised pixels of each token (after the 2x2 merge on Qwen-style towers), any
            dtype; compared in float32, or wider where they are.
        threshold: 0 or more, in the unit of the pixels.

    Returns:
        ``(S, M)`` bool.

    Raises:
        ValueError: ``threshold`` is negative or not a number; not three dimensions, or nothing in them.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold: {threshold}; the L1 rule takes 0 or more, in the unit of the pixels")
    if pixels_SMP.dim() != 3 or pixels_SMP.numel() == 0:
        raise ValueError(f"pixels: a tensor of shape {tuple(pixels_SMP.shape)}; give (frames, tokens, pixels of one)")
    wide = torch.promote_types(pixels_SMP.dtype, torch.float32)
    kept = [torch.ones_like(pixels_SMP[:1, :, 0], dtype=torch.bool)]
    at_once = max(1, MOST_NUMBERS // pixels_SMP[0].numel())
    for before, after in zip(pixels_SMP[:-1].split(at_once), pixels_SMP[1:].split(at_once), strict=True):
        difference = (after.to(wide) - before.to(wide)).abs_().mean(-1)
        exceeds = difference > threshold
        kept.append(exceeds.scatter_(1, difference.argmax(1, keepdim=True), True))
    return torch.cat(kept)

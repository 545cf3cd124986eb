"""Inter-slice anchor-based filtering (MedPruner Sec. 2.2): which slices of a volume are encoded at all.

Legend: S slices, N numbers of a slice.
"""

import torch
from torch import Tensor

MOST_NUMBERS = 2**22
"""Slices compared at once have at most so many numbers: 16 MiB in float32; four times that is slower on a CPU."""


def kept_slices(slices_SN: Tensor, gamma: float) -> Tensor:
    """Slices that differ from the slice kept before them by more than ``gamma`` (MedPruner Eq. 2).

    The first slice is the first anchor. A slice whose mean absolute difference to the anchor is larger than ``gamma``
    is kept and becomes the anchor; with ``gamma`` 0 only exact repeats go. Slices are compared in chunks that begin
    with as many as the last anchor lasted and double: each slice is compared a few times at most, and the host waits
    for the device once a chunk.

    Args:
        slices_SN: ``(S, ...)`` pixels, any dtype, in the order of the volume. Compared in float32, or wider where they
            are.
        gamma: 0 or more, in the unit of the pixels (normalised values, or HU).

    Returns:
        ``(S)`` bool, on the device of the slices.

    Raises:
        ValueError: ``gamma`` is negative or not a number; fewer than two dimensions, or nothing in them; pixels that
            are not numbers.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma: {gamma}; the slice filter takes 0 or more, in the unit of the pixels")
    if slices_SN.dim() < 2 or slices_SN.numel() == 0:
        raise ValueError(
            f"slices: a tensor of shape {tuple(slices_SN.shape)}; the slice filter takes (slices, pixels...)"
        )
    pixels = slices_SN.flatten(1)
    count = len(pixels)
    limit = max(1, MOST_NUMBERS // pixels.shape[1])
    kept, start, width = [0], 1, 1
    while start < count:
        distances = _distances(pixels[start : start + min(width, limit)], pixels[kept[-1]], start)
        over = next((i for i, distance in enumerate(distances) if distance > gamma), None)
        if over is None:
            start, width = start + len(distances), 2 * width
        else:
            start, width = start + over + 1, start + over - kept[-1]
            kept.append(start - 1)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[kept] = True
    return mask.to(slices_SN.device)


def _distances(chunk: Tensor, anchor: Tensor, first: int) -> list[float]:
    """Eq. 2 of each slice of a chunk; ``first`` is the number of its first slice, for the error."""
    wide = torch.promote_types(chunk.dtype, torch.float32)
    distances: list[float] = (chunk.to(wide) - anchor.to(wide)).abs_().mean(1).tolist()
    for place, distance in enumerate(distances, first):
        if distance != distance:
            raise ValueError(
                f"slice {place} (counted from 0), or the one kept before it, holds pixels that are not finite numbers: "
                "replace them before pruning"
            )
    return distances

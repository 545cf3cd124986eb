"""HiPrune's choice of tokens, a baseline: attention of a middle layer and of a deep one. Nothing is merged.

Legend: M tokens of a slice, h w its grid of tokens.
"""

import torch
from torch import Tensor

from medpruner.visionzip import dominant


def hiprune(object_M: Tensor, deep_M: Tensor, grid: tuple[int, int], keep: int, alpha: float = 0.1) -> Tensor:
    """Anchors, their neighbours as buffers, and registers.

    The anchors are the round(keep * alpha / 5) best tokens of the object layer (Python's ``round``: halves to even),
    the buffers their neighbours to the left, right, above and below, the registers the best of the deep layer among
    all other tokens. Where ``keep`` has no room for every buffer, those with the best scores of the deep layer stay.
    Of equal tokens the first stay.

    Args:
        object_M: ``(..., M)`` global attention (mean over heads and queries) of the object layer, each row for itself.
        deep_M: ``(..., M)`` of the deep layer.
        grid: rows and columns of the tokens, M = h * w, in raster order.
        keep: tokens of a row, from 1 to M. alpha: share of ``keep`` for anchors and buffers, 0 to 1.

    Returns:
        ``(..., M)`` bool with exactly ``keep`` True in a row.

    Raises:
        ValueError: a setting out of range, or scores that do not fit the grid.
    """
    height, width = grid
    tokens = object_M.shape[-1]
    if object_M.shape != deep_M.shape or height < 1 or width < 1 or tokens != height * width:
        raise ValueError(
            f"scores of shapes {tuple(object_M.shape)} and {tuple(deep_M.shape)} on a grid of {height} x {width} "
            "tokens; both layers need one score for each token of the grid"
        )
    if not 1 <= keep <= tokens:
        raise ValueError(f"keep: {keep} of {tokens} tokens; give 1 up to all of them")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha}; it is from 0 to 1")
    anchors = dominant(object_M, round(keep * alpha / 5))
    rank = 2 * anchors.int() + _neighbours(anchors.unflatten(-1, grid)).flatten(-2).int()
    order = deep_M.argsort(dim=-1, descending=True, stable=True)
    # Anchors, then buffers, then all others; the deep layer decides within each.
    order = order.gather(-1, rank.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(anchors).scatter_(-1, order[..., :keep], True)


def _neighbours(tokens: Tensor) -> Tensor:
    """``(..., h, w)`` bool: what stands beside a True in the same row or column."""
    beside = torch.zeros_like(tokens)
    beside[..., :, 1:] |= tokens[..., :, :-1]
    beside[..., :, :-1] |= tokens[..., :, 1:]
    beside[..., 1:, :] |= tokens[..., :-1, :]
    beside[..., :-1, :] |= tokens[..., 1:, :]
    return beside

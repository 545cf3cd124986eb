"""Unselected tokens merged into a few (MedPruner Sec. 2.3, after VisionZip's contextual tokens).

Legend: S slices, M tokens of a slice, d width of keys, C width of features, U unselected tokens of a slice, K centres
and R other unselected tokens, of all slices.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_SIMILARITIES = 2**24
"""Cosines held at once: 64 MiB in float32."""


class Clusters(NamedTuple):
    """Which unselected tokens become one.

    Tokens are numbered through all slices: slice ``s`` has ``s * M`` to ``(s + 1) * M - 1``.

    Attributes:
        centres: ``(K)`` tokens that stay, ascending.
        assigned: ``(R)`` the place in ``centres`` of each member's centre.
        members: ``(R)`` tokens that go, ascending.
    """

    centres: Tensor
    assigned: Tensor
    members: Tensor


@torch.no_grad()
def clusters(keys_Md: Tensor, selected_M: Tensor, count: int) -> Clusters:
    """Clusters of the tokens that were not selected, each slice for itself.

    Of a slice's U unselected tokens in order, min(count, U) are centres: those at 0, step, 2 step, ... with step =
    max(1, U // count). Every other goes to the centre whose key has the largest cosine with its own, the first of
    equals.

    Args:
        keys_Md: ``(M, d)`` head-averaged keys of a slice, or ``(S, M, d)`` of slices of equal size; any floating
            dtype, compared in float32.
        selected_M: ``(M)`` or ``(S, M)`` bool: the primary tokens.
        count: centres of a slice, 0 or more. With 0 nothing is merged and nothing has members.

    Raises:
        ValueError: shapes that do not fit, a negative ``count``.
    """
    if keys_Md.dim() not in (2, 3) or keys_Md.shape[:-1] != selected_M.shape:
        raise ValueError(
            f"keys of shape {tuple(keys_Md.shape)} with a selection of {tuple(selected_M.shape)}; give (tokens, "
            "width) with (tokens), or (slices, tokens, width) with (slices, tokens)"
        )
    if count < 0:
        raise ValueError(f"count: {count}; give 0 or more cluster centres of a slice")
    tokens, width = keys_Md.shape[-2:]
    keys, others = keys_Md.reshape(-1, tokens, width), ~selected_M.reshape(-1, tokens)
    if count == 0:
        empty = torch.empty(0, dtype=torch.long, device=keys.device)
        return Clusters(empty, empty, empty)
    unselected = others.sum(1, keepdim=True)  # U
    step = (unselected // count).clamp(min=1)
    rank = others.cumsum(1) - 1  # place among the unselected
    is_centre = others & (rank % step == 0) & (rank // step < count)
    centres = is_centre.flatten().nonzero().squeeze(1)
    at, members = (others & ~is_centre).nonzero(as_tuple=True)  # at: the slice of each
    number = unselected.squeeze(1).clamp(max=count)
    nearest = _nearest(keys, centres, number, count)
    return Clusters(centres, (number.cumsum(0) - number)[at] + nearest[at, members], at * tokens + members)


def _nearest(keys: Tensor, centres: Tensor, number: Tensor, count: int) -> Tensor:
    """``(S, M)``: which of its slice's centres each token is most similar to; ``number`` (S) of them are there."""
    slices, tokens, width = keys.shape
    # (S, count): a slice with fewer centres has no members, so what stands in its gaps does not matter.
    there = torch.arange(count, device=keys.device) < number[:, None]
    place = there.new_zeros(there.shape, dtype=torch.long).masked_scatter_(there, centres)
    nearest = []
    for some in torch.arange(slices).split(max(1, MOST_SIMILARITIES // (tokens * count))):
        part = slice(int(some[0]), int(some[-1]) + 1)
        unit = F.normalize(keys[part].float(), dim=-1)
        of_centres = F.normalize(keys.reshape(-1, width)[place[part]].float(), dim=-1)
        nearest.append((unit @ of_centres.mT).argmax(-1))
    return torch.cat(nearest)


def merge(features_MC: Tensor, clusters: Clusters) -> Tensor:
    """Each centre plus the mean of what was assigned to it; the centre alone where nothing was.

    Args:
        features_MC: ``(M, C)``, or ``(S, M, C)`` as the keys were; any floating dtype, summed in float32.
        clusters: of the same tokens.

    Returns:
        ``(K, C)`` in the dtype of the features.
    """
    features = features_MC.reshape(-1, features_MC.shape[-1])
    centres = features[clusters.centres].float()
    of_members = features[clusters.members].float()
    sums = torch.zeros_like(centres).index_add_(0, clusters.assigned, of_members)
    sizes = torch.bincount(clusters.assigned, minlength=len(centres)).clamp(min=1)
    return (centres + sums / sizes[:, None]).to(features.dtype)

"""Dynamic information nucleus selection (MedPruner Sec. 2.3): tokens that hold the attention of a slice.

Legend: H heads, M tokens, d head width.
"""

import math

import torch
from torch import Tensor

CPU_SCORES, DEVICE_SCORES = 2**19, 2**26
"""Scores held at once unless told: 2 MiB in float32, which stay in the cache of a core, and 256 MiB elsewhere."""


@torch.no_grad()
def attention_received(queries_HMd: Tensor, keys_HMd: Tensor, scale: float, block: int | None = None) -> Tensor:
    """Attention that each token gets from all tokens of its slice, averaged over heads (column sums of Eq. 3).

    The paper says the average over queries, which is this divided by M; every value is then about 1 / M and Eq. 4
    almost flat, so the published code sums. In blocks of queries: the M x M matrix is never held.

    Args:
        queries_HMd: ``(..., H, M, d)`` of one slice or of slices of equal size, any floating dtype; computed in
            float32. keys_HMd: alike.
        scale: what products are multiplied by before the softmax, ``d ** -0.5`` in Eq. 3.
        block: queries of a head at a time; as many as suit the device if None.

    Returns:
        ``(..., M)`` float32, on average 1. No gradient.

    Raises:
        ValueError: queries and keys of different shapes, or with fewer than three dimensions or none of something; a
            ``block`` below 1.
    """
    shape = queries_HMd.shape
    if shape != keys_HMd.shape or len(shape) < 3 or 0 in shape:
        raise ValueError(
            f"queries of shape {tuple(shape)} with keys of {tuple(keys_HMd.shape)}; give both as (..., heads, "
            "tokens, head width), keys repeated for each head that shares them"
        )
    if block is not None and block < 1:
        raise ValueError(f"block: {block}; give 1 or more queries at a time, or None")
    heads, tokens = shape[-3], shape[-2]
    entries = CPU_SCORES if queries_HMd.device.type == "cpu" else DEVICE_SCORES
    rows = min(tokens, block or max(1, entries // tokens))
    together = max(1, entries // (rows * tokens))  # heads, of all slices
    queries, keys = queries_HMd.flatten(0, -3), keys_HMd.flatten(0, -3)
    sums = queries.new_empty(len(queries), tokens, dtype=torch.float32)
    for head in range(0, len(queries), together):
        some = slice(head, head + together)
        sums[some] = _column_sums(queries[some].float() * scale, keys[some].float(), rows)
    return sums.view(*shape[:-3], heads, tokens).mean(-2)


def _column_sums(queries: Tensor, keys: Tensor, rows: int) -> Tensor:
    """``(heads, M, d)`` twice -> ``(heads, M)``: softmax over keys, summed over queries, ``rows`` of them at a time."""
    sums = keys.new_zeros(keys.shape[:2])
    for some in queries.split(rows, dim=1):
        sums += torch.softmax(some @ keys.mT, dim=-1).sum(1)
    return sums


def nucleus(importance_M: Tensor, temperature: float, tau: float) -> Tensor:
    """The fewest tokens whose shares of the importance sum to ``tau`` (MedPruner Eq. 4-5).

    Args:
        importance_M: ``(..., M)``, each row for itself.
        temperature: T of Eq. 4, above 0. tau: of Eq. 5, above 0 and at most 1; 1 keeps every token.

    Returns:
        ``(..., M)`` bool in the order of the tokens. At least one of a row is kept; of equal tokens the first.

    Raises:
        ValueError: ``temperature`` or ``tau`` out of range; no tokens; importance that is not finite.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: {temperature}; it is above 0 and finite")
    if not 0 < tau <= 1:
        raise ValueError(f"tau: {tau}; it is above 0 and at most 1")
    if importance_M.dim() < 1 or importance_M.shape[-1] == 0:
        raise ValueError(f"importance: a tensor of shape {tuple(importance_M.shape)}; give one number for each token")
    if not importance_M.isfinite().all():
        raise ValueError("importance: not finite everywhere; the tower's attention overflowed (run it in bfloat16)")
    if tau == 1:  # Every share is above 0, though the smallest no longer move the sum.
        return torch.ones_like(importance_M, dtype=torch.bool)
    importance = importance_M.double()
    # Less the largest before dividing: a tiny temperature would overflow otherwise.
    share = torch.softmax((importance - importance.amax(-1, keepdim=True)) / temperature, dim=-1)  # Eq. 4
    ordered, order = share.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    return torch.zeros_like(importance_M, dtype=torch.bool).scatter_(-1, order, before < tau)  # Eq. 5

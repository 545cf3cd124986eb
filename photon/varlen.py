"""Attention of sequences that lie end to end, without padding between them.

Legend: T tokens of all sequences together, H heads, J key-value heads, E head width.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:  # torch < 2.10, or a build without it
    varlen_attn = None  # type: ignore[assignment]
    _VARLEN_PARAMETERS = frozenset()


def offsets(lengths: list[int]) -> list[int]:
    """Start of each of the sequences of ``lengths`` when they lie end to end, and the end of the last."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def match_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads up to the number of query heads; head axis is -3."""
    repeats = query.shape[-3] // key.shape[-3]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)


def _varlen_usable(query: Tensor) -> bool:
    return varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, scale: float) -> Tensor:
    """torch's own variable-length kernel (CUDA, half precision). Its causal switch changed its name in 2.12."""
    key, value = match_heads(query, key, value)
    bounds = torch.tensor(offsets(lengths), dtype=torch.int32).to(query.device, non_blocking=True)
    options: dict[str, Any] = {"scale": scale} if "scale" in _VARLEN_PARAMETERS else {}
    if "scale" not in _VARLEN_PARAMETERS:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "is_causal" in _VARLEN_PARAMETERS:
        options["is_causal"] = causal
    elif causal:
        options["window_size"] = (-1, 0)
    q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    out: Any = varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths), **options)
    return out.transpose(0, 1)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, scale: float
) -> Tensor:
    """Each sequence attends to itself alone.

    Args:
        query: ``(H, T, E)``. key, value: ``(J, T, E)`` with H a multiple of J.
        lengths: tokens of each sequence, in order; they sum to T.
        causal: a token sees itself and what stands before it in its own sequence.

    Returns:
        ``(H, T, E)``.
    """
    if _varlen_usable(query):
        return _varlen(query, key, value, lengths, causal, scale)
    key, value = match_heads(query, key, value)
    if len(set(lengths)) == 1:  # equal lengths: one batched call
        q, k, v = (x.unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return out.transpose(0, 1).flatten(1, 2)
    parts = zip(query.split(lengths, 1), key.split(lengths, 1), value.split(lengths, 1), strict=True)
    each = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal, scale=scale)[0] for q, k, v in parts
    ]
    return torch.cat(each, dim=1)

"""Attention of sequences that lie end to end, without padding between them.

Legend: T tokens of all sequences together, H heads, J key-value heads (H is a multiple of J), E head width,
B sequences, L length of the longest, P tokens of a prefix that questions share, S tokens of those questions
together, K questions.

:func:`packed_attention` has several ways to compute the same thing, by name in ``BACKENDS``; :func:`choose` takes
the one for the tensors at hand and :func:`set_backend` fixes one. :func:`tree_attention` is for sequences that
begin with the same prefix.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10, or a build without it
    varlen_attn = None  # type: ignore[assignment]

_HALF = (torch.bfloat16, torch.float16)
_Attend = Callable[[Tensor, Tensor, Tensor, list[int], bool, float], Tensor]


def offsets(lengths: Sequence[int]) -> list[int]:
    """Start of each of the sequences of ``lengths`` when they lie end to end, and the end of the last."""
    return [0, *accumulate(lengths)]


def match_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads up to the number of query heads; head axis is -3."""
    repeats = query.shape[-3] // key.shape[-3]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's attention of ``(B, heads, L, E)``. On CUDA only some of its kernels can share key-value heads."""
    if query.is_cuda:
        key, value = match_heads(query, key, value)
    shared = query.shape[-3] != key.shape[-3]
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=shared, **options)


class _Spans(NamedTuple):
    """Where each sequence's queries and keys lie: ``(B + 1)`` int32 bounds, and the most tokens of one."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


def _spans(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> _Spans:
    # The result is cached: made while generating and used while training, which inference tensors do not allow.
    with torch.inference_mode(False):
        q, k = (torch.tensor(offsets(n), dtype=torch.int32).to(device, non_blocking=True) for n in (queries, keys))
    return _Spans(q, k, max(queries), max(keys))


@lru_cache(maxsize=32)
def _own_spans(lengths: tuple[int, ...], device: torch.device) -> _Spans:
    """Every sequence sees itself. All layers of a pass share one copy on the device."""
    return _spans(lengths, lengths, device)


@lru_cache(maxsize=4)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _flash_kernel(query: Tensor, key: Tensor, value: Tensor, spans: _Spans, causal: bool, scale: float) -> Tensor:
    """flash-attn 2 on ``(T, heads, E)``. Causal means that a sequence's last query sees up to its last key."""
    options = {"softmax_scale": scale, "causal": causal, "deterministic": torch.are_deterministic_algorithms_enabled()}
    return flash_attn_varlen_func(query, key, value, *spans, **options)


def _varlen_kernel(query: Tensor, key: Tensor, value: Tensor, spans: _Spans, causal: bool, scale: float) -> Tensor:
    """torch's own kernel on ``(T, heads, E)``; the same meaning of causal.

    2.10 has ``is_causal``, later ones ``window_size``, ``scale`` and then ``enable_gqa``.
    """
    known, options = _parameters(varlen_attn), dict[str, Any]()
    if "scale" in known:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if "is_causal" in known:
        options["is_causal"] = causal
    elif causal:
        options["window_size"] = (-1, 0)
    out: Any = varlen_attn(query, key, value, *spans, **options)
    return out


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, _Spans, bool, float], Tensor]] = {
    "flash": _flash_kernel,
    "varlen": _varlen_kernel,
}


def _by_kernel(name: str) -> _Attend:
    """``packed_attention`` by one of the kernels."""

    def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))
        return _KERNELS[name](q, k, v, _own_spans(tuple(lengths), query.device), causal, scale).transpose(0, 1)

    return attend


def _kernel_missing(function: Callable[..., Any] | None, query: Tensor) -> str | None:
    """Why a kernel cannot take these tensors."""
    if function is None:
        return "not installed"
    if not query.is_cuda or query.dtype not in _HALF:
        return "needs bfloat16 or float16 on a GPU"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return "needs a head width of at most 256 that 8 divides"
    return None


@lru_cache(maxsize=4)
def _block_mask(lengths: tuple[int, ...], causal: bool, device: torch.device) -> BlockMask:
    """Tokens of the same sequence see each other, or only what stands before them."""

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = owner[q] == owner[k]
        return same & (q >= k) if causal else same

    with torch.inference_mode(False):
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        return create_block_mask(visible, None, None, len(owner), len(owner), device=device)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _flex(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, scale: float) -> Tensor:
    # Key-value heads are repeated: sharing them asks for a power of two (Qwen2.5-VL-7B has 28 heads on 4).
    key, value = match_heads(query, key, value)
    attend: Any = _compiled_flex() if query.is_cuda else flex_attention
    mask = _block_mask(tuple(lengths), causal, query.device)
    return attend(query[None], key[None], value[None], block_mask=mask, scale=scale)[0]


def _flex_missing(query: Tensor) -> str | None:
    if query.is_cuda:
        return None if importlib.util.find_spec("triton") else "needs triton"
    return "has no gradient on the CPU" if query.requires_grad else None


def _sequences(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """``(heads, T, E)`` as one ``(length, heads, E)`` per sequence: tokens first, as they lie in memory."""
    return x.transpose(0, 1).split(lengths)


def _padded(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, scale: float) -> Tensor:
    """All sequences padded at their end to the longest, in one call."""
    longest = max(lengths)

    def pad(x: Tensor) -> Tensor:
        rows = [F.pad(row, (0, 0, 0, 0, 0, longest - len(row))) for row in _sequences(x, lengths)]
        return torch.stack(rows).transpose(1, 2)

    mask = None
    if not causal and min(lengths) < longest:  # padding stands behind: what is causal cannot see it
        mask = torch.arange(longest, device=query.device) < torch.tensor(lengths, device=query.device)[:, None]
        mask = mask[:, None, None]
    out = _sdpa(pad(query), pad(key), pad(value), attn_mask=mask, is_causal=causal, scale=scale)
    rows = out.transpose(1, 2).unbind()
    return torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]).transpose(0, 1)


def _grouped(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, scale: float) -> Tensor:
    """One call for all sequences of the same length; nothing is padded."""
    if len(set(lengths)) == 1:  # views, no copies
        q, k, v = (x.unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value))
        return _sdpa(q, k, v, is_causal=causal, scale=scale).transpose(0, 1).flatten(1, 2)
    parts = [_sequences(x, lengths) for x in (query, key, value)]
    out: list[Tensor] = [query] * len(lengths)
    for length in set(lengths):
        members = [i for i, n in enumerate(lengths) if n == length]
        q, k, v = (torch.stack([x[i] for i in members]).transpose(1, 2) for x in parts)
        rows = _sdpa(q, k, v, is_causal=causal, scale=scale).transpose(1, 2).unbind()
        for i, row in zip(members, rows, strict=True):
            out[i] = row
    return torch.cat(out).transpose(0, 1)


class Backend(NamedTuple):
    """A way to compute :func:`packed_attention`, and why it cannot take a given query (None if it can)."""

    attend: _Attend
    why_not: Callable[[Tensor], str | None]


BACKENDS: dict[str, Backend] = {
    "flash": Backend(_by_kernel("flash"), lambda query: _kernel_missing(flash_attn_varlen_func, query)),
    "varlen": Backend(_by_kernel("varlen"), lambda query: _kernel_missing(varlen_attn, query)),
    "flex": Backend(_flex, _flex_missing),
    "padded": Backend(_padded, lambda query: None),
    "grouped": Backend(_grouped, lambda query: None),
}
_fixed: str | None = None


def set_backend(name: str | None) -> None:
    """Use this backend in every call from now on, or choose again for each call (None).

    Raises:
        ValueError: there is no such backend.
    """
    global _fixed
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: there is no {name!r}; take one of {', '.join(BACKENDS)}, or None to choose")
    _fixed = name


def choose(query: Tensor) -> str:
    """The backend for a query ``(H, T, E)``: in half precision on a GPU the first kernel there is."""
    if query.is_cuda and query.dtype in _HALF:
        for name in ("flash", "varlen", "flex"):
            if BACKENDS[name].why_not(query) is None:
                return name
    return "grouped"


def _resolve(query: Tensor, backend: str | None) -> str:
    """The backend asked for, if it can take this query; else the automatic choice."""
    name = backend or _fixed
    if name is None:
        return choose(query)
    reasons = {n: b.why_not(query) for n, b in BACKENDS.items()}
    if reason := reasons.get(name, "unknown"):
        usable = ", ".join(n for n, r in reasons.items() if r is None)
        raise ValueError(f"backend: {name} cannot be used here ({reason}); take one of {usable}")
    return name


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    causal: bool,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """Each sequence attends to itself alone.

    Args:
        query: ``(H, T, E)``. key, value: ``(J, T, E)`` with H a multiple of J.
        lengths: tokens of each sequence, in order; they sum to T.
        causal: a token sees itself and what stands before it in its own sequence.
        backend: a name in ``BACKENDS`` instead of the automatic choice.

    Returns:
        ``(H, T, E)``.

    Raises:
        ValueError: lengths do not sum to T, or the backend is unknown or cannot take these tensors.
    """
    if sum(lengths) != query.shape[1]:
        raise ValueError(f"lengths: they sum to {sum(lengths)}, but there are {query.shape[1]} tokens")
    lengths = [n for n in lengths if n]
    if not lengths:
        return torch.empty_like(query)
    return BACKENDS[_resolve(query, backend)].attend(query, key, value, lengths, causal, scale)


@lru_cache(maxsize=16)
def _branch_mask(prefix: int, suffixes: tuple[int, ...], device: torch.device) -> Tensor:
    """``(S, P + S)`` bool: a question's token sees the prefix and, causally, its own question."""
    with torch.inference_mode(False):
        owner = torch.repeat_interleave(torch.arange(len(suffixes)), torch.tensor(suffixes)).to(device)
        own = (owner[:, None] == owner[None]).tril()
        return torch.cat([own.new_ones(len(owner), prefix), own], dim=1)


def branch_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    suffixes: list[int],
    scale: float,
    visible: Tensor | None = None,
) -> Tensor:
    """The questions of one group: each sees the prefix and, causally, its own tokens; one call with a mask.

    Args:
        query: ``(H, S, E)``, the questions end to end. own_key, own_value: ``(J, S, E)``.
        prefix_key, prefix_value: ``(J, P, E)``.
        suffixes: tokens of each of the K questions; they sum to S.
        visible: ``(K, P)`` bool, which prefix tokens each question sees; all if None.

    Returns:
        ``(H, S, E)``.

    Raises:
        ValueError: sizes do not match.
    """
    prefix, tokens = prefix_key.shape[1], query.shape[1]
    if sum(suffixes) != tokens:
        raise ValueError(f"suffixes: they sum to {sum(suffixes)}, but there are {tokens} tokens")
    if visible is not None and visible.shape != (len(suffixes), prefix):
        raise ValueError(f"visible: {tuple(visible.shape)}, must be {(len(suffixes), prefix)}: (questions, prefix)")
    if not tokens:
        return torch.empty_like(query)
    mask = _branch_mask(prefix, tuple(suffixes), query.device)
    if visible is not None:
        counts = torch.tensor(suffixes, device=visible.device)
        mask = torch.cat([visible.repeat_interleave(counts, 0, output_size=tokens), mask[:, prefix:]], dim=1)
    key, value = torch.cat([prefix_key, own_key], dim=1), torch.cat([prefix_value, own_value], dim=1)
    return _sdpa(query[None], key[None], value[None], attn_mask=mask, scale=scale)[0]


@lru_cache(maxsize=8)
def _tree_spans(
    prefixes: tuple[int, ...], suffixes: tuple[tuple[int, ...], ...], trunk: bool, device: torch.device
) -> tuple[Tensor, _Spans]:
    """Every question as a sequence whose keys are its prefix and its own tokens; with ``trunk`` the prefixes first.

    Returns:
        which of the T keys to take, in order; and the bounds for them and for the queries.
    """
    starts, at = offsets(prefixes), sum(prefixes)
    pieces = [(n, [range(start, start + n)]) for start, n in zip(starts, prefixes, strict=False) if n and trunk]
    for start, shared, lengths in zip(starts, prefixes, suffixes, strict=False):
        for n in lengths:
            if n:
                pieces.append((n, [range(start, start + shared), range(at, at + n)]))
            at += n
    queries, keys = [n for n, _ in pieces], [sum(map(len, ranges)) for _, ranges in pieces]
    with torch.inference_mode(False):
        index = torch.cat([torch.arange(r.start, r.stop) for _, ranges in pieces for r in ranges]).to(device)
    return index, _spans(queries, keys, device)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: list[int],
    suffixes: list[list[int]],
    scale: float,
    visible: list[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """All groups: prefixes attend causally to themselves, questions to their group's prefix and to themselves.

    With ``flash`` or ``varlen`` it is one call on gathered keys, in which a prefix stands once more for each of its
    questions; else, and with ``visible``, :func:`packed_attention` and one :func:`branch_attention` per question.

    Args:
        query: ``(H, T, E)``, the prefixes of all groups and then their questions; or the questions alone, if the
            prefixes' results are known. key, value: ``(J, T, E)`` in the same order, always with the prefixes.
        prefixes: tokens of each group's prefix, 0 where there is none. suffixes: tokens of each group's questions.
        visible: for each group ``(K, P)`` bool, which prefix tokens each question sees; all if None.
        backend: as in :func:`packed_attention`.

    Returns:
        as ``query``.

    Raises:
        ValueError: sizes do not match, or the backend is unknown or cannot take these tensors.
    """
    sizes, given = [sum(prefixes), *map(sum, suffixes)], (query.shape[1], key.shape[1])
    if len(prefixes) != len(suffixes):
        raise ValueError(f"prefixes, suffixes: {len(prefixes)} groups and {len(suffixes)}; one entry for each group")
    if given[1] != sum(sizes) or given[0] not in (sum(sizes), sum(sizes[1:])):
        raise ValueError(f"prefixes, suffixes: they sum to {sum(sizes)}, but there are {given} queries and keys")
    name, trunk = _resolve(query, backend), given[0] == given[1]
    if name in _KERNELS and visible is None and given[0]:
        index, spans = _tree_spans(tuple(prefixes), tuple(map(tuple, suffixes)), trunk, query.device)
        k, v = (x.transpose(0, 1).index_select(0, index) for x in (key, value))
        return _KERNELS[name](query.transpose(0, 1).contiguous(), k, v, spans, True, scale).transpose(0, 1)
    (keys, *own_keys), (values, *own_values) = (x.split(sizes, dim=1) for x in (key, value))
    parts = []
    if trunk:
        first, query = query.split([sizes[0], sum(sizes[1:])], dim=1)
        parts.append(packed_attention(first, keys, values, prefixes, True, scale, name))
    shared = zip(keys.split(prefixes, 1), values.split(prefixes, 1), strict=True)
    seen: list[Tensor] | list[None] = visible or [None] * len(prefixes)
    groups = zip(query.split(sizes[1:], dim=1), shared, own_keys, own_values, suffixes, seen, strict=True)
    for q, (prefix_key, prefix_value), own_key, own_value, lengths, mask in groups:
        # Question by question: in one call most of the mask would hide one question from another.
        each = zip(*(x.split(lengths, dim=1) for x in (q, own_key, own_value)), lengths, strict=True)
        for i, (one, one_key, one_value, n) in enumerate(each):
            own_mask = None if mask is None else mask[i : i + 1]
            parts.append(branch_attention(one, prefix_key, prefix_value, one_key, one_value, [n], scale, own_mask))
    return torch.cat(parts, dim=1)

"""Attention that tokens receive in a block of a vision tower, read beside whatever kernel the block itself uses.

Hooks take queries and keys as the block computes them; attention is summed over queries by blocks, so that no
matrix of all patches by all patches exists (:func:`medpruner.nucleus.attention_received`).

Legend: N patches of all slices, H heads, d width of a head, S slices, M patches of a slice.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from medpruner.nucleus import attention_received


@dataclass(frozen=True)
class Reading:
    """One block: attention received (N,), 1 on average, and keys averaged over heads (N, d), in the tower's order."""

    received: Tensor
    keys: Tensor


@dataclass
class Readings:
    """Of all blocks that were read, by the index they were asked by, and the seconds that it took."""

    blocks: dict[int, Reading] = field(default_factory=dict)
    seconds: float = 0.0


QueriesKeys = tuple[Tensor, Tensor, Sequence[int], float]
"""Queries and keys (N, H, d), the lengths of the slices, and the scale of their product."""


def read(queries: Tensor, keys: Tensor, lengths: Sequence[int], scale: float) -> Reading:
    """A block's reading from its queries and keys ``(N, H, d)``, slice by slice."""
    parts, start = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        stop = start + count * length
        q, k = (
            x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in (queries, keys)
        )  # each (S, H, M, d)
        parts.append(torch.stack([attention_received(*pair, scale) for pair in zip(q, k, strict=True)]).flatten())
        start = stop
    return Reading(torch.cat(parts), keys.float().mean(1))


def clock(device: torch.device) -> float:
    """Seconds, with all that was asked of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def reading(
    blocks: Mapping[int, nn.Module], watch: Callable[[nn.Module], tuple[list[object], Callable[[], QueriesKeys]]]
) -> Iterator[Readings]:
    """Read these attention modules during their next forward pass.

    ``watch`` hooks into one of them and returns the hooks' handles and a call that gives what they saw.
    """
    found = Readings()
    handles: list[object] = []

    def finish(index: int, seen: Callable[[], QueriesKeys]) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: object, _output: object) -> None:
            device = next(module.parameters()).device
            start = clock(device)
            found.blocks[index] = read(*seen())
            found.seconds += clock(device) - start

        return hook

    try:
        for index, block in blocks.items():
            opened, seen = watch(block)
            handles += [*opened, block.register_forward_hook(finish(index, seen))]
        yield found
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]


def block_index(index: int, depth: int, name: str) -> int:
    """A block counted from the tower's start.

    Raises:
        ValueError: there is no such block.
    """
    if not -depth <= index < depth:
        raise ValueError(f"{name}: {index}, the tower has blocks 0 to {depth - 1}, or -{depth} to -1 from its end")
    return index % depth

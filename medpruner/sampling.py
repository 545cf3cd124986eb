"""Slices at uniform distance and tokens at random, the plainest baselines.

Legend: S slices, M tokens.
"""

import torch
from torch import Tensor


def uniform_slices(count: int, keep: int) -> Tensor:
    """``keep`` of ``count`` slices at uniform distance: floor(i * count / keep) for i = 0, 1, ..., keep - 1.

    Returns:
        ``(S)`` bool, S = ``count``, on the CPU. The first slice stays.

    Raises:
        ValueError: ``keep`` is not from 1 to ``count``.
    """
    if not 1 <= keep <= count:
        raise ValueError(f"keep: {keep} of {count} slices; give 1 up to all of them")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.arange(keep) * count // keep] = True
    return mask


def random_tokens(count: int, keep: int, generator: torch.Generator) -> Tensor:
    """``keep`` of ``count`` tokens, every choice of them equally likely.

    Returns:
        ``(M)`` bool, M = ``count``, with exactly ``keep`` True, on the generator's device.

    Raises:
        ValueError: ``keep`` is not from 0 to ``count``.
    """
    if not 0 <= keep <= count:
        raise ValueError(f"keep: {keep} of {count} tokens; give 0 up to all of them")
    mask = torch.zeros(count, dtype=torch.bool, device=generator.device)
    mask[torch.randperm(count, generator=generator, device=generator.device)[:keep]] = True
    return mask

"""Depthwise decomposed convolution in one GPU kernel, where triton is there; for eval mode without gradients.

Legend: B batch, D H W axes, C channels, k kernel, N positions B D H W.

The three branches read the same voxels. Apart they read the volume three times and write it three times, and then the
sum is read and written twice more. Here a program holds the sum of one tile of positions and channels in registers,
reads the neighbours along all three axes (through the cache), and writes once. Batch norm and bias are in the kernels,
and the three centre taps are one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = None

BLOCK_POSITIONS, BLOCK_CHANNELS = 32, 32


def available() -> bool:
    """Whether the kernel can be built at all."""
    return triton is not None


def taps(weights: Sequence[Tensor], bias: Tensor) -> Tensor:
    """What the kernel reads: ``(3 (k - 1) + 2, C)``.

    First the sum of the bias, then the centre taps' sum, then along depth, height and width the taps beside the centre.

    Args:
        weights: folded ``(C, 1, k)`` along height, width and depth. bias: ``(C)``.
    """
    height, width, depth = (weight[:, 0] for weight in weights)
    kernel = depth.shape[1]
    half = kernel // 2
    beside = [i for i in range(kernel) if i != half]
    centre = depth[:, half] + height[:, half] + width[:, half]
    return torch.cat([bias[None], centre[None], *(w[:, beside].T for w in (depth, height, width))]).contiguous()


def depthwise(x: Tensor, weights: Sequence[Tensor], bias: Tensor, residual: bool = False) -> Tensor:
    """All branches of a folded depthwise convolution: ``(B, D, H, W, C) -> (B, D, H, W, C)``.

    Raises:
        ValueError: triton is not installed.
    """
    if triton is None:
        raise ValueError("form: fused needs triton (pip install triton); take views, banded or auto")
    x = x.contiguous()
    batch, depth, height, width, channels = x.shape
    table = taps(weights, bias)
    if residual:
        table[1] += 1
    out = torch.empty_like(x)
    positions = batch * depth * height * width
    grid = (triton.cdiv(positions, BLOCK_POSITIONS), triton.cdiv(channels, BLOCK_CHANNELS))
    _kernel[grid](
        x, table, out, positions, depth, height, width, channels,
        HALF=weights[0].shape[-1] // 2, BLOCK_N=BLOCK_POSITIONS, BLOCK_C=BLOCK_CHANNELS,
    )  # fmt: skip
    return out


_kernel: Any = None

if triton is not None:

    @triton.jit
    def _along(x, table, total, row, place, length, step, channel, inside, first, channels, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        """Add the taps beside the centre along one axis, whose neighbours are ``step`` positions apart."""
        for i in tl.static_range(2 * HALF):
            shift = i - HALF + (1 if i >= HALF else 0)
            there = (place + shift >= 0) & (place + shift < length)
            weight = tl.load(table + (first + i) * channels + channel, mask=channel < channels, other=0.0)
            source = (row + shift * step) * channels
            value = tl.load(x + source[:, None] + channel[None, :], mask=inside & there[:, None], other=0.0)
            total += value.to(tl.float32) * weight[None, :]
        return total

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        x, table, out, positions, depth, height, width, channels,
        HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """One tile of positions and channels."""
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (row < positions)[:, None] & (channel < channels)[None, :]
        w = row % width
        h = (row // width) % height
        d = (row // (width * height)) % depth
        known = channel < channels
        bias = tl.load(table + channel, mask=known, other=0.0)
        centre = tl.load(table + channels + channel, mask=known, other=0.0)
        place = row[:, None] * channels + channel[None, :]
        total = bias[None, :] + tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * centre[None, :]
        total = _along(x, table, total, row, d, depth, height * width, channel, inside, 2, channels, HALF)
        total = _along(x, table, total, row, h, height, width, channel, inside, 2 + 2 * HALF, channels, HALF)
        total = _along(x, table, total, row, w, width, 1, channel, inside, 2 + 4 * HALF, channels, HALF)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)

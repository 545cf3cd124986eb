"""A chain of folded dense convolutions on a CPU, plane by plane.

Legend: C channels in, E channels out, D H W positions, R = (H + 2) (W + 2) rows of a plane with a frame of zeros.

Each convolution takes the newest plane, adds up one matrix product for each of its seven taps (the three branches'
centre taps are one), and hands the plane on. Only three planes of each layer exist at a time, so they stay in the cache
and nothing as large as the volume is ever allocated. Neighbours in a plane are rows a fixed number of rows away: at
the end of a line the frame is what is next.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Folded(NamedTuple):
    """A decomposed convolution whose batch norm is in its kernels.

    Attributes:
        weights: along height, width and depth, ``(E, C, k)`` each; C = 1 if depthwise. bias: ``(E)`` of the sum.
    """

    weights: tuple[Tensor, Tensor, Tensor]
    bias: Tensor


class PlaneConvolution:
    """A folded dense convolution of kernel 3 on planes of ``(height, width)`` positions."""

    def __init__(self, folded: Folded, height: int, width: int, dtype: torch.dtype) -> None:
        along_h, along_w, along_d = (weight.to(dtype).permute(2, 1, 0).contiguous() for weight in folded.weights)
        self.framed = (height + 2, width + 2)
        self.bias = folded.bias.to(dtype)
        self.centre = sum(weight[..., 1] for weight in folded.weights).T.to(dtype).contiguous()  # type: ignore[union-attr]
        self.before, self.behind = along_d[0], along_d[2]
        self.beside = [(-width - 2, along_h[0]), (width + 2, along_h[2]), (-1, along_w[0]), (1, along_w[2])]
        self.lines = slice(width + 2, (height + 1) * (width + 2))  # all but the frame's first and last

    def __call__(self, planes: tuple[Tensor | None, Tensor, Tensor | None], out: Tensor, edge: float) -> Tensor:
        """Planes before, at and behind a place, ``(R, C)``, to ``out`` ``(R, E)`` in a frame of ``edge``."""
        before, here, behind = planes
        begin, end = self.lines.start, self.lines.stop
        inner = out[self.lines]
        torch.addmm(self.bias, here[self.lines], self.centre, out=inner)
        for shift, weight in self.beside:
            inner.addmm_(here[begin + shift : end + shift], weight)
        for plane, weight in ((before, self.before), (behind, self.behind)):
            if plane is not None:
                inner.addmm_(plane[self.lines], weight)
        framed = out.view(*self.framed, -1)
        for axis in (0, 1):
            framed.select(axis, 0).fill_(edge)
            framed.select(axis, -1).fill_(edge)
        return out

    def run(self, planes: Iterator[Tensor], edge: float) -> Iterator[Tensor]:
        """All planes of a volume, in order. A plane is overwritten when three more have been asked for."""
        first = next(planes)
        buffers = cycle([first.new_empty(len(first), len(self.bias)) for _ in range(3)])
        before: Tensor | None = None
        here = first
        for behind in chain(planes, [None]):
            yield self((before, here, behind), next(buffers), edge)
            if behind is not None:
                before, here = here, behind


def convolved_and_pooled(x: Tensor, layers: Sequence[Folded]) -> Tensor:
    """Convolutions one after the other, then max pooling of kernel 3, stride 2 and padding 1; without gradients.

    Args:
        x: ``(B, D, H, W, C)``. layers: of kernel 3.

    Returns:
        ``(B, D / 2, H / 2, W / 2, E)``, halves rounded up.
    """
    _, _, height, width, channels = x.shape
    framed = F.pad(x, (0, 0, 1, 1, 1, 1)).flatten(2, 3)
    steps = [PlaneConvolution(layer, height, width, x.dtype) for layer in layers]
    volumes = []
    for volume in framed:
        planes = iter(volume)
        for step in steps:
            # Behind the last one comes the pooling, in which what is outside must not win.
            planes = step.run(planes, -torch.inf if step is steps[-1] else 0.0)
        volumes.append(torch.stack([_pool(plane, height, width) for plane in planes]))
    stacked = torch.stack(volumes).movedim(-1, 1)
    return F.max_pool3d(stacked, (3, 1, 1), (2, 1, 1), (1, 0, 0)).movedim(1, -1)


def _pool(plane: Tensor, height: int, width: int) -> Tensor:
    """In the plane: ``(R, C) -> (H / 2, W / 2, C)``; the frame is the padding."""
    framed = plane.view(1, height + 2, width + 2, -1).permute(0, 3, 1, 2)
    return F.max_pool2d(framed, 3, 2)[0].permute(1, 2, 0)

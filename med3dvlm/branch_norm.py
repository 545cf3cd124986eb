"""Three batch norms whose outputs are added, as one operation.

Legend: E channels, N rows (batch and positions).

In training each branch of a decomposed convolution is normalised by its own statistics. One module after the other
reads and writes the volume nine times; here it is read twice and written once, and a piece of it stays in the cache
while it is worked on. The statistics are taken in float32 at least, about each piece's own mean.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CACHED_NUMBERS = 2**16
"""Numbers of a piece."""


def uses_batch_statistics(norm: Any) -> bool:
    """Whether a batch norm would normalise by the batch it sees."""
    return bool(norm.training) or norm.running_mean is None


def widened(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def affine(norm: Any, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """What batch norm with these statistics multiplies by and adds, ``(E)`` each."""
    scale = (widened(variance) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * widened(norm.weight)
    shift = -widened(mean) * scale
    return scale, shift if norm.bias is None else shift + widened(norm.bias)


@torch.no_grad()
def update_running(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """What BatchNorm3d does to its buffers in a forward pass over ``count`` positions in training mode."""
    if not norm.training or norm.running_mean is None:
        return
    norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    unbiased = variance * (count / max(count - 1, 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)


def normalised_sum(outputs: Sequence[Tensor], norms: Sequence[nn.Module]) -> Tensor:
    """``sum of norm(output)`` over the branches, channels last.

    Other norms than BatchNorm3d (one that is synchronised between ranks, say) run as the modules they are, and so
    does everything on a GPU, where a batch norm is two kernels already.

    Args:
        outputs: ``(B, D, H, W, E)`` each.

    Raises:
        ValueError: one value per channel, of which there is no variance.
    """
    own = all(type(norm) is nn.BatchNorm3d and norm.affine and uses_batch_statistics(norm) for norm in norms)
    if not own or outputs[0].device.type != "cpu":
        parts = [_as_module(norm, y) for norm, y in zip(norms, outputs, strict=True)]
        return parts[0] + parts[1] + parts[2]
    rows = [y.reshape(-1, y.shape[-1]) for y in outputs]
    if len(rows[0]) == 1:
        raise ValueError("batch norm: one position in the whole batch has no variance; take more or larger volumes")
    statistics = [_statistics(x) for x in rows]
    for norm, (mean, variance) in zip(norms, statistics, strict=True):
        update_running(norm, mean, variance, len(rows[0]))
    parameters = [p for norm in norms for p in (norm.weight, norm.bias)]
    eps = tuple(norm.eps for norm in norms)
    return _NormalisedSum.apply(eps, statistics, *rows, *parameters).view(outputs[0].shape)


def _as_module(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def _pieces(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """``(N, E)`` each, a few rows at a time."""
    step = max(CACHED_NUMBERS // rows[0].shape[1], 1)
    return zip(*(x.split(step) for x in rows), strict=True)


@torch.no_grad()
def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each column."""
    means, squares, counts = [], [], []
    for (piece,) in _pieces(rows):
        piece = widened(piece)
        means.append(piece.mean(0))
        squares.append((piece - means[-1]).square_().sum(0))
        counts.append(len(piece))
    weight = torch.tensor(counts, dtype=means[0].dtype)[:, None] / len(rows)
    of_pieces = torch.stack(means)
    mean = (weight * of_pieces).sum(0)
    return mean, torch.stack(squares).sum(0) / len(rows) + (weight * (of_pieces - mean).square()).sum(0)


class _NormalisedSum(torch.autograd.Function):
    """``sum of (y - mean) / std * weight + bias`` over three branches; statistics depend on y."""

    @staticmethod
    def forward(ctx: Any, eps: tuple[float, ...], statistics: list[tuple[Tensor, Tensor]], *tensors: Tensor) -> Tensor:
        rows, weights, biases = tensors[:3], tensors[3::2], tensors[4::2]
        means = [mean for mean, _ in statistics]
        inverse = [(variance + e).rsqrt() for (_, variance), e in zip(statistics, eps, strict=True)]
        scales = [widened(w) * i for w, i in zip(weights, inverse, strict=True)]
        shift = torch.stack([widened(b) - m * s for b, m, s in zip(biases, means, scales, strict=True)]).sum(0)
        out = torch.empty_like(rows[0])
        for target, *parts in _pieces(out, *rows):
            total = torch.addcmul(shift, widened(parts[0]), scales[0])
            for part, scale in zip(parts[1:], scales[1:], strict=True):
                total.addcmul_(widened(part), scale)
            target.copy_(total)
        ctx.save_for_backward(*rows, *weights, *means, *inverse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        rows, weights, means, inverse = (saved[i : i + 3] for i in (0, 3, 6, 9))
        count = len(gradient)
        total = torch.zeros_like(means[0])
        dots = [torch.zeros_like(mean) for mean in means]
        for piece, *parts in _pieces(gradient, *rows):
            piece = widened(piece)
            total += piece.sum(0)
            for dot, part, mean in zip(dots, parts, means, strict=True):
                dot += (widened(part) - mean).mul_(piece).sum(0)
        results = []
        for y, weight, mean, inv, dot in zip(rows, weights, means, inverse, dots, strict=True):
            scale = widened(weight) * inv
            slope = scale * inv.square() * dot / count
            shift = slope * mean - scale * total / count
            out = torch.empty_like(y)
            for target, piece, part in _pieces(out, gradient, y):
                target.copy_(torch.addcmul(shift, widened(piece), scale).addcmul_(widened(part), -slope))
            results.append(out)
        of_weights = [(dot * inv).to(w.dtype) for dot, inv, w in zip(dots, inverse, weights, strict=True)]
        pairs = [(w, total.to(w.dtype)) for w in of_weights]
        return None, None, *results, *(x for pair in pairs for x in pair)

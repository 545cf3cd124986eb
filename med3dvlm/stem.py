"""DCFormer's stem, and fewer operations for it.

Legend: B batch, C width of the stem, D H W voxels, D' H' W' positions after the stem's stride, k kernel of the first
convolution, F = 3 k + 1 features.

The stem is four dense decomposed convolutions without an activation between them, and two thirds of DCFormer-S's
operations. Three things make it cheaper, and none changes what it computes:

- The first convolution sees one channel, so whatever its width, its output is a linear map of the 3 k voxels beside a
  position and of a one (:func:`voxel_lines`). The second convolution is applied to those F features with the product of
  both kernels, 22 channels instead of 64. The one is zero outside the volume, as the first convolution's output is,
  so borders are exact.
- In training the first batch norm needs mean and variance of that map: they follow from mean and covariance of the
  lines (:func:`line_statistics`), without its output.
- Where batch norm folds and no gradient is wanted, a CPU runs the rest plane by plane (:mod:`planes`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dvlm.branch_norm import affine, normalised_sum, update_running, uses_batch_statistics, widened
from med3dvlm.decomposed import BRANCHES, DecomposedConv3d, conv_view, summed, wants_gradient
from med3dvlm.planes import Folded, convolved_and_pooled
from med3dvlm.remembered import Remembered

POOL = (3, 2, 1)
"""Kernel, stride and padding of the pooling between stages."""


class Stem(nn.Sequential):
    """Kernel 7 with stride 4, then three of kernel 3: ``(B, 1, H, W, D) -> (B, C, H / 4, W / 4, D / 4)``."""

    def __init__(self, channels: int, width: int) -> None:
        first = DecomposedConv3d(channels, width, 7, stride=4)
        super().__init__(first, *(DecomposedConv3d(width, width, 3) for _ in range(3)))
        self._layers: Remembered[list[Folded]] = Remembered()

    @property
    def convolutions(self) -> list[DecomposedConv3d]:
        return list(self)  # type: ignore[arg-type]

    @property
    def merges(self) -> bool:
        """The first convolution has one input channel and batch norms whose statistics are those of this process."""
        first = self.convolutions[0]
        return first.branches()[0][0].in_channels == 1 and all(type(n) is nn.BatchNorm3d for _, n in first.branches())

    def channels_last(self, volume: Tensor) -> Tensor:
        """``(B, 1, D, H, W) -> (B, D', H', W', C)``, with gradients."""
        first, second, *rest = self.convolutions
        if self.merges:
            lines = voxel_lines(volume[:, 0], first.kernel, first.stride)
            x = _merged(first, second, lines)
        else:
            x = second.channels_last(first.channels_last(volume.movedim(1, -1)))
        for convolution in rest:
            x = convolution.channels_last(x)
        return x

    def pooled(self, volume: Tensor, form: str = "auto") -> Tensor:
        """Stem and the pooling behind it: ``(B, 1, D, H, W) -> (B, D'', H'', W'', C)``.

        Args:
            form: in eval mode without gradients, where batch norm is folded: ``planes`` (see that module) or ``views``;
                ``auto`` takes planes on a CPU, where they are measured to be faster.
        """
        folds = all(convolution.folds for convolution in self.convolutions)
        if not (self.merges and folds) or wants_gradient(self, volume):
            return max_pool(self.channels_last(volume))
        if torch.is_autocast_enabled(volume.device.type):
            volume = volume.to(torch.get_autocast_dtype(volume.device.type))  # products into a buffer do not cast
        first = self.convolutions[0]
        features = with_ones(voxel_lines(volume[:, 0], first.kernel, first.stride))
        layers = self._layers.get(self, self._fold)
        if form == "planes" or (form == "auto" and volume.device.type == "cpu"):
            return convolved_and_pooled(features, layers)
        return max_pool(folded_views(features, layers))

    def _fold(self) -> list[Folded]:
        """All convolutions, the first two as one."""
        first, second, *rest = (convolution.folded() for convolution in self.convolutions)
        return [Folded(_composed(second.weights, _line_map(first)), second.bias), *rest]


def folded_views(x: Tensor, layers: Sequence[Folded]) -> Tensor:
    """Dense convolutions one after the other, each branch a view: ``(B, D, H, W, C) -> (B, D, H, W, E)``."""
    for weights, bias in layers:
        branches = zip(weights, (bias, None, None), BRANCHES.values(), strict=True)
        x = summed([conv_view(x, *branch) for branch in branches])
    return x


def max_pool(x: Tensor) -> Tensor:
    """The pooling between stages on ``(B, D, H, W, C)``."""
    return F.max_pool3d(x.permute(0, 4, 1, 2, 3), *POOL).permute(0, 2, 3, 4, 1)


# --- the first two convolutions as one ----------------------------------------------------------------------------


def voxel_lines(volume: Tensor, kernel: int, stride: int) -> list[Tensor]:
    """Voxels along height, width and depth around every ``stride``-th one, ``(B, D', H', W', k)`` each.

    Args:
        volume: ``(B, D, H, W)``.
    """
    lines = []
    for axis in BRANCHES.values():
        thin = volume[tuple(slice(None, None, 1 if i in (0, axis) else stride) for i in range(4))]
        pad = [0] * 6
        pad[2 * (3 - axis)] = pad[2 * (3 - axis) + 1] = kernel // 2
        lines.append(F.pad(thin, pad).unfold(axis, kernel, stride))
    return lines


def with_ones(lines: Sequence[Tensor]) -> Tensor:
    """All features of a position: ``(B, D', H', W', 3 k + 1)``."""
    return torch.cat([*lines, torch.ones_like(lines[0][..., :1])], dim=-1)


def line_statistics(line: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``line @ weight.T`` over all positions, from those of the line.

    Args:
        line: ``(..., k)``. weight: ``(C, k)``.

    Returns:
        ``(C)`` each.
    """
    rows = widened(line).flatten(0, -2)
    mean = rows.mean(0)
    rows = rows - mean
    return weight @ mean, ((weight @ (rows.T @ rows / len(rows))) * weight).sum(1)


def _line_map(first: Folded) -> Tensor:
    """A folded first convolution as a map of the features: ``(C, F)``."""
    return torch.cat([*(weight[:, 0] for weight in first.weights), first.bias[:, None]], dim=1)


def _composed(weights: Sequence[Tensor], inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels ``(E, C, k)`` behind a map ``(C, F)``: ``(E, F, k)``."""
    with torch.autocast(inner.device.type, enabled=False):
        height, width, depth = (torch.einsum("eck,cf->efk", weight, inner) for weight in weights)
    return height, width, depth


def _merged(first: DecomposedConv3d, second: DecomposedConv3d, lines: Sequence[Tensor]) -> Tensor:
    """The first two convolutions with their batch norms, in training or eval mode: ``(B, D', H', W', C)``."""
    features = with_ones(lines)
    with torch.autocast(features.device.type, enabled=False):
        weights, offset = [], torch.zeros((), device=features.device)
        for (conv, norm), line in zip(first.branches(), lines, strict=True):
            weight = widened(conv.weight).flatten(1)
            bias = torch.zeros_like(weight[:, 0]) if conv.bias is None else widened(conv.bias)
            mean, variance = norm.running_mean, norm.running_var
            if uses_batch_statistics(norm):
                mean, variance = line_statistics(line, weight)
                mean = mean + bias
                update_running(norm, mean.detach(), variance.detach(), line[..., 0].numel())
            scale, shift = affine(norm, mean, variance)
            weights.append((weight * scale[:, None])[:, None])
            offset = offset + bias * scale + shift
        inner = _line_map(Folded((weights[0], weights[1], weights[2]), offset))
        if second.folds:
            folded = second.folded()
            kernels, biases = _composed(folded.weights, inner), [folded.bias, None, None]
        else:
            kernels = _composed([widened(conv.weight).flatten(2) for conv, _ in second.branches()], inner)
            biases = [conv.bias for conv, _ in second.branches()]
    outputs = [conv_view(features, *given) for given in zip(kernels, biases, BRANCHES.values(), strict=True)]
    return summed(outputs) if second.folds else normalised_sum(outputs, [norm for _, norm in second.branches()])

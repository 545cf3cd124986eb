"""The decomposed 3D convolution (Med3DVLM Eq. 1-4) and faster forms of it.

Legend: B batch, C channels in, E channels out, H W D axes (D H W where channels are last), k kernel, L an axis'
length, N positions B D H W.

Three 1-D convolutions run side by side along the axes of a volume, each has its own batch norm, and their outputs
are added. :meth:`DecomposedConv3d.forward` is that, written down with ``Conv3d``: the reference, forward and
backward. :meth:`DecomposedConv3d.channels_last` computes the same on ``(B, D, H, W, C)`` in one of several forms:

===========  ==============================================================================================
views        each branch as a ``Conv2d`` on a view of the volume with channels last: nothing is moved
banded       depthwise only: each branch as a batched product with a banded matrix, after moving channels first
fused        depthwise only, folded, without gradients, on a GPU with triton: one kernel for all branches
===========  ==============================================================================================

With ``auto``, :func:`choose` takes one by device and shape. Where batch norm uses its running statistics (eval mode)
it is a scale and a shift, and it is folded into the kernels, in every form. In training each branch keeps its own
statistics.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dvlm import decomposed_triton
from med3dvlm.branch_norm import affine, normalised_sum, uses_batch_statistics, widened
from med3dvlm.planes import Folded
from med3dvlm.remembered import Remembered

FORMS = ("auto", "plain", "views", "banded", "fused")
"""``plain`` is the reference; in ``channels_last`` it means the same as ``views``."""

BRANCHES = {"c1": 2, "c2": 3, "c3": 1}
"""The branches run along height, width and depth of ``(B, C, H, W, D)``; here: that axis of ``(B, D, H, W, C)``."""

LONGEST_BAND = 64
"""Of axes longer than this most of a banded matrix is zero."""


class DecomposedConv3d(nn.Module):
    """Convolutions along height, width and depth, each with a batch norm, added up (Med3DVLM Eq. 1-4).

    Parameter names are those of the published checkpoints: ``c1`` along height, ``c2`` along width, ``c3`` along
    depth of a tensor ``(B, C, H, W, D)``; in each 0 is the convolution and 1 the batch norm.

    Args:
        stride: on all three axes.
        depthwise: a kernel for each channel instead of one for all pairs.
        residual: add the input, as Eq. 4 has it and the published code does not.

    Raises:
        ValueError: a residual where the output has another shape.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int = 1,
        depthwise: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if residual and (channels_in != channels_out or stride != 1):
            raise ValueError("residual: input and output of a decomposed convolution must have the same shape")
        if kernel % 2 == 0:
            raise ValueError(f"kernels: {kernel} is even, a centred kernel is odd")
        self.kernel, self.stride, self.depthwise, self.residual = kernel, stride, depthwise, residual
        self.form = "auto"
        self._folded: Remembered[Folded] = Remembered()
        groups = channels_in if depthwise else 1
        for axis, name in enumerate(BRANCHES):
            size = tuple(kernel if i == axis else 1 for i in range(3))
            padding = tuple(n // 2 for n in size)
            conv = nn.Conv3d(channels_in, channels_out, size, stride, padding, groups=groups)  # type: ignore[arg-type]
            self.add_module(name, nn.Sequential(conv, nn.BatchNorm3d(channels_out)))

    def branches(self) -> list[tuple[nn.Conv3d, Any]]:
        """Convolution and batch norm of each branch, in the order of ``BRANCHES``."""
        return [(getattr(self, name)[0], getattr(self, name)[1]) for name in BRANCHES]

    def forward(self, x: Tensor) -> Tensor:
        """The reference: ``(B, C, H, W, D) -> (B, E, H', W', D')``."""
        out = summed([getattr(self, name)(x) for name in BRANCHES])
        return out + x if self.residual else out

    @property
    def folds(self) -> bool:
        """Batch norm uses its running statistics, so it can be part of the kernels."""
        return not any(uses_batch_statistics(norm) for _, norm in self.branches())

    def folded(self) -> Folded:
        """Kernels with batch norm in them, in float32 at least; gradients pass through them."""
        return self._folded.get(self, self._fold)

    def _fold(self) -> Folded:
        weights, bias = [], torch.zeros(())
        for conv, norm in self.branches():
            scale, shift = affine(norm, norm.running_mean, norm.running_var)
            weights.append(widened(conv.weight).flatten(2) * scale[:, None, None])
            offset = shift if conv.bias is None else widened(conv.bias) * scale + shift
            bias = offset if bias.ndim == 0 else bias + offset
        return Folded((weights[0], weights[1], weights[2]), bias)

    def channels_last(self, x: Tensor, form: str | None = None) -> Tensor:
        """The same with channels last: ``(B, D, H, W, C) -> (B, D', H', W', E)``.

        Args:
            form: one of ``FORMS``; by default the module's own.

        Raises:
            ValueError: a form that cannot compute this.
        """
        form = form or self.form
        if form == "auto":
            form = choose(self, x)
        self._check(form)
        if self.folds:
            folded = self.folded()
            if form == "fused":
                return decomposed_triton.depthwise(x, *folded, residual=self.residual)
            out = summed(self._convolve(x, folded.weights, [folded.bias, None, None], form))
        else:
            weights = [conv.weight.flatten(2) for conv, _ in self.branches()]
            outputs = self._convolve(x, weights, [conv.bias for conv, _ in self.branches()], form)
            out = normalised_sum(outputs, [norm for _, norm in self.branches()])
        return out + x if self.residual else out

    def _check(self, form: str) -> None:
        if form in ("banded", "fused") and (not self.depthwise or self.stride != 1):
            raise ValueError(f"form: {form} is for depthwise convolutions of stride 1; take views or auto")
        if form == "fused" and not (self.folds and decomposed_triton.available()):
            raise ValueError("form: fused needs triton and eval mode; take views, banded or auto")

    def _convolve(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], form: str
    ) -> list[Tensor]:
        """Output of each branch before batch norm, ``(B, D', H', W', E)`` in any memory order."""
        given = zip(weights, biases, BRANCHES.values(), strict=True)
        if form == "banded":
            return banded(x, list(given))
        groups = x.shape[-1] if self.depthwise else 1
        return [conv_view(x, weight, bias, axis, self.stride, groups) for weight, bias, axis in given]


def choose(module: DecomposedConv3d, x: Tensor) -> str:
    """The form for an input ``(B, D, H, W, C)``.

    On a CPU always views: oneDNN's depthwise kernels are fast where channels are last (measured by
    ``benchmarks/med3dvlm_encoder.py``). On a GPU the depthwise ones have one fused kernel where batch norm folds and no
    gradient is wanted, else banded products as long as the axes are short.
    """
    if x.device.type != "cuda" or not module.depthwise or module.stride != 1:
        return "views"
    if module.folds and not wants_gradient(module, x) and decomposed_triton.available():
        return "fused"
    return "banded" if max(x.shape[1:4]) <= LONGEST_BAND else "views"


def wants_gradient(module: nn.Module, x: Tensor) -> bool:
    """Whether a backward pass through ``module`` on ``x`` may follow."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def summed(parts: list[Tensor]) -> Tensor:
    """The three branches added up."""
    return parts[0] + parts[1] + parts[2]


# --- forms --------------------------------------------------------------------------------------------------------


def conv_view(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, stride: int = 1, groups: int = 1) -> Tensor:
    """A 1-D convolution along ``axis`` of ``(B, D, H, W, C)`` as a 2-D one with channels last.

    The axes on one side of the convolution's are the rows of an image, or they are images of their own: either way a
    contiguous volume is only looked at differently.

    Args:
        weight: ``(E, C / groups, k)``. stride: on all axes.

    Returns:
        ``(B, D', H', W', E)``.
    """
    if stride > 1:  # the other axes have a kernel of one, so their stride only leaves positions out
        x = x[tuple(slice(None, None, 1 if i in (0, axis, 4) else stride) for i in range(5))]
    batch, depth, height, width, channels = x.shape
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if axis == 1:
        image = (batch, depth, height * width)
    elif axis == 3 and groups > 1:  # oneDNN's gradient of a depthwise kernel is several times faster along columns
        image = (batch * depth * height, width, 1)
    else:
        image = (batch * depth, height, width)
    in_rows = axis == 3 and groups == 1
    out = F.conv2d(
        x.reshape(*image, channels).permute(0, 3, 1, 2),
        (weight[..., None, :] if in_rows else weight[..., None]).contiguous(),  # float64's backward pass insists
        bias,
        (1, stride) if in_rows else (stride, 1),
        (0, weight.shape[-1] // 2) if in_rows else (weight.shape[-1] // 2, 0),
        groups=groups,
    )
    shape = [batch, depth, height, width]
    shape[axis] = -(-shape[axis] // stride)
    return out.permute(0, 2, 3, 1).reshape(*shape, -1)


def band(weight: Tensor, length: int) -> Tensor:
    """Kernels ``(C, k)`` as the matrices ``(C, L, L)`` that convolve an axis of ``length`` padded with zeros."""
    kernel = weight.shape[-1]
    place = torch.arange(length, device=weight.device)
    tap = place[None, :] - place[:, None] + kernel // 2
    inside = (tap >= 0) & (tap < kernel)
    return torch.where(inside, weight[:, tap.clamp(0, kernel - 1)], 0)


def banded(x: Tensor, branches: Sequence[tuple[Tensor, Tensor | None, int]]) -> list[Tensor]:
    """Depthwise convolutions of ``(B, D, H, W, C)`` along each branch's axis as batched matrix products.

    Args:
        branches: weights ``(C, 1, k)``, biases, axes.
    """
    first = x.permute(0, 4, 1, 2, 3).contiguous()
    batch, channels, depth, height, width = first.shape
    outputs = []
    for weight, bias, axis in branches:
        matrix = band(weight[:, 0], x.shape[axis])
        if not torch.is_autocast_enabled(x.device.type):
            matrix = matrix.to(x.dtype)
        if axis == 1:
            out = torch.matmul(matrix, first.flatten(3))
        elif axis == 2:
            out = torch.matmul(matrix[:, None], first)
        else:
            out = torch.matmul(first.flatten(2, 3), matrix.transpose(1, 2))
        out = out.view(batch, channels, depth, height, width).permute(0, 2, 3, 4, 1)
        outputs.append(out if bias is None else out + bias.to(out.dtype))
    return outputs

"""Surrogate gradient propagation (Photon Sec. 3.3): dropping tokens with a gradient for their probabilities.

Legend: T tokens of the packed sequence before dropping, S after it, D width, R rows, N visual tokens of a row.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class SurrogateSettings:
    """Settings of Eq. 12-17; defaults are Photon A.2.1.

    Attributes:
        beta, eps_std, clip, s_min, s_max, eps_sat: as in the equations.
        importance: ``paper`` promotes tokens with a large eta (Eq. 12-14); ``removal`` reads A.1.4 strictly,
            where removing a token changes the loss by minus eta, and promotes those with a small one.
        statistics: means and deviations over the ``kept`` tokens (the paper's masked mean) or over ``all``
            visual tokens of the row, dropped ones counting as zero (published code).
        centre: subtract the row mean of the direction (published code).
    """

    beta: float = 0.8
    eps_std: float = 3e-3
    clip: float = 1.5
    s_min: float = 0.5
    s_max: float = 2.0
    eps_sat: float = 5e-3
    importance: Literal["paper", "removal"] = "paper"
    statistics: Literal["kept", "all"] = "kept"
    centre: bool = False


def masked_mean(x: Tensor, over: Tensor) -> Tensor:
    """Mean of ``x`` (R, N) over the True of ``over``: ``(R, 1)``; 0 where there is none."""
    return torch.where(over, x, 0).sum(1, keepdim=True) / over.sum(1, keepdim=True).clamp(min=1)


def surrogate_gradient(
    eta: Tensor,
    magnitude: Tensor,
    probability: Tensor,
    kept: Tensor,
    valid: Tensor,
    settings: SurrogateSettings,
) -> Tensor:
    """dL/dq of Eq. 13-17, with psi(z) = 0.5 + 0.5 tanh(z).

    Args:
        eta: ``(R, N)`` inner products of Eq. 12, 0 where a token was dropped.
        magnitude: ``(R, N)`` m of Eq. 15, likewise.
        probability: ``(R, N)`` q. kept: M. valid: False behind a row's end.

    Returns:
        ``(R, N)``, 0 where not valid.
    """
    over = kept if settings.statistics == "kept" else valid
    if settings.importance == "removal":
        eta = -eta
    mean = masked_mean(eta, over)
    std = masked_mean((eta - mean) ** 2, over).sqrt()
    z = ((eta - mean) / std.clamp(min=settings.eps_std)).clamp(-settings.clip, settings.clip)  # Eq. 13
    direction = 0.5 - (0.5 + 0.5 * z.tanh())  # Eq. 14
    if settings.centre:
        direction = direction - masked_mean(direction, valid)
    scale = (magnitude / (masked_mean(magnitude, over) + 1e-12)).clamp(settings.s_min, settings.s_max)  # Eq. 16
    slope = (probability * (1 - probability)).clamp(min=settings.eps_sat)
    return settings.beta * direction * scale * slope * valid  # Eq. 17


class DropTokens(torch.autograd.Function):
    """Select tokens; backward scatters their gradient to where they stood (Eq. 11) and gives q its surrogate.

    Eta depends on the scale of the loss, and eps_std (Eq. 13) is meant for a loss that is a mean over one
    sample's answer. A trainer divides by the tokens of the whole global batch instead, so ``sample_scale`` turns
    a row's gradient back into that of its own mean, and ``row_weight`` weighs the rows' surrogate gradients
    like every other mean over questions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        probability: Tensor,
        index: Tensor,
        cell: Tensor,
        kept: Tensor,
        valid: Tensor,
        sample_scale: Tensor,
        row_weight: float,
        settings: SurrogateSettings,
        at: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """``hidden[index]``: ``(T, D) -> (S, D)``.

        Args:
            hidden: ``(T, D)``. probability: ``(R, N)``. kept, valid: ``(R, N)`` bool.
            index: ``(S)`` which token comes next. cell: ``(S)`` its place in the flattened ``(R, N)``, -1 for text.
            sample_scale: ``(R)``. row_weight: weight of a row in the loss.
            at, share: where rows have tokens in common, ``cell`` has one entry for each row's token (C) instead;
                ``at`` (C) is where it stands in the result, and ``share`` (C) its part of that token's gradient.
        """
        ctx.save_for_backward(hidden, probability, index, cell, kept, valid, sample_scale, at, share)
        ctx.row_weight, ctx.settings = row_weight, settings
        return hidden[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, probability, index, cell, kept, valid, sample_scale, at, share = ctx.saved_tensors
        grad = grads[0]
        restored = torch.zeros_like(hidden).index_add_(0, index, grad) if ctx.needs_input_grad[0] else None  # Eq. 11
        if not ctx.needs_input_grad[1]:
            return restored, *[None] * 10
        product = hidden[index].float() * grad.float()
        sums = torch.stack([product.sum(1), product.abs().sum(1)])
        if at is not None:
            sums = sums[:, at] * share
        # Text tokens are added to one cell behind the table, which is cut off: no boolean index, no host sync.
        place = torch.where(cell < 0, kept.numel(), cell)
        table = product.new_zeros(2, kept.numel() + 1)
        table.index_add_(1, place, sums)
        eta, magnitude = table[:, :-1].unflatten(1, kept.shape) * sample_scale[:, None]  # Eq. 12, 15
        dq = surrogate_gradient(eta, magnitude, probability.float(), kept, valid, ctx.settings) * ctx.row_weight
        return restored, dq.to(probability.dtype), *[None] * 9

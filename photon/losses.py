"""Photon's training objective (Sec. 3.4): its four losses, and which of them a batch has.

Legend: A label tokens, V vocabulary, R rows (one question each).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from photon.perturbation import Perturbation, draw_kind

Combination = Literal["replace", "add"]
Loss = Literal["ce", "band", "robust", "flip"]


def band_loss(mean_probability: Tensor, low: float, high: float) -> Tensor:
    """Soft retention band (Photon Eq. 18), one value per row: ``(R) -> (R)``.

    Zero while r, the mean retention probability of a row's visual tokens, is within [``low``, ``high``]; the
    distance to the band outside.
    """
    return (mean_probability - high).clamp(min=0) + (low - mean_probability).clamp(min=0)


def entropy(logits: Tensor) -> Tensor:
    """H of Photon Eq. 19 in nats, one value per label token: ``(A, V) -> (A)``; the robustness loss is minus its mean.

    Computed in float32 (float64 stays float64), finite for any finite logits; a logit of minus infinity is a
    token that cannot come and adds nothing. The gradient can be taken once, not twice.

    Besides the logits nothing of size (A, V) outlives the forward pass, and neither pass has more than one such
    float32 tensor at a time, next to the gradient itself where that is in bfloat16: plain autograd would hold on
    to two.
    """
    return _Entropy.apply(logits)


class _Entropy(torch.autograd.Function):
    """Forward and backward make the probabilities anew, in one buffer, and turn that into what is asked for."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        p = _probabilities(logits)
        found = torch.special.entr(p, out=p).sum(-1)  # -p log p; 0 at p = 0
        ctx.save_for_backward(logits, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits, h = ctx.saved_tensors
        # dH/dlogit = -p (log p + H) = -p log q = -exp(-H) q log q with q = p exp(H): entr again, in one buffer.
        # exp(H) is at most V.
        q = _probabilities(logits).mul_(h.exp()[:, None])
        return torch.special.entr(q, out=q).mul_((grad * (-h).exp())[:, None]).to(logits.dtype)


def _probabilities(logits: Tensor) -> Tensor:
    """Softmax in at least float32, in one buffer: ``(A, V) -> (A, V)``."""
    p = logits.detach().to(_precise(logits.dtype), copy=True)
    p.sub_(p.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def flip_loss(token_losses: Tensor, eps: float = 1e-6) -> Tensor:
    """Flip regularizer (Photon Eq. 20), one value per label token: ``(A) -> (A)``.

    -log(1 - p + eps), where p = exp(-cross-entropy) is the label's probability under the flipped mask. The paper
    gives no value for eps; 1e-6 is the published one.

    1 - p is ``-expm1(-cross-entropy)``. Written as 1 - exp(...) it would be a difference of two numbers near 1
    for a confident model, off by up to 6e-8 in float32, 6 % of eps; expm1 adds no error there, and none at p near 0
    either. (The cross-entropy's own rounding near 0, 1e-7, stays.)

    Value and gradient are finite for every cross-entropy, infinity included: from -log(eps) with slope -1/eps at
    p = 1 to -log(1 + eps), about -eps, with slope 0 at p = 0. The steep end does not reach the logits: the
    cross-entropy's own slope there is 1 - p, and the product stays below 1, up to rounding.
    """
    # A fused cross-entropy can come out below 0 by rounding, and 1 - p + eps then below 0 too.
    surprise = token_losses.to(_precise(token_losses.dtype)).clamp(min=0)
    return -(eps - torch.expm1(-surprise)).log()


@dataclass(frozen=True)
class BatchKind:
    """What is done to a batch.

    Attributes:
        perturbation: how its volumes are spoilt (:mod:`photon.perturbation`); None: not at all.
        flip: whether the retention mask is inverted; never on a perturbed batch.
    """

    perturbation: Perturbation | None = None
    flip: bool = False


def draw_batch_kind(
    perturb_probability: float, flip_probability: float, flipping: bool, generator: torch.Generator
) -> BatchKind:
    """What to do to the next batch (published: 0.15 perturbed; of the others, 0.05 flipped).

    The same amount is drawn from ``generator`` whatever comes out, so the batches behind this one do not depend
    on its outcome nor on any of the arguments.

    Args:
        perturb_probability: of a perturbation.
        flip_probability: of a flip, given that the batch is not perturbed.
        flipping: False before the step from which masks are flipped.
        generator: on the CPU, or every call waits for the device.
    """
    draws = torch.rand(2, generator=generator, dtype=torch.float64, device=generator.device)
    perturbed, flip = (draws < draws.new_tensor([perturb_probability, flip_probability])).tolist()
    kind = draw_kind(generator)
    return BatchKind(perturbation=kind) if perturbed else BatchKind(flip=flip and flipping)


def loss_terms(kind: BatchKind, combination: Combination = "replace") -> tuple[Loss, ...]:
    """Which losses a batch of phase 2 has; the objective is their sum (Photon Eq. 21).

    A perturbed batch has the robustness loss alone (Sec. 3.4). Of the equation's "CE or band" the published code
    makes CE plus band, and so does this.

    Args:
        kind: what was done to the batch.
        combination: of a flipped batch. ``replace``: the flip loss alone (published code); ``add``: beside the
            losses of the same batch under its own mask (Eq. 21 as printed).
    """
    if kind.perturbation is not None:
        return ("robust",)
    if kind.flip and combination == "replace":
        return ("flip",)
    return ("ce", "band", "flip") if kind.flip else ("ce", "band")

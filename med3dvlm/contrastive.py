"""Contrastive losses over the batches of all ranks: SigLIP (Med3DVLM Eq. 5) and CLIP.

Legend: B pairs of this rank, N pairs of all ranks, P width of the features, K rows of another rank's at a time
(`chunk`), x images, y texts.

How the ranks exchange features. One rank after the other broadcasts its (B, 2P) of both kinds. Against K rows of them
at a time, a rank computes two blocks of logits, its images against those texts and its texts against those images.
So it holds (B, K) logits and never (N, N), and finds the whole gradient of its own features by itself: the pairs in
which x_i occurs are row i, those of y_j are column j. CLIP takes two rounds: first the log-sum-exp of the rows and
columns, which add up as the chunks come; then they travel with the features. All exchange is in the forward pass, the
backward pass multiplies what was found there. Ranks may have unequal numbers of pairs.

What a rank's term must be. `contrastive_sum` returns this rank's share of a SUM over pairs: added up over the ranks
and divided by N it is the loss of the global batch. For `mllm3d.training.recipe.Term` that is the `value`, `per` the
unit of which `counts` has B. The trainer multiplies it by ranks / N and DeepSpeed averages the ranks' gradients,
mean over ranks of (ranks / N) * g = sum of g / N, so the g of a rank has to be
- with respect to its own features: the gradient of the sum over ALL ranks of their shares, as the other ranks'
  shares depend on these features too and nobody else's graph leads to them;
- with respect to t_prime and bias, of which every rank has a copy: parts that add up to the whole over the ranks.
That is what the backward pass gives, provided every rank multiplies its share by the same number, as the trainer does.

Under gradient accumulation, negatives come from one micro-batch of all ranks, not from the whole optimizer step: the
step's loss is the mean over its micro-batches' losses, weighed by their pairs. Four micro-batches of 16 are not one of
64; for more negatives enlarge the micro-batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

Loss = Literal["siglip", "clip"]
Start = Literal["published", "original"]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of images, texts, t_prime and bias."""

STARTS: dict[str, tuple[float, float]] = {"published": (math.log(1 / 0.07), 0.0), "original": (math.log(10), -10.0)}
"""t_prime (the logarithm of the temperature t) and bias at the start: of Med3DVLM's code, and of the SigLIP paper."""


@dataclass(frozen=True)
class ContrastiveSettings:
    """Which loss, and how.

    Attributes:
        loss: ``siglip`` (Eq. 5, with labels +1 and -1) or ``clip`` (cross-entropy both ways, which has no bias).
        start: a key of ``STARTS``. CLIP's own temperature is the published one.
        symmetric: average the logits with their transpose before the log-sigmoid, as Med3DVLM's code does. SigLIP
            alone: Med3DVLM's CLIP loss does not.
        chunk: K. Logits take B * K numbers; the loss does not depend on it.
    """

    loss: Loss = "siglip"
    start: Start = "published"
    symmetric: bool = False
    chunk: int = 1024

    def __post_init__(self) -> None:
        for name, kind in (("loss", Loss), ("start", Start)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        if self.symmetric and self.loss == "clip":
            raise ValueError("symmetric: averages the logits of siglip; set it to false for clip")
        if self.chunk < 1:
            raise ValueError(f"chunk: {self.chunk} rows; give 1 or more")


def contrastive_sum(
    image: Tensor,
    text: Tensor,
    t_prime: Tensor,
    bias: Tensor | None,
    settings: ContrastiveSettings,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's share of the sum over all pairs; see the top of this file for what to do with it.

    Row i of ``image`` belongs to row i of ``text``; every other row, on every rank, is a negative. All ranks of the
    group have to call this together, the same number of times. Computed in float32 (float64 stays float64) whatever
    the dtypes and outside of autocast. The gradient can be taken once, not twice.

    Args:
        image: ``(B, P)`` normalised features; B may differ between the ranks and be 0.
        text: ``(B, P)`` alike.
        t_prime: scalar, the logarithm of the temperature.
        bias: scalar; None for CLIP.
        settings: the loss. group: the ranks that exchange; by default all of them.

    Raises:
        ValueError: the shapes do not fit, on this rank or to each other.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"images {tuple(image.shape)} and texts {tuple(text.shape)}: give one (pairs, width) for both")
    if (bias is None) != (settings.loss == "clip"):
        raise ValueError(f"bias: {settings.loss} has {'one' if bias is None else 'none'}")
    offset = t_prime.new_zeros(()) if bias is None else bias
    if settings.symmetric:
        # (x_i . y_j + x_j . y_i) / 2 is a product of longer vectors: the loss of these features is plain SigLIP.
        image, text = torch.cat([image, text], 1), torch.cat([text, image], 1) / 2
    learn = torch.is_grad_enabled() and any(given.requires_grad for given in (image, text, t_prime, offset))
    share: Tensor = _Share.apply(image, text, t_prime, offset, settings, group, learn)
    return share


class _Share(torch.autograd.Function):
    """Finds the gradients in the forward pass; the backward pass is left without exchange between ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        t_prime: Tensor,
        bias: Tensor,
        settings: ContrastiveSettings,
        group: dist.ProcessGroup | None,
        learn: bool,
    ) -> Tensor:
        given = (image, text, t_prime, bias)
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            x, y, log_t, b = (tensor.to(dtype) for tensor in given)
            ranks = _Ranks(x, learn, settings.chunk, group)
            t = log_t.exp()
            value, gradients = _clip(x, y, t, ranks) if settings.loss == "clip" else _siglip(x, y, t, b, ranks)
        ctx.dtypes = [tensor.dtype for tensor in given]
        if learn:
            ctx.save_for_backward(*(gradient.to(dtype) for gradient in gradients))
        return value.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [(gradient * grad).to(dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *found, None, None, None


@dataclass
class _Ranks:
    """The ranks' batches, and the exchange of rows between them.

    learn: whether any rank wants gradients; all of them then take part in what that needs.
    """

    features: Tensor
    learn: bool
    chunk: int
    group: dist.ProcessGroup | None
    own: int = 0
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows, width = self.features.shape
        self.rows = [rows]
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.group) == 1:
            return
        self.own = dist.get_rank(self.group)
        told = self.features.new_tensor([rows, width, self.features.element_size(), self.learn], dtype=torch.int64)
        heard = [torch.empty_like(told) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(heard, told, group=self.group)
        self.rows, widths, bytes_each, learning = map(list, zip(*(each.tolist() for each in heard), strict=True))
        if len(set(widths)) > 1 or len(set(bytes_each)) > 1:
            raise ValueError(f"the ranks' features differ: widths {widths}, bytes per number {bytes_each}")
        self.learn = any(learning)

    def each(self, own: Tensor) -> Iterator[tuple[Tensor, int | None]]:
        """Up to `chunk` rows at a time of what every rank has under `own` (its rows first, then some width).

        With each chunk comes the row of this rank's at which it begins, None if it is another rank's.
        """
        for rank, rows in enumerate(self.rows):
            mine = rank == self.own
            part = own if mine else own.new_empty(rows, own.shape[1])
            if len(self.rows) > 1 and rows:
                dist.broadcast(part, group=self.group, group_src=rank)
            for start in range(0, rows, self.chunk):
                yield part[start : start + self.chunk], start if mine else None


def _diagonal(block: Tensor, at: int | None) -> Tensor:
    """The pairs' own places in a ``(B, K)`` block whose columns begin at this rank's row ``at``: a view."""
    return block[:0, 0] if at is None else block.diagonal(-at)


def _siglip(x: Tensor, y: Tensor, t: Tensor, bias: Tensor, ranks: _Ranks) -> tuple[Tensor, Gradients]:
    """Sum over this rank's rows of -log sigmoid(z (t x_i . y_j + bias)), z = 1 for i = j and else -1."""
    value, bias_gradient = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)

    def negated(own: Tensor, other: Tensor, at: int | None) -> Tensor:
        """-z times the logits."""
        block = ((own * t) @ other.T).add_(bias)
        _diagonal(block, at).neg_()
        return block

    def slope(block: Tensor, at: int | None) -> Tensor:
        """The loss's derivative with respect to the logits, in place of ``block``."""
        block.sigmoid_()
        _diagonal(block, at).neg_()
        return block

    for chunk, at in ranks.each(torch.cat([x, y], 1)):
        chunk_x, chunk_y = chunk.split(x.shape[1], 1)
        block = negated(x, chunk_y, at)
        value -= logsigmoid(-block).sum(dtype=torch.float64)
        if ranks.learn:
            rows = slope(block, at)
            bias_gradient += rows.sum(dtype=torch.float64)
            dx.addmm_(rows, chunk_y)
            dy.addmm_(slope(negated(y, chunk_x, at), at), chunk_x)
    return value, (dx.mul_(t), dy.mul_(t), _temperature_gradient(x, dx), bias_gradient)


def _clip(x: Tensor, y: Tensor, t: Tensor, ranks: _Ranks) -> tuple[Tensor, Gradients]:
    """Half the sum over this rank's pairs of both cross-entropies, image to text and text to image.

    A pair's cross-entropy is log(1 + sum over the others of exp(s_ij - s_ii)). Taken in that way, and not as the
    difference of a log-sum-exp and s_ii, it is exact also where it is small.
    """
    scaled_x, scaled_y = x * t, y * t
    own = (scaled_x * y).sum(1, keepdim=True)
    others = [torch.full_like(own, -math.inf) for _ in range(2)]  # log-sum-exp along rows and columns

    def relative(logits: Tensor, to: Tensor, at: int | None) -> Tensor:
        """The other pairs' logits relative to `to`."""
        block = logits - to
        _diagonal(block, at).fill_(-math.inf)
        return block

    for chunk, at in ranks.each(torch.cat([x, y], 1)):
        chunk_x, chunk_y = chunk.split(x.shape[1], 1)
        for n, logits in enumerate((scaled_x @ chunk_y.T, scaled_y @ chunk_x.T)):
            others[n] = torch.logaddexp(others[n], relative(logits, own, at).logsumexp(1, keepdim=True))
    rows, columns = (-logsigmoid(-sums) for sums in others)
    value = (rows.sum(dtype=torch.float64) + columns.sum(dtype=torch.float64)) / 2
    pull = (torch.expm1(-rows) + torch.expm1(-columns)) / 2  # the mean of both softmaxes minus 1, for the pairs
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)

    def slope(logits: Tensor, mine: Tensor, theirs: Tensor, chunk_own: Tensor, at: int | None) -> Tensor:
        """The loss's derivative with respect to the logits: the mean of both softmaxes, minus 1 for the pairs."""
        block = relative(logits, own, at).sub_(mine).exp_()
        block += relative(logits, chunk_own.T, at).sub_(theirs.T).exp_()
        block /= 2
        if at is not None:
            _diagonal(block, at).copy_(pull[at : at + len(theirs), 0])
        return block

    if ranks.learn:
        for chunk, at in ranks.each(torch.cat([x, y, own, rows, columns], 1)):
            chunk_x, chunk_y, chunk_own, chunk_rows, chunk_columns = chunk.split([*[x.shape[1]] * 2, 1, 1, 1], 1)
            dx.addmm_(slope(scaled_x @ chunk_y.T, rows, chunk_columns, chunk_own, at), chunk_y)
            dy.addmm_(slope(scaled_y @ chunk_x.T, columns, chunk_rows, chunk_own, at), chunk_x)
    return value, (dx.mul_(t), dy.mul_(t), _temperature_gradient(x, dx), torch.zeros_like(t))


def _temperature_gradient(x: Tensor, dx: Tensor) -> Tensor:
    """With respect to t_prime: the sum over logits of slope * t x_i . y_j, which is that of x_i . dx_i."""
    return (x * dx).sum(dtype=torch.float64)

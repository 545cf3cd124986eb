"""Instruction-conditioned token scheduling (Photon Sec. 3.2): which visual tokens a question keeps.

Legend: R rows (one question each), N visual tokens, Q instruction tokens, H heads, J key-value heads,
E head width.

Saliency is linear in the keys (Eq. 5), so the instruction's queries are weighted and summed first and the keys
are read once: no (instruction x visual) matrix is made.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from photon.surrogate import SurrogateSettings, masked_mean

EPS = 1e-6
FEATURES = 12


LayerName = int | str
"""A decoder layer: its number, or a share of all layers as the paper writes it: ``n/4``, ``3n/4``."""


@dataclass(frozen=True)
class SchedulingSettings:
    """Settings of the scheduling layers; they are saved in config.json.

    Attributes:
        layers: decoder layers before tokens are dropped, once for each time (Photon Sec. A.2.1: a quarter of them).
            0 drops before the first layer, by that layer's own queries and keys.
        self_affinity: weigh instruction tokens by Eq. 3-4; else all alike (Table 4, without self-affinity).
        centrality_floor: Eq. 4 divides by no less than this; the paper says by the sum, the published code has 1.
        temperature: tau_ce of Eq. 8.
        threshold: this theta for every row instead of the predictor's (training-free).
        threshold_scale: the predictor's output is multiplied by it, so that the best token always stays.
        predictor_width: hidden units of the predictor; an eighth of the model's width if None.
        predictor_bias: start of the last bias; -5 keeps nearly everything at first.
        detach: saliency gets no gradient; the predictor still learns through the threshold.
        keep_ratio: keep this share of the tokens instead of using a threshold.
        selection: ``random`` keeps as many tokens as saliency would, but drawn at random (a control).
        upper_layers: ``own``: above the drop each row has its own kept tokens, as in the paper. ``union``: the rows of
            a volume share those that any of them keeps, and each reads its own; the same for one row.
        surrogate: settings of the backward pass (Eq. 12-17).
    """

    layers: tuple[LayerName, ...] = ("n/4",)
    self_affinity: bool = True
    centrality_floor: float = EPS
    temperature: float = 0.2
    threshold: float | None = None
    threshold_scale: float = 0.9
    predictor_width: int | None = None
    predictor_bias: float = -5.0
    detach: bool = True
    keep_ratio: float | None = None
    selection: Literal["saliency", "random"] = "saliency"
    upper_layers: Literal["own", "union"] = "own"
    surrogate: SurrogateSettings = SurrogateSettings()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SchedulingSettings":
        """From a config's mapping; an unknown key is a ``TypeError`` that names it."""
        values = dict(values)
        if "layers" in values:
            values["layers"] = tuple(values["layers"])
        return cls(surrogate=SurrogateSettings(**values.pop("surrogate", {})), **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json stores them."""
        return {**asdict(self), "layers": list(self.layers)}

    @property
    def predicts(self) -> bool:
        """Whether thresholds come from a predictor."""
        return self.keep_ratio is None and self.threshold is None


def layer_numbers(names: Sequence[LayerName], depth: int) -> tuple[int, ...]:
    """Layers out of ``depth`` by their numbers or shares, as numbers.

    Raises:
        ValueError: a name is neither, a layer is outside of the decoder, or they do not grow.
    """
    numbers = tuple(_layer_number(name, depth) for name in names)
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise ValueError(f"scheduling.layers: {list(names)} are layers {list(numbers)} of {depth}; they must grow")
    return numbers


def _layer_number(name: LayerName, depth: int) -> int:
    if isinstance(name, str):
        share = re.fullmatch(r"(\d*)n/(\d+)", name.replace(" ", ""))
        if share is None or int(share[2]) == 0:
            raise ValueError(f"scheduling.layers: {name!r} is neither a number nor a share such as n/4 or 3n/4")
        name = max(1, int(share[1] or 1) * depth // int(share[2]))
    if not 0 <= name < depth:
        raise ValueError(f"scheduling.layers: {name} is not in 0..{depth - 1}")
    return name


@dataclass
class Retention:
    """What was decided for each row. Rows of unequal N are padded behind their end.

    Attributes:
        valid: ``(R, N)`` bool, False behind a row's end and for tokens that an earlier layer dropped.
        saliency: ``(R, N)`` rho of Eq. 5, in [0, 1].
        threshold: ``(R)`` theta of Eq. 7.
        probability: ``(R, N)`` q of Eq. 8; carries the gradient.
        kept: ``(R, N)`` bool M of Eq. 9.
        asked: ``(R)`` bool, False where a row has no instruction, and so keeps everything.
        rescued: number of rows in which no token was above the threshold, so that the best one stayed.
    """

    valid: Tensor
    saliency: Tensor
    threshold: Tensor
    probability: Tensor
    kept: Tensor
    asked: Tensor
    rescued: Tensor

    def keep_rate(self) -> Tensor:
        """``(R)`` share of each row's visual tokens that stay."""
        return self.kept.sum(1) / self.valid.sum(1).clamp(min=1)

    def mean_probability(self) -> Tensor:
        """``(R)`` r of Eq. 18: the mean of q over a row's visual tokens."""
        return masked_mean(self.probability, self.valid)[:, 0]

    def flipped(self) -> Tensor:
        """``(R, N)`` the inverted mask of Eq. 20; at least the least probable token where all were kept.

        A row without instruction keeps everything here as well: nothing was chosen that could be inverted.
        """
        inverted = at_least_one(self.valid & ~self.kept, self.valid, -self.probability)
        return torch.where(self.asked[:, None], inverted, self.valid)


def instruction_weights(
    query: Tensor, key: Tensor, present: Tensor, self_affinity: bool = True, floor: float = EPS
) -> Tensor:
    """How central each instruction token is among the others (Photon Eq. 3-4).

    Args:
        query: ``(R, Q, H, E)`` after RoPE. key: ``(R, Q, J, E)``. present: ``(R, Q)`` bool.
        self_affinity: False weighs all present tokens alike. floor: Eq. 4 divides by no less.

    Returns:
        ``(R, Q)`` weights that sum to 1 over the present tokens (to less under a higher floor); uniform where no
        token is drawn to another (a single token, or none but negative affinities), zero in a row without
        instruction.
    """
    uniform = present / present.sum(1, keepdim=True).clamp(min=1)
    if not self_affinity:
        return uniform
    groups = query.shape[2] // key.shape[2]
    query = query.unflatten(2, (key.shape[2], groups))
    # The affinity is the mean over heads; heads that share a key are summed first.
    affinity = torch.einsum("rqje,rpje->rqp", query.sum(3), key) / (key.shape[2] * groups)
    affinity = (affinity * query.shape[-1] ** -0.5).clamp(min=0)
    others = (
        present[:, :, None] & present[:, None] & ~torch.eye(present.shape[1], dtype=torch.bool, device=query.device)
    )
    centrality = (affinity * others).sum(-1)
    total = centrality.sum(1, keepdim=True)
    return torch.where(total > EPS, centrality / total.clamp(min=floor), uniform)


def weighted_query(query: Tensor, weights: Tensor, key_heads: int) -> Tensor:
    """One query per key-value head that stands for the whole instruction: ``(R, J, E)``.

    ``u_j = <weighted_query, k_j>`` summed over heads is Eq. 5's head-averaged logit.

    Args:
        query: ``(R, Q, H, E)``. weights: ``(R, Q)``.
    """
    heads, width = query.shape[2:]
    summed = torch.einsum("rq,rqhe->rhe", weights, query).unflatten(1, (key_heads, heads // key_heads)).sum(2)
    return summed * (width**-0.5 / heads)


def saliency_logits(query: Tensor, key: Tensor) -> Tensor:
    """u of Eq. 5 for all questions of one volume: ``(R, J, E) x (J, N, E) -> (R, N)``."""
    return query.flatten(1) @ key.transpose(0, 1).flatten(1).T


def _range(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest valid entry of each row, ``(R, 1)`` each; 0 in a row without any."""
    some = valid.any(1, keepdim=True)
    low = x.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return torch.where(some, low, 0), torch.where(some, high, 0)


def normalise(logits: Tensor, valid: Tensor) -> Tensor:
    """Min-max over each row's tokens (Eq. 5, A.1.2): ``(R, N)`` in [0, 1], 0 where not valid."""
    low, high = _range(logits, valid)
    return torch.where(valid, (logits - low) / (high - low + EPS), 0)


def threshold_features(saliency: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    """The 12 statistics of Eq. 6 and A.1.2: ``(R, N), (R, N) -> (R, 12)``.

    Six of rho (mean, deviation, minimum, maximum, lower quartile, median), four of u (mean, deviation, minimum,
    maximum), two of sign(u) log(1 + |u|) (mean, maximum). Deviations are the population's. All are 0 in a row
    without visual tokens.
    """

    def spread(x: Tensor) -> list[Tensor]:
        mean = masked_mean(x, valid)
        # The floor keeps the root's gradient finite where all tokens are alike.
        variance = masked_mean((x - mean) ** 2, valid)
        return [mean, variance.clamp(min=1e-20).sqrt(), *_range(x, valid)]

    points = saliency.new_tensor([0.25, 0.5])
    counted = valid | ~valid.any(1, keepdim=True)  # a row of nothing but nan would have a nan gradient
    quartile, median = torch.where(counted, saliency, torch.nan).nanquantile(points, dim=1)[:, :, None]
    compressed = logits.sign() * logits.abs().log1p()
    columns = [
        *spread(saliency),
        quartile,
        median,
        *spread(logits),
        masked_mean(compressed, valid),
        _range(compressed, valid)[1],
    ]
    return torch.cat(columns, dim=1)


class PredictorLinear(nn.Linear):
    """A layer of the threshold predictor with its own start: xavier-uniform weights and a constant bias.

    It is a class of its own because transformers visits the modules that hold parameters, one by one.
    """

    def __init__(self, inputs: int, outputs: int, first_bias: float) -> None:
        self.first_bias = first_bias
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        init.xavier_uniform_(self.weight)
        init.constant_(self.bias, self.first_bias)


class ThresholdPredictor(nn.Module):
    """theta from the 12 statistics (Photon Eq. 7), scaled: ``(R, 12) -> (R)`` in (0, ``scale``).

    ``bias`` is where the output's bias starts.
    """

    def __init__(self, width: int, scale: float, bias: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(PredictorLinear(FEATURES, width, 0.0), nn.GELU(), PredictorLinear(width, 1, bias))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        return self.mlp(features.to(first.weight.dtype))[:, 0].float().sigmoid() * self.scale


def retention_probability(saliency: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """q of Eq. 8: ``(R, N), (R) -> (R, N)``."""
    return ((saliency - threshold[:, None]) / temperature).sigmoid()


def at_least_one(kept: Tensor, valid: Tensor, score: Tensor) -> Tensor:
    """``kept``, and the valid token of the highest ``score`` in a row that would keep none: ``(R, N)`` bool."""
    best = F.one_hot(score.masked_fill(~valid, -torch.inf).argmax(1), score.shape[1]).bool()
    return kept | (best & valid & ~kept.any(1, keepdim=True))


def keep_best(score: Tensor, counts: Tensor, valid: Tensor) -> Tensor:
    """The ``counts`` (R) highest valid ``score`` (R, N) of each row, as bool; ties go to the earlier token."""
    order = score.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return (ranks < counts[:, None]) & valid


def random_scores(seeds: Tensor, tokens: int) -> Tensor:
    """Scores that rank tokens at random, ``(R) -> (R, tokens)``; a row's depend on its seed alone."""
    rows = [torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(rows).to(seeds.device)


@dataclass(frozen=True)
class Chance:
    """What is drawn at random in a decision, for each row on its own.

    Attributes:
        seeds: ``(R)``. random: keep as many tokens as saliency would, but drawn at random.
        threshold_noise: thresholds are multiplied by 1 + x, x uniform in [-threshold_noise, threshold_noise]
            (Photon A.2.7).
    """

    seeds: Tensor
    random: bool = True
    threshold_noise: float = 0.0

    def noisy(self, threshold: Tensor) -> Tensor:
        """Thresholds ``(R)`` with their noise."""
        if not self.threshold_noise:
            return threshold
        # The other end of the seeds: tokens drawn from the same seed stay independent of it.
        draws = random_scores(self.seeds + (1 << 40), 1)[:, 0].to(threshold)
        return threshold * (1 + self.threshold_noise * (2 * draws - 1))


def decide(
    logits: Tensor,
    valid: Tensor,
    asked: Tensor,
    predictor: ThresholdPredictor | None,
    settings: SchedulingSettings,
    chance: Chance | None = None,
) -> Retention:
    """Eq. 5-9.

    Args:
        logits: ``(R, N)`` u of Eq. 5. valid: ``(R, N)`` bool, which of them are visual tokens of the row.
        asked: ``(R)`` bool, False where a row has no instruction: without one there is nothing to choose by, and
            every token stays.
        predictor: threshold predictor, where ``settings`` neither fix the ratio nor the threshold.
        chance: what is drawn at random, if anything is.
    """
    saliency = normalise(logits, valid)
    if settings.keep_ratio is not None:
        counts = (settings.keep_ratio * valid.sum(1).double()).round().long().clamp(min=1)
        above = keep_best(saliency, counts, valid)
        threshold = torch.where(above, saliency, 2.0).amin(1)
    elif settings.threshold is not None:
        threshold = torch.full_like(logits[:, 0], settings.threshold)
    else:
        if predictor is None:
            raise ValueError("scheduling: neither a threshold predictor nor threshold or keep_ratio is given")
        threshold = predictor(threshold_features(saliency, logits, valid))
    if chance is not None:
        threshold = chance.noisy(threshold)
    probability = retention_probability(saliency, threshold, settings.temperature)
    if settings.keep_ratio is None:
        above = (probability > 0.5) & valid  # Eq. 9
    kept = at_least_one(above, valid, probability)
    if chance is not None and chance.random:
        kept = keep_best(random_scores(chance.seeds, logits.shape[1]), kept.sum(1), valid)
    rescued = (valid.any(1) & asked & ~above.any(1)).sum()
    kept = torch.where(asked[:, None], kept, valid)
    probability = torch.where(asked[:, None], probability, probability.detach())  # it decided nothing
    return Retention(valid, saliency, threshold, probability, kept, asked, rescued)

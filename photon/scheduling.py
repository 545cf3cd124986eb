"""Instruction-conditioned token scheduling (Photon Sec. 3.2): which visual tokens a question keeps.

Legend: R rows (one question each), N visual tokens, Q instruction tokens, H heads, J key-value heads,
E head width.

Saliency is linear in the keys (Eq. 5), so the instruction's queries are weighted and summed first and the keys
are read once: no (instruction x visual) matrix is made.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from photon.surrogate import SurrogateSettings

EPS = 1e-6
FEATURES = 12


@dataclass(frozen=True)
class SchedulingSettings:
    """Settings of the scheduling layer; they are saved in config.json.

    Attributes:
        layer: decoder layers before tokens are dropped; a quarter of them if None (Photon Sec. A.2.1).
        temperature: tau_ce of Eq. 8.
        threshold_scale: the predictor's output is multiplied by it, so that the best token always stays.
        predictor_width: hidden units of the predictor; an eighth of the model's width if None.
        predictor_bias: start of the last bias; -5 keeps nearly everything at first.
        detach: saliency gets no gradient; the predictor still learns through the threshold.
        keep_ratio: keep this share of the tokens instead of using the predictor.
        surrogate: settings of the backward pass (Eq. 12-17).
    """

    layer: int | None = None
    temperature: float = 0.2
    threshold_scale: float = 0.9
    predictor_width: int | None = None
    predictor_bias: float = -5.0
    detach: bool = True
    keep_ratio: float | None = None
    surrogate: SurrogateSettings = SurrogateSettings()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SchedulingSettings":
        """From a config's mapping; an unknown key is a ``TypeError`` that names it."""
        values = dict(values)
        return cls(surrogate=SurrogateSettings(**values.pop("surrogate", {})), **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json stores them."""
        return asdict(self)


@dataclass
class Retention:
    """What was decided for each row. Rows of unequal N are padded behind their end.

    Attributes:
        valid: ``(R, N)`` bool, False behind a row's end.
        saliency: ``(R, N)`` rho of Eq. 5, in [0, 1].
        threshold: ``(R)`` theta of Eq. 7.
        probability: ``(R, N)`` q of Eq. 8; carries the gradient.
        kept: ``(R, N)`` bool M of Eq. 9.
    """

    valid: Tensor
    saliency: Tensor
    threshold: Tensor
    probability: Tensor
    kept: Tensor

    def keep_rate(self) -> Tensor:
        """``(R)`` share of each row's visual tokens that stay."""
        return self.kept.sum(1) / self.valid.sum(1).clamp(min=1)

    def mean_probability(self) -> Tensor:
        """``(R)`` r of Eq. 18: the mean of q over a row's visual tokens."""
        return (self.probability * self.valid).sum(1) / self.valid.sum(1).clamp(min=1)


def instruction_weights(query: Tensor, key: Tensor, present: Tensor) -> Tensor:
    """How central each instruction token is among the others (Photon Eq. 3-4).

    Args:
        query: ``(R, Q, H, E)`` after RoPE. key: ``(R, Q, J, E)``. present: ``(R, Q)`` bool.

    Returns:
        ``(R, Q)`` weights that sum to 1 over the present tokens; uniform where no token is drawn to another
        (a single token, or none but negative affinities), zero in a row without instruction.
    """
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
    uniform = present / present.sum(1, keepdim=True).clamp(min=1)
    return torch.where(total > EPS, centrality / total.clamp(min=EPS), uniform)


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


def normalise(logits: Tensor) -> Tensor:
    """Min-max over each row's tokens (Eq. 5, A.1.2): ``(R, N)`` in [0, 1]."""
    low, high = logits.amin(1, keepdim=True), logits.amax(1, keepdim=True)
    return (logits - low) / (high - low + EPS)


def threshold_features(saliency: Tensor, logits: Tensor) -> Tensor:
    """The 12 statistics of Eq. 6 and A.1.2: ``(R, N), (R, N) -> (R, 12)``.

    Six of rho (mean, deviation, minimum, maximum, lower quartile, median), four of u (mean, deviation, minimum,
    maximum), two of sign(u) log(1 + |u|) (mean, maximum). Deviations are the population's.
    """

    def spread(x: Tensor) -> list[Tensor]:
        return [x.mean(1), x.std(1, unbiased=False), x.amin(1), x.amax(1)]

    levels = torch.quantile(saliency, saliency.new_tensor([0.25, 0.5]), dim=1)
    compressed = logits.sign() * logits.abs().log1p()
    columns = [
        *spread(saliency),
        levels[0],
        levels[1],
        *spread(logits),
        compressed.mean(1),
        compressed.amax(1),
    ]
    return torch.stack(columns, dim=1)


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


def keep_mask(probability: Tensor) -> Tensor:
    """M of Eq. 9, with at least the most probable token of each row kept: ``(R, N)`` bool."""
    best = F.one_hot(probability.argmax(1), probability.shape[1]).bool()
    return (probability > 0.5) | best


def keep_best(score: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` (R) highest ``score`` (R, N) of each row, as ``(R, N)`` bool; ties go to the earlier token."""
    order = score.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return ranks < counts[:, None]


def random_scores(seeds: Tensor, tokens: int) -> Tensor:
    """Scores that rank tokens at random, ``(R) -> (R, tokens)``; a row's depend on its seed alone."""
    rows = [torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(rows).to(seeds.device)


def decide(
    logits: Tensor,
    asked: Tensor,
    predictor: ThresholdPredictor | None,
    settings: SchedulingSettings,
    random_seeds: Tensor | None = None,
) -> Retention:
    """Eq. 5-9 for rows with the same number of visual tokens.

    Args:
        logits: ``(R, N)`` u of Eq. 5. asked: ``(R)`` bool, False where a row has no instruction: without one
            there is nothing to choose by, and every token stays.
        predictor: threshold predictor; may be None when ``settings.keep_ratio`` is set.
        random_seeds: ``(R)``; when given, as many tokens as saliency would keep are drawn at random (a control).
    """
    saliency = normalise(logits)
    if settings.keep_ratio is not None:
        count = max(1, round(settings.keep_ratio * logits.shape[1]))
        kept = keep_best(saliency, torch.full_like(asked, count, dtype=torch.long))
        threshold = torch.where(kept, saliency, saliency.new_tensor(2.0)).amin(1)
        probability = retention_probability(saliency, threshold, settings.temperature)
    else:
        if predictor is None:
            raise ValueError("scheduling: neither a threshold predictor nor keep_ratio is given")
        threshold = predictor(threshold_features(saliency, logits))
        probability = retention_probability(saliency, threshold, settings.temperature)
        kept = keep_mask(probability)
    if random_seeds is not None:
        kept = keep_best(random_scores(random_seeds, logits.shape[1]), kept.sum(1))
    kept = kept | ~asked[:, None]
    return Retention(torch.ones_like(kept), saliency, threshold, probability, kept)


def join(parts: list[Retention]) -> Retention:
    """Rows of groups with different numbers of visual tokens as one, padded behind their ends."""
    if len(parts) == 1:
        return parts[0]
    width = max(p.kept.shape[1] for p in parts)

    def stack(name: str) -> Tensor:
        return torch.cat([F.pad(getattr(p, name), (0, width - p.kept.shape[1])) for p in parts])

    return Retention(
        valid=stack("valid"),
        saliency=stack("saliency"),
        threshold=torch.cat([p.threshold for p in parts]),
        probability=stack("probability"),
        kept=stack("kept"),
    )

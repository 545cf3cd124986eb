"""Photon Eq. 3-10 and A.1.2, written plainly from the paper in float64, against the vectorised code."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.scheduling import (
    Chance,
    SchedulingSettings,
    ThresholdPredictor,
    decide,
    instruction_weights,
    keep_best,
    normalise,
    retention_probability,
    saliency_logits,
    threshold_features,
    weighted_query,
)


def plain_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Eq. 3-4 for q (Q, H, E), k (Q, J, E); the affinity is the mean over heads."""
    tokens, heads, width = q.shape
    share = heads // k.shape[1]
    c = np.zeros(tokens)
    for t in range(tokens):
        for u in range(tokens):
            if t != u:
                affinity = np.mean([q[t, h] @ k[u, h // share] / math.sqrt(width) for h in range(heads)])
                c[t] += max(affinity, 0.0)
    return c / c.sum() if c.sum() > 1e-6 else np.full(tokens, 1 / tokens)


def plain_logits(q: np.ndarray, k: np.ndarray, w: np.ndarray) -> np.ndarray:
    """u of Eq. 5 for q (Q, H, E) and visual keys k (N, J, E): the full (instruction x visual) matrix."""
    heads, width = q.shape[1:]
    share = heads // k.shape[1]
    return np.array(
        [
            sum(
                w[t] * np.mean([q[t, h] @ key[h // share] / math.sqrt(width) for h in range(heads)])
                for t in range(len(q))
            )
            for key in k
        ]
    )


def plain_features(rho: np.ndarray, u: np.ndarray) -> np.ndarray:
    """z of Eq. 6."""
    psi = [rho.mean(), rho.std(), rho.min(), rho.max(), np.quantile(rho, 0.25), np.median(rho)]
    phi = [u.mean(), u.std(), u.min(), u.max()]
    slog = np.sign(u) * np.log(1 + np.abs(u))
    return np.array([*psi, *phi, slog.mean(), slog.max()])


RELATIVE = 1e-5
"""To which saliency equals the plain formula, in float64: products of random numbers cancel, in float32 to less."""


@given(seed=st.integers(0, 10_000), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]), tokens=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_saliency_is_the_papers(seed: int, heads: tuple[int, int], tokens: int) -> None:
    rng = np.random.default_rng(seed)
    width, visual = 8, 11
    q = rng.normal(size=(tokens, heads[0], width))
    k = rng.normal(size=(tokens, heads[1], width))
    kv = rng.normal(size=(visual, heads[1], width))
    w = plain_weights(q, k)
    u = plain_logits(q, kv, w)

    # Two rows, the second padded, so that padding is tested too.
    pad = ((0, 2), (0, 0), (0, 0))
    query = torch.tensor(np.stack([np.pad(q, pad, constant_values=9.0)] * 2))
    key = torch.tensor(np.stack([np.pad(k, pad, constant_values=9.0)] * 2))
    keys = torch.tensor(kv).transpose(0, 1)
    present = torch.arange(tokens + 2) < tokens
    weights = instruction_weights(query, key, present.expand(2, -1))
    np.testing.assert_allclose(weights[1, :tokens], w, rtol=RELATIVE)
    assert torch.all(weights[:, tokens:] == 0)
    logits = saliency_logits(weighted_query(query, weights, heads[1]), keys)
    np.testing.assert_allclose(logits, np.stack([u, u]), rtol=RELATIVE)
    # As models compute it. What float32 rounds is relative to the products that are summed: they can cancel.
    single = saliency_logits(weighted_query(query.float(), weights.float(), heads[1]), keys.float())
    np.testing.assert_allclose(single[0], u, rtol=0, atol=RELATIVE * plain_logits(abs(q), abs(kv), w).max())

    rho = (u - u.min()) / (u.max() - u.min() + 1e-6)
    valid = torch.arange(visual + 3) < visual  # three places behind the row's end, which must not count
    padded = torch.nn.functional.pad(logits, (0, 3), value=99.0)
    found = normalise(padded, valid.expand(2, -1))
    np.testing.assert_allclose(found[0, :visual], rho, rtol=RELATIVE)
    assert not found[:, visual:].any()
    features = threshold_features(*(torch.tensor(np.pad(x, (0, 3)))[None] for x in (rho, u)), valid[None])
    np.testing.assert_allclose(features[0], plain_features(rho, u), atol=1e-9)


def test_without_self_affinity_all_instruction_tokens_weigh_alike() -> None:
    present = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    query = torch.randn(3, 3, 2, 4)
    found = instruction_weights(query, query, present, self_affinity=False)
    assert found.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]


def test_the_published_weights_divide_by_one_at_least() -> None:
    torch.manual_seed(0)
    query, present = torch.randn(1, 4, 2, 8) / 20, torch.ones(1, 4, dtype=torch.bool)
    weights = instruction_weights(query, query, present)
    floored = instruction_weights(query, query, present, floor=1.0)
    assert weights.sum().item() == pytest.approx(1)
    total = floored.sum().item()  # here the centralities themselves
    assert 0 < total < 1
    torch.testing.assert_close(floored, weights * total)


def everything(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens are there, all rows have a question."""
    return torch.ones_like(u, dtype=torch.bool), torch.ones(len(u), dtype=torch.bool)


def test_threshold_and_mask_are_the_papers() -> None:
    torch.manual_seed(1)
    predictor = ThresholdPredictor(6, 0.9, 0.3)
    u = torch.randn(5, 13, dtype=torch.float64)
    found = decide(u.float(), *everything(u), predictor, SchedulingSettings(temperature=0.2))
    weights = {n: p.detach().double().numpy() for n, p in predictor.named_parameters()}
    for row in range(5):
        d = u[row].numpy()
        rho = (d - d.min()) / (d.max() - d.min() + 1e-6)
        z = plain_features(rho, d)
        hidden = weights["mlp.0.weight"] @ z + weights["mlp.0.bias"]
        gelu = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
        raw = float((weights["mlp.2.weight"] @ gelu + weights["mlp.2.bias"])[0])
        theta = 0.9 / (1 + math.exp(-raw))  # Eq. 7, scaled
        q = 1 / (1 + np.exp(-(rho - theta) / 0.2))  # Eq. 8
        assert found.threshold[row].item() == pytest.approx(theta, abs=1e-5)
        np.testing.assert_allclose(found.probability[row].detach(), q, atol=1e-5)
        assert found.kept[row].tolist() == (q > 0.5).tolist()  # Eq. 9
        assert found.mean_probability()[row].item() == pytest.approx(q.mean(), abs=1e-5)


def test_the_predictor_starts_near_keeping_everything() -> None:
    predictor = ThresholdPredictor(8, 0.9, -5.0)
    u = torch.linspace(-1, 1, 101)[None]
    found = decide(u, *everything(u), predictor, SchedulingSettings())
    assert found.keep_rate().item() > 0.9


def test_one_token_is_always_kept() -> None:
    predictor = ThresholdPredictor(8, 5.0, 5.0)  # a threshold far above every saliency
    u = torch.randn(3, 20)
    found = decide(u, *everything(u), predictor, SchedulingSettings())
    assert found.kept.sum(1).tolist() == [1, 1, 1]
    assert found.rescued.item() == 3


def test_a_fixed_threshold_needs_no_predictor() -> None:
    u = torch.linspace(0, 1, 11)[None]
    found = decide(u, *everything(u), None, SchedulingSettings(threshold=0.55))
    assert found.kept[0].tolist() == [False] * 6 + [True] * 5
    assert found.rescued.item() == 0


def test_noise_multiplies_each_threshold_within_its_bounds() -> None:
    u = torch.linspace(0, 1, 11).expand(400, -1)
    chance = Chance(torch.arange(400), random=False, threshold_noise=0.1)
    factors = decide(u, *everything(u), None, SchedulingSettings(threshold=0.5), chance).threshold / 0.5
    assert 0.9 <= factors.min() < 0.92 and 1.08 < factors.max() <= 1.1
    assert factors.mean().item() == pytest.approx(1, abs=0.01)  # five times the deviation of this mean, 0.003
    alone = Chance(torch.tensor([7]), random=False, threshold_noise=0.1)
    again = decide(u[:1], *everything(u[:1]), None, SchedulingSettings(threshold=0.5), alone).threshold / 0.5
    assert again.item() == factors[7].item()  # a row's noise is its own


def test_what_an_earlier_layer_dropped_stays_dropped() -> None:
    u = torch.tensor([[0.9, 0.1, 0.5, 0.4], [0.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[False, True, True, True], [False, False, False, False]])
    found = decide(u, valid, torch.ones(2, dtype=torch.bool), None, SchedulingSettings(threshold=0.5))
    assert found.kept.tolist() == [[False, False, True, True], [False] * 4]
    assert found.saliency[0].tolist() == pytest.approx([0, 0, 1, 0.75], abs=1e-5)  # min-max of the three
    flipped = found.flipped()
    assert flipped.tolist() == [[False, True, False, False], [False] * 4]


def test_features_of_a_row_without_tokens_have_finite_gradients() -> None:
    u = torch.tensor([[0.0, 0.0], [0.3, 0.3]], requires_grad=True)
    valid = torch.tensor([[False, False], [True, True]])
    threshold_features(normalise(u, valid), u, valid).sum().backward()
    assert u.grad is not None and u.grad.isfinite().all()


@given(ratio=st.floats(0.01, 1.0), tokens=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_a_fixed_ratio_keeps_the_most_salient(ratio: float, tokens: int) -> None:
    u = torch.randn(2, tokens)
    found = decide(u, *everything(u), None, SchedulingSettings(keep_ratio=ratio))
    count = max(1, round(ratio * tokens))
    assert found.kept.sum(1).tolist() == [count, count]
    for row in range(2):
        kept, rest = u[row][found.kept[row]], u[row][~found.kept[row]]
        assert len(rest) == 0 or kept.min() >= rest.max()


def test_ties_go_to_the_earlier_token() -> None:
    found = keep_best(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), torch.tensor([2]), torch.ones(1, 4, dtype=torch.bool))
    assert found.tolist() == [[True, True, False, False]]


def test_retention_probability_falls_with_the_threshold() -> None:
    theta = torch.tensor([0.2, 0.6])
    q = retention_probability(torch.full((2, 3), 0.5), theta, 0.2)
    assert q[0, 0] > 0.5 > q[1, 0]


def test_unknown_scheduling_settings_are_named() -> None:
    values: dict[str, Any] = {"temprature": 0.1}
    with pytest.raises(TypeError, match="temprature"):
        SchedulingSettings.from_dict(values)

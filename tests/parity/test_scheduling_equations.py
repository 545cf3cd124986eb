"""Photon Eq. 3-10 and A.1.2, written plainly from the paper in float64, against the vectorised code."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.scheduling import (
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
    query = torch.tensor(np.stack([np.pad(q, pad, constant_values=9.0)] * 2)).float()
    key = torch.tensor(np.stack([np.pad(k, pad, constant_values=9.0)] * 2)).float()
    present = torch.arange(tokens + 2) < tokens
    weights = instruction_weights(query, key, present.expand(2, -1))
    # float32 products of 8 numbers: 1e-5 leaves a decade above what was seen (1e-6).
    np.testing.assert_allclose(weights[1, :tokens], w, rtol=1e-4, atol=1e-5)
    assert torch.all(weights[:, tokens:] == 0)
    logits = saliency_logits(weighted_query(query, weights, heads[1]), torch.tensor(kv).float().transpose(0, 1))
    np.testing.assert_allclose(logits[0], u, rtol=1e-4, atol=1e-5)

    rho = (u - u.min()) / (u.max() - u.min() + 1e-6)
    np.testing.assert_allclose(normalise(logits)[0], rho, atol=2e-5)
    features = threshold_features(torch.tensor(rho)[None], torch.tensor(u)[None])
    np.testing.assert_allclose(features[0], plain_features(rho, u), atol=1e-9)


def test_threshold_and_mask_are_the_papers() -> None:
    torch.manual_seed(1)
    predictor = ThresholdPredictor(6, 0.9, 0.3)
    u = torch.randn(5, 13, dtype=torch.float64)
    found = decide(u.float(), torch.ones(5, dtype=torch.bool), predictor, SchedulingSettings(temperature=0.2))
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
    found = decide(u, torch.ones(1, dtype=torch.bool), predictor, SchedulingSettings())
    assert found.keep_rate().item() > 0.9


def test_one_token_is_always_kept() -> None:
    predictor = ThresholdPredictor(8, 5.0, 5.0)  # a threshold far above every saliency
    found = decide(torch.randn(3, 20), torch.ones(3, dtype=torch.bool), predictor, SchedulingSettings())
    assert found.kept.sum(1).tolist() == [1, 1, 1]


@given(ratio=st.floats(0.01, 1.0), tokens=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_a_fixed_ratio_keeps_the_most_salient(ratio: float, tokens: int) -> None:
    u = torch.randn(2, tokens)
    found = decide(u, torch.ones(2, dtype=torch.bool), None, SchedulingSettings(keep_ratio=ratio))
    count = max(1, round(ratio * tokens))
    assert found.kept.sum(1).tolist() == [count, count]
    for row in range(2):
        kept, rest = u[row][found.kept[row]], u[row][~found.kept[row]]
        assert len(rest) == 0 or kept.min() >= rest.max()


def test_ties_go_to_the_earlier_token() -> None:
    assert keep_best(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), torch.tensor([2])).tolist() == [[True, True, False, False]]


def test_retention_probability_falls_with_the_threshold() -> None:
    theta = torch.tensor([0.2, 0.6])
    q = retention_probability(torch.full((2, 3), 0.5), theta, 0.2)
    assert q[0, 0] > 0.5 > q[1, 0]


def test_unknown_scheduling_settings_are_named() -> None:
    values: dict[str, Any] = {"temprature": 0.1}
    with pytest.raises(TypeError, match="temprature"):
        SchedulingSettings.from_dict(values)

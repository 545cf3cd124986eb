"""Photon Eq. 18-21, written plainly from the paper in float64, against the losses that training adds up."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from photon.losses import BatchKind, Combination, Loss, band_loss, entropy, flip_loss, loss_terms

LOW, HIGH, EPS = 0.3, 0.8, 1e-6


def plain_probabilities(logits: np.ndarray) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights)
    return [w / total for w in weights]


def plain_band(q: np.ndarray) -> float:
    """Eq. 18 for q (R, N)."""
    total = 0.0
    for row in q:
        r = sum(row) / len(row)
        total += max(0.0, r - HIGH) + max(0.0, LOW - r)
    return total / len(q)


def plain_entropy(logits: np.ndarray) -> float:
    """H of Eq. 19 for logits (V); 0 log 0 is 0."""
    return -sum(p * math.log(p) for p in plain_probabilities(logits) if p > 0)


def plain_entropy_gradient(logits: np.ndarray) -> list[float]:
    """dH/dlogit_k = sum over v of dH/dp_v dp_v/dlogit_k, with dH/dp_v = -log p_v - 1 and softmax's derivative."""
    p = plain_probabilities(logits)
    return [
        sum((-math.log(p[v]) - 1) * p[v] * ((v == k) - p[k]) for v in range(len(p)) if p[v] > 0) for k in range(len(p))
    ]


def plain_robust(logits: np.ndarray) -> float:
    """Eq. 19 for logits (A, V)."""
    return -sum(plain_entropy(row) for row in logits) / len(logits)


def plain_flip(logits: np.ndarray, labels: np.ndarray) -> float:
    """Eq. 20; 1 - p is the sum of the other tokens' probabilities."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        p = plain_probabilities(row)
        others = sum(p[v] for v in range(len(p)) if v != label)
        total -= math.log(others + EPS)
    return total / len(logits)


def plain_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Of Eq. 21."""
    return -sum(math.log(plain_probabilities(row)[y]) for row, y in zip(logits, labels, strict=True)) / len(logits)


def plain_objective(case: dict[str, Any], what: str, combination: str) -> float:
    """Eq. 21 with CE and band added up: perturbed cases drop all others; a flip replaces them or comes on top."""
    if what == "perturbed":
        return plain_robust(case["perturbed"])
    usual = plain_cross_entropy(case["logits"], case["labels"]) + plain_band(case["q"])
    if what == "plain":
        return usual
    flip = plain_flip(case["flipped"], case["labels"])
    return flip if combination == "replace" else usual + flip


def case(seed: int = 0, scale: float = 2.0) -> dict[str, Any]:
    """Three rows of eight visual tokens, one under, one in and one over the band; five label tokens of six words."""
    rng = np.random.default_rng(seed)
    q = rng.uniform(0, 0.2, (3, 8)) + np.array([[0.0], [0.4], [0.8]])
    logits = {name: rng.normal(size=(5, 6)) * scale for name in ("logits", "flipped", "perturbed")}
    return {"q": q, "labels": rng.integers(0, 6, 5), **logits}


def leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array, requires_grad=True)


def flip_of(logits: Tensor, labels: np.ndarray) -> Tensor:
    return flip_loss(F.cross_entropy(logits, torch.tensor(labels), reduction="none"), EPS)


def test_band() -> None:
    c = case()
    q = leaf(c["q"])
    assert band_loss(q.mean(1), LOW, HIGH).mean().item() == pytest.approx(plain_band(c["q"]), rel=1e-12)
    # The rows are away from the band's ends, where it has a corner and no derivative.
    assert torch.autograd.gradcheck(lambda q: band_loss(q.mean(1), LOW, HIGH), (q,))


# From flat to a distribution whose second token has 1e-13; float64 sums of 6 terms are right to 1e-14.
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0, 30.0])
def test_entropy(scale: float) -> None:
    logits = case(1, scale)["logits"]
    x = leaf(logits)
    found = entropy(x)
    np.testing.assert_allclose(found.detach(), [plain_entropy(row) for row in logits], atol=1e-14, rtol=1e-12)
    assert -found.mean().item() == pytest.approx(plain_robust(logits), rel=1e-12)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    (found * weights).sum().backward()
    assert x.grad is not None
    expected = np.array([plain_entropy_gradient(row) for row in logits]) * weights[:, None].numpy()
    np.testing.assert_allclose(x.grad, expected, atol=1e-13)
    assert torch.autograd.gradcheck(entropy, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_in_training_precision(dtype: torch.dtype) -> None:
    """Of the same logits: the sum and its gradient are float32, whatever the logits are."""
    logits = torch.tensor(np.random.default_rng(2).normal(size=(4, 300)) * 4).to(dtype)
    x = logits.clone().requires_grad_()
    found = entropy(x)
    rows = logits.double().numpy()
    # H is up to log 300 = 5.7: ten units of float32.
    h = [plain_entropy(row) for row in rows]
    np.testing.assert_allclose(found.detach(), h, atol=5e-6)
    found.sum().backward()
    assert x.grad is not None
    expected = [[-p * (math.log(p) + h[a]) for p in plain_probabilities(row)] for a, row in enumerate(rows)]
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2e-6  # the gradient is rounded to the logits' dtype
    np.testing.assert_allclose(x.grad.double(), expected, rtol=unit, atol=1e-6)


def test_entropy_of_a_whole_vocabulary() -> None:
    """Qwen2.5's 151,936 words, where exp(H) of the backward pass is largest: flat is log V, with no gradient."""
    logits = torch.full((2, 151_936), -7.5)
    logits[1, 5] = 30.0  # sure of itself
    logits.requires_grad_()
    found = entropy(logits)
    # Sums of 150,000 float32 numbers, in blocks: 1e-6 of 11.9.
    assert found[0].item() == pytest.approx(math.log(151_936), rel=1e-6)
    p = math.exp(-37.5)
    assert found[1].item() == pytest.approx(151_935 * p * (37.5 + 1), abs=1e-7)
    found.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and logits.grad[0].abs().max() < 1e-10


# At scale 30 labels are next to certain or next to impossible. Their cross-entropy is right to 1e-16 absolutely,
# which eps = 1e-6 below the logarithm makes 1e-10.
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_flip(scale: float) -> None:
    c = case(3, scale)
    found = flip_of(torch.tensor(c["flipped"]), c["labels"]).mean().item()
    assert found == pytest.approx(plain_flip(c["flipped"], c["labels"]), rel=1e-10, abs=1e-10)


def test_flip_has_a_true_gradient() -> None:
    c = case(3)
    assert torch.autograd.gradcheck(lambda x: flip_of(x, c["labels"]), (leaf(c["flipped"]),))
    losses = torch.tensor([0.01, 0.5, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flip_loss, (losses,))


KINDS = {"plain": BatchKind(), "flipped": BatchKind(flip=True), "perturbed": BatchKind(perturbation="zeros")}


def objective(what: str, combination: Combination, q: Tensor, *logits: Tensor, labels: Tensor) -> Tensor:
    """The losses that a batch has, each the mean over its label tokens or rows."""
    usual, flipped, perturbed = logits
    ce, under_flip = (F.cross_entropy(x, labels, reduction="none") for x in (usual, flipped))
    terms: dict[Loss, Tensor] = {
        "ce": ce.mean(),
        "band": band_loss(q.mean(1), LOW, HIGH).mean(),
        "robust": -entropy(perturbed).mean(),
        "flip": flip_loss(under_flip, EPS).mean(),
    }
    return sum((terms[name] for name in loss_terms(KINDS[what], combination)), torch.tensor(0.0))


@pytest.mark.parametrize("combination", ["replace", "add"])
@pytest.mark.parametrize("what", KINDS)
def test_objective(what: str, combination: Combination) -> None:
    c = case(4)
    names = ("q", "logits", "flipped", "perturbed")
    inputs = tuple(leaf(c[name]) for name in names)
    labels = torch.tensor(c["labels"])
    total = objective(what, combination, *inputs, labels=labels)
    assert total.item() == pytest.approx(plain_objective(c, what, combination), rel=1e-12)
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        expected = differences(c, name, what, combination)
        # Central differences with a step of 1e-6 of a smooth function of size 1: 1e-10 of rounding.
        np.testing.assert_allclose(np.zeros_like(c[name]) if grad is None else grad, expected, atol=1e-8)


def differences(c: dict[str, Any], name: str, what: str, combination: str) -> np.ndarray:
    """Gradient of the plain objective, one number at a time."""
    out = np.zeros_like(c[name])
    for place in np.ndindex(out.shape):
        values = []
        for step in (1e-6, -1e-6):
            moved = c[name].copy()
            moved[place] += step
            values.append(plain_objective({**c, name: moved}, what, combination))
        out[place] = (values[0] - values[1]) / 2e-6
    return out

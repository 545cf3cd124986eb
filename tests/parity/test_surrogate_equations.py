"""Photon Eq. 11-17, written plainly from the paper in float64, against the autograd function."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from photon.surrogate import DropTokens, SurrogateSettings, surrogate_gradient


def plain_dq(t: np.ndarray, g: np.ndarray, q: np.ndarray, kept: np.ndarray, s: SurrogateSettings) -> np.ndarray:
    """dL/dq for one row: t, g (N, D) hidden states and restored gradients, q (N), kept (N)."""
    n = len(q)
    eta = np.array([t[j] @ g[j] for j in range(n)])  # Eq. 12
    if s.importance == "removal":
        eta = -eta
    over = kept if s.statistics == "kept" else np.ones(n, bool)
    mu = eta[over].mean()
    std = math.sqrt(((eta[over] - mu) ** 2).mean())
    m = np.array([sum(abs(t[j, k] * g[j, k]) for k in range(t.shape[1])) for j in range(n)])  # Eq. 15
    mean_m = m[over].mean()
    direction = np.zeros(n)
    for j in range(n):
        z = min(max((eta[j] - mu) / max(std, s.eps_std), -s.clip), s.clip)  # Eq. 13
        direction[j] = 0.5 - (0.5 + 0.5 * math.tanh(z))  # Eq. 14
    if s.centre:
        direction -= direction.mean()
    out = np.zeros(n)
    for j in range(n):
        scale = min(max(m[j] / (mean_m + 1e-12), s.s_min), s.s_max)  # Eq. 16
        out[j] = s.beta * direction[j] * scale * max(q[j] * (1 - q[j]), s.eps_sat)  # Eq. 17
    return out


SETTINGS = [
    SurrogateSettings(),
    SurrogateSettings(importance="removal"),
    SurrogateSettings(statistics="all", centre=True),
    SurrogateSettings(beta=0.5, clip=0.4, s_min=0.9, s_max=1.1, eps_sat=0.2),
]


def case(seed: int = 0) -> dict[str, Any]:
    """Two rows over one volume of six tokens between two text tokens."""
    rng = np.random.default_rng(seed)
    kept = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]], bool)
    hidden = torch.tensor(rng.normal(size=(10, 5)))
    index, cell = [], []
    for row in range(2):
        index += [0] + [1 + j for j in range(6) if kept[row, j]] + [7 + row]
        cell += [-1] + [row * 6 + j for j in range(6) if kept[row, j]] + [-1]
    return {
        "hidden": hidden,
        "probability": torch.tensor(rng.uniform(0.02, 0.98, size=(2, 6))),
        "index": torch.tensor(index),
        "cell": torch.tensor(cell),
        "kept": torch.tensor(kept),
        "valid": torch.ones(2, 6, dtype=torch.bool),
        "grad": torch.tensor(rng.normal(size=(len(index), 5))),
    }


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_are_the_papers(settings: SurrogateSettings) -> None:
    c = case()
    hidden, q = c["hidden"].requires_grad_(), c["probability"].requires_grad_()
    scale, weight = torch.tensor([2.0, 3.0], dtype=torch.float64), 0.25
    out = DropTokens.apply(hidden, q, c["index"], c["cell"], c["kept"], c["valid"], scale, weight, settings)
    assert torch.equal(out, hidden[c["index"]])
    out.backward(c["grad"])

    restored = np.zeros((10, 5))  # Eq. 11: every copy's gradient returns to where the token stood
    own = np.zeros((2, 6, 5))
    for place, (source, cell) in enumerate(zip(c["index"].tolist(), c["cell"].tolist(), strict=True)):
        restored[source] += c["grad"][place].numpy()
        if cell >= 0:
            own[cell // 6, cell % 6] = c["grad"][place].numpy()
    np.testing.assert_allclose(hidden.grad, restored, atol=1e-12)
    for row in range(2):
        expected = plain_dq(
            hidden.detach()[1:7].numpy(),
            own[row] * float(scale[row]),
            q.detach()[row].numpy(),
            c["kept"][row].numpy(),
            settings,
        )
        # The products are taken in float32 on purpose; 1e-5 is a hundred of its units.
        np.testing.assert_allclose(q.grad[row], expected * weight, atol=1e-5)


def test_the_hidden_gradient_is_a_true_one() -> None:
    c = case()
    rest = (c["index"], c["cell"], c["kept"], c["valid"], torch.ones(2), 1.0, SurrogateSettings())
    q = c["probability"]
    assert torch.autograd.gradcheck(lambda h: DropTokens.apply(h, q, *rest), (c["hidden"].requires_grad_(),))


def test_useful_tokens_are_promoted_and_the_other_sign_demotes_them() -> None:
    eta = torch.tensor([[3.0, 0.1, 0.0, -2.0]])
    kept = torch.tensor([[True, True, False, True]])
    half = torch.full((1, 4), 0.5)
    paper = surrogate_gradient(eta, eta.abs(), half, kept, torch.ones_like(kept), SurrogateSettings())
    removal = surrogate_gradient(
        eta, eta.abs(), half, kept, torch.ones_like(kept), SurrogateSettings(importance="removal")
    )
    assert paper[0, 0] < 0 < paper[0, 3]  # a negative gradient raises q: descent keeps the token
    assert removal[0, 0] > 0 > removal[0, 3]


def test_saturated_probabilities_still_move() -> None:
    eta = torch.tensor([[2.0, -2.0]])
    kept = torch.ones(1, 2, dtype=torch.bool)
    q = torch.tensor([[1.0, 1.0]])
    found = surrogate_gradient(eta, eta.abs(), q, kept, kept, SurrogateSettings())
    assert torch.all(found.abs() > 0)


def test_padding_gets_no_gradient() -> None:
    eta = torch.randn(1, 4)
    valid = torch.tensor([[True, True, True, False]])
    found = surrogate_gradient(eta, eta.abs(), torch.full((1, 4), 0.5), valid, valid, SurrogateSettings())
    assert found[0, 3] == 0

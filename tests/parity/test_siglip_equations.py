"""Med3DVLM Eq. 5 and CLIP's loss, written plainly in float64 with the whole N x N matrix, against the chunks."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from med3dvlm.contrastive import STARTS, ContrastiveSettings, contrastive_sum

SETTINGS = [
    ContrastiveSettings(),
    ContrastiveSettings(start="original"),
    ContrastiveSettings(symmetric=True),
    ContrastiveSettings(loss="clip"),
]


def plain_siglip(x: Tensor, y: Tensor, t_prime: Tensor, bias: Tensor, symmetric: bool = False) -> Tensor:
    """Eq. 5: minus the mean over i of the sum over j of log 1 / (1 + exp(z_ij (-t x_i . y_j - b))).

    The paper prints + b beside -t and labels 0 and 1; as in the SigLIP paper and the published code, the logit is
    t x_i . y_j + b and the labels are 1 and -1. `symmetric`: published code, the logits averaged with their transpose.
    """
    logits = t_prime.exp() * (x @ y.T) + bias
    if symmetric:
        logits = (logits + logits.T) / 2
    total = x.new_zeros(())
    for i in range(len(x)):
        for j in range(len(y)):
            z = 1 if i == j else -1
            total = total - torch.log(1 / (1 + torch.exp(-z * logits[i, j])))
    return total / len(x)


def plain_clip(x: Tensor, y: Tensor, t_prime: Tensor) -> Tensor:
    """Mean of the cross-entropies image to text and text to image."""
    logits = t_prime.exp() * (x @ y.T)
    total = x.new_zeros(())
    for i in range(len(x)):
        total = total - torch.log(logits[i, i].exp() / logits[i].exp().sum())
        total = total - torch.log(logits[i, i].exp() / logits[:, i].exp().sum())
    return total / (2 * len(x))


def features(pairs: int, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised float64 features of images and texts that are somewhat alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pairs, width, generator=generator, dtype=torch.float64)
    y = x + torch.randn(pairs, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)


def leaves(settings: ContrastiveSettings, pairs: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images, texts, t_prime and, for SigLIP, bias; all of them want a gradient."""
    t_prime, bias = (torch.tensor(value) for value in STARTS[settings.start])
    given = [*features(pairs), t_prime, *([bias] if settings.loss == "siglip" else [])]
    return [tensor.to(dtype).requires_grad_() for tensor in given]


def plain_loss(settings: ContrastiveSettings, given: list[Tensor]) -> Tensor:
    image, text, t_prime, *bias = given
    if settings.loss == "clip":
        return plain_clip(image, text, t_prime)
    return plain_siglip(image, text, t_prime, bias[0], settings.symmetric)


def in_chunks(settings: ContrastiveSettings, given: list[Tensor]) -> Tensor:
    """The same loss, from the sum over pairs."""
    image, text, t_prime, *bias = given
    return contrastive_sum(image, text, t_prime, bias[0] if bias else None, settings) / len(image)


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradients_are_the_plain_ones(settings: ContrastiveSettings, chunk: int) -> None:
    given, copies = leaves(settings, 11), leaves(settings, 11)
    expected = plain_loss(settings, copies)
    found = in_chunks(replace(settings, chunk=chunk), given)
    (3 * found).backward()
    (3 * expected).backward()
    # Both in float64; a hundred of its units at the size of these sums.
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    for mine, theirs in zip(given, copies, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("settings", SETTINGS)
def test_finite_differences_agree(settings: ContrastiveSettings) -> None:
    settings = replace(settings, chunk=2)

    def loss(*given: Any) -> Tensor:
        return in_chunks(settings, list(given))

    assert torch.autograd.gradcheck(loss, tuple(leaves(settings, 5)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_float32_is_as_exact_as_float32_can_be(settings: ContrastiveSettings) -> None:
    given, copies = leaves(settings, 40, torch.float32), leaves(settings, 40)
    expected = plain_loss(settings, copies)
    expected.backward()
    found = in_chunks(replace(settings, chunk=16), given)
    found.backward()
    # Logits of 14 are rounded by 1e-6, which moves each summand by as much of itself; the sum by less.
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, theirs in zip(given, copies, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        scale = float(theirs.grad.abs().max())
        assert float((mine.grad - theirs.grad).abs().max()) < 2e-6 * scale


def test_sure_pairs_have_an_exact_loss_in_float32() -> None:
    """Well separated pairs: each loss is tiny beside its logit, of which it must not be a rounded difference."""
    x = torch.eye(6)
    t_prime, bias = torch.tensor(math.log(12.0)), torch.tensor(-1.0)
    loss = contrastive_sum(x, x, t_prime, None, ContrastiveSettings(loss="clip"))
    # Logits of 12 are off by a unit of float32, 1e-6, and the loss by as much of itself. 1 + 3e-5 would lose 0.2 %.
    assert loss.item() == pytest.approx(6 * math.log1p(5 * math.exp(-12)), rel=5e-6)
    loss = contrastive_sum(x, x, t_prime, bias, ContrastiveSettings())
    assert loss.item() == pytest.approx(6 * math.log1p(math.exp(-11)) + 30 * math.log1p(math.exp(-1)), rel=1e-6)


def test_large_logits_stay_finite() -> None:
    """Where the plain forms overflow: t = 1,000 on features that point the wrong way."""
    for settings in (ContrastiveSettings(), ContrastiveSettings(loss="clip")):
        given = leaves(settings, 6, torch.float32)
        with torch.no_grad():
            given[1].neg_()
            given[2].fill_(math.log(1000))
        loss = in_chunks(settings, given)
        loss.backward()
        assert loss.isfinite() and loss > 100
        assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in given)


def test_the_starts_are_the_published_ones() -> None:
    assert STARTS["published"] == (pytest.approx(2.6593, abs=1e-4), 0.0)  # t = 14.29
    assert STARTS["original"] == (pytest.approx(2.3026, abs=1e-4), -10.0)  # t = 10

"""Loss terms, written out for single values."""

import math

import pytest
import torch

from photon.heads import AuxiliaryHeads, dense_loss, findings_loss
from photon.losses import band_loss


def cross_entropy(logit: float, target: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(0.0, 0.3), (0.25, 0.05), (0.3, 0.0), (0.5, 0.0), (0.8, 0.0), (0.9, 0.1), (1.0, 0.2)],
)
def test_the_band_is_the_distance_to_it(mean: float, expected: float) -> None:
    """Photon Eq. 18 with r_min 0.3 and r_max 0.8."""
    assert band_loss(torch.tensor([mean]), 0.3, 0.8).item() == pytest.approx(expected, abs=1e-6)


def test_the_band_pulls_towards_itself_and_leaves_what_is_inside_alone() -> None:
    mean = torch.tensor([0.1, 0.5, 0.95], requires_grad=True)
    band_loss(mean, 0.3, 0.8).sum().backward()
    assert mean.grad is not None and mean.grad.tolist() == [-1.0, 0.0, 1.0]


def test_dense_loss_is_on_shares_and_for_small_classes_on_presence() -> None:
    logits = torch.tensor([[[0.5, -1.0], [2.0, 0.3]]])  # 1 volume, 2 tokens, classes: an organ, a lesion
    shares = torch.tensor([[[0.25, 0.03], [1.0, 0.01]]])
    found = dense_loss(logits, shares, small=torch.tensor([False, True]))
    lesion = 4 * cross_entropy(-1.0, 1.0)  # 3 % of a token's voxels are there, and positives weigh four times
    nothing = cross_entropy(0.3, 0.0)  # 1 % is not
    expected = (cross_entropy(0.5, 0.25) + cross_entropy(2.0, 1.0) + lesion + nothing) / 4
    assert found.shape == (1,) and found.item() == pytest.approx(expected, rel=1e-5)


def test_findings_that_are_not_known_do_not_count() -> None:
    logits = torch.tensor([[1.0, -2.0, 7.0], [3.0, 3.0, 3.0]], requires_grad=True)
    found = findings_loss(logits, torch.tensor([[1.0, 0.0, -1.0], [-1.0, -1.0, -1.0]]))
    expected = (cross_entropy(1.0, 1.0) + cross_entropy(-2.0, 0.0)) / 2
    assert found.tolist() == pytest.approx([expected, 0.0], rel=1e-5)
    found.sum().backward()
    assert logits.grad is not None and logits.grad[0, 2] == 0 and not logits.grad[1].any()


def test_heads_see_each_token_and_the_mean_and_maximum_of_all() -> None:
    heads = AuxiliaryHeads(width=3, classes=2, findings=4)
    tokens = torch.randn(5, 7, 3)
    dense, whole = heads(tokens)
    assert (dense.shape, whole.shape) == ((5, 7, 2), (5, 4))
    torch.testing.assert_close(dense[2, 6], heads.dense(tokens[2, 6]))
    pooled = torch.cat([tokens[3].mean(0), tokens[3].max(0).values])
    torch.testing.assert_close(whole[3], heads.whole(pooled))
    torch.testing.assert_close(heads(tokens.flip(1))[1], whole)  # of the whole volume: order does not matter

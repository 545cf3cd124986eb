"""Loss terms, written out for single values, and what a batch is drawn to be."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from photon.heads import AuxiliaryHeads, dense_loss, findings_loss
from photon.losses import BatchKind, Combination, band_loss, draw_batch_kind, entropy, flip_loss, loss_terms
from photon.perturbation import PERTURBATIONS


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_is_finite_with_its_gradient(dtype: torch.dtype) -> None:
    inf = math.inf
    rows = [[0.0] * 4, [1e4, 0, 0, 0], [-1e4, 1e4, 1e4, -1e4], [2.0, 2.0, -inf, -inf], [-3e38, -3e38, -3e38, 0]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    found = entropy(logits)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([math.log(4), 0, math.log(2), math.log(2), 0], abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    # Each row is flat or without rivals, where the entropy does not change; one unit of float32 is 1e-7.
    assert logits.grad.float().abs().max() < 1e-6


def test_entropy_falls_towards_the_likely_token() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    entropy(logits).sum().backward()
    assert logits.grad is not None and logits.grad[0, 0] < 0 < logits.grad[0, 2]
    more = logits.detach() - logits.grad * 0.1
    assert entropy(more) < entropy(logits)  # descent on the entropy sharpens, so descent on its minus flattens


def test_entropy_of_no_tokens() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    entropy(logits).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 7)


def peak_bytes(events: list[dict], start: int = 0) -> int:
    """Most bytes at a time of a profile with memory."""
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held = [start]
    for event in memory:
        held.append(held[-1] + event["args"]["Bytes"])
    return max(held)


@pytest.mark.parametrize(("dtype", "backward"), [(torch.float32, 1.0), (torch.bfloat16, 1.5)])
def test_entropy_takes_one_buffer(dtype: torch.dtype, backward: float, tmp_path: Path) -> None:
    """In float32 tensors of the logits' size: one forward, one backward, and there the gradient in bfloat16."""
    logits = torch.randn(64, 4096, dtype=dtype, requires_grad=True)
    result: list[Tensor] = []
    peaks = []
    for work in (lambda: result.append(entropy(logits)), lambda: result[0].sum().backward()):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            work()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        peaks.append(peak_bytes(events) / (logits.numel() * 4))
    # The values per row are 1/4096 of it each; 0.01 has room for forty.
    assert peaks == pytest.approx([1.0, backward], abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_flip_is_finite_at_both_ends(dtype: torch.dtype) -> None:
    losses = torch.tensor([0.0, 1e-30, 1e-7, 50.0, 1e30, math.inf], dtype=dtype, requires_grad=True)
    found = flip_loss(losses)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found.sum().backward()
    assert losses.grad is not None and bool(found.isfinite().all() and losses.grad.isfinite().all())
    assert found[0].item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    assert found[3:].tolist() == pytest.approx([-1e-6] * 3, abs=1e-7)  # a unit of float32 below 1 + eps
    assert losses.grad[0].item() == pytest.approx(-1e6, rel=4e-3)  # bfloat16 has 8 bits
    assert not losses.grad[3:].any()


def test_flip_keeps_float32_where_one_minus_p_is_small() -> None:
    """Against the same in float64; 1 - exp(-ce) is off by up to 6 % at the left end."""
    losses = torch.logspace(-9, 1.5, 200, dtype=torch.float64).float()
    torch.testing.assert_close(flip_loss(losses), flip_loss(losses.double()).float(), rtol=1e-6, atol=1e-6)


def test_flip_takes_a_cross_entropy_below_zero_for_zero() -> None:
    losses = torch.tensor([-1e-7, -1e-3], requires_grad=True)  # as rounding may leave it, and far more
    found = flip_loss(losses)
    found.sum().backward()
    assert found.tolist() == pytest.approx([-math.log(1e-6)] * 2, rel=1e-6)
    assert losses.grad is not None and bool(losses.grad.isfinite().all())


def test_flip_presses_a_confident_label_down_and_is_bounded_at_the_logits() -> None:
    gaps = torch.linspace(-30, 30, 121)  # of the label above the only other token
    logits = torch.stack([gaps, torch.zeros_like(gaps)], 1).requires_grad_()
    losses = F.cross_entropy(logits, torch.zeros(len(gaps), dtype=torch.long), reduction="none")
    found = flip_loss(losses)
    assert bool((found.diff() >= 0).all()) and found[-1] > 10 > 1e-3 > found[0]
    found.sum().backward()
    assert logits.grad is not None
    # The product of a slope up to 1e6 and one that is right to 1.2e-7.
    assert logits.grad.abs().max() < 1.12 and bool((logits.grad[:, 0] >= 0).all())


PLAIN, FLIPPED, PERTURBED = BatchKind(), BatchKind(flip=True), BatchKind(perturbation="noise")


@pytest.mark.parametrize(
    ("kind", "combination", "expected"),
    [
        (PLAIN, "replace", {"ce", "band"}),
        (PLAIN, "add", {"ce", "band"}),
        (FLIPPED, "replace", {"flip"}),
        (FLIPPED, "add", {"ce", "band", "flip"}),
        (PERTURBED, "replace", {"robust"}),
        (PERTURBED, "add", {"robust"}),
    ],
)
def test_losses_of_a_batch(kind: BatchKind, combination: Combination, expected: set[str]) -> None:
    found = loss_terms(kind, combination)
    assert set(found) == expected and len(found) == len(expected)
    assert combination == "add" or loss_terms(kind) == found  # published: the default


def test_batches_are_drawn_as_often_as_asked() -> None:
    generator = torch.Generator().manual_seed(3)
    n, perturb, flip = 8000, 0.15, 0.05
    kinds = [draw_batch_kind(perturb, flip, True, generator) for _ in range(n)]
    perturbed = sum(k.perturbation is not None for k in kinds)
    flipped = sum(k.flip for k in kinds)
    assert abs(perturbed - n * perturb) < 5 * math.sqrt(n * perturb * (1 - perturb))
    rest = n - perturbed
    assert abs(flipped - rest * flip) < 5 * math.sqrt(rest * flip * (1 - flip))
    assert not any(k.flip and k.perturbation for k in kinds)
    assert {k.perturbation for k in kinds} == {None, *PERTURBATIONS}


def test_batches_do_not_depend_on_what_was_drawn_before() -> None:
    """The same stream whatever the probabilities, and whether flips have begun."""
    plain = [BatchKind()] * 50
    sure = torch.Generator().manual_seed(5)
    never = torch.Generator().manual_seed(5)
    early = torch.Generator().manual_seed(5)
    kinds = [draw_batch_kind(1.0, 1.0, True, sure) for _ in plain]
    assert all(k.perturbation is not None and not k.flip for k in kinds)
    assert [draw_batch_kind(0.0, 0.0, True, never) for _ in plain] == plain
    assert [draw_batch_kind(0.0, 1.0, False, early) for _ in plain] == plain
    assert torch.equal(sure.get_state(), never.get_state()) and torch.equal(sure.get_state(), early.get_state())
    again = torch.Generator().manual_seed(5)
    some = [draw_batch_kind(0.5, 1.0, True, again) for _ in plain]
    assert {k.flip for k in some} == {True, False}
    assert all(k.flip or k == full for k, full in zip(some, kinds, strict=True))  # and the kinds are those above


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

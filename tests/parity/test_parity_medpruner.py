"""MedPruner Eq. 2-5 and its clusters, written plainly in float64 from the paper and its published facts."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medpruner.clustering import clusters, merge
from medpruner.nucleus import attention_received, nucleus
from medpruner.slice_filter import kept_slices

# Sums of a few hundred float32 products and exponentials, against float64.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def plain_kept(slices: np.ndarray, gamma: float) -> list[bool]:
    """Eq. 2: the anchor is the first slice, and then each slice that is further from the anchor than gamma."""
    anchor = slices[0]
    kept = [True]
    for picture in slices[1:]:
        difference = 0.0
        for value, other in zip(picture.flat, anchor.flat, strict=True):
            difference += abs(value - other)
        kept.append(difference / picture.size > gamma)
        if kept[-1]:
            anchor = picture
    return kept


def plain_received(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Eq. 3: softmax of every head (H, M, d), mean over heads, sum over queries."""
    heads, tokens, width = queries.shape
    average = np.zeros((tokens, tokens))
    for h in range(heads):
        for i in range(tokens):
            scores = [math.exp(queries[h, i] @ keys[h, j] / math.sqrt(width)) for j in range(tokens)]
            for j in range(tokens):
                average[i, j] += scores[j] / sum(scores) / heads
    return average.sum(0)


def plain_nucleus(importance: np.ndarray, temperature: float, tau: float) -> list[bool]:
    """Eq. 4-5: the smallest k whose top tokens' shares sum to tau."""
    weights = [math.exp(value / temperature) for value in importance]
    share = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(share)), key=lambda j: -share[j])
    for k in range(1, len(order) + 1):
        if sum(share[j] for j in order[:k]) >= tau:
            break
    return [j in order[:k] for j in range(len(order))]


def plain_clusters(keys: np.ndarray, selected: list[bool], count: int) -> tuple[list[int], dict[int, int]]:
    """Centres at a uniform stride among the unselected, and of every other token its centre."""
    unselected = [j for j, chosen in enumerate(selected) if not chosen]
    step = max(1, len(unselected) // count)
    centres = unselected[::step][:count]
    of = {}
    for j in unselected:
        if j in centres:
            continue
        cosines = [keys[j] @ keys[c] / math.sqrt((keys[j] @ keys[j]) * (keys[c] @ keys[c])) for c in centres]
        of[j] = centres[cosines.index(max(cosines))]
    return centres, of


def plain_merge(features: np.ndarray, centres: list[int], of: dict[int, int]) -> np.ndarray:
    """A centre becomes itself plus the mean of what was assigned to it."""
    out = []
    for centre in centres:
        members = [features[j] for j, its in of.items() if its == centre]
        out.append(features[centre] + (sum(members) / len(members) if members else 0))
    return np.array(out).reshape(-1, features.shape[1])


def drifting(count: int, seed: int, step: float = 0.1) -> np.ndarray:
    """Slices (count, 5, 7) that drift, with pauses of some length."""
    rng = np.random.default_rng(seed)
    moves = rng.normal(size=(count, 5, 7)) * step * (rng.random(count) < 0.6)[:, None, None]
    return moves.cumsum(0)


@pytest.mark.parametrize("gamma", [0, 0.02, 0.1, 0.15, 0.3, 3.0])
@pytest.mark.parametrize(("count", "seed"), [(2, 0), (9, 1), (60, 2), (61, 3)])
def test_kept_slices_are_those_of_eq_2(count: int, seed: int, gamma: float) -> None:
    slices = drifting(count, seed)
    assert kept_slices(torch.tensor(slices, dtype=torch.float32), gamma).tolist() == plain_kept(slices, gamma)


def test_slices_are_compared_to_the_anchor_and_not_to_their_neighbours() -> None:
    ramp = torch.arange(32.0)[:, None].expand(32, 4)  # each 1 from the next, which never exceeds 2.5
    assert kept_slices(ramp, 2.5).nonzero().flatten().tolist() == list(range(0, 32, 3))


@pytest.mark.parametrize(("shape", "block"), [((1, 1, 4), None), ((3, 13, 8), None), ((4, 37, 6), 5), ((2, 37, 6), 1)])
def test_attention_received_is_the_column_sum_of_eq_3(shape: tuple[int, int, int], block: int | None) -> None:
    queries, keys = np.random.default_rng(0).normal(size=(2, *shape)) * 1.5
    received = attention_received(torch.tensor(queries), torch.tensor(keys), shape[-1] ** -0.5, block)
    expected = plain_received(queries, keys)
    np.testing.assert_allclose(received, expected, **CLOSE)
    assert abs(expected.mean() - 1) < 1e-12


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tau", [0.05, 0.3, 0.7, 0.9, 0.99])
def test_nucleus_is_that_of_eq_4_and_5(temperature: float, tau: float) -> None:
    importance = np.random.default_rng(1).gamma(0.4, 2.5, size=(6, 40))
    expected = [plain_nucleus(row, temperature, tau) for row in importance]
    assert nucleus(torch.tensor(importance), temperature, tau).tolist() == expected
    assert 1 <= sum(expected[0]) < 40


@pytest.mark.parametrize(("tokens", "count"), [(40, 2), (40, 3), (41, 7), (40, 12), (40, 60)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_clusters_and_merged_tokens_are_the_published_ones(tokens: int, count: int, share: float) -> None:
    rng = np.random.default_rng(tokens + count)
    keys, features = rng.normal(size=(tokens, 5)), rng.normal(size=(tokens, 9))
    selected = (rng.random(tokens) < share).tolist()
    centres, of = plain_clusters(keys, selected, count)

    found = clusters(torch.tensor(keys), torch.tensor(selected), count)
    assert found.centres.tolist() == centres
    assert dict(zip(found.members.tolist(), found.centres[found.assigned].tolist(), strict=True)) == of
    merged = merge(torch.tensor(features, dtype=torch.float32), found)
    np.testing.assert_allclose(merged, plain_merge(features, centres, of), **CLOSE)


def test_slices_together_are_the_slices_apart() -> None:
    """Of unequal numbers of unselected tokens: more than centres, fewer, none."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 5, 3, 24, 8, generator=generator)
    received = attention_received(queries, keys, 8**-0.5)
    selected = nucleus(received, 0.1, 0.8)
    selected[1], selected[2, :-3], selected[3] = True, True, False
    features = torch.randn(5, 24, 6, generator=generator)
    found = clusters(keys.mean(1), selected, 4)
    alone = [clusters(k, s, 4) for k, s in zip(keys.mean(1), selected, strict=True)]

    for s in range(5):
        np.testing.assert_allclose(received[s], attention_received(queries[s], keys[s], 8**-0.5), **CLOSE)
    assert found.centres.tolist() == [s * 24 + i for s, one in enumerate(alone) for i in one.centres.tolist()]
    assert found.members.tolist() == [s * 24 + i for s, one in enumerate(alone) for i in one.members.tolist()]
    expected: list[Tensor] = [merge(f, one) for f, one in zip(features, alone, strict=True)]
    assert [len(part) for part in expected] == [4, 0, 3, 4, 4]
    np.testing.assert_allclose(merge(features, found), torch.cat(expected), **CLOSE)

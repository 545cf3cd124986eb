"""VisionZip, HiPrune and Hulu-Med's L1 rule, written plainly in float64 from their published facts."""

import numpy as np
import pytest
import torch

from medpruner.clustering import clusters, merge
from medpruner.hiprune import hiprune
from medpruner.hulu_l1 import hulu_l1
from medpruner.visionzip import dominant


def best(scores: np.ndarray, keep: int, among: set[int]) -> list[int]:
    """The ``keep`` highest of ``among``, the first of equals."""
    return sorted(sorted(among), key=lambda j: -scores[j])[:keep]


def plain_visionzip(
    scores: np.ndarray, keys: np.ndarray, features: np.ndarray, keep: int, contextual: int
) -> np.ndarray:
    """Dominant tokens in spatial order, then the contextual ones."""
    chosen = sorted(best(scores, keep, set(range(len(scores)))))
    rest = [j for j in range(len(scores)) if j not in chosen]
    step = max(1, len(rest) // contextual)
    centres = [rest[i] for i in range(0, len(rest), step)][:contextual]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    groups: dict[int, list[int]] = {centre: [] for centre in centres}
    for j in rest:
        if j not in groups:
            groups[centres[int(np.argmax([unit[j] @ unit[c] for c in centres]))]].append(j)
    merged = [features[c] + (features[g].mean(0) if g else 0) for c, g in groups.items()]
    return np.array([*features[chosen], *merged])


def plain_hiprune(
    object_layer: np.ndarray, deep: np.ndarray, grid: tuple[int, int], keep: int, alpha: float
) -> set[int]:
    """Anchors, then their neighbours, then the best of the deep layer, until ``keep`` are there."""
    height, width = grid
    everything = set(range(height * width))
    anchors = best(object_layer, round(keep * alpha / 5), everything)
    buffers = set()
    for anchor in anchors:
        row, column = divmod(anchor, width)
        for r, c in ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)):
            if 0 <= r < height and 0 <= c < width:
                buffers.add(r * width + c)
    kept = set(anchors)
    kept |= set(best(deep, keep - len(kept), buffers - kept))
    kept |= set(best(deep, keep - len(kept), everything - kept))
    return kept


def plain_hulu_l1(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Pixels (S, M, P): tokens that differ from the previous frame; the first frame whole, one of each at least."""
    frames, tokens, _ = pixels.shape
    kept = np.ones((frames, tokens), bool)
    for s in range(1, frames):
        difference = [np.mean(np.abs(pixels[s, j] - pixels[s - 1, j])) for j in range(tokens)]
        kept[s] = [value > threshold for value in difference]
        kept[s, int(np.argmax(difference))] = True
    return kept


@pytest.mark.parametrize(("keep", "contextual"), [(65, 5), (10, 1), (1, 40), (95, 9)])
def test_visionzip(keep: int, contextual: int) -> None:
    rng = np.random.default_rng(keep)
    scores, keys, features = rng.gamma(0.5, size=100), rng.normal(size=(100, 6)), rng.normal(size=(100, 8))
    chosen = dominant(torch.tensor(scores), keep)
    of_features = torch.tensor(features, dtype=torch.float32)
    merged = merge(of_features, clusters(torch.tensor(keys), chosen, contextual))
    expected = plain_visionzip(scores, keys, features, keep, contextual)
    # Means of a hundred numbers in float32.
    np.testing.assert_allclose(torch.cat([of_features[chosen], merged]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(12, 12), (7, 20), (1, 50)])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_hiprune(grid: tuple[int, int], alpha: float) -> None:
    tokens = grid[0] * grid[1]
    rng = np.random.default_rng(tokens)
    for retention in (1 / tokens, 0.05, 0.112, 0.223, 0.334, 0.9, 1):
        keep = round(retention * tokens)
        object_layer, deep = rng.gamma(0.5, size=(2, tokens))
        found = hiprune(torch.tensor(object_layer), torch.tensor(deep), grid, keep, alpha)
        assert set(found.nonzero().flatten().tolist()) == plain_hiprune(object_layer, deep, grid, keep, alpha)
        assert found.sum() == keep


@pytest.mark.parametrize("threshold", [0, 0.1, 0.4, 9.0])
def test_hulu_l1(threshold: float) -> None:
    rng = np.random.default_rng(5)
    frames = rng.normal(size=(9, 16, 12)) * rng.random((9, 16, 1)) * (rng.random((9, 16, 1)) < 0.5)
    pixels = frames.cumsum(0) * 0.5
    found = hulu_l1(torch.tensor(pixels, dtype=torch.float32), threshold).numpy()
    np.testing.assert_array_equal(found, plain_hulu_l1(pixels, threshold))

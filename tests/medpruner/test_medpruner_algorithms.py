"""The choices of slices and tokens where they degenerate, and what must hold of any input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medpruner import nucleus as nucleus_module
from medpruner import slice_filter
from medpruner.clustering import clusters, merge
from medpruner.hiprune import hiprune
from medpruner.hulu_l1 import hulu_l1
from medpruner.nucleus import attention_received, nucleus
from medpruner.sampling import random_tokens, uniform_slices
from medpruner.slice_filter import kept_slices
from medpruner.visionzip import dominant

NAN = float("nan")
INF = float("inf")
QUICK = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31)


def places(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- slices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 0.05, INF])
def test_one_slice_and_identical_slices_leave_the_first(gamma: float) -> None:
    assert kept_slices(torch.ones(1, 8, 8), gamma).tolist() == [True]
    assert places(kept_slices(torch.full((50, 4, 6), 0.3), gamma)) == [0]


def test_a_difference_of_gamma_itself_is_not_enough() -> None:
    pixels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])[:, None].expand(5, 10)  # exact in binary
    assert places(kept_slices(pixels, 0.25)) == [0, 2, 4]
    assert places(kept_slices(pixels, 0.2499)) == [0, 1, 2, 3, 4]


def test_slices_in_hounsfield_units_may_be_whole_numbers() -> None:
    """Sixteen bits would overflow in a difference of 60000, eight bits without a sign in any negative one."""
    hounsfield = torch.tensor([-30000, 30000, 30000, -30000], dtype=torch.int16)[:, None].expand(4, 9)
    assert places(kept_slices(hounsfield, 59999)) == [0, 1, 3]
    assert places(kept_slices(torch.tensor([[200], [190], [100]], dtype=torch.uint8), 50)) == [0, 2]


@given(seeds, st.integers(1, 70), st.floats(0, 0.4), st.sampled_from([1, 50, 10**9]))
@QUICK
def test_chunks_do_not_change_what_is_kept(seed: int, count: int, gamma: float, most: int) -> None:
    generator = seeded(seed)
    moves = torch.rand(count, 3, 4, generator=generator) * (torch.rand(count, 1, 1, generator=generator) < 0.3)
    pixels = moves.cumsum(0)
    expected, anchor = [0], 0
    for i in range(1, count):
        if (pixels[i] - pixels[anchor]).flatten().abs().mean() > gamma:
            expected.append(i)
            anchor = i
    before, slice_filter.MOST_NUMBERS = slice_filter.MOST_NUMBERS, most
    try:
        assert places(kept_slices(pixels, gamma)) == expected
    finally:
        slice_filter.MOST_NUMBERS = before


@pytest.mark.parametrize("pattern", ["all kept", "none kept", "every third"])
def test_each_slice_is_compared_a_few_times_at_most(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 300
    step = {"all kept": 1.0, "none kept": 0.0, "every third": 0.4}[pattern]
    compared, chunks = 0, 0
    distances = slice_filter._distances

    def counted(chunk: Tensor, *rest: Any) -> list[float]:
        nonlocal compared, chunks
        compared, chunks = compared + len(chunk), chunks + 1
        return distances(chunk, *rest)

    monkeypatch.setattr(slice_filter, "_distances", counted)
    kept = kept_slices(step * torch.arange(count)[:, None].expand(count, 5), 0.9)
    assert int(kept.sum()) == {"all kept": 300, "none kept": 1, "every third": 100}[pattern]
    assert compared < 3 * count
    assert chunks <= int(kept.sum()) + 10  # one host wait each; 10 doublings reach 300


@pytest.mark.parametrize("gamma", [-0.1, NAN, -INF])
def test_gamma_out_of_range(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"^gamma: .* 0 or more[^\n]*$"):
        kept_slices(torch.zeros(3, 4, 4), gamma)


def test_slices_of_no_use() -> None:
    for shape in ((5,), (0, 4, 4), (3, 0), ()):
        with pytest.raises(ValueError, match=r"^slices: a tensor of shape [^\n]*$"):
            kept_slices(torch.zeros(shape), 0.1)
    pixels = torch.zeros(6, 4)
    pixels[3, 1] = NAN
    with pytest.raises(ValueError, match=r"^slice 3 [^\n]*not finite[^\n]*$"):
        kept_slices(pixels, 0.1)


@given(st.integers(1, 200), st.data())
@QUICK
def test_uniform_slices(count: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    kept = places(uniform_slices(count, keep))
    assert len(kept) == keep and kept[0] == 0
    gaps = {b - a for a, b in zip(kept, [*kept[1:], count], strict=True)}
    assert max(gaps) - min(gaps) <= 1


# --- attention ------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 4), st.integers(1, 60), st.integers(1, 70))
@QUICK
def test_in_blocks_as_at_once(seed: int, heads: int, tokens: int, block: int) -> None:
    queries, keys = torch.randn(2, 2, heads, tokens, 8, generator=seeded(seed))
    at_once = torch.softmax(queries @ keys.mT * 0.3, -1).mean(1).sum(1)
    found = attention_received(queries, keys, 0.3, block)
    torch.testing.assert_close(found, at_once, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean(-1), torch.ones(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("entries", [1, 100, 1000, 2**30])
def test_memory_bounds_do_not_change_the_sums(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = torch.randn(2, 3, 4, 30, 8, generator=seeded(0))
    expected = attention_received(queries, keys, 0.3)
    monkeypatch.setattr(nucleus_module, "CPU_SCORES", entries)
    torch.testing.assert_close(attention_received(queries, keys, 0.3), expected, rtol=1e-5, atol=1e-5)


def test_never_more_scores_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    softmax = torch.softmax

    def watched(scores: Tensor, dim: int) -> Tensor:
        nonlocal most
        most = max(most, scores.numel())
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    monkeypatch.setattr(nucleus_module, "CPU_SCORES", 1000)
    queries = torch.randn(5, 4, 60, 8)
    attention_received(queries, queries, 1.0)
    assert 500 < most <= 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    generator = seeded(1)
    queries, keys = torch.randn(2, 4, 64, 16, generator=generator).to(dtype)
    found = attention_received(queries, keys, 0.25)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, attention_received(queries.float(), keys.float(), 0.25), rtol=0, atol=0)

    importance = torch.rand(3, 50, generator=generator).to(dtype)
    assert torch.equal(nucleus(importance, 0.2, 0.7), nucleus(importance.float(), 0.2, 0.7))

    pixels = torch.randn(12, 6, 40, generator=generator).cumsum(0).to(dtype)
    assert torch.equal(kept_slices(pixels, 1.3), kept_slices(pixels.float(), 1.3))
    assert torch.equal(hulu_l1(pixels, 0.8), hulu_l1(pixels.float(), 0.8))

    selected = torch.rand(64, generator=generator) < 0.4
    found_clusters = clusters(keys.mean(0), selected, 5)
    for one, other in zip(found_clusters, clusters(keys.mean(0).float(), selected, 5), strict=True):
        assert torch.equal(one, other)
    merged = merge(queries[0], found_clusters)
    assert merged.dtype == dtype
    assert torch.equal(merged, merge(queries[0].float(), found_clusters).to(dtype))


def test_attention_that_all_goes_to_one_token() -> None:
    keys = torch.zeros(2, 9, 4)
    keys[:, 5, 0] = 1000
    queries = torch.zeros(2, 9, 4)
    queries[..., 0] = 10
    received = attention_received(queries, keys, 0.5)
    assert received.tolist() == [0, 0, 0, 0, 0, 9, 0, 0, 0]
    # Softmax of 9 beside eight zeros at T = 1: a share of 0.999.
    assert places(nucleus(received, 1, 0.9)) == [5]


def test_attention_needs_queries_and_keys_alike() -> None:
    good = torch.zeros(2, 5, 4)
    for queries, keys in ((good, torch.zeros(1, 5, 4)), (good[0], good[0]), (good[:, :0], good[:, :0])):
        with pytest.raises(ValueError, match=r"^queries of shape [^\n]*$"):
            attention_received(queries, keys, 0.5)
    with pytest.raises(ValueError, match=r"^block: 0;[^\n]*$"):
        attention_received(good, good, 0.5, 0)


# --- nucleus --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 5000])
@pytest.mark.parametrize("peak", [0.0, 1.0, 1e4])
def test_tau_one_keeps_all_and_tau_near_zero_one(tokens: int, peak: float) -> None:
    """A sum of shares reaches 1 long before the last token where one holds nearly everything, and may never."""
    importance = torch.rand(tokens, generator=seeded(0))
    importance[tokens // 2] += peak + 1
    for temperature in (1e-300, 0.01, 2.0, 1e300):
        assert nucleus(importance, temperature, 1).all()
        assert nucleus(importance, temperature, 1.0).all()
    for tau in (1e-300, 1e-9):
        assert places(nucleus(importance, 2.0, tau)) == [tokens // 2]
    assert places(nucleus(importance, 1e-308, 0.9)) == [tokens // 2]  # importance / temperature would be infinite


@given(seeds, st.integers(1, 80), st.floats(0.05, 20), st.floats(0.01, 0.999))
@QUICK
def test_the_nucleus_is_the_smallest_set_that_holds_tau(seed: int, tokens: int, temperature: float, tau: float) -> None:
    importance = torch.rand(tokens, generator=seeded(seed)) * 5
    kept = nucleus(importance, temperature, tau)
    share = torch.softmax(importance.double() / temperature, -1)
    least = share[kept].min()
    # 1e-9: sums of 80 doubles, in another order.
    assert share[kept].sum() >= tau - 1e-9
    assert share[kept].sum() - least < tau + 1e-9
    assert not (~kept).any() or share[~kept].max() <= least
    assert torch.equal(nucleus(importance + 100, temperature, 1e-6), nucleus(importance, temperature, 1e-6))


@given(seeds, st.integers(1, 40), st.floats(0.1, 0.95))
@QUICK
def test_more_of_tau_and_of_temperature_keep_more(seed: int, tokens: int, tau: float) -> None:
    importance = torch.rand(tokens, generator=seeded(seed)) * 5
    kept = nucleus(importance, 1.0, tau)
    assert (kept <= nucleus(importance, 1.0, tau + 0.04)).all()
    assert (kept <= nucleus(importance, 2.0, tau)).all()


def test_of_equal_tokens_the_first_are_kept() -> None:
    assert places(nucleus(torch.ones(1024), 2.0, 0.25)) == list(range(256))  # shares are exact: 256 sum to tau
    assert places(nucleus(torch.tensor([1.0, 3, 1, 3, 3, 1]), 1.0, 0.5)) == [1, 3]
    assert places(dominant(torch.tensor([1.0, 3, 1, 3, 3, 1]), 4)) == [0, 1, 3, 4]
    assert places(dominant(torch.zeros(5000), 10)) == list(range(10))


@pytest.mark.parametrize(
    ("temperature", "tau", "message"),
    [
        (0, 0.9, "temperature: 0; it is above 0"),
        (-1, 0.9, "temperature: -1; "),
        (NAN, 0.9, "temperature: nan; "),
        (INF, 0.9, "temperature: inf; "),
        (2, 0, "tau: 0; it is above 0 and at most 1"),
        (2, 1.001, "tau: 1.001; "),
        (2, NAN, "tau: nan; "),
    ],
)
def test_settings_of_the_nucleus_out_of_range(temperature: float, tau: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        nucleus(torch.ones(4), temperature, tau)


def test_importance_of_no_use() -> None:
    for importance in (torch.tensor([1.0, NAN]), torch.tensor([1.0, INF]), torch.ones(3, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"^importance: [^\n]*$"):
            nucleus(importance, 2, 0.9)


# --- clusters -------------------------------------------------------------------------------------------------------


def test_fewer_unselected_tokens_than_centres_are_all_centres() -> None:
    features = torch.randn(6, 3, generator=seeded(0))
    for left in ([], [4], [0, 2, 5]):
        selected = torch.ones(6, dtype=torch.bool)
        selected[left] = False
        found = clusters(features, selected, 4)
        assert found.centres.tolist() == left
        assert len(found.members) == len(found.assigned) == 0
        assert torch.equal(merge(features, found), features[left])


@given(seeds, st.integers(1, 4), st.integers(1, 50), st.integers(0, 60), st.floats(0, 1))
@QUICK
def test_every_unselected_token_is_a_centre_or_in_one_cluster(
    seed: int, slices: int, tokens: int, count: int, share: float
) -> None:
    generator = seeded(seed)
    keys = torch.randn(slices, tokens, 4, generator=generator)
    selected = torch.rand(slices, tokens, generator=generator) < share
    found = clusters(keys, selected, count)
    per_slice = (~selected).sum(1).clamp(max=count)
    assert len(found.centres) == per_slice.sum()
    assert torch.equal(found.centres, found.centres.sort().values)
    if count:
        everything = torch.cat([found.centres, found.members]).sort().values
        assert torch.equal(everything, (~selected).flatten().nonzero().flatten())
        assert torch.equal(found.centres[found.assigned] // tokens, found.members // tokens)  # never another slice's
    else:
        assert len(found.members) == 0
    # Sums of means: what all centres hold is their own plus the mean of each cluster.
    merged = merge(torch.ones(slices * tokens, 2), found)
    filled = torch.bincount(found.assigned, minlength=len(found.centres)) > 0
    assert torch.equal(merged, (1.0 + filled.float())[:, None].expand(-1, 2))


def test_centres_stand_at_a_uniform_stride_and_equal_keys_go_to_the_first() -> None:
    selected = torch.zeros(11, dtype=torch.bool)
    selected[[0, 3]] = True
    found = clusters(torch.ones(11, 2), selected, 4)
    assert found.centres.tolist() == [1, 4, 6, 8]  # every second of 1 2 4 5 6 7 8 9 10
    assert found.members.tolist() == [2, 5, 7, 9, 10]
    assert found.assigned.tolist() == [0, 0, 0, 0, 0]
    zeros = clusters(torch.zeros(11, 2), selected, 4)  # no direction at all
    assert zeros.assigned.tolist() == [0, 0, 0, 0, 0]


def test_cosine_and_not_the_product_decides() -> None:
    keys = torch.tensor([[1.0, 0.0], [100.0, 100.0], [5.0, 0.5], [2.0, 2.5]])
    found = clusters(keys, torch.zeros(4, dtype=torch.bool), 1)
    assert found.centres.tolist() == [0]
    keys = keys[[0, 2, 1, 3]]  # stride 2: centres 0 and 2
    found = clusters(keys, torch.zeros(4, dtype=torch.bool), 2)
    assert found.centres[found.assigned].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("keys", "selected", "count", "message"),
    [
        ((5, 3), (4,), 2, "keys of shape"),
        ((5,), (5,), 2, "keys of shape"),
        ((2, 2, 5, 3), (2, 2, 5), 2, "keys of shape"),
        ((5, 3), (5,), -1, "count: -1;"),
    ],
)
def test_clusters_of_no_use(keys: tuple[int, ...], selected: tuple[int, ...], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        clusters(torch.ones(keys), torch.zeros(selected, dtype=torch.bool), count)


# --- baselines ------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.data())
@QUICK
def test_hiprune_keeps_as_many_as_asked(seed: int, height: int, width: int, alpha: float, data: st.DataObject) -> None:
    tokens = height * width
    keep = data.draw(st.integers(1, tokens))
    object_layer, deep = torch.rand(2, 3, tokens, generator=seeded(seed))
    kept = hiprune(object_layer, deep, (height, width), keep, alpha)
    assert kept.sum(1).tolist() == [keep] * 3
    assert (kept >= dominant(object_layer, round(keep * alpha / 5))).all()  # no anchor is lost


def drawn(kept: Tensor, width: int) -> list[str]:
    return ["".join(".#"[int(x)] for x in row) for row in kept.view(-1, width).tolist()]


def test_hiprune_keeps_neighbours_inside_the_grid() -> None:
    deep = torch.zeros(20)
    deep[19] = 1
    corner, edge = torch.zeros(20), torch.zeros(20)
    corner[0], edge[9] = 1, 1
    assert drawn(hiprune(corner, deep, (4, 5), 4, 1.0), 5) == ["##...", "#....", ".....", "....#"]
    assert drawn(hiprune(edge, deep, (4, 5), 5, 1.0), 5) == ["....#", "...##", "....#", "....#"]
    both = torch.zeros(20)
    both[6], both[7] = 2, 1  # neighbours of one another: eight tokens in all, and two of the deep layer
    deep[18] = 1
    assert drawn(hiprune(both, deep, (4, 5), 10, 1.0), 5) == [".##..", "####.", ".##..", "...##"]


def test_hiprune_without_room_keeps_anchors_and_then_the_best_neighbours() -> None:
    object_layer, deep = torch.zeros(9), torch.zeros(9)
    object_layer[4] = 1
    deep[0], deep[7], deep[3] = 9, 5, 2  # the corner is no neighbour
    assert drawn(hiprune(object_layer, deep, (3, 3), 3, 1.0), 3) == ["...", "##.", ".#."]


@pytest.mark.parametrize(
    ("count", "grid", "keep", "alpha", "message"),
    [
        (12, (3, 5), 4, 0.1, "scores of shapes"),
        (0, (0, 5), 1, 0.1, "scores of shapes"),
        (15, (3, 5), 0, 0.1, "keep: 0 of 15"),
        (15, (3, 5), 16, 0.1, "keep: 16 of 15"),
        (15, (3, 5), 4, 1.5, "alpha: 1.5"),
        (15, (3, 5), 4, NAN, "alpha: nan"),
    ],
)
def test_hiprune_out_of_range(count: int, grid: tuple[int, int], keep: int, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        hiprune(torch.ones(count), torch.ones(count), grid, keep, alpha)


def test_hulu_l1_compares_to_the_previous_frame() -> None:
    value = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.25], [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]])
    kept = hulu_l1(value[:, :, None].expand(4, 3, 6), 0.25)  # exactly 0.25 does not exceed it
    assert kept.int().tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert hulu_l1(torch.zeros(1, 3, 6)).tolist() == [[True] * 3]
    few = torch.tensor([[0.0, 0.0, 0.0], [0.02, 0.05, 0.03]])[:, :, None]
    assert hulu_l1(few).int().tolist() == [[1, 1, 1], [0, 1, 0]]  # the most different where none exceeds 0.1


def test_hulu_l1_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randn(9, 8, 5, generator=seeded(0))
    expected = hulu_l1(pixels, 1.0)
    assert 8 < int(expected.sum()) < 60
    monkeypatch.setattr("medpruner.hulu_l1.MOST_NUMBERS", 90)
    assert torch.equal(hulu_l1(pixels, 1.0), expected)


def test_hulu_l1_out_of_range() -> None:
    for threshold in (-0.1, NAN):
        with pytest.raises(ValueError, match=r"^threshold: [^\n]*$"):
            hulu_l1(torch.zeros(2, 3, 4), threshold)
    for shape in ((3, 4), (0, 3, 4), (2, 3, 0)):
        with pytest.raises(ValueError, match=r"^pixels: [^\n]*$"):
            hulu_l1(torch.zeros(shape))


def test_random_tokens() -> None:
    first = random_tokens(100, 30, seeded(4))
    assert int(first.sum()) == 30
    assert torch.equal(first, random_tokens(100, 30, seeded(4)))
    assert not torch.equal(first, random_tokens(100, 30, seeded(5)))
    generator = seeded(0)
    often = sum(random_tokens(10, 3, generator).int() for _ in range(2000))
    assert isinstance(often, Tensor)
    assert often.min() > 500 and often.max() < 700  # 600 each, five standard deviations are 102
    assert random_tokens(5, 5, generator).all() and not random_tokens(5, 0, generator).any()


@pytest.mark.parametrize(
    ("choose", "least"),
    [
        (lambda keep: uniform_slices(8, keep), 1),
        (lambda keep: random_tokens(8, keep, seeded(0)), 0),
        (lambda keep: dominant(torch.ones(8), keep), 0),
    ],
)
def test_keep_out_of_range(choose: Callable[[int], Tensor], least: int) -> None:
    for keep in (least - 1, 9):
        with pytest.raises(ValueError, match=rf"^keep: {keep} of 8 [^\n]*$"):
            choose(keep)
    assert int(choose(least).sum()) == least
    assert choose(8).all()

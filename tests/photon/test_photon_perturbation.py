"""What each perturbation leaves of a volume, and what it must not touch."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.geometry import PatchGeometry
from photon.patch_embedding import patchify
from photon.perturbation import PERTURBATIONS, Perturbation, draw_kind, perturb

KINDS = list(PERTURBATIONS)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FILL = -5.0

COUNTS = st.lists(st.integers(1, 14), min_size=1, max_size=4)
VOXELS = st.integers(1, 25)
CHANNELS = st.integers(1, 3)
SEEDS = st.integers(0, 2**31)
thorough = settings(deadline=None)


def generator(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def numbered(counts: Sequence[int], width: int) -> Tensor:
    """No two numbers alike, none of them 0 or ``FILL``; those of a later volume are larger."""
    return torch.arange(1.0, sum(counts) * width + 1).view(sum(counts), width)


def kept(share: float, n: int) -> int:
    return max(1, round(share * n))


@thorough
@given(COUNTS, VOXELS, SEEDS)
def test_shuffled_patches_are_the_same_patches(counts: list[int], voxels: int, seed: int) -> None:
    patches = numbered(counts, voxels)
    found = perturb(patches, counts, "shuffle_patches", generator(seed))
    for before, after in zip(patches.split(counts), found.split(counts), strict=True):
        assert torch.equal(after[after[:, 0].argsort()], before)  # numbered: sorted by their first voxel


@thorough
@given(COUNTS, VOXELS, CHANNELS, SEEDS)
def test_shuffled_voxels_are_the_same_voxels(counts: list[int], voxels: int, channels: int, seed: int) -> None:
    width = voxels * channels
    patches = numbered(counts, width)
    found = perturb(patches, counts, "shuffle_voxels", generator(seed), channels=channels)
    start = 1.0
    for before, after in zip(patches.split(counts), found.split(counts), strict=True):
        assert torch.equal(after.flatten().sort().values, before.flatten())
        came = (after - start).long()  # which number of the volume stands here now
        source, place = came // width, (came % width).view(-1, channels, voxels)
        assert torch.equal(source, source[:, :1].expand_as(source))  # a patch stays together
        assert torch.equal(place, place[:1].expand_as(place))  # the same order of voxels in all of them
        assert torch.equal(place // voxels, torch.arange(channels)[None, :, None].expand_as(place))
        assert torch.equal(place % voxels, (place % voxels)[:, :1].expand_as(place))  # and in all channels
        start += before.numel()


@thorough
@given(COUNTS, VOXELS, SEEDS, st.sampled_from([0.0, FILL]))
def test_a_fifth_of_the_patches_stays(counts: list[int], voxels: int, seed: int, fill: float) -> None:
    patches = numbered(counts, voxels)
    found = perturb(patches, counts, "keep_patches", generator(seed), fill=fill)
    for before, after in zip(patches.split(counts), found.split(counts), strict=True):
        same = (after == before).all(1)
        assert int(same.sum()) == kept(0.2, len(before))
        assert bool((after[~same] == fill).all())


@thorough
@given(COUNTS, VOXELS, CHANNELS, SEEDS, st.sampled_from([0.0, FILL]))
def test_a_tenth_of_the_voxel_positions_stays(
    counts: list[int], voxels: int, channels: int, seed: int, fill: float
) -> None:
    patches = numbered(counts, voxels * channels)
    found = perturb(patches, counts, "keep_voxels", generator(seed), fill=fill, channels=channels)
    for before, after in zip(patches.split(counts), found.split(counts), strict=True):
        same = (after == before).view(-1, channels, voxels)
        assert torch.equal(same, same[:1, :1].expand_as(same))  # in all patches and channels
        assert int(same[0, 0].sum()) == kept(0.1, voxels)
        assert bool((after[~same.flatten(1)] == fill).all())


@thorough
@given(COUNTS, VOXELS, SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_noise_has_the_range_of_its_volume(counts: list[int], voxels: int, seed: int, dtype: torch.dtype) -> None:
    patches = numbered(counts, voxels).mul(-0.37).to(dtype)
    found = perturb(patches, counts, "noise", generator(seed))
    for before, after in zip(patches.split(counts), found.split(counts), strict=True):
        assert before.min() <= after.min() and after.max() <= before.max()


def test_noise_is_uniform_and_each_volumes_own() -> None:
    patches = torch.cat([torch.linspace(-1, 3, 8000).view(100, 80), torch.linspace(10, 11, 8000).view(100, 80)])
    found = perturb(patches, [100, 100], "noise", generator(0))
    for volume, low, high in zip(found.split(100), (-1, 10), (3, 11), strict=True):
        share = ((volume - low) / (high - low)).flatten()
        counts = torch.histc(share, 10, 0, 1)
        assert (counts - 800).abs().max() < 5 * math.sqrt(8000 * 0.1 * 0.9)
        ranks = torch.stack([share[:-1], share[1:]])
        assert torch.corrcoef(ranks)[0, 1].abs() < 5 / math.sqrt(8000)  # neighbours know nothing of each other
    flat = torch.full((3, 4), 0.7)
    assert torch.equal(perturb(flat, [3], "noise", generator(0)), flat)  # a volume without contrast has no range


def test_zeros_are_zero_whatever_the_fill() -> None:
    found = perturb(numbered([3, 2], 4), [3, 2], "zeros", generator(0), fill=FILL)
    assert found.shape == (5, 4) and not found.any()


@thorough
@given(COUNTS, VOXELS, SEEDS, st.sampled_from(KINDS), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_input_stays_and_the_outcome_repeats(
    counts: list[int], voxels: int, seed: int, kind: Perturbation, dtype: torch.dtype
) -> None:
    patches = numbered(counts, voxels).to(dtype)
    before = patches.clone()
    found = perturb(patches, counts, kind, generator(seed))
    assert torch.equal(patches, before)
    assert found.dtype == dtype and found.shape == patches.shape
    assert found.untyped_storage().data_ptr() != patches.untyped_storage().data_ptr()
    assert torch.equal(found, perturb(patches, counts, kind, generator(seed)))


@thorough
@given(COUNTS, VOXELS, SEEDS, st.sampled_from(KINDS))
def test_volumes_know_nothing_of_each_other(counts: list[int], voxels: int, seed: int, kind: Perturbation) -> None:
    """What becomes of one does not change with what is in the others, and holds only its own values."""
    patches = numbered(counts, voxels)
    found = perturb(patches, counts, kind, generator(seed))
    for n in range(len(counts)):
        others = [v if n == i else -7 * v for i, v in enumerate(patches.split(counts))]
        again = perturb(torch.cat(others), counts, kind, generator(seed))
        assert torch.equal(again.split(counts)[n], found.split(counts)[n])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zeros"])
def test_equal_volumes_are_drawn_apart_and_other_seeds_differ(kind: Perturbation) -> None:
    """Thirty patches of thirty voxels: that two draws agree has a chance below 1 in 4,000, and the seed is fixed."""
    volume = numbered([30], 30)
    first, second = perturb(volume.repeat(2, 1), [30, 30], kind, generator(1)).split(30)
    assert not torch.equal(first, second) and not torch.equal(first, volume)
    assert not torch.equal(first, perturb(volume, [30], kind, generator(2)))


def test_every_order_is_as_likely() -> None:
    """All six orders of three patches, and with voxels each beside all six orders of three positions."""
    patches, draws, n = numbered([3], 3), generator(7), 3600
    cases: list[tuple[Perturbation, int]] = [("shuffle_patches", 6), ("shuffle_voxels", 36)]
    for kind, orders in cases:
        found = Counter(tuple(perturb(patches, [3], kind, draws).flatten().tolist()) for _ in range(n))
        assert len(found) == orders
        spread = math.sqrt(n / orders * (1 - 1 / orders))
        assert all(abs(count - n / orders) < 5 * spread for count in found.values())


@pytest.mark.parametrize("kind", ["keep_patches", "keep_voxels"])
def test_every_choice_is_as_likely(kind: Perturbation) -> None:
    """Two of eight patches (20 % of 8 is 1.6), or two of twenty voxels: all pairs come up alike."""
    patches, draws, n = numbered([8], 20), generator(7), 3800
    stays = [(perturb(patches, [8], kind, draws) != 0) for _ in range(n)]
    axis = 1 if kind == "keep_patches" else 0
    found = Counter(tuple(same.any(axis).nonzero().flatten().tolist()) for same in stays)
    pairs = math.comb(patches.shape[1 - axis], 2)
    assert len(found) == pairs and all(len(pair) == 2 for pair in found)
    assert all(abs(count - n / pairs) < 5 * math.sqrt(n / pairs) for count in found.values())


def test_kinds_are_drawn_as_often_as_published() -> None:
    published = {
        "shuffle_patches": 0.16,
        "shuffle_voxels": 0.16,
        "keep_patches": 0.16,
        "keep_voxels": 0.16,
        "noise": 0.16,
        "zeros": 0.20,
    }
    assert {kind: p.probability for kind, p in PERTURBATIONS.items()} == published
    draws, n = generator(11), 10_000
    found = Counter(draw_kind(draws) for _ in range(n))
    for kind, share in published.items():
        assert abs(found[kind] - n * share) < 5 * math.sqrt(n * share * (1 - share)), kind  # type: ignore[index]
    assert sum(found.values()) == n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn_on", DEVICES)
@pytest.mark.parametrize("device", DEVICES)
def test_generator_and_patches_may_be_on_different_devices(kind: Perturbation, drawn_on: str, device: str) -> None:
    patches = numbered([6, 4], 20).to(torch.bfloat16)
    found = perturb(patches.to(device), [6, 4], kind, generator(3, drawn_on))
    assert found.device.type == device
    assert torch.equal(found.cpu(), perturb(patches, [6, 4], kind, generator(3, drawn_on)))


def test_channels_of_a_cut_volume_stay_copies_of_each_other() -> None:
    """A slice-video backbone's patches: one grey volume on three channels, whole tokens of 2 x 2 patches."""
    geometry = PatchGeometry((2, 3, 3), channels=3, merge=2)
    patches, (t, h, w) = patchify(torch.randn(5, 11, 7), geometry)
    for kind in KINDS:
        found = perturb(patches, [t * h * w], kind, generator(0), channels=3).unflatten(1, (3, -1))
        assert torch.equal(found, found[:, :1].expand_as(found)), kind


def test_no_volumes() -> None:
    assert perturb(torch.zeros(0, 8), [], "noise", generator(0)).shape == (0, 8)


def test_bad_input_is_named() -> None:
    patches = numbered([4], 6)
    with pytest.raises(ValueError, match="kind: 'blur' .* choose one of shuffle_patches, .*, zeros"):
        perturb(patches, [4], "blur", generator(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"counts: \[3\] .* the 4 patches"):
        perturb(patches, [3], "zeros", generator(0))
    with pytest.raises(ValueError, match=r"counts: \[4, 0\]"):
        perturb(patches, [4, 0], "zeros", generator(0))
    with pytest.raises(ValueError, match="channels: 4 do not divide the 6"):
        perturb(patches, [4], "zeros", generator(0), channels=4)

"""Every question once, every rank the same number of batches, every batch again from its position."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm3d.data.manifest import Row, Study
from mllm3d.data.samplers import BatchSchedule, Group, batches_for_rank, make_groups
from mllm3d.errors import UserError
from tests.data.scans import row


def rows_of(sizes: list[int], priors: bool = False) -> list[Row]:
    """`sizes[n]` questions about volume n, interleaved as a manifest may have them."""
    pairs = sorted((question, volume) for volume, size in enumerate(sizes) for question in range(size))
    return [row(f"{v}-{q}", volume=f"{v}.nii", prior="p.nii" if priors and q % 2 else None) for q, v in pairs]


SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=9)
SEEDS = st.integers(0, 2**31)


@given(SIZES, st.integers(1, 5), SEEDS, st.integers(0, 3), st.booleans())
def test_groups_hold_every_row_once(sizes: list[int], k: int, seed: int, epoch: int, priors: bool) -> None:
    rows = rows_of(sizes, priors)
    groups = make_groups(rows, k, seed, epoch)
    assert sorted(index for group in groups for index in group.rows) == list(range(len(rows)))
    for group in groups:
        assert 1 <= len(group.rows) <= k
        assert {(rows[n].study, rows[n].prior) for n in group.rows} == {(group.study, group.prior)}
    if not priors:  # as few groups as there can be
        assert len(groups) == sum(-(-size // k) for size in sizes)
    assert groups == make_groups(rows, k, seed, epoch)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), SEEDS, st.integers(0, 3))
def test_ranks_agree_and_lose_nothing(count: int, size: int, world: int, seed: int, epoch: int) -> None:
    groups = [Group(Study(f"{n}"), None, (n,)) for n in range(count)]
    ranks = [batches_for_rank(groups, size, rank, world, seed, epoch) for rank in range(world)]
    shapes = [[len(batch) for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(n == size for n in shapes[0][:-1]) and 1 <= shapes[0][-1] <= size
    times = Counter(group.study for batches in ranks for batch in batches for group in batch)
    assert set(times) == {group.study for group in groups}
    assert sum(times.values()) - count == -count % world  # a few come twice, so that ranks are equal
    if count >= world:
        assert max(times.values()) <= 2
    together = batches_for_rank(groups, size * world, 0, 1, seed, epoch)
    merged = [Counter(g for batches in ranks for g in batches[n]) for n in range(len(shapes[0]))]
    if count % world == 0:
        assert merged == [Counter(batch) for batch in together]


@given(
    SIZES,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    SEEDS,
    st.integers(0, 30),
    st.integers(1, 12),
)
def test_a_position_is_enough_to_continue(
    sizes: list[int], k: int, size: int, world: int, seed: int, before: int, after: int
) -> None:
    def schedule() -> BatchSchedule:
        return BatchSchedule(rows_of(sizes), k, size, world - 1, world, seed)

    straight = list(islice(schedule().from_here(), before + after))
    saved, _ = straight[before]
    resumed = schedule()
    assert saved == divmod(before, resumed.batches_per_epoch)
    resumed.seek(list(saved))  # as JSON gives it back
    assert list(islice(resumed.from_here(), after)) == straight[before:]
    assert resumed.position == saved


SHOWN: list[dict[str, object]] = [
    {"volume": "0.nii"},
    {"volume": None, "images": ["0.png", "1.png"]},
    {"volume": None, "images": ["1.png", "0.png"]},
    {"volume": None, "images": ["0.png"]},
    {"volume": None, "video": "0"},
    {"volume": "0.nii", "images": ["0.png"]},
]


@given(st.lists(st.integers(0, len(SHOWN) - 1), min_size=1, max_size=20), st.integers(1, 4), SEEDS, st.integers(0, 2))
def test_groups_of_any_studies_are_those_of_as_many_volumes(which: list[int], k: int, seed: int, epoch: int) -> None:
    """Order and company of rows depend on which rows share a study, not on what it is."""
    mixed = [row(f"{n}", **SHOWN[kind]) for n, kind in enumerate(which)]
    volumes = [row(f"{n}", volume=f"{kind}.nii") for n, kind in enumerate(which)]
    groups = make_groups(mixed, k, seed, epoch)
    assert [group.rows for group in groups] == [group.rows for group in make_groups(volumes, k, seed, epoch)]
    assert all(mixed[n].study == group.study for group in groups for n in group.rows)


def test_epochs_and_seeds_differ() -> None:
    rows = rows_of([4] * 8)
    first, second, other = (make_groups(rows, 2, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0)))
    assert first != second != other != first
    orders = [batches_for_rank(first, 2, 0, 1, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_is_pinned() -> None:
    """A resumed run reads on where it stopped: the order must not change with a release."""
    schedule = BatchSchedule(rows_of([3, 2, 4]), k=2, volumes_per_batch=2, rank=0, world=1, seed=7)
    assert schedule.batches_per_epoch == 3
    found = [[(str(group.study)[0], *group.rows) for group in batch] for _, batch in islice(schedule.from_here(), 3)]
    assert found == [[("1", 4, 1), ("2", 2, 5)], [("2", 8, 7), ("0", 3)], [("0", 0, 6)]]


@pytest.mark.parametrize("position", [(-1, 0), (0, 3), (0, -1), (2, 99)])
def test_positions_that_are_not_there(position: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="position"):
        BatchSchedule(rows_of([1, 1, 1]), k=1, volumes_per_batch=1).seek(position)


def test_no_rows() -> None:
    with pytest.raises(UserError, match="no rows"):
        BatchSchedule([], k=1, volumes_per_batch=1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        BatchSchedule(rows_of([1]), k=1, volumes_per_batch=1, rank=2, world=2)

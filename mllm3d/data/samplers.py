"""Which questions of which studies come when: a pure function of the rows, the seed and the epoch.

So a position is two numbers, (epoch, batch index), and nothing else has to be saved to continue in the middle
of an epoch, on any rank.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mllm3d.data.manifest import Row, Study
from mllm3d.errors import UserError

Position = tuple[int, int]
"""(epoch, index of the next batch in it)."""

_QUESTIONS, _GROUPS = 0, 1  # separate random streams of an epoch


class Group(NamedTuple):
    """Questions that share one encoding of a study; `rows` are indices into the schedule's rows."""

    study: Study
    prior: str | None
    rows: tuple[int, ...]


def make_groups(rows: Sequence[Row], k: int, seed: int, epoch: int) -> list[Group]:
    """All questions of each (study, prior), shuffled, in groups of at most `k`; each row is in one group."""
    by_study: dict[tuple[Study, str | None], list[int]] = {}
    for index, row in enumerate(rows):
        by_study.setdefault((row.study, row.prior), []).append(index)
    random = np.random.default_rng((seed, epoch, _QUESTIONS))
    groups: list[Group] = []
    for (study, prior), indices in by_study.items():
        mixed = [indices[n] for n in random.permutation(len(indices))]
        groups += [Group(study, prior, tuple(mixed[start : start + k])) for start in range(0, len(mixed), k)]
    return groups


def batches_for_rank(
    groups: Sequence[Group], volumes_per_batch: int, rank: int, world: int, seed: int, epoch: int
) -> list[list[Group]]:
    """This rank's batches of an epoch; batch n of all ranks together is one slice of the shuffled groups.

    Every rank gets the same number of batches, and of groups in each: up to `world - 1` groups from the front
    come a second time at the end. Only the last batch may be smaller than `volumes_per_batch`.
    """
    order = [groups[n] for n in np.random.default_rng((seed, epoch, _GROUPS)).permutation(len(groups))]
    missing = -len(order) % world
    order += [order[n % len(order)] for n in range(missing)]
    together = volumes_per_batch * world
    return [order[start : start + together][rank::world] for start in range(0, len(order), together)]


class BatchSchedule:
    """The batches of one rank, epoch after epoch without end. `position` is that of the next batch."""

    def __init__(
        self,
        rows: Sequence[Row],
        k: int,
        volumes_per_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        if not rows:
            raise UserError("data: no rows to make batches of")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self.rows = list(rows)
        self.seed = seed
        self._k, self._volumes_per_batch, self._rank, self._world = k, volumes_per_batch, rank, world
        self._loaded_epoch = -1
        self._batches: list[list[Group]] = []
        self.batches_per_epoch = len(self.epoch_batches(0))
        self.position: Position = (0, 0)

    def epoch_batches(self, epoch: int) -> list[list[Group]]:
        """All batches of this rank in an epoch."""
        if epoch != self._loaded_epoch:
            groups = make_groups(self.rows, self._k, self.seed, epoch)
            self._batches = batches_for_rank(groups, self._volumes_per_batch, self._rank, self._world, self.seed, epoch)
            self._loaded_epoch = epoch
        return self._batches

    def seek(self, position: Sequence[int]) -> None:
        """Continue with this batch. Raises ValueError for a position that this schedule doesn't have."""
        epoch, index = position
        if epoch < 0 or not 0 <= index < self.batches_per_epoch:
            raise ValueError(f"position {(epoch, index)} in epochs of {self.batches_per_epoch} batches")
        self.position = (epoch, index)

    def after(self, position: Position) -> Position:
        """The position that follows."""
        epoch, index = position
        return (epoch, index + 1) if index + 1 < self.batches_per_epoch else (epoch + 1, 0)

    def from_here(self) -> Iterator[tuple[Position, list[Group]]]:
        """Batches with their positions from `position` on, leaving `position` as it is."""
        position = self.position
        while True:
            yield position, self.epoch_batches(position[0])[position[1]]
            position = self.after(position)

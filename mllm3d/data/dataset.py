"""Groups of questions with their volumes, and the loader that brings them in batches."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm3d.config import VolumeConfig
from mllm3d.data.cache import VolumeCache
from mllm3d.data.manifest import Row, volume_path
from mllm3d.data.preprocess import Prepared, for_modality
from mllm3d.data.samplers import BatchSchedule, Group, Position
from mllm3d.data.volumes import UNKNOWN_LABEL
from mllm3d.errors import UserError


class GroupItem(NamedTuple):
    """A group with what it needs: the prior scan first if there is one, then the current one.

    `labels`: a uint8 (D, H, W) label map per volume. A row doesn't name its prior's map: it is that of the
    rows about the prior scan itself, or UNKNOWN_LABEL everywhere if there are none.
    """

    volumes: list[Prepared]
    rows: list[Row]
    labels: list[np.ndarray] | None


class Loaded(NamedTuple):
    """A collated batch. A checkpoint keeps `next_position`: seek it to continue with the batch after this."""

    batch: Any
    position: Position
    next_position: Position


def load_group(
    group: Group,
    rows: Sequence[Row],
    root: Path,
    cache: VolumeCache,
    config: VolumeConfig,
    want_labels: bool = False,
) -> GroupItem:
    """Read a group through the cache; `rows` is what its indices count, `root` the manifest's folder."""
    chosen = [rows[index] for index in group.rows]
    config = for_modality(config, chosen[0].modality)
    paths = [group.volume] if group.prior is None else [group.prior, group.volume]
    volumes = [cache.get(volume_path(root, path), config) for path in paths]
    if not want_labels:
        return GroupItem(volumes, chosen, None)
    maps = sorted({row.labels for row in chosen if row.labels is not None})
    if len(maps) != 1:
        found = "no label map" if not maps else f"{len(maps)} label maps"
        raise UserError(f"{group.volume}: {found} in its rows (first: {chosen[0].id}); this run needs one per volume")
    labels = [cache.get_labels(volume_path(root, maps[0]), config, like=volumes[-1])]
    if group.prior is not None:
        of_prior = next((row.labels for row in rows if row.volume == group.prior and row.labels), None)
        if of_prior is None:
            labels.insert(0, np.full(volumes[0].array.shape, UNKNOWN_LABEL, np.uint8))
        else:
            labels.insert(0, cache.get_labels(volume_path(root, of_prior), config, like=volumes[0]))
    return GroupItem(volumes, chosen, labels)


class _Failure(NamedTuple):
    """A user's error on its way out of a worker: raised there, torch would wrap it into a traceback."""

    message: str


class _Batches:
    """Data set whose index is a batch: workers read and collate, the schedule stays in the main process."""

    def __init__(
        self,
        rows: Sequence[Row],
        root: Path,
        cache: VolumeCache,
        config: VolumeConfig,
        collate: Callable[[list[GroupItem]], Any],
        want_labels: bool,
    ) -> None:
        self._rows, self._root, self._cache, self._config = rows, root, cache, config
        self._collate, self._want_labels = collate, want_labels

    def __getitem__(self, index: tuple[Position, list[Group]]) -> tuple[Any, Position] | _Failure:
        position, groups = index
        try:
            return self._collate(self._load(groups)), position
        except UserError as error:
            return _Failure(str(error))

    def _load(self, groups: list[Group]) -> list[GroupItem]:
        return [
            load_group(group, self._rows, self._root, self._cache, self._config, self._want_labels) for group in groups
        ]


def batch_loader(
    schedule: BatchSchedule,
    root: Path,
    cache: VolumeCache,
    config: VolumeConfig,
    collate: Callable[[list[GroupItem]], Any],
    workers: int = 0,
    want_labels: bool = False,
) -> Iterator[Loaded]:
    """Batches without end from `schedule.position` on, read by `workers` processes (0: this one).

    `schedule.position` follows what was handed out, not what workers have read ahead. torch's global random
    state is neither read nor moved, so that a resumed run draws the same numbers.
    """
    import torch
    from torch.utils.data import DataLoader

    batches = _Batches(schedule.rows, root, cache, config, collate, want_labels)
    loader: DataLoader[Any] = DataLoader(
        batches,  # type: ignore[arg-type]  # torch asks for no more of a Dataset than __getitem__
        sampler=schedule.from_here(),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(schedule.seed),
    )
    for found in loader:
        if isinstance(found, _Failure):
            raise UserError(found.message)
        batch, position = found
        following = schedule.after(position)
        schedule.seek(following)
        yield Loaded(batch, position, following)


def _as_is(batch: Any) -> Any:
    """torch's default would turn numpy arrays inside a batch into tensors."""
    return batch

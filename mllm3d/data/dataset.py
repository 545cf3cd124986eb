"""Groups of questions with their studies, and the loader that brings them in batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mllm3d.config import VolumeConfig
from mllm3d.data.cache import VolumeCache
from mllm3d.data.features import FeatureCache
from mllm3d.data.images import read_image, read_video
from mllm3d.data.manifest import Row, Study, volume_path
from mllm3d.data.preprocess import Prepared, for_modality
from mllm3d.data.samplers import BatchSchedule, Group, Position
from mllm3d.data.volumes import UNKNOWN_LABEL
from mllm3d.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class GroupItem(NamedTuple):
    """A group with what it needs: of volumes the prior scan first if there is one, then the current one.

    `features`: in place of volumes, where a run reads them, what a frozen encoder said of each.
    `images`: uint8 (H, W) or (H, W, 3) in the rows' order; `videos`: uint8 (T, H, W) or (T, H, W, 3).
    `labels`: a uint8 (D, H, W) label map per volume. A row doesn't name its prior's map: it is that of the
    rows about the prior scan itself, or UNKNOWN_LABEL everywhere if there are none.
    """

    volumes: list[Prepared]
    rows: list[Row]
    labels: list[np.ndarray] | None
    images: Sequence[np.ndarray] = ()
    videos: Sequence[np.ndarray] = ()
    features: Sequence["Mapping[str, Tensor]"] = ()


class Loaded(NamedTuple):
    """A collated batch. A checkpoint keeps `next_position`: seek it to continue with the batch after this."""

    batch: Any
    position: Position
    next_position: Position


@dataclass(frozen=True)
class Reader:
    """Reads groups of one manifest.

    Attributes:
        root: the manifest's folder. cache, config: of its volumes.
        want_volumes: False reads rows alone, for what learns from text. want_labels: label maps too.
        features: read what a frozen encoder said of the volumes in place of the volumes; it is all there.
    """

    root: Path
    cache: VolumeCache
    config: VolumeConfig
    want_volumes: bool = True
    want_labels: bool = False
    features: FeatureCache | None = None

    def load(self, group: Group, rows: Sequence[Row]) -> GroupItem:
        """A group; `rows` is what its indices count."""
        chosen = [rows[index] for index in group.rows]
        if not self.want_volumes:
            return GroupItem([], chosen, None)
        config = for_modality(self.config, chosen[0].modality)
        paths = [volume_path(self.root, path) for path in (group.prior, group.study.volume) if path is not None]
        images, videos = load_pixels(group.study, self.root)
        if self.features is not None:
            features = [self.features.get(path, config) for path in paths]
            return GroupItem([], chosen, None, images, videos, features)
        volumes = [self.cache.get(path, config) for path in paths]
        labels = self._labels(group, rows, volumes, config) if self.want_labels else None
        return GroupItem(volumes, chosen, labels, images, videos)

    def _labels(
        self, group: Group, rows: Sequence[Row], volumes: Sequence[Prepared], config: VolumeConfig
    ) -> list[np.ndarray]:
        """A label map for each volume."""
        chosen = [rows[index] for index in group.rows]
        maps = sorted({row.labels for row in chosen if row.labels is not None})
        if len(maps) != 1:
            found = "no label map" if not maps else f"{len(maps)} label maps"
            raise UserError(
                f"{group.study}: {found} in its rows (first: {chosen[0].id}); this run needs one per volume"
            )
        labels = [self.cache.get_labels(volume_path(self.root, maps[0]), config, like=volumes[-1])]
        if group.prior is not None:
            of_prior = next((row.labels for row in rows if row.volume == group.prior and row.labels), None)
            if of_prior is None:
                labels.insert(0, np.full(volumes[0].array.shape, UNKNOWN_LABEL, np.uint8))
            else:
                labels.insert(0, self.cache.get_labels(volume_path(self.root, of_prior), config, like=volumes[0]))
        return labels


def load_pixels(study: Study, root: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A study's images and its video (none or one), decoded.

    They are not cached: a frame of 1280 x 720 is decoded in 5 ms (JPEG) or 26 ms (PNG) on one core, and a training
    step of the 3B model on its 1,200 tokens takes 32 TFLOP, 90 ms of an H100. Pixels take ten times a JPEG's space.
    """
    images = [read_image(volume_path(root, path)) for path in study.images]
    return images, [] if study.video is None else [read_video(volume_path(root, study.video))]


class _Failure(NamedTuple):
    """A user's error on its way out of a worker: raised there, torch would wrap it into a traceback."""

    message: str


class _Batches:
    """Data set whose index is a batch: workers read and collate, the schedule stays in the main process."""

    def __init__(
        self,
        rows: Sequence[Row],
        reader: Reader,
        collate: Callable[[list[GroupItem]], Any],
    ) -> None:
        self._rows, self._reader, self._collate = rows, reader, collate

    def __getitem__(self, index: tuple[Position, list[Group]]) -> tuple[Any, Position] | _Failure:
        position, groups = index
        try:
            return self._collate([self._reader.load(group, self._rows) for group in groups]), position
        except UserError as error:
            return _Failure(str(error))


def batch_loader(
    schedule: BatchSchedule,
    reader: Reader,
    collate: Callable[[list[GroupItem]], Any],
    workers: int = 0,
) -> Iterator[Loaded]:
    """Batches without end from `schedule.position` on, read by `workers` processes (0: this one).

    `schedule.position` follows what was handed out, not what workers have read ahead. torch's global random
    state is neither read nor moved, so that a resumed run draws the same numbers.
    """
    import torch
    from torch.utils.data import DataLoader

    batches = _Batches(schedule.rows, reader, collate)
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

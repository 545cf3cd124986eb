"""Groups with their volumes, and a loader that continues exactly where it was."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm3d.config import VolumeConfig
from mllm3d.data.cache import VolumeCache
from mllm3d.data.dataset import GroupItem, Loaded, Reader, batch_loader
from mllm3d.data.images import read_image
from mllm3d.data.manifest import Row, Study
from mllm3d.data.preprocess import prepare, prepare_labels
from mllm3d.data.samplers import BatchSchedule, Group
from mllm3d.data.volumes import UNKNOWN_LABEL, read_labels, read_volume
from mllm3d.errors import UserError
from tests.data.pictures import picture, save
from tests.data.scans import row, save_nifti, scan

CONFIG = VolumeConfig(shape=(4, 4, 4))
NAMES = "abcd"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of four scans of which `a` and `b` have label maps."""
    for n, name in enumerate(NAMES):
        save_nifti(tmp_path / f"{name}.nii", scan() + np.int16(50 * n))
    for n, name in enumerate("ab"):
        save_nifti(tmp_path / f"{name}-labels.nii", (scan() % (3 + n)).astype(np.uint8))
    return tmp_path


def rows() -> list[Row]:
    return [row(f"{name}{n}", volume=f"{name}.nii") for name in NAMES for n in range(3)]


def load(root: Path, found: list[Row], group: Group, want_labels: bool = False) -> GroupItem:
    return Reader(root, VolumeCache(root / ".cache"), CONFIG, want_labels=want_labels).load(group, found)


def test_a_group_has_its_prior_first(root: Path) -> None:
    found = [row("1", volume="b.nii"), row("2", volume="b.nii", prior="a.nii")]
    item = load(root, found, Group(Study("b.nii"), "a.nii", (1,)))
    for prepared, name in zip(item.volumes, ("a", "b"), strict=True):
        np.testing.assert_array_equal(prepared.array, prepare(read_volume(root / f"{name}.nii"), CONFIG).array)
    assert item.rows == [found[1]] and item.labels is None
    assert len(load(root, found, Group(Study("b.nii"), None, (0,))).volumes) == 1


def test_mr_is_windowed_by_its_percentiles_in_training_as_in_prediction(root: Path) -> None:
    item = load(root, [row("1", volume="b.nii", modality="MR")], Group(Study("b.nii"), None, (0,)))
    by_percentiles = CONFIG.model_copy(update={"window_percentile": (0.5, 99.5)})
    expected = prepare(read_volume(root / "b.nii"), by_percentiles).array
    np.testing.assert_array_equal(item.volumes[0].array, expected)
    assert not np.array_equal(expected, prepare(read_volume(root / "b.nii"), CONFIG).array)


def test_labels_of_a_prior_are_its_own_or_unknown(root: Path) -> None:
    follow_up = row("1", volume="b.nii", prior="a.nii", labels="b-labels.nii")
    about_prior = row("2", volume="a.nii", labels="a-labels.nii")
    group = Group(Study("b.nii"), "a.nii", (0,))
    maps = {name: prepare_labels(read_labels(root / f"{name}-labels.nii"), CONFIG) for name in "ab"}
    labels = load(root, [follow_up, about_prior], group, want_labels=True).labels
    assert labels is not None
    np.testing.assert_array_equal(labels, [maps["a"], maps["b"]])
    labels = load(root, [follow_up], group, want_labels=True).labels
    assert labels is not None and (labels[0] == UNKNOWN_LABEL).all()
    np.testing.assert_array_equal(labels[1], maps["b"])


def test_labels_that_are_missing_or_two(root: Path) -> None:
    group = Group(Study("a.nii"), None, (0, 1))
    with pytest.raises(UserError, match=r"a\.nii: no label map in its rows \(first: 1\)"):
        load(root, [row("1", volume="a.nii"), row("2", volume="a.nii")], group, want_labels=True)
    two = [row(name, volume="a.nii", labels=f"{name}-labels.nii") for name in "ab"]
    with pytest.raises(UserError, match="2 label maps"):
        load(root, two, group, want_labels=True)


def test_a_group_has_its_images_in_order_and_its_video(root: Path) -> None:
    pixels = {name: save(root / name, picture(4, 6, seed=n)) for n, name in enumerate(["2.png", "1.png", "v/1.png"])}
    found = [
        row("1", volume=None, images=["2.png", "1.png"]),
        row("2", volume=None, video="v"),
        row("3", volume="a.nii", images=["1.png"]),
    ]
    images, video, both = (load(root, found, Group(item.study, None, (n,))) for n, item in enumerate(found))
    assert not images.volumes and not images.videos and images.labels is None
    for array, name in zip(images.images, ("2.png", "1.png"), strict=True):
        np.testing.assert_array_equal(array, read_image(pixels[name]))
    assert [array.shape for array in video.videos] == [(1, 4, 6)] and not video.images
    assert len(both.volumes) == len(both.images) == 1


def test_an_image_that_cannot_be_read_is_one_line(root: Path) -> None:
    (root / "1.png").write_bytes(b"damaged")
    mixed = [*rows(), row("x", volume=None, images=["1.png"])]
    with pytest.raises(UserError, match=r"1\.png: damaged, or no PNG file") as caught:
        list(islice(loader(root, BatchSchedule(mixed, k=2, volumes_per_batch=9), 0), 2))
    assert "\n" not in str(caught.value)


def collate(items: list[GroupItem]) -> dict[str, Any]:
    return {
        "ids": [found.id for item in items for found in item.rows],
        "means": [float(item.volumes[0].array.mean()) for item in items],
        "array": np.stack([item.volumes[0].array for item in items]),
    }


def loader(root: Path, schedule: BatchSchedule, workers: int) -> Any:
    return batch_loader(schedule, Reader(root, VolumeCache(root / ".cache"), CONFIG), collate, workers)


def schedule() -> BatchSchedule:
    return BatchSchedule(rows(), k=2, volumes_per_batch=3, seed=5)


def seen(batches: list[Loaded]) -> list[object]:
    return [(found.position, found.next_position, found.batch["ids"], found.batch["means"]) for found in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_where_it_was(root: Path, workers: int) -> None:
    """Also with workers that have read ahead: the position counts what was handed out."""
    straight = list(islice(loader(root, schedule(), 0), 8))
    first = schedule()
    before = list(islice(loader(root, first, workers), 4))
    assert first.position == before[-1].next_position == (1, 1)
    second = schedule()
    second.seek(before[-1].next_position)
    after = list(islice(loader(root, second, workers), 4))
    assert seen(before + after) == seen(straight)
    assert isinstance(before[0].batch["array"], np.ndarray)


def test_a_loader_leaves_torchs_random_state_alone(root: Path) -> None:
    for workers in (0, 1):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        list(islice(loader(root, schedule(), workers), 3))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_error_in_a_worker_stays_one_line(root: Path, workers: int) -> None:
    (root / "c.nii").write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        list(islice(loader(root, schedule(), workers), 4))
    assert "\n" not in str(caught.value) and "c.nii: not a NIfTI file" in str(caught.value)

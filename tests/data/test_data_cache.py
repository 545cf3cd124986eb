"""The cache: the same array with it and without, whoever writes and whatever breaks."""

import errno
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from mllm3d.config import VolumeConfig
from mllm3d.data import cache as cache_module
from mllm3d.data import files as files_module
from mllm3d.data.cache import VolumeCache
from mllm3d.data.preprocess import prepare, prepare_labels
from mllm3d.data.volumes import Volume, content_hash, read_labels, read_volume
from mllm3d.errors import UserError
from tests.data.scans import itk_image, save_dicom, save_nifti, scan

CONFIG = VolumeConfig(preset="phantom", shape=(8, 8, 8), flip=("W",))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_nifti(tmp_path / "x.nii.gz", scan())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The scans that were really read."""
    seen: list[Path] = []

    def read(path: Path) -> Volume:
        seen.append(path)
        return read_volume(path)

    monkeypatch.setattr(cache_module, "read_volume", read)
    return seen


def entries(root: Path) -> list[Path]:
    return sorted(root.glob("??/*.b2"))


def test_a_hit_is_the_same_to_the_bit(tmp_path: Path, path: Path, reads: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache")
    wanted = prepare(read_volume(path), CONFIG)
    for found in (
        cache.get(path, CONFIG),
        cache.get(path, CONFIG),
        VolumeCache(tmp_path / "cache").get(path, CONFIG),
    ):
        np.testing.assert_array_equal(found.array, wanted.array)
        np.testing.assert_array_equal(found.to_source, wanted.to_source)
        np.testing.assert_array_equal(found.source_affine, wanted.source_affine)
        assert found.source_shape == wanted.source_shape and found.array.dtype == np.float32
    assert reads == [path] and len(entries(tmp_path / "cache")) == 1


def test_labels_and_images_are_kept_apart(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "x.nii.gz", (scan() % 5).astype(np.uint8))
    cache = VolumeCache(tmp_path / "cache")
    image = cache.get(path, CONFIG)
    for _ in range(2):
        found = cache.get_labels(path, CONFIG, like=image)
        np.testing.assert_array_equal(found, prepare_labels(read_labels(path), CONFIG))
    other = save_nifti(tmp_path / "y.nii.gz", (scan((5, 5, 6)) % 5).astype(np.uint8))
    with pytest.raises(UserError, match="doesn't cover the same space"):
        cache.get_labels(other, CONFIG, like=image)


@pytest.mark.parametrize(
    ("changes", "new_entry"),
    [
        ({"window_hu": (-150.0, 300.0)}, True),
        ({"window_percentile": (1.0, 99.0)}, True),
        ({"shape": (8, 8, 9)}, True),
        ({"crop": (4, 4, 4)}, True),
        ({"spacing_mm": (2.0, 2.0, 2.0)}, True),
        ({"flip": ()}, True),
        ({"mean": 0.1, "std": 0.3}, False),
    ],
)
def test_the_key_holds_what_changes_the_entry(
    tmp_path: Path, path: Path, reads: list[Path], changes: dict[str, object], new_entry: bool
) -> None:
    cache = VolumeCache(tmp_path / "cache")
    other = VolumeConfig(**{**CONFIG.model_dump(), **changes})
    cache.get(path, CONFIG)
    np.testing.assert_array_equal(cache.get(path, other).array, prepare(read_volume(path), other).array)
    assert len(reads) == (2 if new_entry else 1)


def test_the_key_is_the_content_not_the_name(tmp_path: Path, path: Path, reads: list[Path]) -> None:
    cache = VolumeCache(tmp_path / "cache")
    cache.get(path, CONFIG)
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes(path.read_bytes())
    cache.get(copy, CONFIG)
    assert reads == [path]


@pytest.mark.parametrize("age_s", [0, 100])
def test_a_changed_file_is_read_again(tmp_path: Path, reads: list[Path], age_s: int) -> None:
    """Also where size and time stamp stay, as long as the file was new when it was hashed."""
    path = save_nifti(tmp_path / "x.nii", scan())
    stamp = time.time_ns() - age_s * 10**9
    os.utime(path, ns=(stamp, stamp))
    cache = VolumeCache(tmp_path / "cache")
    before = cache.get(path, CONFIG).array
    save_nifti(path, scan()[::-1])
    os.utime(path, ns=(stamp + age_s, stamp + age_s))
    after = cache.get(path, CONFIG).array
    assert len(reads) == 2 and not np.array_equal(before, after)


def test_the_hash_of_a_settled_file_is_remembered(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def hash_of(path: Path) -> str:
        hashed.append(path)
        return content_hash(path)

    monkeypatch.setattr(cache_module, "content_hash", hash_of)
    os.utime(path, (1e9, 1e9))
    for _ in range(2):
        cache = VolumeCache(tmp_path / "cache")
        cache.get(path, CONFIG)
        cache.get(path, CONFIG)
    assert hashed == [path]
    for memo in (tmp_path / "cache" / "sources").iterdir():
        memo.write_text("{broken")
    VolumeCache(tmp_path / "cache").get(path, CONFIG)
    assert hashed == [path, path]


def test_a_dicom_folder_is_cached_too(tmp_path: Path, reads: list[Path]) -> None:
    folder = save_dicom(tmp_path / "series", itk_image(scan()))
    cache = VolumeCache(tmp_path / "cache")
    first, second = cache.get(folder, CONFIG), cache.get(folder, CONFIG)
    np.testing.assert_array_equal(first.array, second.array)
    assert reads == [folder]


@pytest.mark.parametrize("place", [0, 10, 60, -1])
def test_a_damaged_entry_is_rebuilt_with_one_warning(
    tmp_path: Path, path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = VolumeCache(tmp_path / "cache")
    wanted = cache.get(path, CONFIG).array
    (entry,) = entries(tmp_path / "cache")
    good = entry.read_bytes()
    data = bytearray(good)
    data[place] ^= 1
    for damaged in (bytes(data), good[:50], b""):
        entry.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(cache.get(path, CONFIG).array, wanted)
        assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0] and str(entry) in caplog.messages[0]
        assert entry.read_bytes() == good


def _get_many(root: Path, paths: list[Path], results: "multiprocessing.Queue[list[float]]") -> None:
    cache = VolumeCache(root)
    results.put([float(cache.get(path, CONFIG).array.sum()) for _ in range(3) for path in paths])


def test_processes_that_write_the_same_entries(tmp_path: Path) -> None:
    paths = [save_nifti(tmp_path / f"{n}.nii.gz", scan() + np.int16(n)) for n in range(3)]
    wanted = [float(prepare(read_volume(path), CONFIG).array.sum()) for path in paths] * 3
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[list[float]] = context.Queue()
    workers = [context.Process(target=_get_many, args=(tmp_path / "cache", paths, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [wanted] * 4
    assert len(entries(tmp_path / "cache")) == 3 and not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the cache .*data.cache") as caught:
        VolumeCache(tmp_path / "file" / "cache").get(path, CONFIG)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_no_half_entry(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module.Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        VolumeCache(tmp_path / "cache").get(path, CONFIG)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_a_bad_scan_is_not_cached(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "x.nii.gz", np.zeros((4, 5, 6), np.int16))
    with pytest.raises(UserError, match="empty image"):
        VolumeCache(tmp_path / "cache").get(path, CONFIG)
    assert not entries(tmp_path / "cache")
    with pytest.raises(UserError, match="no such file"):
        VolumeCache(tmp_path / "cache").get(tmp_path / "gone.nii.gz", CONFIG)

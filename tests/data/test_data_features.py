"""Features of frozen encoders on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mllm3d.config import VolumeConfig
from mllm3d.data.cache import VolumeCache
from mllm3d.data.features import FeatureCache
from mllm3d.errors import UserError

CONFIG = VolumeConfig(shape=(4, 6, 8))
FEATURES = {"low": torch.randn(6, 4, dtype=torch.bfloat16), "high": torch.randn(2, 8)[:, ::2]}


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.npy"
    np.save(path, np.random.default_rng(0).integers(-1000, 1000, (4, 6, 8)).astype(np.int16))
    return path


def cache(tmp_path: Path, encoder: str = "a") -> FeatureCache:
    return FeatureCache(VolumeCache(tmp_path / "cache"), encoder)


def test_features_come_back_bit_for_bit(tmp_path: Path, scan: Path) -> None:
    features = cache(tmp_path)
    assert not features.has(scan, CONFIG)
    features.put(scan, CONFIG, FEATURES)
    assert features.has(scan, CONFIG)
    found = cache(tmp_path).get(scan, CONFIG)
    assert found.keys() == FEATURES.keys()
    for name, value in FEATURES.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_another_encoder_preprocessing_or_content_has_none(tmp_path: Path, scan: Path) -> None:
    features = cache(tmp_path)
    features.put(scan, CONFIG, FEATURES)
    assert not cache(tmp_path, "b").has(scan, CONFIG)
    for change in ({"shape": (4, 6, 6)}, {"mean": 0.5}, {"window_hu": (-100.0, 100.0)}):
        assert not features.has(scan, CONFIG.model_copy(update=change))
    copy = tmp_path / "copy.npy"
    copy.write_bytes(scan.read_bytes())
    assert features.has(copy, CONFIG)  # the content counts, not the name
    np.save(scan, np.zeros((4, 6, 8), np.int16))
    assert not features.has(scan, CONFIG)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_damaged_entry_is_noticed(tmp_path: Path, scan: Path, damage: str) -> None:
    features = cache(tmp_path)
    features.put(scan, CONFIG, FEATURES)
    file = features.file(scan, CONFIG)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    match damage:
        case "flip":
            file.write_bytes(data)
        case "cut":
            file.write_bytes(file.read_bytes()[:-5])
        case "empty":
            file.write_bytes(b"")
        case _:
            file.unlink()
    with pytest.raises(UserError, match="start the run again"):
        features.get(scan, CONFIG)
    assert not features.has(scan, CONFIG)  # so that the next run computes them

"""Real CT and MR: NIfTI, JPEG 2000 DICOM, and a DICOM series with an RTSTRUCT."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mllm3d.config import VolumeConfig
from mllm3d.data.cache import VolumeCache
from mllm3d.data.check import check_manifest
from mllm3d.data.dataset import Reader
from mllm3d.data.manifest import write_manifest
from mllm3d.data.preprocess import prepare, same_grid
from mllm3d.data.samplers import make_groups
from mllm3d.data.volumes import read_labels, read_volume
from mllm3d.errors import UserError
from tests.data.scans import row

# path, modality, label map, (D, H, W), spacing (d, h, w) in mm
SCANS = [
    (
        "totalsegmentator/example_ct.nii.gz",
        "CT",
        "totalsegmentator/example_seg_fast_force_split.nii.gz",
        (112, 101, 122),
        (3, 3, 3),
    ),
    (
        "totalsegmentator/example_ct_dicom",
        "CT",
        "totalsegmentator/example_seg_dicom.nii.gz",
        (20, 512, 512),
        (2, 0.977, 0.977),
    ),
    (
        "totalsegmentator/example_mr_sm.nii.gz",
        "MR",
        "totalsegmentator/example_seg_mr.nii.gz",
        (20, 91, 117),
        (3, 3, 3),
    ),
    (
        "sts_001/STS_001_CT_image.nii.gz",
        "CT",
        "sts_001/STS_001_CT_mask.nii.gz",
        (59, 202, 198),
        (3.27, 0.977, 0.977),
    ),
    (
        "sts_001/STS_001_CT_dicom",
        "CT",
        "sts_001/STS_001_CT_mask.nii.gz",
        (59, 202, 198),
        (3.27, 0.977, 0.977),
    ),
    (
        "sts_001/STS_001_MR_T1_image.nii.gz",
        "MR",
        "sts_001/STS_001_MR_T1_mask.nii.gz",
        (59, 158, 174),
        (3.27, 0.977, 0.977),
    ),
]


@pytest.mark.parametrize(("name", "modality", "labels", "shape", "spacing"), SCANS)
def test_every_scan_is_read(
    real_data: Path, name: str, modality: str, labels: str, shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    volume = read_volume(real_data / name)
    assert volume.array.shape == shape
    np.testing.assert_allclose(volume.spacing_mm, spacing, atol=1e-3)
    found = read_labels(real_data / labels)
    assert found.array.shape == shape and found.array.any()


def test_a_series_and_its_nifti_are_one_volume(real_data: Path) -> None:
    series = read_volume(real_data / "sts_001" / "STS_001_CT_dicom")
    image = read_volume(real_data / "sts_001" / "STS_001_CT_image.nii.gz")
    np.testing.assert_array_equal(series.array, image.array)
    config = VolumeConfig()
    assert same_grid(prepare(series, config), prepare(image, config))


def test_an_rtstruct_is_no_volume_and_no_slice(real_data: Path, tmp_path: Path) -> None:
    structures = real_data / "sts_001" / "STS_001_CT_rtstruct"
    with pytest.raises(UserError, match="no DICOM image"):
        read_volume(structures)
    mixed = tmp_path / "mixed"
    shutil.copytree(real_data / "sts_001" / "STS_001_CT_dicom", mixed)
    shutil.copy(structures / "RS.dcm", mixed / "000000_RS.dcm")
    assert read_volume(mixed).array.shape == (59, 202, 198)


def test_organs_lie_where_they_do_in_a_body(real_data: Path) -> None:
    """Liver on the patient's right and before the kidneys, spleen on the left: the axes are as stated."""
    labels = read_labels(real_data / "totalsegmentator" / "example_seg_fast_force_split.nii.gz").array
    centre = {name: np.argwhere(labels == n).mean(axis=0) for name, n in (("liver", 5), ("spleen", 1))}
    kidneys = {name: np.argwhere(labels == n).mean(axis=0) for name, n in (("right", 2), ("left", 3))}
    assert centre["liver"][2] < centre["spleen"][2] and kidneys["right"][2] < kidneys["left"][2]
    assert centre["liver"][0] > kidneys["right"][0]
    assert centre["liver"][1] < kidneys["right"][1]


def test_check_and_loading_through_a_manifest(real_data: Path, tmp_path: Path) -> None:
    """Linked into a data set: `mllm3d data check` finds nothing, and all groups load with labels."""
    (tmp_path / "real").symlink_to(real_data)
    rows = [
        row(f"q{n}", case=f"{n}", volume=f"real/{name}", modality=modality, labels=f"real/{labels}")
        for n, (name, modality, labels, _, _) in enumerate(SCANS)
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    assert check_manifest(tmp_path / "m.jsonl") == []
    config = VolumeConfig(preset="phantom", window_percentile=(1, 99))
    cache = VolumeCache(tmp_path / ".cache")
    for group in make_groups(rows, k=1, seed=0, epoch=0):
        item = Reader(tmp_path, cache, config, want_labels=True).load(group, rows)
        assert item.volumes[0].array.shape == (56, 112, 112) and item.labels is not None
        assert item.labels[0].any() and item.volumes[0].array.std() > 0.1

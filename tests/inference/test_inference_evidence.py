"""A token's box has to land on the right voxels of the scan as it was stored, whatever its orientation."""

from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from mllm3d.config import VolumeConfig
from mllm3d.data.preprocess import prepare
from mllm3d.data.volumes import read_volume
from mllm3d.inference.evidence import boxes_to_mask, draw, mask_on_scan, plane, resample_mask, write_nifti

ORIENTATIONS = [
    "".join(pair[side] for pair, side in zip(order, sides, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for sides in product((0, 1), repeat=3)
]


def store(path: Path, array_ras: np.ndarray, spacing: tuple[float, float, float], codes: str) -> Path:
    """Write an array given in RAS axes as a file whose axes point to `codes`."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-31.0, 17.0, 5.0)
    image = nibabel.Nifti1Image(array_ras.astype(np.int16), affine)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes))
    nibabel.save(image.as_reoriented(turn), path)
    return path


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_bright_box_is_found_again_on_a_resampled_scan_of_any_orientation(tmp_path: Path, codes: str) -> None:
    # 4 mm slices in the file, 2 mm and twice the width on the model's grid: W is resized and reversed too.
    scan = np.full((16, 24, 12), -1000)
    scan[2:6, 4:12, 8:10] = 500  # RAS indices: right is high, front is high, head is high
    volume = read_volume(store(tmp_path / "scan.nii.gz", scan, (2.0, 2.0, 4.0), codes))
    config = VolumeConfig(spacing_mm=(2.0, 2.0, 2.0), shape=(24, 24, 32), flip=("W",))
    prepared = prepare(volume, config)
    # By hand: D = 2 * [8, 10); H counts from the front: 24 - [4, 12); W counts from the right and is doubled:
    # 2 * (16 - [2, 6)), and is then reversed: 32 - that.
    box = np.array([[[16, 20], [12, 20], [4, 12]]])
    mask = boxes_to_mask(box, (24, 24, 32))
    assert prepared.array[mask].mean() > 0.6 > 0.2 > prepared.array[~mask].mean()
    on_scan = mask_on_scan(mask, prepared)
    stored = np.asarray(nibabel.load(tmp_path / "scan.nii.gz").dataobj)
    np.testing.assert_array_equal(on_scan, stored == 500)


def test_crop_and_pad_move_the_box_and_what_was_cropped_is_not_kept(tmp_path: Path) -> None:
    scan = np.arange(16 * 16 * 16).reshape(16, 16, 16) % 700
    volume = read_volume(store(tmp_path / "scan.nii", scan, (1.0, 1.0, 1.0), "LPS"))
    prepared = prepare(volume, VolumeConfig(crop=(8, 24, 16)))
    everything = mask_on_scan(np.ones((8, 24, 16), bool), prepared)  # stored (W, H, D)
    assert everything[:, :, 4:12].all() and everything.sum() == 16 * 16 * 8


def test_nearest_is_exact_at_the_edges_of_a_voxel() -> None:
    mask = np.array([False, True, False, False]).reshape(4, 1, 1)
    to_mask = np.diag([0.25, 1.0, 1.0, 1.0])  # four new voxels per voxel; centres at -3/8, -1/8, 1/8, 3/8
    to_mask[0, 3] = -3 / 8
    assert np.flatnonzero(resample_mask(mask, to_mask, (16, 1, 1))).tolist() == [4, 5, 6, 7]


def test_nifti_overlays_on_the_scan(tmp_path: Path) -> None:
    scan = np.zeros((8, 10, 12))
    scan[1, 2, 3] = 300
    source = store(tmp_path / "scan.nii.gz", scan, (1.5, 2.0, 2.5), "PIR")
    prepared = prepare(read_volume(source), VolumeConfig())
    write_nifti(prepared.array == prepared.array.max(), prepared, tmp_path / "kept.nii.gz")
    kept, original = nibabel.load(tmp_path / "kept.nii.gz"), nibabel.load(source)
    np.testing.assert_allclose(kept.affine, original.affine)
    assert kept.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(kept.dataobj), np.asarray(original.dataobj) == 300)


def test_planes_are_in_radiological_display() -> None:
    # Canonical axes: D to the head, H to the back, W to the left. One marked voxel per direction.
    volume = np.zeros((5, 6, 7), int)
    volume[2, 0, 3], volume[2, 3, 0], volume[4, 3, 3] = 1, 2, 3  # front, right, head
    axial, coronal, sagittal = plane(volume, 0, 2), plane(volume, 1, 3), plane(volume, 2, 3)
    assert axial[0, 3] == 1 and axial[3, 0] == 2  # front on top, right on the viewer's left
    assert coronal[0, 3] == 3 and coronal[2, 0] == 2  # head on top, right on the viewer's left
    assert sagittal[0, 3] == 3 and sagittal[2, 0] == 1  # head on top, front on the viewer's left


@pytest.mark.parametrize("kept", ["some", "none", "all"])
def test_picture_is_drawn_and_washes_out_only_what_was_dropped(
    tmp_path: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    shown: list[np.ndarray] = []
    original = Axes.imshow

    def imshow(axes: Axes, image: np.ndarray, **options: Any) -> object:
        shown.append(image)
        return original(axes, image, **options)

    monkeypatch.setattr(Axes, "imshow", imshow)
    scan = np.random.default_rng(0).integers(-1000, 0, (16, 16, 16))
    volume = read_volume(store(tmp_path / "scan.nii", scan, (1.0, 1.0, 2.0), "RAS"))
    prepared = prepare(volume, VolumeConfig())
    mask = np.full(prepared.array.shape, kept == "all")
    if kept == "some":
        mask[4:8, 4:8, 4:8] = True
    draw(volume, prepared, mask, r"What? $\nonsense$ stays as it is".replace("$", r"\$"), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert len(shown) == 3
    washed = [image >= 0.8 - 1e-6 for image in shown]
    expected = {"some": 15 / 16, "none": 1.0, "all": 0.25}[kept]  # 16 of 256 pixels of each plane are kept
    assert np.mean(washed) == pytest.approx(expected, abs=0.06)

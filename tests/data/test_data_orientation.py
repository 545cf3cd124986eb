"""However a scan is stored, the same canonical array comes out, with the way back to the stored index."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mllm3d.data.orientation import apply_map
from mllm3d.data.volumes import Volume, read_volume
from mllm3d.errors import UserError
from tests.data.scans import ORIENTATIONS, SHAPE, SPACING, itk_image, save_dicom, save_nifti, scan, store

ROTATIONS = [
    (axes, flips) for axes, flips in ORIENTATIONS if np.linalg.det(store(scan(), axes=axes, flips=flips)[1][:3, :3]) > 0
]


def check(volume: Volume, stored: np.ndarray, affine: np.ndarray) -> None:
    np.testing.assert_array_equal(volume.array, scan())
    assert volume.array.dtype == np.int16 and volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.spacing_mm, SPACING, rtol=1e-5)
    assert volume.source_shape == stored.shape
    np.testing.assert_allclose(volume.source_affine, affine, atol=1e-4)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    index = apply_map(volume.to_source, places.astype(float))
    np.testing.assert_array_equal(index, np.rint(index))
    np.testing.assert_array_equal(stored[tuple(np.moveaxis(index.astype(int), -1, 0))], scan())


def test_there_are_48_orientations_and_half_of_them_are_rotations() -> None:
    affines = {store(scan(), axes=a, flips=f)[1][:3, :3].tobytes() for a, f in ORIENTATIONS}
    assert len(affines) == 48 and len(ROTATIONS) == 24


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_nifti_in_all_48_orientations(tmp_path: Path, axes: tuple[int, ...], flips: tuple[bool, ...]) -> None:
    path = save_nifti(tmp_path / "x.nii.gz", scan(), axes=axes, flips=flips)
    check(read_volume(path), *store(scan(), axes=axes, flips=flips))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_nrrd_and_metaimage_in_all_48_orientations(tmp_path: Path, suffix: str) -> None:
    for axes, flips in ORIENTATIONS:
        path = tmp_path / f"x{suffix}"
        sitk.WriteImage(itk_image(scan(), axes=axes, flips=flips), str(path))
        check(read_volume(path), *store(scan(), axes=axes, flips=flips))


def test_dicom_in_all_24_rotations(tmp_path: Path) -> None:
    """DICOM has no mirrored slices: their normal is the cross product of rows and columns."""
    for n, (axes, flips) in enumerate(ROTATIONS):
        folder = save_dicom(tmp_path / str(n), itk_image(scan(), axes=axes, flips=flips))
        check(read_volume(folder), *store(scan(), axes=axes, flips=flips))


def test_known_anatomy_lands_where_the_page_says(tmp_path: Path) -> None:
    """A voxel at the head, the back and the left of an RAS file is the last one of every canonical axis."""
    array = np.zeros((3, 4, 5), np.int16)  # stored (i, j, k) = (right, front, head)
    array[0, 0, 4] = 1000
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0])), tmp_path / "ras.nii")
    found = read_volume(tmp_path / "ras.nii").array
    assert found.shape == (5, 4, 3) and found[-1, -1, -1] == 1000


def test_an_oblique_scan_keeps_its_grid(tmp_path: Path) -> None:
    stored, affine = store(scan())
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(stored, turn @ affine), tmp_path / "x.nii")
    volume = read_volume(tmp_path / "x.nii")
    np.testing.assert_array_equal(volume.array, scan())
    np.testing.assert_allclose(volume.spacing_mm, SPACING, rtol=1e-5)


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.diag([1.0, 1.0, 0.0, 1.0]), "singular"),
        (np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        (np.diag([1.0, np.nan, 1.0, 1.0]), "NaN"),
    ],
)
def test_an_affine_without_directions_is_an_error(tmp_path: Path, affine: np.ndarray, words: str) -> None:
    image = nib.Nifti1Image(store(scan())[0], np.eye(4))
    image.header["sform_code"], image.header["qform_code"] = 2, 0
    for name, values in zip(("srow_x", "srow_y", "srow_z"), affine, strict=False):
        image.header[name] = values
    path = tmp_path / "x.nii"
    body = np.asarray(image.dataobj).tobytes(order="F")
    image.header["vox_offset"] = 352
    path.write_bytes(image.header.binaryblock + b"\0" * 4 + body)
    with pytest.raises(UserError, match=words):
        read_volume(path)

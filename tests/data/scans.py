"""Small asymmetric scans and rows for the tests of mllm3d.data."""

import itertools
import locale
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from mllm3d.data.manifest import Row

SHAPE = (4, 5, 6)  # (D, H, W): no two alike, so that a swapped axis shows
SPACING = (3.0, 2.0, 1.5)
SERIES_UID, SOP_UID = "1.2.826.0.1.3680043.2.1125.1", "1.2.826.0.1.3680043.2.1125.2"

# Column n: where (d, h, w) points in RAS. d to S, h to P, w to L.
_RAS_FROM_DHW = np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]], dtype=np.float64)

ORIENTATIONS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)
]


def scan(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A canonical (D, H, W) int16 array in which every voxel differs."""
    return (np.arange(np.prod(shape)) * 7 - 1000).astype(np.int16).reshape(shape)


def store(
    array: np.ndarray,
    axes: tuple[int, ...] = (2, 1, 0),
    flips: tuple[bool, ...] = (False, False, False),
    spacing: tuple[float, ...] = SPACING,
) -> tuple[np.ndarray, np.ndarray]:
    """A canonical array as stored in a file: its axis n is canonical axis `axes[n]`, reversed if `flips[n]`.

    Returns the stored array (i, j, k) and its affine to RAS mm; voxel (0, 0, 0) of `array` is at 10, 20, 30.
    """
    stored = array.transpose(axes)
    affine = np.eye(4)
    affine[:3, 3] = (10, 20, 30)
    for n, axis in enumerate(axes):
        step = _RAS_FROM_DHW[:, axis] * spacing[axis]
        if flips[n]:
            affine[:3, 3] += step * (array.shape[axis] - 1)
            step = -step
            stored = np.flip(stored, n)
        affine[:3, n] = step
    return stored, affine


def save_nifti(path: Path, array: np.ndarray, **how: Any) -> Path:
    """Write a canonical array as NIfTI."""
    stored, affine = store(array, **how)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(stored), affine), path)
    return path


def itk_image(array: np.ndarray, **how: Any) -> sitk.Image:
    """A canonical array as an ITK image (LPS) with the stored layout."""
    stored, affine = store(array, **how)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def save_dicom(folder: Path, image: sitk.Image, series: str = SERIES_UID, start: int = 0) -> Path:
    """Write an ITK image as a DICOM series with HU offset by a rescale intercept of -1024."""
    folder.mkdir(parents=True, exist_ok=True)
    encoding = locale.setlocale(locale.LC_CTYPE)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    for k in range(image.GetDepth()):
        slice_ = image[:, :, k]
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{SOP_UID}.{start + k}",
            "0008|0060": "CT",
            "0020|000e": series,
            "0020|0013": str(start + k),
            "0020|0032": "\\".join(f"{x:.4f}" for x in image.TransformIndexToPhysicalPoint((0, 0, k))),
            "0020|0037": "\\".join(f"{x:.6f}" for x in (*direction[:, 0], *direction[:, 1])),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        # Names in reverse, so that nothing depends on them.
        writer.SetFileName(str(folder / f"{900 - start - k}.dcm"))
        writer.Execute(slice_)
    locale.setlocale(locale.LC_CTYPE, encoding)  # GDCM's writer leaves the whole process with ASCII
    return folder


def row(name: str = "q1", **fields: Any) -> Row:
    """A valid row; `fields` replace its own."""
    given = {
        "id": name,
        "case": "c1",
        "split": "train",
        "volume": "volumes/c1.nii.gz",
        "question": "Is there a nodule?",
        "answer": "Yes",
        "task": "existence",
    }
    return Row(**{**given, **fields})

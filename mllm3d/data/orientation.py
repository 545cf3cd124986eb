"""Where an axis points: stated here once, for every volume in the project.

**Canonical array.** Axes (D, H, W). The index grows toward the patient's
    D: superior (feet to head),   H: posterior (front to back),   W: left (patient's right to left).
So slice 0 is the lowest, row 0 is the front of the patient, and column 0 is the patient's right, as
radiologists look at an axial slice. Spacing is (d, h, w) in mm.

**World.** Millimetres in RAS+ as in NIfTI: x grows toward the patient's right, y toward the front, z toward
the head. DICOM and ITK use LPS+ (x to the left, y to the back); `ras_from_lps` converts.

**Stored index.** (i, j, k) counts voxels as the file has them. `to_source` is a 4 x 4 matrix that takes
(d, h, w, 1) to (i, j, k, 1); index n is the centre of voxel n.

The affine decides, never a space tag or the file's axis order. An oblique scan keeps its own grid: axes are
permuted and reversed to the nearest of the patient's, voxels are not interpolated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel import orientations

from mllm3d.errors import UserError

_WHD_POINT_TO = ("L", "P", "S")
_WHD_FROM_DHW = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)


class Stored(NamedTuple):
    """A scan as its file has it: `array` (i, j, k) and `affine` (4, 4) from stored index to RAS mm."""

    array: np.ndarray
    affine: np.ndarray


class Oriented(NamedTuple):
    """A scan on the canonical axes: `array` (D, H, W), `spacing_mm` (d, h, w), `to_source` (4, 4)."""

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    to_source: np.ndarray


def canonical(stored: Stored, path: Path) -> Oriented:
    """Bring a stored scan to the canonical axes by permuting and reversing axes.

    Raises `UserError` if the affine doesn't say where the axes point.
    """
    affine = np.asarray(stored.affine, dtype=np.float64)
    _check_affine(affine, path)
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(_WHD_POINT_TO))
    turned = orientations.apply_orientation(stored.array, turn)
    to_source = orientations.inv_ornt_aff(turn, stored.array.shape) @ _WHD_FROM_DHW
    sizes = np.linalg.norm((affine @ to_source)[:3, :3], axis=0)
    spacing_mm = (float(sizes[0]), float(sizes[1]), float(sizes[2]))
    return Oriented(np.ascontiguousarray(turned.transpose(2, 1, 0)), spacing_mm, to_source)


def ras_from_lps(affine_lps: np.ndarray) -> np.ndarray:
    """Affine to RAS mm from an affine to LPS mm (DICOM, ITK)."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_lps


def apply_map(index_map: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Take points (..., 3) through a 4 x 4 index map or affine."""
    return points @ index_map[:3, :3].T + index_map[:3, 3]


def corners_mm(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Centres of the first and last voxel (2, 3) in mm; with the shape, equal for arrays over the same space."""
    return apply_map(affine, np.array([[0, 0, 0], [n - 1 for n in shape]], dtype=np.float64))


def _check_affine(affine: np.ndarray, path: Path) -> None:
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: the affine holds NaN or infinity; write the image again with a valid one")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Unit columns: the determinant is then 1 for orthogonal axes at any spacing, and 0 where two coincide.
    if (sizes < 1e-4).any() or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise UserError(
            f"{path}: the affine is singular (voxel sizes {sizes.round(4).tolist()} mm); correct its header"
        )

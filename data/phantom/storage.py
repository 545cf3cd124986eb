"""Phantom volumes on disk: NIfTI in one of several stored orientations, the same bytes every time."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

ORIENTATIONS = ("LPS", "RAS", "LAS", "RPS", "LSA", "PSR", "SAL", "IRP")
"""Stored axes (i, j, k) point to these sides of the patient; the first is the canonical array's own."""


def stored_spacing(spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """The spacing as a NIfTI header holds it (float32): measuring with it gives what readers measure."""
    d, h, w = (float(np.float32(step)) for step in spacing_mm)
    return d, h, w


def write_nifti(array: np.ndarray, spacing_mm: tuple[float, float, float], orientation: str, path: Path) -> None:
    """Write a canonical (D, H, W) array as .nii.gz with its axes stored as ``orientation`` says.

    The affine (RAS mm) puts the centre of the volume at the origin.
    """
    d, h, w = spacing_mm
    affine = np.diag([-w, -h, d, 1.0])
    centre = (np.array(array.shape[::-1]) - 1) / 2
    affine[:3, 3] = -affine[:3, :3] @ centre
    turn = orientations.ornt_transform(orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(tuple(orientation)))
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine).as_reoriented(turn)
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))

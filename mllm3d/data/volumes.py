"""A scan from disk to the canonical axes: NIfTI, a DICOM series folder, NRRD, MetaImage, .npy."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mllm3d.data.limits import check_size
from mllm3d.data.nifti import one_volume_shape, read_nifti
from mllm3d.data.orientation import Stored, canonical
from mllm3d.errors import UserError

FORMATS = ".nii, .nii.gz, .nrrd, .mha, .mhd, .npy or a folder with a DICOM series"

UNKNOWN_LABEL = 255
"""Stands where nobody has labelled; a label map from a file can't hold it."""


@dataclass(frozen=True)
class Volume:
    """One scan on the canonical axes (see `mllm3d.data.orientation`).

    `array` (D, H, W), C-contiguous, in the file's values (HU for CT): int16 where that holds them exactly,
    else float32; uint8 for label maps. `to_source` (4, 4) takes (d, h, w, 1) to the stored index (i, j, k,
    1), `source_affine` (4, 4) takes that to RAS mm. `has_spacing` is False for .npy, which holds voxels only.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    to_source: np.ndarray
    source_shape: tuple[int, int, int]
    source_affine: np.ndarray
    path: Path
    has_spacing: bool = True


def read_volume(path: str | Path) -> Volume:
    """Read an image. Raises `UserError` for anything that isn't one intact, finite, non-empty volume."""
    path = Path(path)
    volume = _oriented(path)
    _check_values(path, volume.array)
    return volume


def read_labels(path: str | Path) -> Volume:
    """Read a label map: whole numbers 0 to 254 as uint8. It may be empty."""
    path = Path(path)
    volume = _oriented(path)
    array = volume.array
    if not (array.min() >= 0 and array.max() < UNKNOWN_LABEL and (array == np.floor(array)).all()):
        raise UserError(f"{path}: not a label map: labels are whole numbers from 0 to 254")
    return Volume(**{**vars(volume), "array": array.astype(np.uint8)})


def volume_files(path: str | Path) -> list[Path]:
    """The files that hold a volume, in the order of hashing. Raises `UserError` if it isn't there."""
    path = Path(path)
    _check_exists(path)
    if path.is_dir():
        from mllm3d.data.dicom import dicom_files

        return dicom_files(path)
    if path.suffix.lower() == ".mhd":
        from mllm3d.data.itk import itk_parts

        return itk_parts(path)
    return [path]


def content_hash(path: str | Path) -> str:
    """SHA-256 of what the volume's files hold, whatever their names."""
    parts = []
    for file in volume_files(path):
        with file.open("rb") as handle:
            parts.append(hashlib.file_digest(handle, "sha256").digest())
    return digest(*parts)


def digest(*parts: bytes) -> str:
    """SHA-256 of parts that are told apart by their lengths."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _oriented(path: Path) -> Volume:
    _check_exists(path)
    try:
        stored = _read_stored(path)
    except (OSError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not enough memory"
        raise UserError(f"{path}: cannot be read: {reason or error}") from error
    i, j, k = stored.array.shape
    found = canonical(stored, path)
    return Volume(
        array=_compact(path, found.array),
        spacing_mm=found.spacing_mm,
        to_source=found.to_source,
        source_shape=(i, j, k),
        source_affine=np.asarray(stored.affine, dtype=np.float64),
        path=path,
        has_spacing=path.suffix.lower() != ".npy",
    )


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    near = path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    hint = f" (there is {near.name})" if near.is_file() else ""
    raise UserError(f"{path}: no such file or folder; correct the path{hint}")


def _read_stored(path: Path) -> Stored:
    # SimpleITK takes a while to import and most scans are NIfTI: it is imported where it is needed.
    name = path.name.lower()
    if path.is_dir():
        from mllm3d.data.dicom import read_dicom_series

        return read_dicom_series(path)
    if name.endswith((".nii", ".nii.gz")):
        return read_nifti(path)
    if name.endswith((".nrrd", ".mha", ".mhd")):
        from mllm3d.data.itk import read_itk

        return read_itk(path)
    if name.endswith(".npy"):
        return _read_npy(path)
    hint = "; for DICOM give the folder of the series" if name.endswith((".dcm", ".ima")) else ""
    raise UserError(f"{path}: not a known volume format ({FORMATS}){hint}")


def _read_npy(path: Path) -> Stored:
    """A bare array, by contract (D, H, W) on the canonical axes; leading axes of size 1 are dropped."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a plain .npy array of numbers, or truncated: {reason}") from error
    if array.dtype.kind not in "iuf":
        raise UserError(f"{path}: array of {array.dtype}; one of real numbers is needed")
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    check_size(path, one_volume_shape(path, list(array.shape)), array.dtype.itemsize)
    # Index (d, h, w) points to S, P, L: in RAS mm that is (-w, -h, d).
    affine = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
    return Stored(np.array(array).reshape(array.shape[:3]), affine)


def _compact(path: Path, array: np.ndarray) -> np.ndarray:
    """int16 where that is exact for the whole array, else float32, in native byte order."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    limits = np.iinfo(np.int16)
    fits = array.dtype.itemsize == 1 or (array.min() >= limits.min and array.max() <= limits.max)
    return array.astype(np.int16 if fits else np.float32, copy=False)


def _check_values(path: Path, array: np.ndarray) -> None:
    lowest, highest = array.min(), array.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        bad = int((~np.isfinite(array)).sum())
        raise UserError(f"{path}: {bad} of {array.size} voxels are NaN or infinite; replace them with a value for air")
    if lowest == highest:
        raise UserError(f"{path}: empty image: every voxel is {lowest:g}")

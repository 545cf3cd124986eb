"""A DICOM series: one folder, one volume.

SimpleITK (GDCM) decodes the slices, JPEG 2000 included, and applies each slice's rescale slope and intercept.
Which files are slices, their order, and whether one is missing is decided here from every header, because
GDCM takes the first series it meets and only warns about gaps.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from mllm3d.data.itk import itk_reason, silence
from mllm3d.data.limits import check_size
from mllm3d.data.orientation import Stored, ras_from_lps
from mllm3d.errors import UserError

_GAP_TOLERANCE = 0.05  # of the slice distance, plus 0.02 mm for rounded positions
_NOT_IMAGES = tuple(
    f"1.2.840.10008.5.1.4.1.1.{tail}"
    for tail in (
        "481.3",
        "481.4",
        "481.5",
        "481.6",
        "481.7",
        "481.8",
        "481.9",
        "88.",
        "11.",
        "104.",
        "66.",
        "67",
    )
)
"""SOP classes that lie beside a series and hold no slices of it: radiotherapy structures, plans and records,
reports, presentation states, documents, registrations, segmentations."""
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"


@dataclass(frozen=True)
class _Slice:
    path: Path
    series: str
    size: tuple[int, int]
    spacing: tuple[float, float]
    axes: np.ndarray  # (2, 3): directions of i and j in LPS
    position: np.ndarray  # (3,): centre of the first voxel in LPS mm


def read_dicom_series(folder: Path) -> Stored:
    """Read the one image series in a folder. Other DICOM objects (RTSTRUCT, reports) and other files are not
    part of it.

    Raises `UserError` for no series, several series, repeated, missing or uneven slices, or an unreadable
    slice.
    """
    slices = [found for path in dicom_files(folder) if (found := _read_header(path)) is not None]
    if not slices:
        raise UserError(f"{folder}: no DICOM image in this folder; name the folder that holds the slices themselves")
    _check_one_series(folder, slices)
    normal = np.cross(*slices[0].axes)
    slices.sort(key=lambda item: float(item.position @ normal))
    step = _even_step(folder, slices, normal)
    check_size(folder, (*slices[0].size, len(slices)), itemsize=4)
    affine = np.eye(4)
    affine[:3, :2] = slices[0].axes.T * np.array(slices[0].spacing)
    affine[:3, 2] = step
    affine[:3, 3] = slices[0].position
    return Stored(_read_pixels(folder, slices), ras_from_lps(affine))


def dicom_files(folder: Path) -> list[Path]:
    """The files in a folder by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _read_header(path: Path) -> _Slice | None:
    """Geometry of a slice; None for what is no DICOM file, or a DICOM object without slices."""
    sop_class = _sop_class(path)
    if sop_class.startswith(_NOT_IMAGES) or sop_class == _MEDIA_STORAGE_DIRECTORY:
        return None
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        with silence():
            reader.ReadImageInformation()
    except RuntimeError as error:
        if not sop_class:
            return None
        raise UserError(f"{path}: cannot be read as a DICOM slice: {itk_reason(error)}; copy it again") from error
    size, keys = reader.GetSize(), set(reader.GetMetaDataKeys())
    if len(size) > 2 and size[2] > 1:
        raise UserError(f"{path}: a multi-frame DICOM file; convert it to NIfTI or to one file per slice")
    if not {"0020|0032", "0020|0037"} <= keys:
        raise UserError(f"{path}: a DICOM image without position or orientation; move it out of the series' folder")
    series = reader.GetMetaData("0020|000e").strip(" \0") if "0020|000e" in keys else ""
    direction = np.array(reader.GetDirection()).reshape(3, 3)
    return _Slice(path, series, size[:2], reader.GetSpacing()[:2], direction[:, :2].T, np.array(reader.GetOrigin()))


def _sop_class(path: Path) -> str:
    """SOP class UID from the file meta information; "" if the file doesn't begin as a DICOM file."""
    with path.open("rb") as file:
        start = file.read(1024)
    if start[128:132] != b"DICM":
        return ""
    tag = start.find(b"\x02\x00\x02\x00UI", 132)
    if tag < 0:
        return "unknown"
    length = int.from_bytes(start[tag + 6 : tag + 8], "little")
    return start[tag + 8 : tag + 8 + length].decode("ascii", "replace").strip(" \0") or "unknown"


def _check_one_series(folder: Path, slices: list[_Slice]) -> None:
    series = sorted({item.series for item in slices})
    if len(series) > 1:
        raise UserError(f"{folder}: holds {len(series)} image series; give each its own folder")
    first = slices[0]
    for item in slices:
        same = item.size == first.size and np.allclose(item.spacing, first.spacing, rtol=1e-3)
        if not same or not np.allclose(item.axes, first.axes, atol=1e-3):
            raise UserError(f"{item.path}: its size, spacing or orientation differs from {first.path.name}; remove it")
    if len(slices) == 1:
        raise UserError(f"{folder}: 2-D image (one DICOM slice); a volume with several slices is needed")


def _even_step(folder: Path, slices: list[_Slice], normal: np.ndarray) -> np.ndarray:
    """Vector (3,) in mm from one slice to the next; a tilted gantry makes it oblique to the slices."""
    positions = np.stack([item.position for item in slices])
    distances = np.diff(positions @ normal)
    usual = float(np.median(distances))
    repeated = int((distances < 0.01).sum())
    if repeated:
        raise UserError(f"{folder}: {repeated} slices lie where another lies (phases or copies); keep one per position")
    uneven = np.abs(distances - usual) > _GAP_TOLERANCE * usual + 0.02
    if uneven.any():
        where = slices[int(np.argmax(uneven))].path.name
        raise UserError(
            f"{folder}: uneven slices: {distances.max():.2f} mm after {where} where {usual:.2f} mm is usual; "
            "complete the series"
        )
    step: np.ndarray = (positions[-1] - positions[0]) / (len(slices) - 1)
    return step


def _read_pixels(folder: Path, slices: list[_Slice]) -> np.ndarray:
    """Voxels (i, j, k), rescaled slice by slice."""
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(item.path) for item in slices])
    try:
        with silence():
            return np.asarray(sitk.GetArrayFromImage(reader.Execute())).T
    except RuntimeError as error:
        raise UserError(f"{folder}: a slice cannot be decoded: {itk_reason(error)}; copy the series again") from error

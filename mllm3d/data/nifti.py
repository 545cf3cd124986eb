"""NIfTI files, read strictly: checksum, exact length and header before any voxel is believed.

nibabel and SimpleITK return wrong voxels from a .nii.gz with a flipped bit, because they stop before the
checksum at the end of the gzip stream. Here the stream is read to its end, and its length must be what the
header says.
"""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from mllm3d.data.limits import MAX_BYTES, check_size
from mllm3d.data.orientation import Stored
from mllm3d.errors import UserError

_HEADERS: dict[int, type[Nifti1Header]] = {348: Nifti1Header, 540: Nifti2Header}
_HEADER_BYTES = 540
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # xyzt_units: metre, micrometre; anything else is taken as mm
_GZIP = 16 + zlib.MAX_WBITS

_quiet = logging.Logger("mllm3d.data.nifti.header")  # nibabel reports harmless oddities here: not worth a line
_quiet.addHandler(logging.NullHandler())


def read_nifti(path: Path) -> Stored:
    """Read a .nii or .nii.gz (NIfTI-1 or -2, single file), scaled by its slope and intercept.

    Raises `UserError` for anything but an intact 3-D image of real numbers with a known orientation.
    """
    packed = _read_bytes(path)
    compressed = packed[:2] == b"\x1f\x8b"
    if compressed != (path.suffix.lower() == ".gz"):
        what = "is gzip-compressed but not named .gz" if compressed else "is named .gz but is not gzip-compressed"
        raise UserError(f"{path}: {what}; rename it")
    header = _parse_header(path, _gunzip(path, packed, _HEADER_BYTES, whole=False) if compressed else packed)
    shape, dtype = _checked_shape(path, header), _checked_dtype(path, header)
    offset = int(header["vox_offset"])
    wanted = offset + check_size(path, shape, dtype.itemsize, len(packed))
    body = _gunzip(path, packed, wanted) if compressed else packed
    if len(body) != wanted:
        state = f"truncated: {len(body)} bytes where" if len(body) < wanted else "more bytes than"
        raise UserError(f"{path}: {state} the header asks for {wanted}; copy it again")
    array = np.frombuffer(body, dtype, offset=offset).reshape(shape, order="F")
    return Stored(_scaled(path, array, header), _checked_affine(path, header))


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES / 2**30:g} GiB; crop or resample it first")
    packed = path.read_bytes()
    if len(packed) < 2:
        raise UserError(f"{path}: the file is empty; copy it again")
    return packed


def _gunzip(path: Path, packed: bytes, limit: int, whole: bool = True) -> bytes:
    """Unpack; `whole` reads to the stream's end, so that zlib compares checksum and length.

    Never unpacks more than `limit` bytes and one: the caller sees from the length that there is more.
    """
    parts: list[bytes] = []
    room = limit + 1
    try:
        while packed and room > 0:
            stream = zlib.decompressobj(_GZIP)
            parts.append(stream.decompress(packed, room))
            room -= len(parts[-1])
            if not stream.eof and room > 0:
                if whole:
                    raise UserError(f"{path}: truncated: its gzip stream has no end; copy it again")
                break
            packed = stream.unused_data.lstrip(b"\0")  # gzip allows several members and zeros after the last
    except zlib.error as error:
        raise UserError(f"{path}: damaged gzip stream ({error}); copy it again") from error
    return b"".join(parts)


def _parse_header(path: Path, start: bytes) -> Nifti1Header:
    size = start[:4]
    length = next((n for order in "<>" if len(size) == 4 and (n := struct.unpack(f"{order}i", size)[0]) in _HEADERS), 0)
    if not length or len(start) < length:
        raise UserError(f"{path}: not a NIfTI file, or cut off within its header; copy it again")
    try:
        header = _HEADERS[length](start[:length], check=False)
        if not bytes(header["magic"]).startswith((b"n+1", b"n+2")):
            raise UserError(f"{path}: not a single-file NIfTI (magic {bytes(header['magic'])[:3]!r}); convert it")
        header.check_fix(logger=_quiet, error_level=40)
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: invalid NIfTI header: {_first_line(error)}") from error
    lowest = length + 4  # the four bytes that announce extensions
    if not (np.isfinite(header["vox_offset"]) and lowest <= header["vox_offset"] <= MAX_BYTES):
        raise UserError(f"{path}: invalid NIfTI header: voxels at byte {header['vox_offset']}, inside the header")
    return header


def _checked_shape(path: Path, header: Nifti1Header) -> tuple[int, int, int]:
    ndim = int(header["dim"][0])
    if not 1 <= ndim <= 7:
        raise UserError(f"{path}: invalid NIfTI header: {ndim} dimensions")
    return one_volume_shape(path, [int(n) for n in header["dim"][1 : ndim + 1]])


def one_volume_shape(path: Path, shape: list[int]) -> tuple[int, int, int]:
    """The three spatial sizes; raises `UserError` for a 2-D image or a series of volumes."""
    text = " x ".join(str(n) for n in shape)
    if min(shape, default=0) < 1:
        raise UserError(f"{path}: invalid header: image size {text or 'missing'}")
    extra = [n for n in shape[3:] if n > 1]
    if extra:
        raise UserError(f"{path}: {3 + len(extra)}-D image ({text}); one volume is needed: split it into 3-D files")
    if len(shape) < 3 or min(shape[:3]) == 1:
        raise UserError(f"{path}: 2-D image ({text}); a volume with several slices is needed")
    return shape[0], shape[1], shape[2]


def _checked_dtype(path: Path, header: Nifti1Header) -> np.dtype:
    dtype: np.dtype = header.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf" or dtype.itemsize > 8:
        code = int(header["datatype"])
        raise UserError(f"{path}: voxels are not single real numbers (NIfTI data type {code}); convert it to int16")
    return dtype


def _checked_affine(path: Path, header: Nifti1Header) -> np.ndarray:
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        raise UserError(f"{path}: neither qform nor sform is set, so left and right are unknown; set the affine")
    try:
        affine = np.array(header.get_best_affine(), dtype=np.float64)
    except HeaderDataError as error:
        raise UserError(f"{path}: invalid NIfTI header: {_first_line(error)}") from error
    affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def _scaled(path: Path, array: np.ndarray, header: Nifti1Header) -> np.ndarray:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise UserError(f"{path}: invalid NIfTI header: {_first_line(error)}") from error
    if np.isinf(header["scl_slope"]):  # nibabel takes it for "not scaled", which is written as 0 or NaN
        raise UserError(f"{path}: invalid NIfTI header: infinite scl_slope")
    slope, intercept = (1.0 if slope is None else slope), (0.0 if intercept is None else intercept)
    if (slope, intercept) == (1.0, 0.0):
        return array
    if slope == 1 and intercept == round(intercept) and array.dtype.kind in "iu" and array.dtype.itemsize < 8:
        return array.astype(np.int64) + int(intercept)
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

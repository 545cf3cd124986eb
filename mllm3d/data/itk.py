"""What SimpleITK reads: NRRD and MetaImage files, and the pixels of DICOM slices.

ITK's own messages span lines and its warnings go straight to stderr; here they become one line or nothing.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from mllm3d.data.limits import check_size
from mllm3d.data.nifti import one_volume_shape
from mllm3d.data.orientation import Stored, ras_from_lps
from mllm3d.errors import UserError

sitk.ProcessObject.GlobalWarningDisplayOff()

_HEADER_BYTES = 1 << 16
_EACH_LINE = re.MULTILINE
_NRRD_SPACE = r"^space: *(left|right)-(anterior|posterior)-superior|^space: *[LR][AP]S\b"
_ITEM_BYTES = {"8-bit": 1, "16-bit": 2, "32-bit": 4, "64-bit": 8}


def read_itk(path: Path) -> Stored:
    """Read a .nrrd, .mha or .mhd volume with an orientation of its own.

    Raises `UserError` for several components, 2-D or 4-D images, missing orientation, damaged voxels, or
    voxels in another folder.
    """
    _check_text_header(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() == ".nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        with silence():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read: {itk_reason(error)}") from error
    shape = one_volume_shape(path, list(reader.GetSize()))
    if reader.GetNumberOfComponents() != 1:
        count = reader.GetNumberOfComponents()
        raise UserError(f"{path}: {count} values per voxel; one is needed: split the channels")
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())
    packed = sum(part.stat().st_size for part in itk_parts(path))
    unpacked = check_size(path, shape, _ITEM_BYTES.get(kind.split()[0], 8), packed)
    _check_data(path, unpacked)
    try:
        with silence():
            image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read: {itk_reason(error)}; copy it again") from error
    while image.GetDimension() > 3:  # trailing axes of size 1
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    return Stored(sitk.GetArrayFromImage(image).T, image_affine(image))


def itk_parts(path: Path) -> list[Path]:
    """The files that hold this volume: a .mhd has its voxels in a second one beside it."""
    if path.suffix.lower() != ".mhd":
        return [path]
    match = re.search(r"^ElementDataFile\s*=\s*(.+?)\s*$", _header_text(path), _EACH_LINE)
    name = match[1] if match else "LOCAL"
    if name.split()[0] == "LIST" or Path(name).name != name or "%" in name:
        raise UserError(f"{path}: ElementDataFile = {name}: one file in the same folder is needed; convert it to .mha")
    part = path.with_name(name)
    if name != "LOCAL" and not part.is_file():
        raise UserError(f"{path}: its voxels should be in {part}: no such file")
    return [path] if name == "LOCAL" else [path, part]


def image_affine(image: sitk.Image) -> np.ndarray:
    """Affine (4, 4) from ITK index (i, j, k) to RAS mm of a 3-D image."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return ras_from_lps(affine)


def itk_reason(error: RuntimeError) -> str:
    """The last line of an ITK exception that says something, without the address of what raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if line != "Reason: Success"]
    return re.sub(r"^ITK ERROR: (\w+\(0x[0-9a-f]+\): )?", "", lines[-1]) if lines else "unknown error"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send file descriptor 2 nowhere: MetaIO writes there itself whatever ITK's warnings are set to."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_data(path: Path, wanted: int) -> None:
    """Length of the voxels, and their checksum if they are compressed.

    MetaIO goes on with wrong voxels where unpacking fails, and NrrdIO takes a stream without gzip's first
    bytes for plain voxels.
    """
    text = _header_text(path)
    data = _data_bytes(path)
    if re.search(r"^CompressedData\s*=\s*True|^encoding: *gz", text, _EACH_LINE):
        stream = zlib.decompressobj(32 + zlib.MAX_WBITS)
        try:
            data = stream.decompress(data, wanted + 1)
        except zlib.error as error:
            raise UserError(f"{path}: damaged voxels ({error}); copy it again") from error
        if not stream.eof and len(data) <= wanted:
            raise UserError(f"{path}: truncated: its compressed voxels have no end; copy it again")
    skips = re.search(r"^(HeaderSize|(byte|line) skip)", text, _EACH_LINE)
    if len(data) < wanted or (len(data) > wanted and not skips):
        raise UserError(f"{path}: the header asks for {wanted} bytes of voxels, not {len(data)}; copy it again")


def _data_bytes(path: Path) -> bytes:
    """What follows the header, or the file beside a .mhd."""
    parts = itk_parts(path)
    data = parts[-1].read_bytes()
    if len(parts) > 1:
        return data
    end = re.search(rb"\r?\n\r?\n" if path.suffix.lower() == ".nrrd" else rb"ElementDataFile[^\n]*\n", data)
    return data[end.end() :] if end else b""


def _check_text_header(path: Path) -> None:
    """ITK gives an image without orientation the identity, and follows a data file anywhere: refuse both."""
    text = _header_text(path)
    if path.suffix.lower() == ".nrrd":
        if re.search(r"^data ?file:", text, _EACH_LINE | re.IGNORECASE):
            raise UserError(f"{path}: keeps its voxels in another file; convert it to one attached .nrrd")
        named = re.search(_NRRD_SPACE, text, _EACH_LINE | re.IGNORECASE)
        oriented = named is not None and "space directions:" in text
    else:
        if path.suffix.lower() == ".mha" and not re.search(r"^ElementDataFile\s*=\s*LOCAL\s*$", text, _EACH_LINE):
            raise UserError(f"{path}: has no voxels of its own (ElementDataFile = LOCAL); convert it")
        oriented = re.search(r"^(TransformMatrix|Rotation|Orientation)\s*=", text, _EACH_LINE) is not None
    if not oriented:
        raise UserError(f"{path}: no axis directions in the header, so left and right are unknown; add them")


def _header_text(path: Path) -> str:
    """The lines before the voxels."""
    with path.open("rb") as file:
        text = file.read(_HEADER_BYTES).replace(b"\r\n", b"\n").decode("latin-1")
    if path.suffix.lower() == ".nrrd":
        return text.partition("\n\n")[0]
    last = re.search(r"^ElementDataFile.*$", text, _EACH_LINE)
    return text[: last.end()] if last else text

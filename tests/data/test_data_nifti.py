"""NIfTI files: what is right is read exactly, what is wrong gives one line."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm3d.data import limits
from mllm3d.data.volumes import read_labels, read_volume
from mllm3d.errors import UserError
from tests.data.scans import save_nifti, scan, store

Damage = Callable[[bytes], bytes]


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    """The bytes of an intact uncompressed file."""
    return save_nifti(tmp_path / "good.nii", scan()).read_bytes()


def put(offset: int, fmt: str, *values: float | bytes) -> Damage:
    """Overwrite header fields at an offset."""
    new = struct.pack("<" + fmt, *values)
    return lambda data: data[:offset] + new + data[offset + len(new) :]


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


HEADER_DAMAGE: dict[str, tuple[Damage, str]] = {
    "size of header": (put(0, "i", 1), "not a NIfTI"),
    "no dimensions": (put(40, "h", 0), "dimensions"),
    "too many dimensions": (put(40, "h", 9), "not a NIfTI|invalid NIfTI header|dimensions"),
    "negative size": (put(42, "h", -6), "size"),
    "zero size": (put(46, "h", 0), "size"),
    "2-D": (put(40, "h", 2), "2-D image"),
    "one slice": (put(40, "4h", 3, 24, 5, 1), "2-D image"),
    "4-D": (put(40, "5h", 4, 6, 5, 2, 2), "4-D image"),
    "5-D": (put(40, "6h", 5, 6, 5, 1, 2, 2), "5-D image"),
    "unknown data type": (put(70, "h", 7), "data type|header"),
    "RGB": (put(70, "2h", 128, 24), "real numbers"),
    "complex": (put(70, "2h", 32, 64), "real numbers"),
    "voxels inside the header": (put(108, "f", 0.0), "inside the header"),
    "voxels at NaN": (put(108, "f", float("nan")), "header"),
    "infinite slope": (put(112, "f", float("inf")), "header"),
    "infinite intercept": (put(112, "2f", 1.0, float("inf")), "header"),
    "no orientation": (put(252, "2h", 0, 0), "left and right are unknown"),
    "a pair of files": (put(344, "4s", b"ni1\0"), "single-file"),
    "no magic": (put(344, "4s", b"abcd"), "single-file"),
    "claims more than it has": (put(42, "h", 60), "truncated"),
    "claims 16 TB": (put(42, "3h", 20000, 20000, 20000), "over the limit"),
}


@pytest.mark.parametrize("name", HEADER_DAMAGE)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_wrong_header_is_one_line(tmp_path: Path, good: bytes, name: str, suffix: str) -> None:
    damage, words = HEADER_DAMAGE[name]
    data = damage(good)
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == ".nii.gz" else data)
    message = error_of(path)
    assert any(word in message for word in words.split("|")), message


FILE_DAMAGE: dict[str, tuple[str, Damage, str]] = {
    "empty": (".nii", lambda data: b"", "empty"),
    "empty gz": (".nii.gz", lambda data: b"", "empty"),
    "text": (".nii", lambda data: b"hello world, this is not an image", "not a NIfTI"),
    "cut in the header": (".nii", lambda data: data[:300], "cut off"),
    "cut in the voxels": (".nii", lambda data: data[:-3], "truncated"),
    "cut stream": (".nii.gz", lambda data: gzip.compress(data)[:-12], "truncated"),
    "cut checksum": (".nii.gz", lambda data: gzip.compress(data)[:-2], "truncated"),
    "stream of half the voxels": (".nii.gz", lambda data: gzip.compress(data[:-60]), "truncated"),
    "longer than the header says": (".nii", lambda data: data + b"\0", "more bytes"),
    "longer stream": (".nii.gz", lambda data: gzip.compress(data + bytes(9)), "more bytes"),
    "bytes after the stream": (".nii.gz", lambda data: gzip.compress(data) + b"rest", "damaged gzip"),
    "wrong checksum": (
        ".nii.gz",
        lambda data: gzip.compress(data)[:-8] + bytes(4) + gzip.compress(data)[-4:],
        "gzip",
    ),
    "compressed but .nii": (".nii", gzip.compress, "not named .gz"),
    "plain but .nii.gz": (".nii.gz", lambda data: data, "not gzip-compressed"),
}


@pytest.mark.parametrize("name", FILE_DAMAGE)
def test_a_wrong_file_is_one_line(tmp_path: Path, good: bytes, name: str) -> None:
    suffix, damage, words = FILE_DAMAGE[name]
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(damage(good))
    assert words in error_of(path)


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_other_voxels(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = save_nifti(folder / "flip.nii.gz", scan())
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = read_volume(path).array
    except UserError as error:
        assert "\n" not in str(error)
    else:  # gzip's time stamp or file name
        np.testing.assert_array_equal(found, scan())


def test_a_bomb_is_stopped_before_it_unpacks(tmp_path: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = put(42, "3h", 800, 800, 800)(good)[:352]
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(data + bytes(1_000_000)))
    assert "times its size" in error_of(path)
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)
    assert "over the limit" in error_of(path)


def test_a_stream_that_never_ends_is_not_unpacked_beyond_its_header(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "long.nii.gz"
    path.write_bytes(gzip.compress(good + bytes(50_000_000)))
    assert "more bytes" in error_of(path)


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "1 of 120 voxels are NaN"), (np.inf, "infinite"), (-np.inf, "infinite")]
)
def test_values_that_are_no_numbers(tmp_path: Path, value: float, words: str) -> None:
    array = scan().astype(np.float32)
    array[1, 2, 3] = value
    assert words in error_of(save_nifti(tmp_path / "x.nii.gz", array))


def test_float64_beyond_float32_is_infinite(tmp_path: Path) -> None:
    array = scan().astype(np.float64)
    array[0, 0, 0] = 1e300
    assert "infinite" in error_of(save_nifti(tmp_path / "x.nii.gz", array))


def test_an_empty_image(tmp_path: Path) -> None:
    assert "every voxel is -1024" in error_of(save_nifti(tmp_path / "x.nii.gz", np.full((4, 5, 6), -1024, np.int16)))


def test_a_missing_gz_is_not_replaced_by_its_neighbour(tmp_path: Path) -> None:
    save_nifti(tmp_path / "x.nii", scan())
    message = error_of(tmp_path / "x.nii.gz")
    assert "no such file" in message and "there is x.nii" in message
    assert "no such file" in error_of(tmp_path / "y.nii.gz")


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "f4", "f8", ">i2", ">f4"])
def test_every_real_data_type_keeps_its_values(tmp_path: Path, dtype: str) -> None:
    array = np.arange(120).reshape(4, 5, 6).astype(dtype)
    stored, affine = store(array)
    image = nib.Nifti1Image(stored, affine, nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<"), dtype=dtype)
    nib.save(image, tmp_path / "x.nii.gz")
    found = read_volume(tmp_path / "x.nii.gz").array
    np.testing.assert_array_equal(found, array)
    assert found.dtype == (np.float32 if dtype.lstrip(">")[0] == "f" else np.int16)
    assert found.dtype.isnative


def test_values_beyond_int16_become_float32(tmp_path: Path) -> None:
    array = scan().astype(np.int32)
    array[0, 0, 0] = 40000
    found = read_volume(save_nifti(tmp_path / "x.nii", array)).array
    assert found.dtype == np.float32 and found[0, 0, 0] == 40000


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1.0, -1024.0, np.int16), (2.0, -1024.0, np.float32), (0.5, 0.25, np.float32)],
)
def test_slope_and_intercept_are_applied_once(
    tmp_path: Path, good: bytes, slope: float, intercept: float, dtype: type
) -> None:
    path = tmp_path / "x.nii"
    path.write_bytes(put(112, "2f", slope, intercept)(good))
    found = read_volume(path).array
    np.testing.assert_array_equal(found, scan() * slope + intercept)
    assert found.dtype == dtype


def test_nifti_2_extensions_and_trailing_singletons(tmp_path: Path) -> None:
    stored, affine = store(scan())
    second = nib.Nifti2Image(stored[..., None, None], affine)
    second.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100))
    nib.save(second, tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "two.nii.gz").array, scan())


def test_qform_and_metres(tmp_path: Path) -> None:
    stored, affine = store(scan())
    image = nib.Nifti1Image(stored, np.diag([0.001, 0.001, 0.001, 1]) @ affine)
    image.set_qform(image.affine, 1)
    image.set_sform(None, 0)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "x.nii")
    volume = read_volume(tmp_path / "x.nii")
    np.testing.assert_allclose(volume.spacing_mm, (3.0, 2.0, 1.5), rtol=1e-4)
    np.testing.assert_array_equal(volume.array, scan())


def test_label_maps(tmp_path: Path) -> None:
    labels = (scan() % 5).astype(np.uint8)
    found = read_labels(save_nifti(tmp_path / "a.nii.gz", labels.astype(np.float32))).array
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.uint8
    assert not read_labels(save_nifti(tmp_path / "b.nii.gz", np.zeros((4, 5, 6), np.uint8))).array.any()
    for n, wrong in enumerate((labels + 0.5, labels - 1.0, labels + 253.0, np.where(labels == 1, np.nan, labels))):
        path = save_nifti(tmp_path / f"w{n}.nii.gz", wrong.astype(np.float32))
        with pytest.raises(UserError, match="not a label map"):
            read_labels(path)

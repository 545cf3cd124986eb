"""DICOM series, NRRD, MetaImage and .npy: what goes wrong is one line and never wrong voxels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm3d.data.volumes import content_hash, read_volume, volume_files
from mllm3d.errors import UserError
from tests.data.scans import itk_image, save_dicom, save_nifti, scan


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


# --- NRRD and MetaImage --------------------------------------------------------------------------------


def save_itk(path: Path, compress: bool = True) -> bytes:
    sitk.WriteImage(itk_image(scan()), str(path), useCompression=compress)
    return path.read_bytes()


@settings(max_examples=120, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), suffix=st.sampled_from([".mha", ".nrrd"]))
def test_a_flipped_bit_in_compressed_voxels_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"flip{suffix}"
    data = bytearray(save_itk(path))
    start = data.index(b"LOCAL\n") + 6 if suffix == ".mha" else data.index(b"\n\n") + 2
    data[start + int(place * (len(data) - start))] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = read_volume(path).array
    except UserError as error:
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(found, scan())


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("compress", [True, False])
def test_cut_files(tmp_path: Path, suffix: str, compress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"x{suffix}"
    data = save_itk(path, compress)
    for length in (len(data) - 5, len(data) // 2, 20, 0):
        path.write_bytes(data[:length])
        error_of(path)
    assert capfd.readouterr().err == ""  # MetaIO would write there


@pytest.mark.parametrize(
    ("suffix", "old", "new", "words"),
    [
        (".nrrd", b"space: left-posterior-superior\n", b"", "left and right are unknown"),
        (".nrrd", b"space: left-posterior-superior", b"space: 3D-right-handed", "left and right are unknown"),
        (".nrrd", b"encoding: raw\n", b"encoding: raw\ndata file: /etc/hostname\n", "another file"),
        (".mha", b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b"", "left and right are unknown"),
        (".mha", b"ElementDataFile = LOCAL", b"ElementDataFile = /etc/hostname", "no voxels of its own"),
        (".mha", b"DimSize = 6 5 4", b"DimSize = 6 5 9", "asks for"),
        (".mha", b"DimSize = 6 5 4", b"DimSize = 6000 50000 40", "over the limit"),
        (
            ".mha",
            b"ElementType = MET_SHORT",
            b"ElementNumberOfChannels = 2\nElementType = MET_CHAR",
            "per voxel",
        ),
    ],
)
def test_headers_that_cannot_be_trusted(tmp_path: Path, suffix: str, old: bytes, new: bytes, words: str) -> None:
    path = tmp_path / f"x{suffix}"
    data = save_itk(path, compress=False)
    assert old in data
    path.write_bytes(data.replace(old, new))
    assert words in error_of(path)


def test_a_2d_and_a_4d_image(tmp_path: Path) -> None:
    sitk.WriteImage(itk_image(scan())[:, :, 0], str(tmp_path / "flat.mha"))
    assert "2-D image" in error_of(tmp_path / "flat.mha")
    image = itk_image(scan())
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(tmp_path / "series.mha"))
    assert "4-D image" in error_of(tmp_path / "series.mha")
    sitk.WriteImage(sitk.JoinSeries([image]), str(tmp_path / "one.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "one.mha").array, scan())


@pytest.mark.parametrize("name", ["../other.raw", "/etc/hostname", "LIST", "gone.raw"])
def test_an_mhd_reads_only_beside_itself(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.mhd"
    data = save_itk(path, compress=False)
    path.write_bytes(data.replace(b"ElementDataFile = x.raw", f"ElementDataFile = {name}".encode()))
    assert "same folder" in error_of(path) or "no such file" in error_of(path)


def test_the_voxels_of_an_mhd_count_for_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.mhd"
    save_itk(path, compress=False)
    before = content_hash(path)
    raw = tmp_path / "x.raw"
    raw.write_bytes(raw.read_bytes()[:-1] + b"\x55")
    assert volume_files(path) == [path, raw] and content_hash(path) != before


# --- DICOM --------------------------------------------------------------------------------


@pytest.fixture
def series(tmp_path: Path) -> Path:
    return save_dicom(tmp_path / "series", itk_image(scan()))


def slices(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.dcm"))


def test_other_objects_beside_a_series_are_left_alone(series: Path) -> None:
    (series / "LICENSE").write_text("text")
    (series / ".hidden.dcm").write_bytes(b"\0" * 128 + b"DICM")
    structures = b"\0" * 128 + b"DICM" + b"\x02\x00\x02\x00UI\x1e\x00" + b"1.2.840.10008.5.1.4.1.1.481.3\0"
    (series / "RS.dcm").write_bytes(structures + bytes(100))
    np.testing.assert_array_equal(read_volume(series).array, scan())


def test_a_missing_slice(series: Path) -> None:
    slices(series)[1].unlink()
    assert "uneven slices: 6.00 mm" in error_of(series)


def test_the_same_slices_twice(series: Path) -> None:
    save_dicom(series, itk_image(scan()), start=50)
    assert "4 slices lie where another lies" in error_of(series)


def test_two_series_in_one_folder(series: Path) -> None:
    save_dicom(series, itk_image(scan()), series="1.2.3.4", start=50)
    assert "2 image series" in error_of(series)


def test_a_slice_of_another_size(series: Path) -> None:
    image = itk_image(scan((1, 7, 6)))
    image.SetOrigin((-10.0, -20.0, 42.0))
    save_dicom(series, image, start=50)
    with pytest.raises(UserError, match=r"differs from .*\.dcm; remove it"):
        read_volume(series)


def test_a_single_slice_and_no_slice(tmp_path: Path, series: Path) -> None:
    for path in slices(series)[1:]:
        path.unlink()
    assert "2-D image" in error_of(series)
    slices(series)[0].unlink()
    assert "no DICOM image" in error_of(series)
    assert "no DICOM image" in error_of(tmp_path)


def test_a_damaged_slice(series: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = slices(series)[0]
    data = path.read_bytes()
    for damaged in (data[:200], data[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read_volume(series)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_one_file_of_a_series(series: Path) -> None:
    assert "give the folder of the series" in error_of(slices(series)[0])


def test_a_tilted_gantry_is_a_sheared_affine(tmp_path: Path) -> None:
    folder = tmp_path / "tilted"
    image = itk_image(scan())
    for k in range(4):
        one = image[:, :, k : k + 1]
        one.SetOrigin((-10.0, -20.0 + 0.5 * k, 30.0 + 3.0 * k))
        save_dicom(folder, one, start=k)
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, scan())
    np.testing.assert_allclose(volume.source_affine[:3, 2], (0, -0.5, 3.0), atol=1e-3)


def test_the_hash_of_a_series_is_of_its_content(series: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(series, copy)
    assert content_hash(copy) == content_hash(series)
    slices(copy)[0].write_bytes(slices(copy)[0].read_bytes()[:-1] + b"\x11")
    assert content_hash(copy) != content_hash(series)


# --- .npy and the rest --------------------------------------------------------------------------------


def test_npy_is_taken_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", scan()[None])
    volume = read_volume(tmp_path / "x.npy")
    np.testing.assert_array_equal(volume.array, scan())
    np.testing.assert_array_equal(volume.to_source, np.eye(4))
    assert not volume.has_spacing


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (scan()[0], "2-D image"),
        (np.stack([scan(), scan()]), "D image"),
        (np.array([{"a": 1}], dtype=object), "not a plain .npy"),
        (scan().astype(complex), "real numbers"),
        (scan() > 0, "real numbers"),
    ],
)
def test_npy_of_other_things(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    assert words in error_of(tmp_path / "x.npy")


def test_damaged_npy(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, scan())
    data = path.read_bytes()
    for damaged in (data[:-3], data[:40], b"", b"PK\x03\x04 no zip", b"text"):
        path.write_bytes(damaged)
        error_of(path)


def test_unknown_formats_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"123")
    assert "not a known volume format" in error_of(tmp_path / "x.jpg")
    assert "no such file or folder" in error_of(tmp_path / "gone")
    save_nifti(tmp_path / "y.nii.gz", scan())
    assert "there is y.nii.gz" in error_of(tmp_path / "y.nii")

"""Images and folders of frames: the pixels that were saved, upright, or one line that names the file."""

import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm3d.data import images as images_module
from mllm3d.data.images import SUFFIXES, read_image, read_video, video_frames
from mllm3d.data.limits import MAX_PIXELS
from mllm3d.errors import UserError
from tests.data.pictures import picture, save


def refused(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_what_was_saved_is_read(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    pixels = picture(*shape)
    found = read_image(save(tmp_path / f"a{suffix}", pixels, **({"lossless": True} if suffix == ".webp" else {})))
    assert found.dtype == np.uint8
    if suffix == ".webp" and len(shape) == 2:  # the format knows no grey
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if suffix in (".jpg", ".jpeg"):  # lossy; noise is what it keeps worst
        assert found.shape == pixels.shape and np.corrcoef(found.ravel(), pixels.ravel())[0, 1] > 0.5
    else:
        np.testing.assert_array_equal(found, pixels)


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""EXIF orientation -> what turns the stored pixels upright (Exif 2.3, 4.6.4)."""


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_says_which_side_is_up(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = picture(4, 6, 3)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", pixels, exif=exif)), UPRIGHT[orientation](pixels))


def test_every_eight_bit_mode_is_grey_or_colour(tmp_path: Path) -> None:
    pixels, alpha = picture(4, 6, 3), np.full((4, 6, 1), 255, np.uint8)
    alpha[0, 0] = 0
    shown = pixels.copy()
    shown[0, 0] = 255  # transparent shows white
    np.testing.assert_array_equal(read_image(save(tmp_path / "rgba.png", np.concatenate([pixels, alpha], -1))), shown)
    grey = Image.fromarray(pixels[..., 0])
    layered = Image.merge("LA", [grey, Image.fromarray(alpha[..., 0])])
    layered.save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), shown[..., 0])
    bits = pixels[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "one.png")
    np.testing.assert_array_equal(read_image(tmp_path / "one.png"), bits * np.uint8(255))
    few = Image.fromarray(pixels // 128 * 255).quantize(8)
    few.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), np.asarray(few.convert("RGB")))
    clear = np.asarray(few)[1, 1]
    few.save(tmp_path / "clear.png", transparency=int(clear))
    expected = np.where((np.asarray(few) == clear)[..., None], 255, np.asarray(few.convert("RGB")))
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), expected)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "cmyk.tif"), pixels)


# --- files that are refused ---------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG with hardly a pixel."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9))]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_bad(folder: Path) -> dict[str, str]:
    """Files that are no single image of 8 bits, and what is said of each."""
    good = picture(40, 60, 3)
    for name in ("cut.png", "cut.jpg", "cut.bmp", "cut.tif", "cut.webp"):
        path = save(folder / name, good)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    save(folder / "other.jpg", good).rename(folder / "other.png")
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    save(folder / "a.gif", good)
    save(folder / "deep.png", picture(4, 6).astype(np.uint16) * 16)
    save(folder / "float.tif", picture(4, 6).astype(np.float32))
    pages = [Image.fromarray(picture(4, 6, seed=seed)) for seed in range(3)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    save(folder / "thin.png", picture(2, 402))
    (folder / "large.png").write_bytes(png_header(2**13, 2**13 + 1))
    (folder / "larger.png").write_bytes(png_header(2**14, 2**13))  # Pillow itself warns
    (folder / "bomb.png").write_bytes(png_header(2**20, 2**20))  # and raises
    (folder / "folder.png").mkdir()
    return {
        **{f"cut.{end}": "copy" for end in ("png", "jpg", "bmp", "tif", "webp")},
        "other.png": "holds JPEG, not what its name says; rename",
        "text.png": "damaged, or no PNG file",
        "empty.png": "damaged, or no PNG file",
        "a.gif": "not a known image format (.png, .jpg",
        "deep.png": "more than 8 bits per pixel (I;16); choose a window and save it with 8 bits",
        "float.tif": "more than 8 bits per pixel (F)",
        "pages.tif": "3 pictures in one file; give one file for each",
        "thin.png": "2 x 402 pixels, one side over 200 times the other; crop it",
        "large.png": f"8193 x 8192 are 67,117,056 pixels, over the limit of {MAX_PIXELS:,}",
        "larger.png": "8192 x 16384 are 134,217,728 pixels, over the limit",
        "bomb.png": "make it smaller",
        "folder.png": "a folder; an image is one file",
        "gone.png": "no such file; correct the path",
    }


def test_what_is_no_image_is_one_line_that_names_it(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for name, words in write_bad(tmp_path).items():
        message = refused(read_image, tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: ") and words in message, message
    assert not list(recwarn)


def test_sizes_are_refused_before_pixels_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", picture(30, 40))
    monkeypatch.setattr(images_module, "MAX_PIXELS", 30 * 40)
    assert read_image(path).shape == (30, 40)
    monkeypatch.setattr(images_module, "MAX_PIXELS", 30 * 40 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert "30 x 40 are 1,200 pixels" in refused(read_image, path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    suffix=st.sampled_from([".png", ".jpg", ".bmp", ".tif", ".webp"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    end=st.none() | st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_read_or_told_in_one_line(
    tmp_path: Path, suffix: str, edits: list[tuple[int, int]], end: int | None
) -> None:
    path = tmp_path / f"a{suffix}"
    data = bytearray(save(path, picture(9, 14, 3)).read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    path.write_bytes(data if end is None else data[: end % len(data)])
    try:
        found = read_image(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert found.dtype == np.uint8 and found.ndim in (2, 3) and found.shape[2:] in ((), (3,))


# --- videos -------------------------------------------------------------------------------------------------


def test_frames_come_in_the_natural_order_of_their_names(tmp_path: Path) -> None:
    frames = {f"frame {number}.png": picture(4, 6, seed=number) for number in (1, 2, 9, 10, 11, 100)}
    for name, pixels in sorted(frames.items()):
        save(tmp_path / "film" / name, pixels)
    (tmp_path / "film" / ".DS_Store").write_bytes(b"hidden")
    np.testing.assert_array_equal(read_video(tmp_path / "film"), np.stack(list(frames.values())))


@given(numbers=st.lists(st.integers(0, 10**7), min_size=1, max_size=12, unique=True), width=st.integers(1, 9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_in_names_count_by_value(tmp_path: Path, numbers: list[int], width: int) -> None:
    folder = tmp_path / "film"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in numbers:
        (folder / f"A2_{number:0{width}d}.jpg").touch()
    found = [int(re.findall(r"\d+", file.name)[1]) for file in video_frames(folder)]
    assert found == sorted(numbers)


def test_a_video_is_in_colour_if_a_frame_is(tmp_path: Path) -> None:
    grey, colour = picture(4, 6), picture(4, 6, 3)
    save(tmp_path / "1.png", grey)
    save(tmp_path / "2.bmp", colour)
    expected = np.stack([np.repeat(grey[..., None], 3, axis=-1), colour])
    np.testing.assert_array_equal(read_video(tmp_path), expected)


def test_what_is_no_video_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", picture(4, 6))
    assert "no such folder; make one with ffmpeg" in refused(read_video, tmp_path / "gone")
    assert "a.png: a file; a video is a folder of frames" in refused(read_video, tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    assert "the folder has no frames" in refused(read_video, tmp_path / "empty")
    for name, shape in (("1.png", (4, 6)), ("2.png", (4, 6)), ("3.png", (6, 4))):
        save(tmp_path / "film" / name, picture(*shape))
    message = refused(read_video, tmp_path / "film")
    assert message.startswith(f"{tmp_path / 'film' / '3.png'}: 6 x 4 pixels, but 1.png has 4 x 6")
    monkeypatch.setattr(images_module, "MAX_VIDEO_PIXELS", 3 * 4 * 6 - 1)
    assert "3 x 4 x 6 are 72 pixels" in refused(read_video, tmp_path / "film")
    (tmp_path / "film" / "notes.txt").touch()
    monkeypatch.undo()
    (tmp_path / "film" / "3.png").unlink()
    assert "notes.txt: not a known image format" in refused(read_video, tmp_path / "film")

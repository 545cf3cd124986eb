"""Images and videos from disk: PNG, JPEG, BMP, TIFF and WebP, and folders of such frames.

What a model gets is uint8 as stored, 0 to 255, upright: no window and no resizing, which is the model's own.
"""

import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mllm3d.data.limits import MAX_PIXELS, MAX_VIDEO_PIXELS, check_pixels
from mllm3d.errors import UserError

SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
"""What a file's name promises; Pillow's plug-ins for other formats are never asked."""

MAX_ASPECT = 200
"""Longer side over the shorter one: Qwen's processors resize no narrower image."""

GREY, COLOUR = ("1", "L"), ("RGB", "P", "CMYK", "YCbCr")
TRANSPARENT = {"LA": "L", "La": "L", "RGBA": "RGB", "RGBa": "RGB", "PA": "RGB"}


def read_image(path: str | Path) -> np.ndarray:
    """Pixels as uint8 (H, W), or (H, W, 3) in colour, turned upright as EXIF says.

    What is transparent shows white. Raises `UserError` for anything that isn't one intact image of 8 bits.
    """
    path = Path(path)
    expected = _format(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns above its own limit and raises above twice that; ours lies below both.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=sorted(set(SUFFIXES.values()))) as image:
                _check(path, image, expected)
                return np.array(_eight_bits(path, ImageOps.exif_transpose(image)))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}; make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: damaged, or no {expected} file; copy or export it again") from error
    except Exception as error:  # of damaged files decoders raise nearly everything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        remedy = "" if isinstance(error, OSError) and error.errno else "; damaged or truncated, copy it again"
        raise UserError(f"{path}: cannot be read: {reason or type(error).__name__}{remedy}") from error


def read_video(path: str | Path) -> np.ndarray:
    """The frames of a folder as uint8 (T, H, W), or (T, H, W, 3) if any is in colour.

    They are meant to be one per second. Raises `UserError` for anything that isn't a folder of frames of one size.
    """
    path = Path(path)
    files = video_frames(path)
    first = read_image(files[0])
    check_pixels(path, (len(files), *first.shape[:2]), MAX_VIDEO_PIXELS)
    frames = [first]
    for file in files[1:]:
        frames.append(read_image(file))
        if frames[-1].shape[:2] != first.shape[:2]:
            sizes = [f"{height} x {width}" for height, width in (frames[-1].shape[:2], first.shape[:2])]
            raise UserError(f"{file}: {sizes[0]} pixels, but {files[0].name} has {sizes[1]}; give all frames one size")
    if any(frame.ndim == 3 for frame in frames):
        frames = [frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=-1) for frame in frames]
    return np.stack(frames)


def video_frames(path: Path) -> list[Path]:
    """A video's files in the natural order of their names (frame 9 before frame 10); hidden ones are passed over."""
    if not path.is_dir():
        reason = "a file; a video is a folder of frames" if path.exists() else "no such folder"
        raise UserError(f"{path}: {reason}; make one with ffmpeg -i VIDEO -vf fps=1 FOLDER/%05d.png")
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    if not files:
        raise UserError(f"{path}: the folder has no frames; put PNG or JPEG files into it")
    return sorted(files, key=lambda file: (_natural(file.name), file.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by their value, all else as text."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if number % 2 else (-1, part.casefold()) for number, part in enumerate(parts)]


def _format(path: Path) -> str:
    """What the name promises."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; an image is one file, and a folder of frames is a video")
    if not path.is_file():
        raise UserError(f"{path}: no such file; correct the path")
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise UserError(f"{path}: not a known image format ({', '.join(SUFFIXES)}); convert it to PNG")
    return SUFFIXES[suffix]


def _check(path: Path, image: Image.Image, expected: str) -> None:
    """What the header says, before anything is decoded."""
    if image.format != expected:
        raise UserError(f"{path}: holds {image.format}, not what its name says; rename or convert it")
    check_pixels(path, (image.height, image.width), MAX_PIXELS)
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise UserError(
            f"{path}: {frames} pictures in one file; give one file for each, or a folder of frames as video"
        )
    sides = sorted((image.height, image.width))
    if sides[1] > MAX_ASPECT * sides[0]:
        raise UserError(
            f"{path}: {image.height} x {image.width} pixels, one side over {MAX_ASPECT} times the other; crop it"
        )


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """In grey or RGB."""
    mode = image.mode
    if mode in GREY:
        return image.convert("L")
    if mode == "P" and "transparency" in image.info:
        mode, image = "RGBA", image.convert("RGBA")
    if mode in TRANSPARENT:
        image = image.convert("LA" if TRANSPARENT[mode] == "L" else "RGBA")
        white = Image.new(TRANSPARENT[mode], image.size, "white")
        white.paste(image.convert(TRANSPARENT[mode]), mask=image.getchannel("A"))
        return white
    if mode in COLOUR:
        return image.convert("RGB")
    # Pillow would cut 12 or 16 bits off at 255; which part of them matters only who made the image can know.
    raise UserError(f"{path}: more than 8 bits per pixel ({mode}); choose a window and save it with 8 bits first")

"""What stayed: kept tokens as voxels of the original scan, and a picture of three planes (Photon Fig. 3), or of images
and a video's frames."""

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mllm3d.data.preprocess import Prepared
from mllm3d.data.volumes import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PURPLE = "#7b2fd0"
WHITE_WASH = 0.8  # how far a dropped voxel moves towards white
HALF = 0.5 + 1e-6  # a centre on the border of two voxels belongs to the upper one, whatever the rounding
OUTSIDE = 0.5  # brightness of voxels the model never saw
MOST_SLABS = 12  # of a video in one picture


def boxes_to_mask(boxes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Bool (D, H, W) on the model grid, true inside any of the half-open boxes (tokens, 3, 2)."""
    mask = np.zeros(shape, bool)
    for (d0, d1), (h0, h1), (w0, w1) in boxes.tolist():
        mask[d0:d1, h0:h1, w0:w1] = True
    return mask


def resample_mask(mask: np.ndarray, to_mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """`mask` looked up at every voxel of another grid, false outside of it.

    to_mask: 4x4, voxel index of the new grid -> voxel index of the mask; voxel i reaches from i - 1/2 to
    i + 1/2, so a new voxel takes the value of the mask's voxel that its centre lies in.
    """
    out = np.zeros(shape, bool)
    second, third = np.arange(shape[1])[:, None], np.arange(shape[2])[None, :]
    for first in range(shape[0]):  # plane by plane: a few float planes at a time instead of volumes
        index = [np.floor(row[0] * first + row[1] * second + row[2] * third + row[3] + HALF) for row in to_mask[:3]]
        inside = np.ones(shape[1:], bool)
        for at, size in zip(index, mask.shape, strict=True):
            inside &= (at >= 0) & (at < size)
        out[first][inside] = mask[tuple(at[inside].astype(np.intp) for at in index)]
    return out


def mask_on_scan(mask: np.ndarray, prepared: Prepared) -> np.ndarray:
    """A mask on the model grid as bool (I, J, K) on the voxels of the scan's file."""
    return resample_mask(mask, np.linalg.inv(prepared.to_source), prepared.source_shape)


def write_nifti(mask: np.ndarray, prepared: Prepared, path: Path) -> None:
    """The kept voxels as uint8 NIfTI (1 kept, 0 dropped or outside) that overlays on the original file."""
    import nibabel

    image = nibabel.Nifti1Image(mask_on_scan(mask, prepared).astype(np.uint8), prepared.source_affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def draw(volume: Volume, prepared: Prepared, mask: np.ndarray, title: str, path: Path) -> None:
    """PNG with axial, coronal and sagittal planes of the original scan through the centre of the kept mass.

    Radiological display: the patient's right is on the viewer's left. Dropped tokens are washed out towards
    white, kept ones outlined, and what lay outside the model's field of view is darkened.

    volume: the scan as read; prepared: what the model saw of it; mask: kept voxels on the model grid.
    """
    from matplotlib.figure import Figure

    to_model = np.linalg.inv(prepared.to_source) @ volume.to_source
    shape: tuple[int, int, int] = volume.array.shape
    kept = resample_mask(mask, to_model, shape)
    seen = resample_mask(np.ones(mask.shape, bool), to_model, shape)
    centre = _centre(kept if kept.any() else seen)
    grey = to_grey(volume.array)
    figure = Figure(figsize=(13.5, 5.6), layout="constrained")
    for axes, axis in zip(figure.subplots(1, 3), range(3), strict=True):
        _draw_plane(axes, axis, centre[axis], grey, kept, seen, volume.spacing_mm)
    save(figure, title, "outlined: tokens kept    white: tokens dropped    dark: not seen by the model", path)


def save(figure: "Figure", title: str, legend: str, path: Path) -> None:
    """Write a picture with a title above it and a line below."""
    figure.suptitle(title, wrap=True)
    figure.supxlabel(legend, fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of the answer, drawn as a box
        figure.savefig(path, dpi=110, metadata={"Software": None})


# Per canonical axis that is cut: name of the plane and the letters at its left, right, top and bottom.
# Canonical indices grow towards superior, posterior and left, so only D has to be turned over to look right.
_PLANES = (("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI"))
_LETTER: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "weight": "bold",
    "fontsize": 13,
    "color": "white",
    "bbox": {"facecolor": "black", "alpha": 0.55, "pad": 2, "linewidth": 0},
}


def plane(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """The plane `index` across a canonical axis as displayed: first row on top, first column on the left."""
    image = np.take(array, index, axis=axis)
    return image if axis == 0 else image[::-1]


def _draw_plane(
    axes: "Axes",
    axis: int,
    index: int,
    grey: np.ndarray,
    kept: np.ndarray,
    seen: np.ndarray,
    spacing_mm: tuple[float, float, float],
) -> None:
    name, letters = _PLANES[axis]
    image, inside, stays = (plane(array, axis, index) for array in (grey, seen, kept))
    shown = np.where(inside, np.where(stays, image, image + WHITE_WASH * (1 - image)), OUTSIDE * image)
    rows, columns = (spacing_mm[other] for other in range(3) if other != axis)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, aspect=rows / columns, interpolation="nearest")
    outline(axes, stays, f"{name}, plane {index}")
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.97), (0.5, 0.03))
    for (x, y), letter in zip(places, letters, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, **_LETTER)


def outline(axes: "Axes", stays: np.ndarray, title: str) -> None:
    """What stays of an image, (rows, columns) bool, in purple; a title instead of ticks."""
    if stays.any() and not stays.all():
        axes.contour(stays.astype(float), levels=[0.5], colors=[PURPLE], linewidths=1.4)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])


class Part(NamedTuple):
    """An image or a video and its tokens.

    frames: uint8 (T, H, W) or (T, H, W, 3), T = 1 of an image. boxes, kept: of all tokens and of those that stayed,
    (tokens, 3, 2), half-open, on the frames as the model resized them.
    """

    frames: np.ndarray
    boxes: np.ndarray
    kept: np.ndarray


def draw_pixels(names: Sequence[str], parts: Sequence[Part], title: str, path: Path) -> None:
    """PNG with the images, and of a video the first frame of each slab (of MOST_SLABS at most, evenly chosen).

    Dropped tokens are washed out towards white, kept ones outlined.
    """
    from matplotlib.figure import Figure

    panels = [panel for name, part in zip(names, parts, strict=True) for panel in _panels(name, part)]
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.0, 3.5 * columns), 3.5 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, pixels, stays) in zip(grid, panels, strict=False):
        mask = stays if pixels.ndim == 2 else stays[..., None]
        shown = pixels.astype(np.float32) / 255
        axes.imshow(np.where(mask, shown, shown + WHITE_WASH * (1 - shown)), cmap="gray", vmin=0, vmax=1)
        outline(axes, stays, name)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    save(figure, title, "outlined: tokens kept    white: tokens dropped", path)


def _panels(name: str, part: Part) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Title, pixels, and which of them lie in kept tokens."""
    depth, (_, height, width) = int(part.boxes[0, 0, 1]), part.boxes[-1, :, 1].tolist()
    slabs = int(part.boxes[-1, 0, 1]) // depth
    mask = boxes_to_mask(part.kept // np.array([depth, 1, 1])[:, None], (slabs, height, width))
    rows, columns = part.frames.shape[1:3]
    # A pixel lies in the token that its centre lies in.
    y, x = (np.arange(2 * n)[1::2] * size // (2 * n) for n, size in ((rows, height), (columns, width)))
    for slab in np.unique(np.linspace(0, slabs - 1, min(slabs, MOST_SLABS)).round().astype(int)).tolist():
        place = "" if len(part.frames) == 1 else f", frame {slab * depth + 1} of {len(part.frames)}"
        yield name + place, part.frames[slab * depth], mask[slab][np.ix_(y, x)]


def _centre(mask: np.ndarray) -> tuple[int, int, int]:
    """Index of the centre of mass, from the margins: a list of all indices would not stay small."""
    means = []
    for axis, size in enumerate(mask.shape):
        weights = mask.sum(axis=tuple(other for other in range(3) if other != axis), dtype=np.int64)
        means.append(int(round(float(weights @ np.arange(size)) / max(int(weights.sum()), 1))))
    return means[0], means[1], means[2]


def to_grey(array: np.ndarray) -> np.ndarray:
    """Intensities scaled to [0, 1] from the 1st to the 99.5th percentile: readable for CT and MR alike."""
    low, high = np.percentile(array[::2, ::2, ::2], [1, 99.5])
    return np.clip((array.astype(np.float32) - low) / max(float(high - low), 1e-6), 0, 1)

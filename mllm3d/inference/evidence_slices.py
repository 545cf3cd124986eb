"""A picture of slice-wise pruning: what stayed of each slice along the volume, and where on it.

A slice is what the model encodes apart: a slab of the volume, often of several of the scan's planes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mllm3d.data.preprocess import Prepared
from mllm3d.data.volumes import Volume
from mllm3d.inference.evidence import (
    OUTSIDE,
    PURPLE,
    WHITE_WASH,
    boxes_to_mask,
    outline,
    plane,
    resample_mask,
    save,
    to_grey,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SHEETS, COLUMNS = 24, 6
LEGEND = "outlined: tokens kept    white: tokens dropped    dark: slice dropped, or not seen by the model"


class Slab(NamedTuple):
    """One slice: its planes [start, stop) on the model grid, its tokens, and how many of them stayed."""

    start: int
    stop: int
    tokens: int
    kept: int

    @property
    def share(self) -> float:
        """Of its tokens that stayed."""
        return self.kept / self.tokens


def slabs_of(boxes: np.ndarray, kept: np.ndarray) -> list[Slab]:
    """Slices in their order on the model grid, from half-open boxes (tokens, 3, 2) of all tokens and of those kept."""
    extents, counts = np.unique(boxes[:, 0], axis=0, return_counts=True)
    return [
        Slab(int(start), int(stop), int(count), int((kept[:, 0] == (start, stop)).all(1).sum()))
        for (start, stop), count in zip(extents, counts, strict=True)
    ]


def draw_slices(
    volume: Volume, prepared: Prepared, boxes: np.ndarray, kept: np.ndarray, title: str, path: Path
) -> None:
    """PNG with the share of tokens that stayed of each slice, and the middle plane of slices (MOST_SHEETS at most,
    evenly chosen) in the original scan: dropped tokens washed out, kept ones outlined, dropped slices darkened.

    volume: the scan as read; prepared: what the model saw of it; boxes, kept: of all tokens and of those that stayed,
    (tokens, 3, 2) on the model grid.
    """
    from matplotlib.figure import Figure

    slabs = slabs_of(boxes, kept)
    shown = np.unique(np.linspace(0, len(slabs) - 1, min(len(slabs), MOST_SHEETS)).round().astype(int)).tolist()
    columns = min(len(shown), COLUMNS)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(6.0, 2.4 * columns), 2.2 + 2.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[0.6, *[1.0] * rows])
    _draw_strip(figure.add_subplot(grid[0, :]), slabs, shown)
    to_model = np.linalg.inv(prepared.to_source) @ volume.to_source
    mask = boxes_to_mask(kept, prepared.array.shape)
    grey = to_grey(volume.array)
    rows_mm, columns_mm = volume.spacing_mm[1:]
    for place, number in enumerate(shown):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        slab = slabs[number]
        index = _plane_of(slab, to_model, prepared.array.shape, len(grey))
        stays, seen = (_on_plane(m, to_model, index, grey.shape) for m in (mask, np.ones_like(mask)))
        image = shade(plane(grey, 0, index), stays, seen & (slab.kept > 0))
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=rows_mm / columns_mm, interpolation="nearest")
        text = f"{slab.kept} of {slab.tokens}" if slab.kept else "dropped"
        outline(axes, stays, "")
        axes.set_title(f"{number + 1} (plane {index}): {text}", fontsize=9)
    save(figure, title, LEGEND, path)


def shade(grey: np.ndarray, stays: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """A plane with what stayed as it is, what else the model read washed out, and all else darkened."""
    return np.where(seen, np.where(stays, grey, grey + WHITE_WASH * (1 - grey)), OUTSIDE * grey)


def _draw_strip(axes: "Axes", slabs: Sequence[Slab], shown: Sequence[int]) -> None:
    """Kept share along the volume; slices that are drawn below have a mark, dropped ones a grey column."""
    from matplotlib.ticker import MaxNLocator

    places = np.arange(1, len(slabs) + 1)
    dropped = np.array([not slab.kept for slab in slabs])
    axes.bar(places[dropped], 100.0, width=1.0, color="0.88")
    axes.bar(places, [100 * slab.share for slab in slabs], width=0.8, color=PURPLE)
    if len(shown) < len(slabs):
        axes.plot([number + 1 for number in shown], [0] * len(shown), "^", color="black", markersize=5, clip_on=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlim=(0.5, len(slabs) + 0.5), ylim=(0, 100), xlabel="slice", ylabel="tokens kept, %")
    axes.set_title(f"{int((~dropped).sum())} of {len(slabs)} slices kept; grey: dropped", fontsize=10)


def _plane_of(slab: Slab, to_model: np.ndarray, shape: tuple[int, ...], planes: int) -> int:
    """The scan's plane in the middle of a slab; of one that reaches past the volume, of the part within it."""
    middle = (slab.start + min(slab.stop, shape[0]) - 1) / 2
    there = np.linalg.inv(to_model) @ (middle, (shape[1] - 1) / 2, (shape[2] - 1) / 2, 1.0)
    return int(np.clip(np.rint(there[0]), 0, planes - 1))


def _on_plane(mask: np.ndarray, to_model: np.ndarray, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bool (H, W): a mask on the model grid at one plane of the scan."""
    moved = np.eye(4)
    moved[0, 3] = index
    return resample_mask(mask, to_model @ moved, (1, shape[1], shape[2]))[0]

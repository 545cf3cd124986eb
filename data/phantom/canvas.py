"""The voxel grid of a phantom and the few shapes that everything is painted with.

Axes are (D, H, W): feet to head, front to back, right to left. Positions and radii are (z, y, x) in *body
millimetres*: millimetres divided by the patient's size, with the origin in the body's centre, so that one
description of the anatomy fits every habitus.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from labels import BACKGROUND

Triple = tuple[float, float, float]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Grid:
    """Voxel centres of one scan: ``axes`` are float32 body millimetres per axis, ascending."""

    shape: tuple[int, int, int]
    spacing_mm: Triple
    scale: Triple
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def make(cls, shape: tuple[int, int, int], spacing_mm: Triple, scale: Triple, offset_mm: Triple) -> "Grid":
        axes = [
            (((np.arange(n) - (n - 1) / 2) * step - off) / size).astype(np.float32)
            for n, step, off, size in zip(shape, spacing_mm, offset_mm, scale, strict=True)
        ]
        return cls(shape, spacing_mm, scale, (axes[0], axes[1], axes[2]))

    @property
    def voxel_ml(self) -> float:
        return float(np.prod(self.spacing_mm)) / 1000

    def box(self, low: Triple, high: Triple) -> Box:
        """The smallest box that holds every voxel centre between two corners."""
        start = [int(np.searchsorted(a, v)) for a, v in zip(self.axes, low, strict=True)]
        stop = [int(np.searchsorted(a, v, "right")) for a, v in zip(self.axes, high, strict=True)]
        return slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2])

    def coordinates(self, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Open (z, y, x) coordinate arrays of a box, ready to broadcast."""
        z, y, x = (a[s] for a, s in zip(self.axes, box, strict=True))
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def ellipsoid(self, centre: Triple, radii: Triple, tilt: float = 0.0) -> tuple[Box, np.ndarray]:
        """Box and mask of an ellipsoid; ``tilt`` turns it in the axial plane (radians)."""
        cos, sin = float(np.cos(tilt)), float(np.sin(tilt))
        half_y = float(np.hypot(radii[1] * cos, radii[2] * sin))
        half_x = float(np.hypot(radii[2] * cos, radii[1] * sin))
        box = self.box(
            (centre[0] - radii[0], centre[1] - half_y, centre[2] - half_x),
            (centre[0] + radii[0], centre[1] + half_y, centre[2] + half_x),
        )
        z, y, x = self.coordinates(box)
        dy, dx = y - centre[1], x - centre[2]
        plane = ((cos * dy - sin * dx) / radii[1]) ** 2 + ((sin * dy + cos * dx) / radii[2]) ** 2
        return box, plane + ((z - centre[0]) / radii[0]) ** 2 <= 1

    def tube(self, points: list[Triple], radii: list[float]) -> tuple[Box, np.ndarray]:
        """Box and mask of a tube through ``points``; its radius changes linearly from point to point."""
        widest = max(radii)
        box = self._around(points, widest)
        mask = np.zeros([s.stop - s.start for s in box], bool)
        for a, b, ra, rb in zip(points, points[1:], radii, radii[1:], strict=False):
            part = self._around([a, b], widest)
            offsets = [c - o for c, o in zip(self.coordinates(part), a, strict=True)]
            along = [q - p for p, q in zip(a, b, strict=True)]
            t = sum(o * d for o, d in zip(offsets, along, strict=True)) / sum(d * d for d in along)
            t = np.clip(t, 0, 1)
            away = sum((o - t * d) ** 2 for o, d in zip(offsets, along, strict=True))
            local = tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(part, box, strict=True))
            mask[local] |= away <= (ra + t * (rb - ra)) ** 2
        return box, mask

    def _around(self, points: list[Triple], margin: float) -> Box:
        low, high = np.min(points, axis=0) - margin, np.max(points, axis=0) + margin
        return self.box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


class Canvas:
    """The two arrays a case is painted on: HU (float32) and the label map (uint8)."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.hu = np.full(grid.shape, -1000, np.float32)
        self.labels = np.full(grid.shape, BACKGROUND, np.uint8)

    def paint(self, box: Box, mask: np.ndarray, hu: float | np.ndarray, label: int | None = None) -> None:
        """Set HU under a mask, and its label unless ``label`` is None (the voxels keep theirs)."""
        np.copyto(self.hu[box], np.asarray(hu, np.float32), where=mask)
        if label is not None:
            self.labels[box][mask] = label


def blur(image: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """Three-tap Gaussian along one axis; edges repeat. ``sigma`` is in voxels."""
    side = np.float32(np.exp(-0.5 / sigma**2))
    centre = np.float32(1 / (1 + 2 * side))
    moved = np.moveaxis(image, axis, 0)
    wings = moved * (centre * side)
    out = moved * centre
    out[1:] += wings[:-1]
    out[:-1] += wings[1:]
    out[0] += wings[0]
    out[-1] += wings[-1]
    return np.moveaxis(out, 0, axis)


def bounding_box(mask: np.ndarray, margin: Sequence[int] = (0, 0, 0)) -> Box:
    """Box of a non-empty mask, grown by ``margin`` voxels per axis and cut at the volume's edge."""
    spans = []
    for axis, extra in enumerate(margin):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        spans.append(slice(max(int(used[0]) - extra, 0), min(int(used[-1]) + 1 + extra, mask.shape[axis])))
    return spans[0], spans[1], spans[2]

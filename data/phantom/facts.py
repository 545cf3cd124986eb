"""Everything that questions and reports need to know of one case: a small, plain summary of its label map.

``facts_of`` reads it off the label map and the case's metadata alone (painted HU, contrast phase) through
measure.py. It holds no arrays, so that thousands of cases fit in memory while questions are balanced.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from labels import FINDINGS, ORGANS, STATES
from measure import PARTS, Component, Measured, change

PLANE_ORGANS = ("heart", "liver", "spleen", "left kidney", "right kidney")
FLUID = ("pleural effusion", "pericardial effusion")


@dataclass(frozen=True)
class Instance:
    """One instance of a finding. Triples are (d, h, w); ``widest_slice`` counts axial slices from the feet,
    from 1; ``areas_mm2`` are the largest cross-sections in the axial, coronal and sagittal plane."""

    volume_ml: float
    diameter_mm: float
    extent_mm: tuple[float, float, float]
    centre: tuple[float, float, float]
    widest_slice: int
    areas_mm2: tuple[float, float, float]
    side: str
    host: str


@dataclass(frozen=True)
class Organ:
    """An organ with the findings in it; ``low`` and ``high`` are its first and last axial slice (from 0)."""

    volume_ml: float
    low: int
    high: int
    extent_mm: tuple[float, float, float]
    areas_mm2: tuple[float, float, float] | None

    def height(self, slice_index: float) -> float:
        """Where a slice cuts the organ: 0 at its bottom, 1 at its top."""
        return min(max((slice_index + 0.5 - self.low) / (self.high + 1 - self.low), 0.0), 1.0)


@dataclass(frozen=True)
class Facts:
    """One scan; ``changes`` tells per finding what became of it since the prior scan, None without one."""

    slices: int
    phase: str
    hu: Mapping[str, float]
    organs: Mapping[str, Organ]
    instances: Mapping[str, tuple[Instance, ...]]
    states: frozenset[str]
    thickness_mm: Mapping[str, float]
    heart_ratio: float | None
    changes: Mapping[str, str] | None = None

    def present(self, finding: str) -> bool:
        return finding in self.states or bool(self.instances.get(finding))

    def largest(self, finding: str) -> Instance | None:
        """The instance with the largest volume."""
        found = self.instances[finding]
        return found[0] if found else None

    def total_ml(self, finding: str) -> float:
        return sum(instance.volume_ml for instance in self.instances[finding])

    def side_ml(self, finding: str, side: str) -> float:
        return sum(instance.volume_ml for instance in self.instances[finding] if instance.side == side)

    def sides(self, finding: str) -> tuple[str, ...]:
        return tuple(sorted({instance.side for instance in self.instances[finding]}))


@dataclass(frozen=True)
class Scan:
    """What a case's files hold: its label map (uint8, canonical), spacing (d, h, w) in mm, and metadata."""

    labels: np.ndarray
    spacing_mm: tuple[float, float, float]
    painted_hu: dict[str, float]
    phase: str

    def measured(self) -> Measured:
        return Measured(self.labels, self.spacing_mm, self.painted_hu)


def facts_of(scan: Scan, prior: Scan | None = None) -> Facts:
    """Measure a scan, and what changed since a prior scan of the same patient."""
    measured = scan.measured()
    before = prior.measured() if prior else None
    return Facts(
        slices=scan.labels.shape[0],
        phase=scan.phase,
        hu=dict(scan.painted_hu),
        organs={name: _organ(measured, name) for name in ORGANS if measured.visible(name)},
        instances={name: tuple(_instance(measured, part) for part in measured.components(name)) for name in FINDINGS},
        states=frozenset(name for name in STATES if measured.present(name)),
        thickness_mm={name: _thickness(measured, name) for name in FLUID if measured.present(name)},
        heart_ratio=measured.cardiothoracic_ratio(),
        changes={name: change(before, measured, name) for name in (*FINDINGS, *STATES)} if before else None,
    )


def _instance(measured: Measured, component: Component) -> Instance:
    return Instance(
        volume_ml=measured.component_ml(component),
        diameter_mm=measured.largest_diameter_mm(component),
        extent_mm=_scaled(component.mask.shape, measured.spacing_mm),
        centre=component.centre,
        widest_slice=measured.largest_slice(component) + 1,
        areas_mm2=_areas(component.mask, measured.spacing_mm),
        side=measured.side(component),
        host=measured.host(component) or "",
    )


def _organ(measured: Measured, name: str) -> Organ:
    """Box and sections include the findings that belong to the organ (``measure.PARTS``)."""
    own = measured.labels == ORGANS[name]
    for finding in PARTS.get(name, ()):
        for component in measured.components(finding):
            if measured.host(component) == name:
                own[component.box] |= component.mask
    spans = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        used = np.flatnonzero(own.any(axis=axes))
        spans.append((int(used[0]), int(used[-1])))
    cut = own[tuple(slice(first, last + 1) for first, last in spans)]
    return Organ(
        volume_ml=measured.volume_ml(name),
        low=spans[0][0],
        high=spans[0][1],
        extent_mm=_scaled(cut.shape, measured.spacing_mm),
        areas_mm2=_areas(cut, measured.spacing_mm) if name in PLANE_ORGANS else None,
    )


def _scaled(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> tuple[float, float, float]:
    d, h, w = (float(n * step) for n, step in zip(shape, spacing, strict=True))
    return d, h, w


def _areas(mask: np.ndarray, spacing: tuple[float, float, float]) -> tuple[float, float, float]:
    """Largest section (mm2) across D (axial), H (coronal) and W (sagittal)."""
    d, h, w = spacing
    axial, coronal, sagittal = (int(mask.sum(axis=axes).max()) for axes in ((1, 2), (0, 2), (0, 1)))
    return axial * h * w, coronal * d * w, sagittal * d * h


def _thickness(measured: Measured, finding: str) -> float:
    """The largest, over a finding's voxels, of the shortest axis-parallel run through the voxel, in mm."""
    best = 0.0
    for component in measured.components(finding):
        runs = [_runs(component.mask, axis) * measured.spacing_mm[axis] for axis in range(3)]
        best = max(best, float(np.minimum.reduce(runs).max()))
    return best


def _runs(mask: np.ndarray, axis: int) -> np.ndarray:
    """Per voxel, the length in voxels of the unbroken run along an axis that it lies in; 0 outside."""
    moved = np.moveaxis(mask, axis, 0)
    index = np.arange(len(moved), dtype=np.int16)[:, None, None]
    last = np.maximum.accumulate(np.where(moved, np.int16(-1), index), axis=0)
    following = np.minimum.accumulate(np.where(moved, np.int16(len(moved)), index)[::-1], axis=0)[::-1]
    return np.moveaxis(np.where(moved, following - last - 1, 0), 0, axis)

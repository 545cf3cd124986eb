"""What can be read off a phantom's label map. Every answer about a phantom comes from here.

``Measured(labels, spacing_mm, painted_hu)`` needs nothing else, so any answer can be recomputed from the
stored label map and the painted HU in the case's metadata.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import SimpleITK as sitk
from canvas import bounding_box
from labels import FINDINGS, HOSTS, ORGANS

Side = Literal["left", "right"]
Change = Literal["unchanged", "grown", "shrunk", "new", "gone", "absent", "unclear"]

CARDIOMEGALY_RATIO = 0.5
SPLENOMEGALY_MM = 130.0
SPLENOMEGALY_ML = 350.0
FATTY_LIVER_HU = 20.0

PARTS: dict[str, tuple[str, ...]] = {
    "left lung": ("lung nodule", "consolidation"),
    "right lung": ("lung nodule", "consolidation"),
    "aorta": ("arterial calcification",),
    "liver": ("liver lesion",),
    "left kidney": ("kidney cyst", "kidney tumour"),
    "right kidney": ("kidney cyst", "kidney tumour"),
    "pancreas": ("pancreatic lesion",),
}
"""Findings whose voxels count to the organ they lie in. Fluid around an organ does not."""


@dataclass(frozen=True)
class Component:
    """One instance of a finding: its mask inside the box that starts at voxel ``start`` (d, h, w)."""

    finding: str
    start: tuple[int, int, int]
    mask: np.ndarray = field(repr=False)

    @property
    def voxels(self) -> int:
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[slice, slice, slice]:
        spans = [slice(a, a + n) for a, n in zip(self.start, self.mask.shape, strict=True)]
        return spans[0], spans[1], spans[2]

    @property
    def centre(self) -> tuple[float, float, float]:
        """Mean voxel index (d, h, w)."""
        d, h, w = (float(i.mean()) + a for i, a in zip(np.nonzero(self.mask), self.start, strict=True))
        return d, h, w


@dataclass(frozen=True)
class Measured:
    """Measurements on one label map (uint8, canonical (D, H, W)) with its spacing (d, h, w) in mm."""

    labels: np.ndarray
    spacing_mm: tuple[float, float, float]
    painted_hu: dict[str, float]

    @cached_property
    def counts(self) -> np.ndarray:
        """Voxels per label id."""
        return np.bincount(self.labels.ravel(), minlength=256)

    @cached_property
    def _components(self) -> dict[str, list[Component]]:
        return {}

    def _ml(self, voxels: float) -> float:
        return float(voxels * np.prod(self.spacing_mm) / 1000)

    def visible(self, name: str) -> bool:
        """Whether an organ or a finding with voxels of its own is in the map."""
        return bool(self.counts[{**ORGANS, **FINDINGS}[name]])

    def present(self, finding: str) -> bool:
        """Whether a finding is there; the three states are measured against their thresholds."""
        if finding in FINDINGS:
            return self.visible(finding)
        if finding == "cardiomegaly":
            return (self.cardiothoracic_ratio() or 0) > CARDIOMEGALY_RATIO
        if finding == "splenomegaly":
            return self.volume_ml("spleen") > SPLENOMEGALY_ML or (self.spleen_extent_mm() or 0) > SPLENOMEGALY_MM
        if finding == "fatty liver":
            deficit = self.liver_deficit_hu()
            return deficit is not None and deficit >= FATTY_LIVER_HU
        raise KeyError(f"{finding!r} is not a finding of labels.py")

    def volume_ml(self, name: str) -> float:
        """Volume of an organ with the findings in it (see ``PARTS``), or of all instances of a finding."""
        if name in FINDINGS:
            return self._ml(self.counts[FINDINGS[name]])
        voxels = int(self.counts[ORGANS[name]])
        for finding in PARTS.get(name, ()):
            own = [c for c in self.components(finding) if name[:5] not in ("left ", "right") or self.host(c) == name]
            voxels += sum(c.voxels for c in own)
        return self._ml(voxels)

    def component_ml(self, component: Component) -> float:
        return self._ml(component.voxels)

    def components(self, finding: str) -> list[Component]:
        """The 26-connected parts of a finding, largest first (ties: lowest, then frontmost slice)."""
        if finding not in self._components:
            self._components[finding] = self._split(finding)
        return self._components[finding]

    def count(self, finding: str) -> int:
        return len(self.components(finding))

    def _split(self, finding: str) -> list[Component]:
        if not self.visible(finding):
            return []
        whole = self.labels == FINDINGS[finding]
        box = bounding_box(whole)
        image = sitk.ConnectedComponent(sitk.GetImageFromArray(whole[box].astype(np.uint8)), True)
        ids = sitk.GetArrayFromImage(image)
        parts = []
        for i in range(1, int(ids.max()) + 1):
            inner = bounding_box(ids == i)
            start = [a.start + b.start for a, b in zip(box, inner, strict=True)]
            parts.append(Component(finding, (start[0], start[1], start[2]), ids[inner] == i))
        return sorted(parts, key=lambda c: (-c.voxels, c.start[0], c.start[1]))

    def largest_diameter_mm(self, component: Component) -> float:
        """Longest line across the component within one axial slice, from voxel centre to voxel centre plus
        one voxel: what a reader measures."""
        best, (_, step_h, step_w) = 0.0, self.spacing_mm
        for slice_mask in component.mask:
            rows = np.flatnonzero(slice_mask.any(axis=1))
            if rows.size == 0:
                continue
            first = slice_mask[rows].argmax(axis=1)
            last = slice_mask.shape[1] - 1 - slice_mask[rows][:, ::-1].argmax(axis=1)
            down = np.abs(rows[:, None] - rows[None]) * step_h
            across = np.maximum(np.abs(last[:, None] - first[None]), np.abs(last[None] - first[:, None])) * step_w
            best = max(best, float(np.sqrt(down**2 + across**2).max()))
        return best + (step_h + step_w) / 2

    def largest_slice(self, component: Component) -> int:
        """Index (D) of the axial slice with the component's largest area; the lowest of equals."""
        return component.start[0] + int(component.mask.sum(axis=(1, 2)).argmax())

    def side(self, component: Component) -> Side:
        """The side of the nearer lung or kidney where the finding has such a host, else the side of the
        spine's middle (without a spine, of the body's)."""
        hosts = HOSTS[component.finding]
        if len(hosts) == 2:
            return "left" if self.host(component) == hosts[0] else "right"
        middle = self.midline()
        return "left" if component.centre[2] > middle else "right"

    def host(self, component: Component) -> str | None:
        """The organ a component lies in: of two lungs or kidneys, the one with more voxels in the smallest
        neighbourhood that reaches either."""
        hosts = [h for h in HOSTS[component.finding] if self.visible(h)]
        if len(hosts) < 2:
            return hosts[0] if hosts else None
        first, second = (ORGANS[h] for h in hosts)
        for margin in range(1, max(self.labels.shape)):
            near = self.labels[_grow(component.box, margin, self.labels.shape)]
            one, two = int((near == first).sum()), int((near == second).sum())
            if one != two:
                return hosts[0] if one > two else hosts[1]
        return None

    def midline(self) -> float:
        """Mean W index of the spine's voxels (of the body's where no spine is seen)."""
        bone = self.labels == ORGANS["spine"] if self.visible("spine") else self.labels > 0
        weight = bone.sum(axis=(0, 1))
        return float((weight * np.arange(weight.size)).sum() / max(int(weight.sum()), 1))

    def cardiothoracic_ratio(self) -> float | None:
        """Widest heart over widest inner thorax (lungs, what they hold, and what lies between), both along W
        within one axial slice; None without a heart or without both lungs."""
        if not all(self.visible(n) for n in ("heart", "left lung", "right lung")):
            return None
        inner = np.zeros(256, bool)
        names = ("lung nodule", "consolidation", "pleural effusion")
        inner[[ORGANS["left lung"], ORGANS["right lung"], *(FINDINGS[n] for n in names)]] = True
        return widest(self.labels == ORGANS["heart"]) / widest(inner[self.labels])

    def spleen_extent_mm(self) -> float | None:
        """Largest extent of the spleen along an axis."""
        if not self.visible("spleen"):
            return None
        box = bounding_box(self.labels == ORGANS["spleen"])
        return float(max((s.stop - s.start) * mm for s, mm in zip(box, self.spacing_mm, strict=True)))

    def liver_deficit_hu(self) -> float | None:
        """Painted spleen HU less painted liver HU."""
        if "liver" not in self.painted_hu or "spleen" not in self.painted_hu:
            return None
        return self.painted_hu["spleen"] - self.painted_hu["liver"]

    def severity(self, finding: str) -> float | None:
        """How much of a finding there is: ml, or the state's ratio, ml or HU; None where it is absent."""
        if not self.present(finding):
            return None
        if finding in FINDINGS:
            return self.volume_ml(finding)
        if finding == "cardiomegaly":
            return self.cardiothoracic_ratio()
        return self.volume_ml("spleen") if finding == "splenomegaly" else self.liver_deficit_hu()


def change(prior: Measured, current: Measured, finding: str) -> Change:
    """What became of a finding. Grown or shrunk is a severity 1.2 times as large or as small (1.08 for the
    heart's ratio), unchanged one within a third of that (in logarithms); "unclear" lies between the two."""
    before, after = prior.severity(finding), current.severity(finding)
    if before is None or after is None:
        return "absent" if before is after else ("new" if before is None else "gone")
    step = np.log(after / before) / np.log(1.08 if finding == "cardiomegaly" else 1.2)
    if abs(step) < 1:
        return "unchanged" if abs(step) < 1 / 3 else "unclear"
    return "grown" if step > 0 else "shrunk"


def mirror(labels: np.ndarray) -> np.ndarray:
    """The label map of the mirrored patient: flipped along W, with left and right organs exchanged."""
    table = np.arange(256, dtype=np.uint8)
    for organ in ("lung", "kidney"):
        left, right = ORGANS[f"left {organ}"], ORGANS[f"right {organ}"]
        table[left], table[right] = right, left
    return np.ascontiguousarray(table[labels][:, :, ::-1])


def _grow(box: tuple[slice, ...], margin: int, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(max(s.start - margin, 0), min(s.stop + margin, n)) for s, n in zip(box, shape, strict=True))


def widest(mask: np.ndarray) -> int:
    """Largest extent along W, in voxels, over the axial slices of a mask."""
    rows = np.asarray(mask.any(axis=1))
    rows = rows[np.asarray(rows.any(axis=1))]
    if not rows.size:
        return 0
    last = rows.shape[1] - rows[:, ::-1].argmax(axis=1)
    return int((last - rows.argmax(axis=1)).max())

"""Findings: how severe each is planned to be, where it goes, and how it is painted.

A plan has one severity per scan of the patient (one scan, or prior and current), and a finding is placed once
for all of them, so that the two scans differ only in what the plan says. Everything here works on the label
map alone, so the same code draws findings into the procedural anatomy and into an atlas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import SimpleITK as sitk
from anatomy import FAT_HU
from canvas import Box, Canvas, Grid, bounding_box
from labels import BODY, FINDINGS, ORGANS, STATES

Severity = float | None
"""From 0 (just clearly present) to 1; None where the finding is absent."""

COARSE = (
    "pleural effusion",
    "pericardial effusion",
    "consolidation",
    "cardiomegaly",
    "splenomegaly",
    "fatty liver",
)
ALL: tuple[str, ...] = (*FINDINGS, *STATES)
CHANGES = ("unchanged", "grown", "shrunk", "new", "gone")

LUNGS = (ORGANS["left lung"], ORGANS["right lung"])
KIDNEYS = (ORGANS["left kidney"], ORGANS["right kidney"])
SOFT_ORGANS = tuple(ORGANS[n] for n in ("liver", "spleen", "stomach", "pancreas"))
FAT_RANGE = (-140.0, -60.0)
EPICARDIAL_FAT_MM = 4.0
CONSOLIDATION_MM = (32.0, 56.0)
MIN_FILL = 0.4
"""A lesion fills this part of its box at least; a cross of 7 voxels is three across but no lesion to see."""
TRIES = 60


def plan_scan(rng: np.random.Generator, prevalence: Mapping[str, float]) -> dict[str, tuple[Severity, ...]]:
    """Severities of a single scan."""
    drawn = {name: (rng.random(), rng.random()) for name in ALL}
    return {name: ((s if coin < prevalence[name] else None),) for name, (coin, s) in drawn.items()}


def plan_pair(rng: np.random.Generator, prevalence: Mapping[str, float]) -> dict[str, tuple[Severity, ...]]:
    """Severities (prior, current). The five changes are equally likely, and a finding is present in the
    current scan with its prevalence (0.8 at most, since "gone" needs its share)."""
    plan: dict[str, tuple[Severity, ...]] = {}
    for name in ALL:
        coin, one, low, high = rng.random(4)
        slot = int(coin / (prevalence[name] / 4)) if prevalence[name] > 0 else len(CHANGES)
        small, large = 0.15 * low, 0.85 + 0.15 * high
        courses: dict[str, tuple[Severity, Severity]] = {
            "unchanged": (one, one),
            "grown": (small, large),
            "shrunk": (large, small),
            "new": (None, one),
            "gone": (one, None),
        }
        plan[name] = courses[CHANGES[slot]] if slot < len(CHANGES) else (None, None)
    return plan


@dataclass(frozen=True)
class Site:
    """A round lesion: where it may lie and how large it is."""

    finding: str
    hosts: tuple[int, ...]
    share: tuple[float, float]
    """Smallest and largest part of it inside the host; the rest lies in soft tissue around it."""
    size_mm: tuple[float, float]
    count: tuple[int, int]


SITES = (
    Site("lung nodule", LUNGS, (1.0, 1.0), (12, 30), (1, 3)),
    Site("liver lesion", (ORGANS["liver"],), (1.0, 1.0), (15, 40), (1, 4)),
    Site("kidney tumour", KIDNEYS, (0.4, 0.9), (28, 55), (1, 1)),
    Site("kidney cyst", KIDNEYS, (0.35, 1.0), (16, 42), (1, 3)),
    Site("pancreatic lesion", (ORGANS["pancreas"],), (0.35, 1.0), (16, 36), (1, 1)),
    Site("arterial calcification", (ORGANS["aorta"],), (0.4, 0.85), (9, 16), (1, 4)),
    Site("enlarged lymph node", (BODY,), (0.8, 1.0), (16, 32), (1, 4)),
)


def place_findings(
    canvases: Sequence[Canvas],
    plan: Mapping[str, Sequence[Severity]],
    tissues: Sequence[Mapping[str, float]],
    rng: np.random.Generator,
    lesion_scale: float = 1.0,
) -> None:
    """Paint every finding of a plan into the scans of one patient (all on one grid), round lesions scaled."""
    _pericardial_effusion(canvases, plan["pericardial effusion"], rng)
    _pleural_effusion(canvases, plan["pleural effusion"], rng)
    _consolidation(canvases, plan["consolidation"], rng)
    for site in SITES:
        low, high = site.size_mm
        scaled = replace(site, size_mm=(lesion_scale * low, lesion_scale * high))
        _lesions(canvases, scaled, plan[site.finding], tissues, rng)


# ---- fluid: the voxels that fill first, up to a volume ----


def _fill(canvas: Canvas, box: Box, order: np.ndarray, free: np.ndarray, voxels: int, hu: float, finding: str) -> None:
    """Paint the ``voxels`` free voxels that come first in ``order``, less any cut off from the rest."""
    values = order[free]
    if values.size == 0 or voxels <= 0:
        return
    last = np.partition(values, min(voxels, values.size) - 1)[min(voxels, values.size) - 1]
    mask = largest_component(free & (order <= last))
    if min_extent(mask) >= 3:
        canvas.paint(box, mask, hu, FINDINGS[finding])


def _pleural_effusion(canvases: Sequence[Canvas], severities: Sequence[Severity], rng: np.random.Generator) -> None:
    sides = (LUNGS[:1], LUNGS[1:], LUNGS)[int(rng.choice(3, p=(0.4, 0.4, 0.2)))]
    for lung in LUNGS:
        steep, hu, share = rng.uniform(0.35, 0.6), rng.uniform(2, 18), rng.uniform(0.9, 1.1)
        reference = sum(int((c.labels == lung).sum()) for c in canvases) / len(canvases)
        if lung not in sides or reference == 0:
            continue
        for canvas, severity in zip(canvases, severities, strict=True):
            if severity is None:
                continue
            where = canvas.labels == lung
            box = bounding_box(where)
            z, y, x = canvas.grid.coordinates(box)
            wall = np.abs(x - (x.max() if lung == LUNGS[0] else x.min()))
            order = (steep * (z - z.min()) - (y - y.max()) + 0.3 * np.minimum(wall, 40)).astype(np.float32)
            voxels = int(reference * share * (0.12 + 0.24 * severity))
            _fill(canvas, box, order, where[box], voxels, hu, "pleural effusion")


def _pericardial_effusion(canvases: Sequence[Canvas], severities: Sequence[Severity], rng: np.random.Generator) -> None:
    """Fluid around the heart, over a thin coat of fat. Its volume is set from the first scan's heart, so that
    an unchanged effusion keeps its volume when the heart grows."""
    hu, lean = rng.uniform(2, 18), rng.uniform(0.1, 0.3)
    if all(s is None for s in severities):
        return
    surface = 0
    for canvas, severity in zip(canvases, severities, strict=True):
        heart = canvas.labels == ORGANS["heart"]
        if not heart.any():
            continue
        box = bounding_box(heart, [int(np.ceil(32 / s)) for s in canvas.grid.spacing_mm])
        away = distance_mm(heart[box], canvas.grid)
        room = _is_one_of(canvas.labels[box], (BODY, *LUNGS)) & (away < 30) & (canvas.hu[box] < -60)
        surface = surface or int((room & (away <= 6)).sum())
        if severity is None:
            continue
        coat = room & (away <= EPICARDIAL_FAT_MM)
        canvas.paint(box, coat, FAT_HU, BODY)
        _, y, _ = canvas.grid.coordinates(box)
        order = (away - lean * (y - y.mean()) * 0.2).astype(np.float32)
        voxels = int(surface * (10 + 9 * severity) / 5)
        _fill(canvas, box, order, room & ~coat, voxels, hu, "pericardial effusion")


# ---- consolidation: a lobulated patch ----


def _consolidation(canvases: Sequence[Canvas], severities: Sequence[Severity], rng: np.random.Generator) -> None:
    count = 1 + int(rng.random() < 0.25)
    if all(s is None for s in severities) or max(canvases[0].grid.spacing_mm) > CONSOLIDATION_MM[0] / 4:
        return
    room = np.logical_and.reduce([_is_one_of(c.labels, LUNGS) for c in canvases])
    centres = np.flatnonzero(room)
    for _ in range(count if centres.size else 0):
        _place_patch(canvases, severities, room, centres, rng)


def _place_patch(
    canvases: Sequence[Canvas],
    severities: Sequence[Severity],
    room: np.ndarray,
    centres: np.ndarray,
    rng: np.random.Generator,
) -> None:
    grid, finding = canvases[0].grid, FINDINGS["consolidation"]
    lobes, hu = rng.normal(0, 0.36, (5, 3)).clip(-0.44, 0.44), rng.uniform(22, 48)
    low, high = CONSOLIDATION_MM
    sizes = [0.0 if s is None else low + (high - low) * s for s in severities]
    for _ in range(TRIES):
        centre = np.unravel_index(int(centres[rng.integers(centres.size)]), grid.shape)
        shapes = [_lobulated(grid, centre, d, lobes) for d in sizes]
        masks, good = [], True
        for canvas, (box, mask) in zip(canvases, shapes, strict=True):
            inside = mask & room[box]
            good &= bool(inside.sum() >= 0.7 * mask.sum())
            good &= not (canvas.labels[_grown(box, grid)] == finding).any()
            masks.append(inside)
        if good:
            for canvas, (box, _), inside in zip(canvases, shapes, masks, strict=True):
                canvas.paint(box, largest_component(inside), hu, finding)
            return


def _lobulated(grid: Grid, centre: Sequence[np.intp], diameter: float, lobes: np.ndarray) -> tuple[Box, np.ndarray]:
    """A union of overlapping balls about ``diameter`` millimetres across; empty where that is 0."""
    box = _box_around(grid, centre, [diameter * 0.6] * 3)
    offsets = _offsets_mm(grid, box, centre)
    mask = np.zeros([s.stop - s.start for s in box], bool)
    for lobe in lobes if diameter else ():
        away = sum((o - f * 0.5 * diameter) ** 2 for o, f in zip(offsets, lobe, strict=True))
        mask |= away <= (0.36 * diameter) ** 2
    return box, mask


# ---- round lesions ----


def _lesions(
    canvases: Sequence[Canvas],
    site: Site,
    severities: Sequence[Severity],
    tissues: Sequence[Mapping[str, float]],
    rng: np.random.Generator,
) -> None:
    count, contrast = int(rng.integers(site.count[0], site.count[1] + 1)), rng.random()
    if all(s is None for s in severities):
        return
    grid = canvases[0].grid
    centres = _candidates(canvases, site)
    for _ in range(count):
        shape = rng.uniform(0.92, 1.08, 3)
        radii = [_radii(grid, site, s, shape) for s in severities]
        if centres.size and all(r is not None for r in radii):
            _place_lesion(canvases, site, centres, [r for r in radii if r is not None], tissues, contrast, rng)


def _radii(grid: Grid, site: Site, severity: Severity, shape: np.ndarray) -> np.ndarray | None:
    """Half axes in mm; zeros where absent, None where the grid is too coarse for a lesion of this kind."""
    if severity is None:
        return np.zeros(3)
    low, high = site.size_mm
    step = np.array(grid.spacing_mm)
    if site.finding == "arterial calcification":
        return np.maximum(np.array([1.5 * low, low, low]), 3.3 * step) * (1 + 0.7 * severity) / 2
    low = max(low, 3.6 * float(step.max()))
    if low > 0.85 * high:
        return None
    return np.asarray((low + (high - low) * severity) / 2 * shape)


def _candidates(canvases: Sequence[Canvas], site: Site) -> np.ndarray:
    """Flat indices where a lesion's centre may lie in all scans."""
    room = np.logical_and.reduce([_is_one_of(c.labels, site.hosts) for c in canvases])
    if site.finding == "enlarged lymph node":
        for canvas in canvases:
            room &= (canvas.hu > FAT_RANGE[0]) & (canvas.hu < FAT_RANGE[1])
        room &= _beside_the_spine(canvases[0])
    return np.flatnonzero(room)


def _beside_the_spine(canvas: Canvas) -> np.ndarray:
    """The retroperitoneum and mediastinum: in front of the spine, not on the midline."""
    spine = canvas.labels == ORGANS["spine"]
    region = np.zeros(canvas.labels.shape, bool)
    if spine.any():
        _, h, w = (np.flatnonzero(spine.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3))
        step_h, step_w = canvas.grid.spacing_mm[1:]
        middle = float((spine.sum((0, 1)) * np.arange(spine.shape[2])).sum() / spine.sum())
        front = int(h[0])
        sideways = np.abs(np.arange(spine.shape[2]) - middle) * step_w
        deep = (np.arange(spine.shape[1]) - front) * step_h
        region[:, (deep > -70) & (deep < 12), :] = ((sideways > 18) & (sideways < 75))[None, None, :]
    return region


def _place_lesion(
    canvases: Sequence[Canvas],
    site: Site,
    centres: np.ndarray,
    radii: Sequence[np.ndarray],
    tissues: Sequence[Mapping[str, float]],
    contrast: float,
    rng: np.random.Generator,
) -> None:
    """Try places at random; where none fits, try a smaller lesion; where that does not fit, draw none."""
    grid = canvases[0].grid
    for attempt in range(2 * TRIES):
        shrink = 1.0 if attempt < TRIES else 0.82
        centre = np.unravel_index(int(centres[rng.integers(centres.size)]), grid.shape)
        shapes = [_ball(grid, centre, r * shrink) for r in radii]
        if all(_fits(c, site, s) for c, s in zip(canvases, shapes, strict=True)):
            for canvas, (box, mask), tissue in zip(canvases, shapes, tissues, strict=True):
                canvas.paint(box, mask, lesion_hu(site.finding, tissue, contrast), FINDINGS[site.finding])
            return


def _ball(grid: Grid, centre: Sequence[np.intp], radii: np.ndarray) -> tuple[Box, np.ndarray]:
    box = _box_around(grid, centre, radii)
    if not radii.all():
        return box, np.zeros([s.stop - s.start for s in box], bool)
    parts = [(o / r) ** 2 for o, r in zip(_offsets_mm(grid, box, centre), radii, strict=True)]
    return box, parts[0] + parts[1] + parts[2] <= 1


def _fits(canvas: Canvas, site: Site, shape: tuple[Box, np.ndarray]) -> bool:
    """Whole, as far inside its host as it must be, else in soft tissue, a voxel away from its own kind."""
    box, mask = shape
    if not mask.any():
        return True
    if any(s.start == 0 or s.stop == n for s, n in zip(box, canvas.grid.shape, strict=True)):
        return False
    if min_extent(mask) < 3 or mask.mean() < MIN_FILL:
        return False
    labels, hu = canvas.labels[box][mask], canvas.hu[box][mask]
    fat = (labels == BODY) & (hu > FAT_RANGE[0]) & (hu < FAT_RANGE[1])
    node = site.finding == "enlarged lymph node"
    hosted = fat if node else _is_one_of(labels, site.hosts)
    share = hosted.mean()
    if not site.share[0] <= share <= site.share[1]:
        return False
    if len(site.hosts) == 2 and labels[hosted].min() != labels[hosted].max():
        return False
    if share < 1:
        pushed = _is_one_of(labels, LUNGS if node else SOFT_ORGANS)
        soft = (labels == BODY) & (hu > -200) & (hu < 200)
        if not (hosted | soft | pushed).all() or (pushed & ~hosted).mean() > 0.15:
            return False
    return not (canvas.labels[_grown(box, canvas.grid)] == FINDINGS[site.finding]).any()


def lesion_hu(finding: str, tissue: Mapping[str, float], contrast: float) -> float:
    """Mean HU of a lesion, far enough from its host's to be seen in every phase; ``contrast`` in [0, 1]."""
    enhanced = tissue["artery"] > 70
    if finding == "lung nodule":
        return 5 + 45 * contrast
    if finding == "liver lesion":
        dark = tissue["liver"] - 40 - 25 * contrast
        return dark if dark > -25 else tissue["liver"] + 40 + 25 * contrast
    if finding == "kidney cyst":
        return 10 * contrast
    if finding == "kidney tumour":
        return 0.5 * tissue["cortex"] + 15 * contrast if enhanced else 62 + 18 * contrast
    if finding == "pancreatic lesion":
        return 15 * contrast if not enhanced else tissue["pancreas"] - 45 - 25 * contrast
    if finding == "arterial calcification":
        return 650 + 350 * contrast
    return (70 if enhanced else 35) + 15 * contrast


# ---- small geometry ----


def _is_one_of(labels: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Like ``np.isin`` for a handful of ids, which is slower."""
    found = labels == ids[0]
    for i in ids[1:]:
        found |= labels == i
    return np.asarray(found)


def _grown(box: Box, grid: Grid) -> Box:
    """A box and the voxels around it."""
    spans = [slice(max(s.start - 1, 0), min(s.stop + 1, n)) for s, n in zip(box, grid.shape, strict=True)]
    return spans[0], spans[1], spans[2]


def _box_around(grid: Grid, centre: Sequence[np.intp], half_mm: Sequence[float] | np.ndarray) -> Box:
    low = [int(c - r // s) for c, r, s in zip(centre, half_mm, grid.spacing_mm, strict=True)]
    high = [int(c + r // s) + 1 for c, r, s in zip(centre, half_mm, grid.spacing_mm, strict=True)]
    spans = [slice(max(a, 0), min(b, n)) for a, b, n in zip(low, high, grid.shape, strict=True)]
    return spans[0], spans[1], spans[2]


def _offsets_mm(grid: Grid, box: Box, centre: Sequence[np.intp]) -> list[np.ndarray]:
    steps = zip(box, centre, grid.spacing_mm, strict=True)
    z, y, x = ((np.arange(s.start, s.stop) - c) * step for s, c, step in steps)
    return [z[:, None, None], y[None, :, None], x[None, None, :]]


def min_extent(mask: np.ndarray) -> int:
    """Voxels across along the thinnest axis of a mask's bounding box."""
    return min((s.stop - s.start for s in bounding_box(mask)), default=0) if mask.any() else 0


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 26-connected part of a mask (ties: the first in memory order)."""
    found = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8)), True))
    sizes = np.bincount(found.ravel())
    return np.asarray(found == 1 + int(sizes[1:].argmax())) if sizes.size > 1 else mask


def distance_mm(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Distance of every voxel outside a mask to it; negative inside."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(tuple(reversed(grid.spacing_mm)))
    return sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(image, False, False, True))

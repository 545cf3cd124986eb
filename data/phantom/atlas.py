"""Real anatomy: a segmentation's label map, warped and painted with HU, with the same findings drawn in it.

The label map holds whole numbers 0-255 that a JSON file names, as TotalSegmentator's do ("liver",
"kidney_left", "vertebrae_T12", ...). Organs keep the atlas's sizes, so of the three states only a fatty liver
is planned; cardiomegaly and splenomegaly are whatever the atlas has.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anatomy import FAT_HU, MUSCLE_HU
from canvas import Canvas, Grid, Triple
from findings import Severity, plan_pair, plan_scan
from labels import BACKGROUND, BODY, ORGANS
from scene import EXTENT_MM, Case, Painter, SceneOptions, render, stream

from mllm3d.data.volumes import read_labels
from mllm3d.errors import UserError

RULES: tuple[tuple[str, str | None, str | float], ...] = (
    (r"lung_.*left", "left lung", -850.0),
    (r"lung_.*right", "right lung", -850.0),
    (r"kidney_(cyst_)?left", "left kidney", "medulla"),
    (r"kidney_(cyst_)?right", "right kidney", "medulla"),
    (r"liver", "liver", "liver"),
    (r"spleen", "spleen", "spleen"),
    (r"pancreas", "pancreas", "pancreas"),
    (r"stomach", "stomach", "wall"),
    (r"heart.*|atrial_appendage_left", "heart", "right heart"),
    (r"aorta", "aorta", "artery"),
    (r"vertebrae.*|sacrum", "spine", 210.0),
    (r"rib_.*", "ribs", 350.0),
    (r"intervertebral_discs", "spine", 75.0),
    (r"sternum|humerus.*|scapula.*|clavicula.*|femur.*|hip_.*|skull", None, 280.0),
    (r"costal_cartilages", None, 120.0),
    (r".*_vein.*|.*vena_.*", None, "vein"),
    (r".*_artery.*|brachiocephalic_trunk", None, "artery"),
    (r"trachea|lung_.*airways?", None, -960.0),
    (r"esophagus|adrenal_gland.*|duodenum|small_bowel|thyroid_gland|prostate", None, "wall"),
    (r"colon", None, 15.0),
    (r"gallbladder", None, 8.0),
    (r"urinary_bladder", None, "urine"),
    (r"spinal_cord|brain", None, 32.0),
    (r"autochthon.*|iliopsoas.*|gluteus.*|.*muscle.*", None, MUSCLE_HU),
)
"""Pattern of a structure's name -> the phantom's organ (None: unlabelled body) and its HU or tissue."""

WARP_MM = 6.0
SKIN_MM = 18.0


@dataclass(frozen=True)
class Atlas:
    """A label map (D, H, W), canonical, with the name of every id in it."""

    labels: np.ndarray
    spacing_mm: Triple
    names: Mapping[int, str]

    @classmethod
    def load(cls, label_map: Path | str, mapping: Path | str) -> "Atlas":
        """Raises ``UserError`` for an unreadable file, an id without a name, or a structure without an HU."""
        names = read_mapping(Path(mapping))
        volume = read_labels(label_map)
        found = [int(i) for i in np.unique(volume.array) if i]
        unnamed = [i for i in found if i not in names]
        if unnamed:
            raise UserError(f"{mapping}: no name for label {unnamed[0]} of {label_map}; add it")
        for i in found:
            if _rule(names[i]) is None:
                raise UserError(f"{mapping}: {names[i]!r} is not a structure that can be painted; {_hint(names[i])}")
        if not any((rule := _rule(names[i])) and rule[1] for i in found):
            raise UserError(f"{label_map}: holds no organ of the phantom; pass a chest or abdomen label map")
        return cls(volume.array, volume.spacing_mm, names)

    def draw(self, seed: int, options: SceneOptions | None = None) -> Case:
        """One scan of a warped copy of the atlas."""
        options = options or SceneOptions()
        plan = plan_scan(stream(seed, "scan"), options.shares)
        return render(seed, plan, self._painter(seed, options), options.lesion_scale)[0]

    def draw_pair(self, seed: int, options: SceneOptions | None = None) -> tuple[Case, Case]:
        """Prior and current scan of one warped copy of the atlas (see ``scene.draw_pair``)."""
        options = options or SceneOptions()
        plan = plan_pair(stream(seed, "pair"), options.shares)
        prior, current = render(seed, plan, self._painter(seed, options), options.lesion_scale)
        return prior, current

    def _painter(self, seed: int, options: SceneOptions) -> Painter:
        rng = stream(seed, "atlas")
        nominal = [extent / n for extent, n in zip(EXTENT_MM, options.shape, strict=True)]
        nominal[0] *= rng.uniform(0.8, 1.2)
        step = [round(max(a, b), 3) for a, b in zip(nominal, self.spacing_mm, strict=True)]
        size = [n * mm for n, mm in zip(self.labels.shape, self.spacing_mm, strict=True)]
        shape = [max(int(a / b), 1) for a, b in zip(size, step, strict=True)]
        grid = Grid.make((shape[0], shape[1], shape[2]), (step[0], step[1], step[2]), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
        warped = warp(self.labels, self.spacing_mm, grid, rng)
        fat_mm, density = rng.uniform(0.6, 1.4) * SKIN_MM, rng.normal(0, 22)

        def paint(tissues: Mapping[str, float], severities: Mapping[str, Severity]) -> Canvas:
            return self._paint(warped, grid, tissues, fat_mm, density)

        return paint

    def _paint(
        self, warped: np.ndarray, grid: Grid, tissues: Mapping[str, float], fat_mm: float, lung_shift: float
    ) -> Canvas:
        canvas = Canvas(grid)
        body, inner = body_masks(warped > 0, grid, fat_mm)
        canvas.labels[body] = BODY
        canvas.hu[body] = FAT_HU
        canvas.hu[inner] = MUSCLE_HU
        hull = body_masks(warped > 0, grid, 0.0)[0]
        canvas.hu[hull] = FAT_HU
        organ, hu = np.full(256, BODY, np.uint8), np.full(256, FAT_HU, np.float32)
        for i, name in self.names.items():
            if (rule := _rule(name)) is None:
                continue
            _, target, tissue = rule
            organ[i] = ORGANS[target] if target else BODY
            hu[i] = tissues[tissue] if isinstance(tissue, str) else tissue
            if target and target.endswith("lung"):
                hu[i] += lung_shift
        seen = warped > 0
        canvas.labels[seen] = organ[warped[seen]]
        canvas.hu[seen] = hu[warped[seen]]
        return canvas


def read_mapping(path: Path) -> dict[int, str]:
    """Ids and names of a label map's structures from a JSON object {"1": "spleen", ...}."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = {int(key): str(value) for key, value in raw.items()}
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); pass a JSON file with the labels' names"
        ) from error
    except (ValueError, AttributeError) as error:
        raise UserError(f'{path}: not a JSON object of label names; write it as {{"1": "spleen", ...}}') from error
    if any(not 0 <= i <= 255 for i in names):
        raise UserError(f"{path}: label ids must lie between 0 and 255")
    return names


def _rule(name: str) -> tuple[str, str | None, str | float] | None:
    return next((rule for rule in RULES if re.fullmatch(rule[0], name)), None)


def _hint(name: str) -> str:
    plain = [pattern for pattern, _, _ in RULES if re.fullmatch(r"\w+", pattern)]
    near = difflib.get_close_matches(name, plain, 1)
    return f"did you mean {near[0]!r}?" if near else "use TotalSegmentator's names"


def warp(labels: np.ndarray, spacing_mm: Triple, grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Sample a label map on a grid through a smooth random displacement (nearest voxel, 0 outside)."""
    knots = (5, 5, 5)
    weights = []
    for n, k in zip(grid.shape, knots, strict=True):
        at = np.linspace(0, k - 1, n)[:, None] - np.arange(k)[None]
        bell = np.exp(-0.5 * (at / 0.6) ** 2)
        weights.append((bell / bell.sum(1, keepdims=True)).astype(np.float32))
    inside = np.ones(grid.shape, bool)
    index = []
    for axis, (n, step) in enumerate(zip(labels.shape, spacing_mm, strict=True)):
        push = rng.normal(0, WARP_MM, knots).astype(np.float32)
        # One axis at a time, without BLAS: its sums depend on the number of threads.
        field = np.einsum("ai,ijk->ajk", weights[0], push)
        field = np.einsum("bj,ajk->abk", weights[1], field)
        field = np.einsum("ck,abk->abc", weights[2], field)
        view = [1, 1, 1]
        view[axis] = -1
        place = (grid.axes[axis].reshape(view) * rng.uniform(0.95, 1.05) + field) / step + (n - 1) / 2
        place = np.rint(place).astype(np.intp)
        inside &= (place >= 0) & (place < n)
        index.append(place.clip(0, n - 1))
    return np.where(inside, labels[index[0], index[1], index[2]], BACKGROUND).astype(np.uint8)


def body_masks(structures: np.ndarray, grid: Grid, margin_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """The body around an atlas's structures, and the part within its muscle wall (half of the margin).

    A segmentation has no skin. Per slice, the farthest structure in each direction from the slice's middle,
    smoothed over directions, is taken as the outline and moved out by ``margin_mm``.
    """
    body, inner = np.zeros(structures.shape, bool), np.zeros(structures.shape, bool)
    _, y, x = grid.coordinates((slice(None), slice(None), slice(None)))
    directions = 48
    for i, plane in enumerate(structures):
        rows, columns = np.nonzero(plane)
        if rows.size < 10:
            continue
        middle_y, middle_x = np.median(y[0, rows, 0]), np.median(x[0, 0, columns])
        dy, dx = y[0] - middle_y, x[0] - middle_x
        radius, angle = np.hypot(dy, dx), (np.arctan2(dy, dx) / (2 * np.pi)) % 1.0
        sector = (angle * directions).astype(int) % directions
        profile = np.zeros(directions)
        np.maximum.at(profile, sector[plane], radius[plane])
        profile = np.max([np.roll(profile, k) for k in (-2, -1, 0, 1, 2)], axis=0)
        profile = np.mean([np.roll(profile, k) for k in (-3, -2, -1, 0, 1, 2, 3)], axis=0)
        ring = np.interp(angle * directions, np.arange(directions + 1) + 0.5, np.append(profile, profile[0]))
        body[i], inner[i] = radius <= ring + margin_mm, radius <= ring + margin_mm / 2
    return body, inner

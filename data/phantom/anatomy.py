"""Normal anatomy of the procedural phantom: body, bones, lungs, vessels and abdominal organs.

Everything is drawn from the habitus and from a generator that is used alike in every phase and state, so that
a prior and a current scan of one patient share their anatomy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from canvas import Box, Canvas, Grid, Triple
from labels import BODY, ORGANS
from measure import widest

FAT_HU = -100.0
MUSCLE_HU = 55.0

PHASE_HU: dict[str, dict[str, float]] = {
    "non-contrast": {
        "artery": 42, "vein": 40, "left heart": 42, "right heart": 42, "myocardium": 44, "spleen": 50,
        "cortex": 34, "medulla": 33, "urine": 5, "pancreas": 40, "wall": 40,
    },
    "arterial": {
        "artery": 310, "vein": 60, "left heart": 290, "right heart": 200, "myocardium": 95, "spleen": 100,
        "cortex": 190, "medulla": 60, "urine": 5, "pancreas": 105, "wall": 75,
    },
    "portal venous": {
        "artery": 155, "vein": 150, "left heart": 150, "right heart": 150, "myocardium": 105, "spleen": 122,
        "cortex": 180, "medulla": 165, "urine": 8, "pancreas": 95, "wall": 70,
    },
    "delayed": {
        "artery": 100, "vein": 98, "left heart": 98, "right heart": 98, "myocardium": 80, "spleen": 88,
        "cortex": 120, "medulla": 125, "urine": 450, "pancreas": 70, "wall": 60,
    },
}  # fmt: skip
"""Mean HU by contrast phase. The liver is painted relative to the spleen (see ``draw_tissues``): the fatty
liver is defined by that difference, also in the arterial phase, where real spleens run ahead."""


@dataclass(frozen=True)
class Habitus:
    """What stays the same between two scans of one patient."""

    scale: Triple
    offset_mm: Triple
    fat_mm: float
    belly: float
    heart_ratio: float
    spleen_ml: float
    diaphragm: float
    aorta_radius: float
    seed: int


def draw_habitus(rng: np.random.Generator) -> Habitus:
    size = rng.uniform(0.92, 1.07)
    scale = (size, size * rng.uniform(0.95, 1.05), size * rng.uniform(0.96, 1.04))
    return Habitus(
        scale=scale,
        offset_mm=(rng.uniform(-10, 10), rng.uniform(-8, 8), rng.uniform(-10, 10)),
        fat_mm=rng.uniform(6, 28),
        belly=rng.uniform(-0.05, 0.05),
        heart_ratio=rng.uniform(0.37, 0.45),
        spleen_ml=rng.uniform(130, 250),
        diaphragm=rng.normal(0, 4),
        aorta_radius=rng.uniform(11, 14),
        seed=int(rng.integers(2**31)),
    )


def draw_tissues(phase: str, liver_deficit_hu: float, rng: np.random.Generator) -> dict[str, float]:
    """HU of one scan's tissues; the liver lies ``liver_deficit_hu`` below the spleen."""
    tissues = {name: hu * rng.uniform(0.94, 1.06) for name, hu in PHASE_HU[phase].items()}
    tissues["liver"] = tissues["spleen"] - liver_deficit_hu
    return tissues


@dataclass(frozen=True)
class States:
    """Targets of the findings that are a property of an organ, measured after clipping by neighbours."""

    heart_ratio: float
    spleen_ml: float


@dataclass
class _Scene:
    canvas: Canvas
    habitus: Habitus
    tissues: Mapping[str, float]
    rng: np.random.Generator
    cavity: np.ndarray
    above: np.ndarray
    """Voxels over the diaphragm."""

    @property
    def grid(self) -> Grid:
        return self.canvas.grid

    def jitter(self, value: float, share: float = 0.06) -> float:
        return value * self.rng.uniform(1 - share, 1 + share)

    def organ(self, shape: tuple[Box, np.ndarray], hu: float, name: str, under: bool = True) -> np.ndarray:
        """Paint an organ inside the body cavity, on its side of the diaphragm."""
        box, mask = shape
        mask = mask & self.cavity[box] & (self.above[box] != under)
        self.canvas.paint(box, mask, hu, ORGANS[name])
        return mask

    def soft(self, shape: tuple[Box, np.ndarray], hu: float) -> None:
        """Paint an unlabelled structure; labelled organs stay."""
        box, mask = shape
        self.canvas.paint(box, mask & (self.canvas.labels[box] == BODY), hu)

    def inside(self, shape: tuple[Box, np.ndarray], hu: float, name: str) -> None:
        """Paint a part of an organ, which keeps its label."""
        box, mask = shape
        self.canvas.paint(box, mask & (self.canvas.labels[box] == ORGANS[name]), hu)


def paint_anatomy(grid: Grid, habitus: Habitus, states: States, tissues: Mapping[str, float]) -> Canvas:
    """A scan without findings other than the states asked for."""
    rng = np.random.default_rng(habitus.seed)
    canvas = Canvas(grid)
    cavity = _paint_body(canvas, habitus, rng)
    above = grid.axes[0][:, None, None] > _diaphragm(grid, habitus)[None]
    scene = _Scene(canvas, habitus, tissues, rng, cavity, above)
    _paint_lungs(scene)
    _paint_heart(scene, states.heart_ratio)
    _paint_mediastinum(scene)
    _paint_liver(scene)
    _paint_stomach(scene)
    _paint_pancreas(scene)
    _paint_kidneys(scene)
    _paint_spleen(scene, states.spleen_ml)
    _paint_bowel(scene)
    _paint_vessels(scene)
    _paint_spine(scene)
    return canvas


def _oval(grid: Grid, centre_y: float, half_y: np.ndarray, half_x: np.ndarray) -> np.ndarray:
    """Superelliptic radius of every voxel to the power 2.3; the half axes may change from slice to slice."""
    power = 2.3
    y = np.abs(grid.axes[1] - centre_y) ** power
    x = np.abs(grid.axes[2]) ** power
    part_y = y[None] / (half_y[:, None] ** power)
    part_x = x[None] / (half_x[:, None] ** power)
    return part_y[:, :, None] + part_x[:, None, :]


def _ring(value: float) -> float:
    return value**2.3


def _paint_body(canvas: Canvas, habitus: Habitus, rng: np.random.Generator) -> np.ndarray:
    """Skin, fat, muscle, ribs and the fat-filled cavity; returns the cavity's mask."""
    grid = canvas.grid
    z, y, _ = grid.axes
    top = np.clip((z - 40) / 110, 0, 1) ** 2
    low = np.clip((-z - 10) / 100, 0, 1)
    inner = _oval(grid, -2, 80 * (1 - 0.15 * top + 0.4 * habitus.belly * low), 124 * (1 - 0.22 * top - 0.06 * low))
    skin_y = 80 * 1.16 + habitus.fat_mm * (1 + 0.25 * low) + 80 * habitus.belly * low
    skin_x = 124 * 1.13 + habitus.fat_mm * 0.9 + 6 * top
    outer = _oval(grid, -2 - 0.15 * habitus.fat_mm, skin_y, skin_x)
    canvas.labels[outer <= 1] = BODY
    np.copyto(canvas.hu, FAT_HU - 5, where=outer <= 1)
    shrink = 1 - habitus.fat_mm / 130
    np.copyto(canvas.hu, MUSCLE_HU, where=outer <= _ring(shrink))
    cavity = inner <= 1
    np.copyto(canvas.hu, FAT_HU, where=cavity)
    table = (y > 118 + habitus.fat_mm * 0.7)[None, :, None] & (y < 124 + habitus.fat_mm * 0.7)[None, :, None]
    np.copyto(canvas.hu, -650, where=table & (canvas.labels == 0))
    _paint_ribs(canvas, inner, rng)
    return cavity


def _paint_ribs(canvas: Canvas, inner: np.ndarray, rng: np.random.Generator) -> None:
    """Slanting hoops in the chest wall, higher at the back, and the sternum."""
    grid = canvas.grid
    z, y, x = grid.coordinates((slice(None), slice(None), slice(None)))
    shell = (inner > _ring(1.025)) & (inner <= _ring(1.115))
    height = z + 0.42 * y + rng.uniform(0, 27)
    costal = z > -62 + 0.55 * np.abs(y - 40) - 14
    hoops = shell & (np.mod(height, 27) < 10) & costal & (np.abs(x) + y > -58)
    cortex = rng.uniform(320, 460)
    canvas.hu[hoops] = cortex
    marrow = hoops & (inner > _ring(1.045)) & (inner <= _ring(1.09))
    canvas.hu[marrow] = 0.55 * cortex
    canvas.labels[hoops] = ORGANS["ribs"]
    sternum = shell & (np.abs(x) < 17) & (y < 0) & (z > 28)
    canvas.hu[sternum] = 180


def _diaphragm(grid: Grid, habitus: Habitus) -> np.ndarray:
    """Height of the diaphragm over (y, x): two domes, the right one higher, deep recesses at the wall."""
    y, x = grid.axes[1][:, None], grid.axes[2][None, :]
    width = np.abs(x)
    sideways = np.where(width > 55, ((width - 55) / 66) ** 2, ((55 - width) / 130) ** 2)
    dome = 20 - 5 * np.tanh(x / 25) + habitus.diaphragm
    return np.asarray(dome - 58 * (0.75 * sideways + ((y + 12) / 80) ** 2), np.float32)


def _paint_lungs(scene: _Scene) -> None:
    grid, canvas = scene.grid, scene.canvas
    _, y, x = grid.coordinates((slice(None), slice(None), slice(None)))
    centre = 12 + 18 * np.exp(-(((y - 5) / 30) ** 2)) + 0.5 * np.clip(y - 30, 0, 20)
    air = scene.cavity & scene.above
    base, gradient = scene.rng.normal(-850, 22), scene.rng.uniform(0.2, 0.9)
    density = (base + gradient * y).astype(np.float32)
    for sign, name in ((1, "left lung"), (-1, "right lung")):
        mask = air & (sign * x > centre)
        np.copyto(canvas.hu, density, where=mask)
        canvas.labels[mask] = ORGANS[name]
        _paint_lung_vessels(scene, sign, ORGANS[name])


def _paint_lung_vessels(scene: _Scene, sign: int, label: int) -> None:
    """Branches that leave the hilum in all directions, thinner and fainter outwards."""
    grid, canvas, rng = scene.grid, scene.canvas, scene.rng
    count, steps = 70, 52
    direction = rng.normal(0, (0.9, 0.75, 0.5), (count, 3))
    direction[:, 2] = sign * np.abs(direction[:, 2])
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    bend = rng.normal(0, 0.004, (count, 3))
    far = np.linspace(4, 112, steps)[None, :, None]
    points = np.array([52.0, 6.0, sign * 32.0]) + direction[:, None] * far + bend[:, None] * far**2
    index = []
    for axis, (values, n) in enumerate(zip(grid.axes, grid.shape, strict=True)):
        step = values[1] - values[0]
        index.append(np.clip(np.rint((points[..., axis] - values[0]) / step), 0, n - 1).astype(np.intp).ravel())
    hu = np.broadcast_to(np.linspace(-60, -600, steps)[None], (count, steps)).ravel()
    keep = canvas.labels[index[0], index[1], index[2]] == label
    index = [i[keep] for i in index]
    np.maximum.at(canvas.hu, (index[0], index[1], index[2]), hu[keep].astype(np.float32))


def _fit(paint: Callable[[float], float], target: float, power: float, rounds: int = 4) -> float:
    """Scale at which a measured size meets its target; ``paint`` measures what a scale would give."""
    scale = 1.0
    for _ in range(rounds):
        size = paint(scale)
        if size <= 0 or abs(size / target - 1) < 0.015:
            break
        scale *= (target / size) ** (1 / power)
    return scale


def _paint_heart(scene: _Scene, ratio: float) -> None:
    grid, canvas = scene.grid, scene.canvas
    lungs = (canvas.labels == ORGANS["left lung"]) | (canvas.labels == ORGANS["right lung"])
    target = ratio * widest(lungs)
    tilt = -scene.rng.uniform(0.35, 0.6)
    centre_y, radii = scene.rng.uniform(-24, -18), (scene.jitter(38), scene.jitter(36), scene.jitter(52))

    def place(scale: float) -> tuple[Triple, Triple]:
        grow = scale**0.7
        return (26 + 0.62 * radii[0] * grow, centre_y, 8 + 12 * scale), (
            radii[0] * grow,
            radii[1] * grow,
            radii[2] * scale,
        )

    def shape(scale: float) -> tuple[Box, np.ndarray]:
        centre, size = place(scale)
        box, mask = grid.ellipsoid(centre, size, tilt)
        return box, mask & scene.cavity[box] & scene.above[box]

    scale = _fit(lambda k: float(widest(shape(k)[1])), target, 1.0)
    centre, size = place(scale)
    coat, layer = grid.ellipsoid(centre, (size[0] + 4, size[1] + 4, size[2] + 4), tilt)
    canvas.paint(coat, layer & scene.cavity[coat] & scene.above[coat], FAT_HU, BODY)
    box, mask = shape(scale)
    canvas.paint(box, mask, scene.tissues["myocardium"], ORGANS["heart"])
    chambers = (
        ("left heart", (-0.12, 0.10, 0.42), (0.52, 0.42, 0.34)),
        ("left heart", (0.38, 0.52, -0.10), (0.36, 0.30, 0.34)),
        ("right heart", (-0.15, -0.46, -0.02), (0.55, 0.30, 0.42)),
        ("right heart", (0.05, 0.06, -0.56), (0.52, 0.46, 0.30)),
    )
    cos, sin = np.cos(tilt), np.sin(tilt)
    for blood, offset, part in chambers:
        dy, dx = offset[1] * size[1], offset[2] * size[2]
        place_at = (
            centre[0] + offset[0] * size[0],
            centre[1] + cos * dy + sin * dx,
            centre[2] - sin * dy + cos * dx,
        )
        chamber = grid.ellipsoid(place_at, (part[0] * size[0], part[1] * size[1], part[2] * size[2]), tilt)
        scene.inside(chamber, scene.tissues[blood], "heart")


def _paint_mediastinum(scene: _Scene) -> None:
    """Aorta with its arch, caval veins, pulmonary trunk, airways and oesophagus."""
    hu, rng = scene.tissues, scene.rng
    radius, sway = scene.habitus.aorta_radius, rng.uniform(-4, 4)
    down: list[Triple] = [
        (98, 24, 12),
        (85, 40, 19),
        (40, 42, 17 + sway),
        (-20, 38, 9 + sway),
        (-75, 34, 6),
        (-200, 33, 4),
    ]
    ascending: list[Triple] = [(62, -14, -4), (80, -16, -12), (98, -6, -6), (104, 10, 4), (98, 24, 12)]
    scene.soft(scene.grid.tube([(140, -8, -22), (85, -4, -24), (58, -4, -26)], [8, 9, 10]), hu["vein"])
    scene.soft(
        scene.grid.tube([(66, -24, 10), (80, -10, 16), (80, 6, 6), (76, 10, -34)], [13, 12, 9, 7]),
        hu["right heart"],
    )
    scene.soft(scene.grid.tube([(80, 2, 14), (72, 12, 42)], [9, 7]), hu["right heart"])
    scene.soft(scene.grid.tube([(160, 22, 4), (60, 30, 4), (22, 24, 10)], [7, 7, 8]), 38)
    for points, share in ((ascending, 1.18), (down, 1.0)):
        radii = [radius * share * (1 - 0.05 * i) for i in range(len(points))]
        box, mask = scene.grid.tube(points, radii)
        free = np.isin(scene.canvas.labels[box], (BODY, ORGANS["left lung"], ORGANS["right lung"]))
        scene.canvas.paint(box, mask & free, hu["artery"], ORGANS["aorta"])
    airways: tuple[tuple[list[Triple], list[float]], ...] = (
        ([(160, 10, -2), (84, 14, -2)], [9, 8]),
        ([(84, 14, -2), (66, 16, 30)], [6, 5]),
        ([(84, 14, -2), (66, 16, -32)], [7, 5]),
    )
    for points, radii in airways:
        scene.soft(scene.grid.tube(points, radii), -960)


def _paint_liver(scene: _Scene) -> None:
    grid, hu, rng = scene.grid, scene.tissues, scene.rng
    low = rng.normal(0, 4)
    right = grid.ellipsoid((-26 + low, 4, -64), (scene.jitter(78), scene.jitter(84), scene.jitter(66)), 0.15)
    left = grid.ellipsoid((-6 + low, -38, -8), (scene.jitter(36), scene.jitter(34), scene.jitter(64)), 0.12)
    scene.organ(right, hu["liver"], "liver")
    scene.organ(left, hu["liver"], "liver")
    notch = grid.ellipsoid((-72 + low, -12, -16), (36, 32, 24), 0.3)
    box, mask = notch
    taken = mask & (scene.canvas.labels[box] == ORGANS["liver"])
    scene.canvas.paint(box, taken, FAT_HU, BODY)
    shift = 0.55 * (hu["vein"] - hu["spleen"])
    vein = hu["liver"] + (shift if shift > 8 else -8)
    for points in (
        [(0.0, 24.0, -24.0), (-4.0, 8.0, -60.0), (-10.0, 0.0, -92.0)],
        [(2.0, 22.0, -24.0), (-6.0, -20.0, -40.0), (-18.0, -48.0, -50.0)],
        [(-30.0, 2.0, -28.0), (-30.0, 2.0, -58.0), (-42.0, 20.0, -88.0)],
        [(-30.0, 2.0, -58.0), (-26.0, -26.0, -76.0)],
    ):
        bent = [(p[0] + rng.normal(0, 3), p[1] + rng.normal(0, 4), p[2] + rng.normal(0, 3)) for p in points]
        scene.inside(grid.tube(bent, [4.5, 3.4, 2.0][: len(bent)]), vein, "liver")
    if rng.random() < 0.8:
        bladder = grid.ellipsoid((-52 + low, -34, -42 + rng.normal(0, 4)), (scene.jitter(20), 13, 12), 0.3)
        box, mask = bladder
        mask &= scene.cavity[box]
        scene.canvas.paint(box, mask, rng.uniform(4, 14), BODY)


def _paint_stomach(scene: _Scene) -> None:
    """A J-shaped tube under the left dome, with a wall, contents and an air-fluid level."""
    grid, hu, rng = scene.grid, scene.tissues, scene.rng
    full = rng.uniform(0.75, 1.1)
    points: list[Triple] = [(-2, 16, 58), (-20, -14, 60), (-44, -44, 44), (-58, -46, 6), (-56, -30, -18)]
    points = [(p[0] + rng.normal(0, 3), p[1] + rng.normal(0, 3), p[2] + rng.normal(0, 3)) for p in points]
    radii = [27 * full, 26 * full, 21 * full, 15 * full, 10]
    box, outer = grid.tube(points, radii)
    free = (scene.canvas.labels[box] == BODY) & scene.cavity[box] & ~scene.above[box]
    scene.canvas.paint(box, outer & free, hu["wall"], ORGANS["stomach"])
    lumen, inner = grid.tube(points, [r - 5 for r in radii])
    _, y, _ = grid.coordinates(lumen)
    level, contents = rng.uniform(-62, -20), rng.uniform(5, 60)
    scene.inside((lumen, inner), contents, "stomach")
    scene.inside((lumen, inner & (y < level)), -940, "stomach")


def _paint_pancreas(scene: _Scene) -> None:
    rng = scene.rng
    points: list[Triple] = [(-84, 8, -30), (-66, 2, -26), (-54, -12, -4), (-46, -6, 26), (-36, 16, 58)]
    points = [(p[0] + rng.normal(0, 3), p[1] + rng.normal(0, 3), p[2] + rng.normal(0, 3)) for p in points]
    thick = rng.uniform(0.85, 1.15)
    box, mask = scene.grid.tube(points, [10 * thick, 14 * thick, 9 * thick, 10.5 * thick, 8 * thick])
    taken = np.isin(scene.canvas.labels[box], (BODY, ORGANS["liver"], ORGANS["stomach"], ORGANS["spleen"]))
    scene.canvas.paint(box, mask & taken & scene.cavity[box], scene.tissues["pancreas"], ORGANS["pancreas"])


def _paint_kidneys(scene: _Scene) -> None:
    """Bean shapes: cortex, medullary pyramids, and a fat-filled sinus with the collecting system."""
    grid, hu, rng = scene.grid, scene.tissues, scene.rng
    for sign, name, drop in ((1, "left kidney", 0), (-1, "right kidney", 9)):
        centre = (-72 - drop + rng.normal(0, 4), 38 + rng.normal(0, 3), sign * (62 + rng.normal(0, 3)))
        radii = (scene.jitter(48, 0.1), scene.jitter(25, 0.08), scene.jitter(28, 0.08))
        tilt = sign * -0.55
        box, mask = grid.ellipsoid(centre, radii, tilt)
        mask &= scene.cavity[box]
        scene.canvas.paint(box, mask, hu["cortex"], ORGANS[name])
        scene.inside(grid.ellipsoid(centre, (radii[0] - 9, radii[1] - 7, radii[2] - 7), tilt), hu["medulla"], name)
        for height in (-0.55, 0.0, 0.55):
            column = grid.ellipsoid(
                (centre[0] + height * radii[0], centre[1], centre[2]), (4, radii[1], radii[2]), tilt
            )
            scene.inside(column, hu["cortex"], name)
        hilum = (centre[0], centre[1] - 7, centre[2] - sign * 15)
        box, mask = grid.ellipsoid(hilum, (22, 9, 15), tilt)
        scene.canvas.paint(box, mask & (scene.canvas.labels[box] == ORGANS[name]), FAT_HU + 25, BODY)
        box, mask = grid.ellipsoid(hilum, (16, 5, 9), tilt)
        scene.canvas.paint(box, mask & (scene.canvas.labels[box] == BODY), hu["urine"])


def _paint_spleen(scene: _Scene, volume_ml: float) -> None:
    """As large as asked for, after its neighbours have taken their room (the renal sinus stays)."""
    grid, rng = scene.grid, scene.rng
    centre, tilt = (-16 + rng.normal(0, 4), 34 + rng.normal(0, 3), 96.0), rng.uniform(0.7, 1.0)
    size = np.array([50.0, 25.0, 38.0])

    def shape(scale: float) -> tuple[Box, np.ndarray]:
        grow = scale - 1
        middle = (centre[0] - 26 * grow, centre[1] - 6 * grow, centre[2] - 14 * grow)
        box, mask = grid.ellipsoid(middle, (size[0] * scale, size[1] * scale, size[2] * scale), tilt)
        labels, fat = scene.canvas.labels[box], scene.canvas.hu[box] == FAT_HU
        free = fat | (labels == ORGANS["stomach"]) | (labels == ORGANS["liver"])
        return box, mask & scene.cavity[box] & ~scene.above[box] & free

    scale = _fit(lambda k: float(shape(k)[1].sum()) * grid.voxel_ml, volume_ml, 3.0, rounds=6)
    box, mask = shape(scale)
    scene.canvas.paint(box, mask, scene.tissues["spleen"], ORGANS["spleen"])


def _paint_bowel(scene: _Scene) -> None:
    """Colon in the flanks and loops of small bowel in front, with fluid, stool or gas."""
    grid, rng, wall = scene.grid, scene.rng, scene.tissues["wall"]
    for sign in (1, -1):
        points: list[Triple] = [(-62, -14, sign * 98), (-85, 4, sign * 100), (-150, 6, sign * 98)]
        points = [(p[0] + rng.normal(0, 4), p[1] + rng.normal(0, 4), p[2] + rng.normal(0, 2)) for p in points]
        radii = [rng.uniform(13, 18) for _ in points]
        scene.soft(_within(grid.tube(points, radii), scene.cavity), wall)
        lumen = grid.tube(points, [r - 4 for r in radii])
        scene.soft(_within(lumen, scene.cavity), rng.choice([-500.0, -150.0, 25.0]))
    for _ in range(22):
        centre = (rng.uniform(-150, -60), rng.uniform(-64, 4), rng.uniform(-70, 80))
        radii3 = (rng.uniform(11, 17), rng.uniform(10, 15), rng.uniform(13, 26))
        tilt, kind = rng.uniform(-0.9, 0.9), rng.choice([18.0, 35.0, 35.0, -850.0])
        scene.soft(_within(grid.ellipsoid(centre, radii3, tilt), scene.cavity), wall)
        lumen = grid.ellipsoid(centre, (radii3[0] - 4, radii3[1] - 4, radii3[2] - 4), tilt)
        scene.soft(_within(lumen, scene.cavity), kind)


def _within(shape: tuple[Box, np.ndarray], region: np.ndarray) -> tuple[Box, np.ndarray]:
    box, mask = shape
    return box, mask & region[box]


def _paint_vessels(scene: _Scene) -> None:
    """Inferior vena cava, portal, renal and mesenteric vessels."""
    grid, hu = scene.grid, scene.tissues
    cava: list[Triple] = [(44, 12, -26), (0, 24, -24), (-40, 30, -22), (-200, 32, -20)]
    box, mask = grid.tube(cava, [10, 11, 11, 10])
    free = (scene.canvas.labels[box] == BODY) | (scene.canvas.labels[box] == ORGANS["liver"])
    scene.canvas.paint(box, mask & free & scene.cavity[box], hu["vein"], BODY)
    scene.soft(grid.tube([(-50, 4, -10), (-38, 2, -34)], [6.5, 6]), hu["vein"])
    scene.soft(grid.tube([(-46, 8, 14), (-38, 24, 66)], [4, 4]), hu["vein"])
    scene.soft(grid.tube([(-44, 20, 6), (-66, -2, 5), (-150, -8, 2)], [4, 4, 3.5]), hu["artery"])
    scene.soft(grid.tube([(-66, 4, -6), (-150, -6, -9)], [5, 4.5]), hu["vein"])
    for sign in (1, -1):
        scene.soft(grid.tube([(-70, 30, 4), (-74, 34, sign * 44)], [4, 3.5]), hu["vein"])


def _paint_spine(scene: _Scene) -> None:
    """Vertebral bodies and discs, the canal, arches and processes; psoas and back muscles beside them."""
    grid, rng, canvas = scene.grid, scene.rng, scene.canvas
    phase, cancellous = rng.uniform(0, 31), rng.uniform(140, 240)
    muscle = MUSCLE_HU + rng.uniform(-3, 8)
    for sign in (1, -1):
        scene.soft(grid.tube([(-30, 54, sign * 24), (-150, 46, sign * 38)], [6, 19]), muscle)
        back = grid.ellipsoid((0, 86, sign * 26), (1e4, 16, 23))
        canvas.paint(*back, muscle, BODY)
    body, mask = grid.ellipsoid((0, 58, 0), (1e4, 17, 21))
    z, _, _ = grid.coordinates(body)
    level = np.mod(z + phase, 31)
    canvas.paint(body, mask, 75, ORGANS["spine"])
    canvas.paint(body, mask & (level < 25), cancellous, ORGANS["spine"])
    canvas.paint(body, mask & ((level < 3.5) | ((level > 21.5) & (level < 25))), cancellous * 1.6)
    for centre, radii in (((0, 78, 0), (11, 13)), ((0, 96, 0), (15, 4.5)), ((0, 80, 0), (5, 34))):
        box, mask = grid.ellipsoid((0, centre[1], centre[2]), (1e4, radii[0], radii[1]))
        z, _, _ = grid.coordinates(box)
        arch = mask & (np.mod(z + phase, 31) < 17) if radii[0] != 11 else mask
        canvas.paint(box, arch, cancellous * 1.25, ORGANS["spine"])
    canvas.paint(*grid.ellipsoid((0, 77, 0), (1e4, 7, 9)), 28, BODY)

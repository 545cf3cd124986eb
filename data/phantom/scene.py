"""One phantom case from one seed: ``draw`` one scan, or ``draw_pair`` a patient's prior and current scan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from anatomy import Habitus, States, draw_habitus, draw_tissues, paint_anatomy
from canvas import Canvas, Grid, Triple, blur
from findings import ALL, COARSE, Severity, place_findings, plan_pair, plan_scan
from labels import FINDINGS, ORGANS, PHASES

EXTENT_MM: Triple = (280.0, 392.0, 392.0)
NOISE_HU = (8.0, 20.0)


@dataclass(frozen=True)
class Case:
    """One scan: ``image`` int16 HU and ``labels`` uint8, both canonical (D, H, W) = feet to head, front to
    back, right to left; ``spacing_mm`` (d, h, w). ``painted_hu`` is the mean HU of every organ and finding in
    the label map as painted, before blur and noise."""

    image: np.ndarray
    labels: np.ndarray
    spacing_mm: Triple
    painted_hu: dict[str, float]
    phase: str


def default_prevalence() -> dict[str, float]:
    return {name: 0.5 if name in COARSE else 0.4 for name in ALL}


@dataclass(frozen=True)
class SceneOptions:
    """``shape`` is the nominal (D, H, W) of a field of view of 280 x 392 x 392 mm; each case varies both.
    ``prevalence`` names the findings whose share of positive cases differs from the default.
    ``lesion_scale`` multiplies the diameters of round lesions (``findings.SITES``)."""

    shape: tuple[int, int, int] = (56, 112, 112)
    prevalence: Mapping[str, float] = field(default_factory=dict)
    lesion_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value in self.prevalence.items():
            if name not in ALL:
                raise ValueError(f"prevalence: unknown finding {name!r}; known: {', '.join(ALL)}")
            if not 0 <= value <= 1:
                raise ValueError(f"prevalence of {name}: {value} is not between 0 and 1")
        if len(self.shape) != 3 or min(self.shape) < 16:
            raise ValueError(f"shape: {self.shape} must be three sizes of at least 16 voxels")
        if not 0.5 <= self.lesion_scale <= 2:
            raise ValueError(f"lesion_scale: {self.lesion_scale} is not between 0.5 and 2")

    @property
    def shares(self) -> dict[str, float]:
        return default_prevalence() | dict(self.prevalence)


def draw(seed: int, options: SceneOptions | None = None) -> Case:
    """One scan; the same seed and options give the same bytes."""
    options = options or SceneOptions()
    plan = plan_scan(stream(seed, "scan"), options.shares)
    return render(seed, plan, patient(seed, options), options.lesion_scale)[0]


def draw_pair(seed: int, options: SceneOptions | None = None) -> tuple[Case, Case]:
    """Prior and current scan of one patient: same body, organs and grid; every finding is unchanged, grown,
    shrunk, new, gone or absent in both; the contrast phase may differ."""
    options = options or SceneOptions()
    plan = plan_pair(stream(seed, "pair"), options.shares)
    prior, current = render(seed, plan, patient(seed, options), options.lesion_scale)
    return prior, current


Painter = Callable[[Mapping[str, float], Mapping[str, Severity]], Canvas]
"""Paints anatomy without findings from one scan's tissue HU and severities (of which it needs the states)."""

STREAMS = ("scan", "pair", "habitus", "grid", "liver", "findings", "atlas", "first scan", "second scan")


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Independent generators per purpose, so that a change in one part does not shift the others."""
    return np.random.default_rng([seed, STREAMS.index(purpose)])


def render(seed: int, plan: Mapping[str, Sequence[Severity]], paint: Painter, lesion_scale: float = 1.0) -> list[Case]:
    """All scans of one patient: anatomy, the planned findings in it, then the scanner's blur and noise."""
    streams = [stream(seed, name) for name in ("first scan", "second scan")[: len(plan["fatty liver"])]]
    phases = [PHASES[int(s.integers(len(PHASES)))] for s in streams]
    normal_deficit = stream(seed, "liver").uniform(-14, 8)
    tissues, canvases = [], []
    for i, (phase, own) in enumerate(zip(phases, streams, strict=True)):
        fatty = plan["fatty liver"][i]
        tissues.append(draw_tissues(phase, normal_deficit if fatty is None else 30 + 22 * fatty, own))
        canvases.append(paint(tissues[i], {name: course[i] for name, course in plan.items()}))
    place_findings(canvases, plan, tissues, stream(seed, "findings"), lesion_scale)
    return [finish(c, phase, own) for c, phase, own in zip(canvases, phases, streams, strict=True)]


def patient(seed: int, options: SceneOptions) -> Painter:
    """Painter of one procedural patient."""
    habitus = draw_habitus(stream(seed, "habitus"))
    grid = draw_grid(options.shape, habitus, stream(seed, "grid"))

    def paint(tissues: Mapping[str, float], severities: Mapping[str, Severity]) -> Canvas:
        spleen, heart = severities["splenomegaly"], severities["cardiomegaly"]
        states = States(
            heart_ratio=habitus.heart_ratio if heart is None else 0.55 + 0.11 * heart,
            spleen_ml=habitus.spleen_ml if spleen is None else 460 + 420 * spleen,
        )
        return paint_anatomy(grid, habitus, states, tissues)

    return paint


def draw_grid(shape: tuple[int, int, int], habitus: Habitus, rng: np.random.Generator) -> Grid:
    """Slice spacing, field of view and matrix of one scan, around the nominal ones."""
    nominal = EXTENT_MM[0] / shape[0]
    thickness = nominal * rng.uniform(0.8, 1.2)
    depth = round(EXTENT_MM[0] * rng.uniform(0.96, 1.06) / thickness)
    view = EXTENT_MM[1] * rng.uniform(0.95, 1.05)
    zoom = rng.uniform(0.92, 1.06)
    height, width = round(shape[1] * zoom), round(shape[2] * zoom)
    spacing = (round(thickness, 3), round(view / height, 3), round(view / width, 3))
    return Grid.make((depth, height, width), spacing, habitus.scale, habitus.offset_mm)


def finish(canvas: Canvas, phase: str, rng: np.random.Generator) -> Case:
    """Blur and noise of the scanner over a painted canvas."""
    painted = mean_hu(canvas)
    image = canvas.hu
    for axis, sigma in enumerate((0.42, 0.5, 0.5)):
        image = blur(image, sigma, axis)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise = blur(blur(noise, 0.6, 1), 0.6, 2)
    image += noise * np.float32(rng.uniform(*NOISE_HU) / noise[::4, ::4, ::4].std())
    np.clip(np.rint(image, out=image), -1024, 3071, out=image)
    return Case(image.astype(np.int16), canvas.labels, canvas.grid.spacing_mm, painted, phase)


def mean_hu(canvas: Canvas) -> dict[str, float]:
    """Mean HU per organ and finding that has voxels, to a tenth."""
    flat = canvas.labels.ravel()
    count = np.bincount(flat, minlength=256)
    total = np.bincount(flat, weights=canvas.hu.ravel(), minlength=256)
    names = {**ORGANS, **FINDINGS}
    return {name: round(float(total[i] / count[i]), 1) for name, i in names.items() if count[i]}

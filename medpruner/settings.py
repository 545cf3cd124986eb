"""What each pruning method can be told, and what it is told by default.

Every class is one method under :func:`medpruner.attach`. Shares are of language-model tokens.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    ok = low < value <= high if open_low else low <= value <= high
    if not ok or math.isnan(value):
        raise ValueError(f"{name}: {value}, allowed is {'more than ' if open_low else ''}{low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """What all methods share.

    Attributes:
        label_tokens: of a prompt with one image for each slice: text between two images of up to so many tokens is
            the later one's label ("SLICE 3:") and goes with it; longer text begins another volume.
    """

    label_tokens: int = 16
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        _within("label_tokens", self.label_tokens, 0, 10_000)


@dataclass(frozen=True, kw_only=True)
class MedPruner(PruningSettings):
    """MedPruner: slice filter (Sec. 2.2), nucleus and clusters (Sec. 2.3).

    Attributes:
        gamma: a slice stays if its mean absolute difference to the anchor slice is larger (Eq. 2); None: no filter.
        gamma_unit: ``normalised``: of pixels as the model's processor gives them; ``hu``: of the scan.
        hu_per_pixel: HU of one unit of a normalised pixel, for ``gamma_unit: hu``.
        nucleus: whether tokens within a slice are chosen (Eq. 3-5); off: the slice filter alone (Table 3).
        tau: share of the attention that the chosen ones must hold together (Eq. 5).
        temperature: T of Eq. 4; 2 for Qwen3-VL and MedGemma, 1 for Hulu-Med.
        importance: ``sum``: attention received, 1 on average; ``mean``: divided by the number of queries, as the
            paper's text has it, with which Eq. 4 is nearly flat.
        layer: block of the tower that is read, counted from its end if negative.
        clusters: whether what was not chosen is merged into centres (Table 3's "Redundant").
        centre_share: centres of a slice, as a share of its tokens; at least one.
        features: what is merged: tokens behind the ``projector``, as in the published code, or in front of it
            (``tower``), as in the paper.
        encode_dropped: run the tower on all slices and drop then, as the published code does; the result is the same.
        dropped_tokens: tokens that stay of a dropped slice; the published code has 1, which needs ``encode_dropped``.
    """

    gamma: float | None = 0.05
    gamma_unit: Literal["normalised", "hu"] = "normalised"
    hu_per_pixel: float | None = None
    nucleus: bool = True
    tau: float = 0.9
    temperature: float = 2.0
    importance: Literal["sum", "mean"] = "sum"
    layer: int = -1
    clusters: bool = True
    centre_share: float = 0.05
    features: Literal["projector", "tower"] = "projector"
    encode_dropped: bool = False
    dropped_tokens: int = 0
    name: ClassVar[str] = "medpruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None:
            _within("gamma", self.gamma, 0.0, math.inf)
        if self.gamma_unit == "hu" and self.gamma is not None and not self.hu_per_pixel:
            raise ValueError("gamma_unit: hu needs hu_per_pixel, the HU of one unit of a normalised pixel")
        _within("tau", self.tau, 0.0, 1.0, open_low=True)
        _within("temperature", self.temperature, 0.0, 1e6, open_low=True)
        _within("centre_share", self.centre_share, 0.0, 1.0)
        _within("dropped_tokens", self.dropped_tokens, 0, 10_000)
        if self.dropped_tokens and not self.encode_dropped:
            raise ValueError("dropped_tokens: needs encode_dropped: true, else there are no features to keep")

    @property
    def threshold(self) -> float | None:
        """Gamma in normalised pixels."""
        if self.gamma is None or self.gamma_unit == "normalised":
            return self.gamma
        assert self.hu_per_pixel is not None
        return self.gamma / self.hu_per_pixel


@dataclass(frozen=True, kw_only=True)
class VisionZip(PruningSettings):
    """VisionZip: the tokens that receive most attention, and the others merged into centres.

    Attributes:
        keep: share of dominant tokens. contextual: share of centres. layer: block of the tower that is read.
    """

    keep: float = 0.65
    contextual: float = 0.05
    layer: int = -2
    name: ClassVar[str] = "visionzip"

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("keep", self.keep, 0.0, 1.0, open_low=True)
        _within("contextual", self.contextual, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class HiPrune(PruningSettings):
    """HiPrune: anchors and their neighbours from an object layer, the rest from a deep layer.

    Attributes:
        keep: share of tokens. alpha: share of these that anchors with their buffers are meant to be.
        object_layer: block of the tower; None: the middle one (16 of 32 in Qwen2.5-VL). deep_layer: the other one.
    """

    keep: float = 0.223
    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int = -1
    name: ClassVar[str] = "hiprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("keep", self.keep, 0.0, 1.0, open_low=True)
        _within("alpha", self.alpha, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class HuluL1(PruningSettings):
    """Hulu-Med's own rule: a token stays if its pixels differ from those of the previous slice.

    Attributes:
        threshold: mean absolute difference of normalised pixels.
    """

    threshold: float = 0.1
    name: ClassVar[str] = "hulu_l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("threshold", self.threshold, 0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Uniform(PruningSettings):
    """Slices at uniform distance, whole.

    Attributes:
        keep: share of slices.
    """

    keep: float = 0.5
    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("keep", self.keep, 0.0, 1.0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Random(PruningSettings):
    """Tokens of every slice, drawn.

    Attributes:
        keep: share of tokens. seed: of the draw, which is the same at every call.
    """

    keep: float = 0.5
    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("keep", self.keep, 0.0, 1.0, open_low=True)


METHODS: dict[str, type[PruningSettings]] = {
    method.name: method for method in (MedPruner, VisionZip, HiPrune, HuluL1, Uniform, Random)
}
"""By name, as configs and the command line have it."""


def settings_of(name: str, values: dict[str, object] | None = None) -> PruningSettings:
    """The settings of a method by its name.

    Raises:
        ValueError: no method or setting of this name, or a value that is not allowed.
    """
    if name not in METHODS:
        raise ValueError(f"pruner {name!r}: unknown (known: {', '.join(METHODS)})")
    known = METHODS[name].__dataclass_fields__
    for key in values or {}:
        if key not in known:
            raise ValueError(f"pruner {name}: no setting {key!r} (known: {', '.join(known)})")
    return METHODS[name](**(values or {}))  # type: ignore[arg-type]

"""How a scan becomes what a slice-wise model reads: `slicewise.json` in the model's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mllm3d.config import Settings
from mllm3d.config.messages import first_problem
from mllm3d.errors import UserError

FILE = "slicewise.json"
PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
"""Files of the transformers library that say how a model's pixels are scaled, the best one first."""

Std = Annotated[float, Field(gt=0)]


class Slicewise(Settings):
    """From a prepared volume to frames.

    A model that has no `slicewise.json` sees every slice as a frame, a second after the one before, with the pixel
    scale of its own image processor.
    """

    slices_per_frame: int = Field(default=1, gt=0, description="Slices averaged into one frame.")
    seconds_per_grid: float | None = Field(
        default=None,
        gt=0,
        description="Time from one temporal patch to the next. None: a second for each of its slices.",
    )
    pixel_mean: list[float] = Field(min_length=1, description="By channel: subtracted from the window as [0, 1].")
    pixel_std: list[Std] = Field(min_length=1, description="By channel: divides after that.")
    text_after: Literal["plane", "maximum"] = Field(
        default="plane",
        description="Rotary position of the text behind a volume: after the largest in plane, as in transformers 5, "
        "or after the largest on any axis, as the code that trained Qwen2.5-VL does.",
    )

    @model_validator(mode="after")
    def _has_a_scale_for_each_channel(self) -> Self:
        if len(self.pixel_mean) != len(self.pixel_std):
            raise ValueError(f"{len(self.pixel_mean)} numbers in pixel_mean, {len(self.pixel_std)} in pixel_std")
        return self


def read_slicewise(folder: Path) -> Slicewise:
    """`slicewise.json` of a model's folder, or what follows from its image processor.

    Raises `UserError` where neither is there, or one of them is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        mean, std = _pixel_scale(folder)
        return Slicewise(pixel_mean=mean, pixel_std=std)
    try:
        return Slicewise.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}; correct it or export the model again") from error


def _pixel_scale(folder: Path) -> tuple[list[float], list[float]]:
    for name in PROCESSORS:
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = _scale_in(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: damaged ({error}); copy it again") from error
        if found is not None:
            return found
    raise UserError(
        f"{folder}: neither {FILE} nor image_mean and image_std in {PROCESSORS[1]}, so the scale of pixels is unknown; "
        "copy the model's preprocessor_config.json there"
    )


def _scale_in(values: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """Of one file; newer ones nest the processors of images and videos."""
    for part in (values, values.get("video_processor") or {}, values.get("image_processor") or {}):
        scale: Sequence[Any] = [part.get("image_mean"), part.get("image_std")]
        if all(isinstance(item, list) for item in scale):
            return [float(x) for x in scale[0]], [float(x) for x in scale[1]]
    return None

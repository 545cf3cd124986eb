"""Photon models without a 3D patch embedding, as the Qwen2.5-VL of the transformers library.

With patches of two frames over three channels and nothing dropped, a Photon model computes what Qwen2.5-VL computes:
only the patch embedding is kept in another shape. What the library has no field for goes into ``slicewise.json``.

Legend: V width of the vision tower, C channels, d h w voxels of a patch.
"""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

from transformers import Qwen2_5_VLConfig

from photon.building import PATCH_WEIGHT, read_config
from photon.configuration_photon import PhotonConfig
from photon.published import TIED, Conversion, Shape, check_shapes, our_shapes

FRAMES, CHANNELS = 2, 3
SETTINGS, PREPROCESSING = "slicewise.json", "preprocessing.json"
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def to_slicewise(config: PhotonConfig, shapes: dict[str, Shape], preprocessing: dict[str, Any]) -> Conversion:
    """How a Photon model becomes a Qwen2.5-VL.

    Args:
        config: of the model. shapes: its weights. preprocessing: its ``preprocessing.json``.

    Raises:
        ValueError: in one line, why it is none, or which weights do not fit ``config``.
    """
    _check_kind(config)
    check_shapes(shapes, our_shapes(config), {TIED} if config.tie_word_embeddings else set())
    patches = config.patches
    kernel = {PATCH_WEIGHT: (shapes[PATCH_WEIGHT][0], patches.channels, *patches.size)}
    files = {
        SETTINGS: json.dumps(slicewise_settings(config, preprocessing), indent=2) + "\n",
        PREPROCESSING: json.dumps(preprocessing, indent=2) + "\n",
    }
    return Conversion(backbone_config(config), {key: key for key in shapes}, {**shapes, **kernel}, files=files)


def _check_kind(config: PhotonConfig) -> None:
    text: Any = config.text_config
    patches = config.patches
    if text.model_type != "qwen2_5_vl_text":
        raise ValueError(f"config.json: text_config is of {text.model_type}; only Qwen2.5-VL can be written")
    if config.scheduling is not None:
        raise ValueError("config.json: the model drops tokens itself (scheduling); convert a backbone that does not")
    if patches.channels != CHANNELS or patches.size[0] != FRAMES or patches.size[1] != patches.size[2]:
        raise ValueError(
            f"config.json: {patches.size} patches over {patches.channels} channels, a 3D patch embedding; Qwen2.5-VL "
            f"has square patches of {FRAMES} frames over {CHANNELS}, as configs/quickstart/backbone.yaml and "
            "configs/photon_max.yaml train them"
        )


def backbone_config(config: PhotonConfig) -> str:
    """Text of Qwen2.5-VL's config.json."""
    text, vision = config.to_dict()["text_config"], config.to_dict()["vision_config"]
    tokens = {name: getattr(config, name) for name in TOKENS}
    backbone = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=config.tie_word_embeddings, **tokens
    )
    backbone.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    backbone.dtype = config.dtype
    return backbone.to_json_string()


def slicewise_settings(config: PhotonConfig, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """What ``slicewise.json`` holds: the model reads volumes in its own units, on every channel alike."""
    vision: Any = config.vision_config
    return {
        "slices_per_frame": config.slices_per_frame,
        "seconds_per_grid": _seconds(config.geometry.temporal_step, vision.tokens_per_second),
        "pixel_mean": [preprocessing["mean"]] * CHANNELS,
        "pixel_std": [preprocessing["std"]] * CHANNELS,
        "text_after": config.text_after,
    }


def _seconds(step: float, tokens_per_second: float) -> float:
    """Of one temporal patch; the library multiplies it again and cuts off, which must not lose a whole position."""
    seconds = step / tokens_per_second
    while seconds * tokens_per_second < step:
        seconds = math.nextafter(seconds, math.inf)
    return seconds


class SlicewisePhoton:
    """One way for folders of files; what ``mllm3d convert --to`` finds under ``qwen2_5_vl``."""

    volume_preset: ClassVar[str] = "photon_max"

    @staticmethod
    def from_published(folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """There is nothing to convert."""
        raise ValueError("Qwen2.5-VL is read as it is: give the folder as model.checkpoint")

    @staticmethod
    def to_published(folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """See :func:`to_slicewise`."""
        config = read_config(folder)
        if PATCH_WEIGHT not in shapes or len(shapes[PATCH_WEIGHT]) != 2:
            raise ValueError("config.json: not a Photon model of ours, which is what can be written as Qwen2.5-VL")
        try:
            preprocessing = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))
            _ = float(preprocessing["mean"]), float(preprocessing["std"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{PREPROCESSING}: missing or damaged; copy it from the run folder") from error
        return to_slicewise(config, shapes, preprocessing)

    @staticmethod
    def complete(folder: Path) -> None:
        """For ``from_published`` alone."""
        raise NotImplementedError

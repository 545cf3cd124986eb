"""Photon models from other models: from a backbone's weights, with another patch embedding, with scheduling.

Every function copies all weights it can and says which it could not: a vision tower that silently stays random
is the one failure that no metric shows early.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from photon.configuration_photon import BACKBONES, PhotonConfig
from photon.geometry import Size3
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.patch_embedding import QWEN_STD, inflate
from photon.scheduling import SchedulingSettings

PATCH_WEIGHT = "model.visual.patch_embed.proj.weight"
SCHEDULER = "model.threshold_predictor."
PatchInit = Literal["inflate", "fresh"]


def photon_config(values: dict[str, Any]) -> PhotonConfig:
    """A Photon configuration with a backbone's shapes (``config.to_dict()`` of Qwen2.5-VL, or of ``BACKBONES``)."""
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "transformers_version")}
    return PhotonConfig(**copy.deepcopy(values))


def planned_config(name: str) -> PhotonConfig | None:
    """The configuration of a published backbone by its hub name, without asking the hub; None if unknown."""
    return photon_config(BACKBONES[name]) if name in BACKBONES else None


def read_config(source: str | Path) -> PhotonConfig:
    """Configuration of a Qwen2.5-VL or Photon checkpoint (path or hub name)."""
    config = AutoConfig.from_pretrained(source)
    if isinstance(config, PhotonConfig):
        return config
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"{source}: a checkpoint of {config.model_type!r}; Photon starts from qwen2_5_vl or photon")
    return photon_config(config.to_dict())


def read_model(source: str | Path, dtype: torch.dtype = torch.float32) -> PhotonForConditionalGeneration:
    """Weights of a Qwen2.5-VL or Photon checkpoint in a Photon model with the same patch embedding.

    Raises:
        ValueError: a weight is missing, is not expected or has another shape.
    """
    config = AutoConfig.from_pretrained(source)
    if isinstance(config, PhotonConfig):
        return _strictly(PhotonForConditionalGeneration, source, dtype)
    model = empty(read_config(source), dtype)
    weights = _strictly(Qwen2_5_VLForConditionalGeneration, source, dtype).state_dict()
    old = "model.visual.patch_embed.proj.weight"
    weights[old] = weights[old].flatten(1)
    transplant(weights, model)
    return model


def _strictly(family: Any, source: str | Path, dtype: torch.dtype) -> Any:
    """``from_pretrained`` that fails where the library would leave a weight random or unused."""
    model, report = family.from_pretrained(source, dtype=dtype, output_loading_info=True, use_safetensors=True)
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        named = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:5])}" for name, keys in wrong.items())
        raise ValueError(f"{source}: the weights do not fit the model ({named})")
    return model


def empty(config: PhotonConfig, dtype: torch.dtype = torch.float32) -> PhotonForConditionalGeneration:
    """A model with fresh weights."""
    return PhotonForConditionalGeneration(config).to(dtype)


def transplant(weights: dict[str, Tensor], model: nn.Module, fresh: tuple[str, ...] = ()) -> None:
    """Load ``weights``; keys that start with one of ``fresh`` may be missing, nothing else may be.

    Raises:
        ValueError: naming the keys that are missing or left over.
    """
    report = model.load_state_dict(weights, strict=False)
    tied = "lm_head.weight"
    missing = [k for k in report.missing_keys if not k.startswith(fresh or ("\0",)) and k != tied]
    if missing or report.unexpected_keys:
        raise ValueError(f"weights: missing {missing[:5]}, not expected {report.unexpected_keys[:5]}")
    model.tie_weights()  # type: ignore[operator]


def patched_config(
    config: PhotonConfig, size: Size3, channels: int, temporal_step: float | None = None
) -> PhotonConfig:
    """A copy of ``config`` for patches of ``size`` (depth, height, width)."""
    config = copy.deepcopy(config)
    config.vision_config.temporal_patch_size = size[0]
    config.vision_config.patch_size = size[1] if size[1] == size[2] else [size[1], size[2]]
    config.vision_config.in_channels = channels
    config.slices_per_frame, config.temporal_step = 1, temporal_step
    return config


def with_patches(
    model: PhotonForConditionalGeneration,
    size: Size3,
    channels: int,
    init: PatchInit,
    std: float,
    image_std: tuple[float, ...] | None = None,
    temporal_step: float | None = None,
) -> PhotonForConditionalGeneration:
    """The same model with a patch embedding of another size.

    Args:
        size: (depth, height, width) of a patch in voxels. channels: input channels of the new embedding.
        init: ``inflate`` starts from the present kernel, ``fresh`` from the initial distribution.
        std: deviation of the volume's scale, image_std: of the present pixels (see :func:`inflate`).
        temporal_step: see ``PhotonConfig``.
    """
    if init == "inflate" and channels != 1:
        raise ValueError(f"patch_init: inflate makes one input channel, {channels} were asked for; use fresh")
    before = model.config.patches
    config = patched_config(model.config, size, channels, temporal_step)
    weights = model.state_dict()
    kernel = weights.pop(PATCH_WEIGHT)
    if init == "inflate":
        kernel = kernel.unflatten(1, (before.channels, *before.size))
        weights[PATCH_WEIGHT] = inflate(kernel, size, std, image_std or QWEN_STD[: before.channels])
    renewed = empty(config, kernel.dtype)
    transplant(weights, renewed, fresh=(PATCH_WEIGHT,) if init == "fresh" else ())
    renewed.generation_config = model.generation_config
    return renewed


def with_scheduling(
    model: PhotonForConditionalGeneration, settings: SchedulingSettings
) -> PhotonForConditionalGeneration:
    """The same model with token scheduling; a threshold predictor that it already has is kept."""
    config = copy.deepcopy(model.config)
    config.scheduling = settings.to_dict()
    scheduled = empty(config, model.dtype)
    weights = model.state_dict()
    if scheduled.model.threshold_predictor is None:
        weights = {k: v for k, v in weights.items() if not k.startswith(SCHEDULER)}
    transplant(weights, scheduled, fresh=(SCHEDULER,))
    scheduled.generation_config = model.generation_config
    return scheduled

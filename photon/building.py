"""Photon models from other models: from a backbone's weights, with another patch embedding, with scheduling.

Every function copies all weights it can and says which it could not: a vision tower that silently stays random
is the one failure that no metric shows early.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils import logging

from photon.configuration_photon import BACKBONES, PhotonConfig
from photon.geometry import Size3
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.patch_embedding import PIXELS, PixelScale, Scale, inflate, inflated_offset
from photon.processing_photon import PhotonProcessor
from photon.scheduling import SchedulingSettings

PATCH_EMBEDDING = "model.visual.patch_embed."
PATCH_WEIGHT = PATCH_EMBEDDING + "proj.weight"
PATCH_BIAS = PATCH_EMBEDDING + "proj.bias"
SCHEDULER = "model.threshold_predictors."
FAMILIES: dict[str, Any] = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
"""Backbones by the ``model_type`` of their configuration."""
PatchInit = Literal["inflate", "fresh"]


def photon_config(values: dict[str, Any]) -> PhotonConfig:
    """A Photon configuration with a backbone's shapes (``config.to_dict()`` of Qwen2.5-VL, or of ``BACKBONES``)."""
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "transformers_version")}
    return PhotonConfig(**copy.deepcopy(values))


def planned_config(name: str) -> PhotonConfig | None:
    """The configuration of a published backbone by its hub name, without asking the hub; None if unknown."""
    return photon_config(BACKBONES[name]) if name in BACKBONES else None


def read_config(source: str | Path) -> PhotonConfig:
    """Configuration of a Qwen2.5-VL, Qwen3-VL or Photon checkpoint (path or hub name).

    Raises:
        ValueError: the checkpoint is of another model. OSError: it cannot be read.
    """
    _family(source)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a field of a wrong type has an error class of the hub's library
        raise ValueError(f"config.json: damaged ({error}); copy it again") from error
    return config if isinstance(config, PhotonConfig) else photon_config(config.to_dict())


def _family(source: str | Path) -> str:
    """Whose checkpoint it is; asked first, as AutoConfig has long advice for each model that it does not know."""
    found = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if found not in (*FAMILIES, "photon"):
        what = f"a checkpoint of {found!r}" if found else "no config.json with a model_type in it"
        raise ValueError(f"{what}; Photon starts from {', '.join(FAMILIES)} or photon")
    return str(found)


def read_model(source: str | Path, dtype: torch.dtype = torch.float32) -> PhotonForConditionalGeneration:
    """Weights of a Qwen2.5-VL, Qwen3-VL or Photon checkpoint in a Photon model with the same patch embedding.

    Raises:
        ValueError: a weight is missing, is not expected or has another shape, or the checkpoint is of another model.
        OSError: it cannot be read. SafetensorError: a file of weights is damaged.
    """
    family = _family(source)
    if Path(source).is_dir() and not list(Path(source).glob("*.safetensors")):
        raise ValueError("no weights (*.safetensors) in it; copy them there or export the checkpoint again")
    if family == "photon":
        return _strictly(PhotonForConditionalGeneration, source, dtype)
    model = empty(read_config(source), dtype)
    weights = _strictly(FAMILIES[family], source, dtype).state_dict()
    weights[PATCH_WEIGHT] = weights[PATCH_WEIGHT].flatten(1)
    transplant(weights, model)
    return model


def _strictly(family: Any, source: str | Path, dtype: torch.dtype) -> Any:
    """``from_pretrained`` that fails where the library would leave a weight random or unused."""
    with _no_report():
        model, report = family.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `report` instead of raised
        )
    wrong = {name: sorted(map(_named, keys)) for name, keys in report.items() if keys}
    if wrong:
        named = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:5])}" for name, keys in wrong.items())
        raise ValueError(f"the weights do not fit config.json ({named}); export the checkpoint again")
    return model


def _named(key: Any) -> str:
    """A key of the loading report; of a weight with another shape it is (name, stored shape, model's shape)."""
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"


@contextmanager
def _no_report() -> Iterator[None]:
    """Without the library's table of keys, which says that training will do what is wrong here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_tokenizer(source: str | Path, config: PhotonConfig) -> Any:
    """Tokenizer of a checkpoint. Raises ``ValueError`` if it is missing, is damaged or does not fit ``config``."""
    return _fitting(_undamaged(AutoTokenizer, source), config)


def read_processor(source: str | Path, config: PhotonConfig) -> PhotonProcessor:
    """Processor of a Photon checkpoint, under the same conditions."""
    processor: PhotonProcessor = _undamaged(PhotonProcessor, source)
    _fitting(processor.tokenizer, config)
    if processor.geometry != config.patches:  # a missing file counts as one with Photon's published numbers
        raise ValueError("processor_config.json: missing, or cuts volumes otherwise than config.json; copy it again")
    return processor


def _undamaged(kind: Any, source: str | Path) -> Any:
    try:
        return kind.from_pretrained(source)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError("tokenizer.json, tokenizer_config.json: missing or damaged; copy them again") from error


def _fitting(tokenizer: Any, config: PhotonConfig) -> Any:
    """Without tokenizer.json the library makes an empty tokenizer."""
    if tokenizer.convert_tokens_to_ids("<|video_pad|>") != config.video_token_id:
        raise ValueError("tokenizer.json: missing, or of another model than config.json; copy it again")
    return tokenizer


def empty(config: PhotonConfig, dtype: torch.dtype = torch.float32) -> PhotonForConditionalGeneration:
    """A model with fresh weights."""
    # Not `.to(dtype)`: rotary frequencies stay in float32.
    return PhotonForConditionalGeneration._from_config(config, dtype=dtype)


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
    scale: Scale,
    pixels: PixelScale | None = None,
    temporal_step: float | None = None,
) -> PhotonForConditionalGeneration:
    """The same model with a patch embedding of another size.

    Args:
        size: (depth, height, width) of a patch in voxels. channels: input channels of the new embedding.
        init: ``inflate`` starts from the present kernel, ``fresh`` from the initial distribution.
        scale: of the volume's voxels. pixels: of what the present kernel reads; the backbone's by default.
        temporal_step: see ``PhotonConfig``.
    """
    if init == "inflate" and channels != 1:
        raise ValueError(f"patch_init: inflate makes one input channel, {channels} were asked for; use fresh")
    before = model.config.patches
    config = patched_config(model.config, size, channels, temporal_step)
    weights = model.state_dict()
    kernel, bias = weights.pop(PATCH_WEIGHT), weights.pop(PATCH_BIAS, None)
    if init == "inflate":
        kernel = kernel.unflatten(1, (before.channels, *before.size))
        pixels = pixels or PIXELS[model.config.vision_config.model_type]
        weights[PATCH_WEIGHT] = inflate(kernel, size, scale, pixels)
        if bias is not None:
            weights[PATCH_BIAS] = bias + inflated_offset(kernel, scale, pixels)
    renewed = empty(config, kernel.dtype)
    transplant(weights, renewed, fresh=(PATCH_EMBEDDING,) if init == "fresh" else ())
    renewed.generation_config = model.generation_config
    return renewed


def with_scheduling(
    model: PhotonForConditionalGeneration, settings: SchedulingSettings | None
) -> PhotonForConditionalGeneration:
    """The same model with this token scheduling, or None; threshold predictors that fit it are kept."""
    config = copy.deepcopy(model.config)
    config.scheduling = None if settings is None else settings.to_dict()
    scheduled = empty(config, model.dtype)
    known = scheduled.state_dict().keys()
    weights = {k: v for k, v in model.state_dict().items() if k in known or not k.startswith(SCHEDULER)}
    transplant(weights, scheduled, fresh=(SCHEDULER,))
    scheduled.generation_config = model.generation_config
    return scheduled

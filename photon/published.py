"""The authors' published checkpoints, Photon-S1 (after phase 1) and Photon-S2 (after phase 2): their names, and ours.

They were written with transformers 4.51, which names the same weights otherwise, keep the patch embedding as a
convolution, and hold a weight that nothing reads. A weight's numbers are the same in both formats: it is renamed, and
the patch embedding's kernel has its axes joined or split, so that a conversion and its way back are exact.

Legend: V width of the vision tower, d h w voxels of a patch, P width of the threshold predictor.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from photon.building import PATCH_WEIGHT, patched_config, photon_config, read_config, read_tokenizer
from photon.configuration_photon import PhotonConfig
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.processing_photon import PhotonProcessor
from photon.scheduling import SchedulingSettings, layer_numbers
from photon.tokenization import token_fields

Shape = tuple[int, ...]

PATCH = "visual.vision_patch_embed.proj.weight"
BACKBONE_PATCH = "visual.patch_embed.proj.weight"
TIED, TIED_TO = "lm_head.weight", "model.embed_tokens.weight"
SHOWN = 5
"""So many keys are named in an error."""

PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}
"""Ours -> published."""

OUR_PREDICTOR = re.compile(r"model\.threshold_predictors\.(\d+)\.(.+)")
SCHEDULED = re.compile(r"model\.layers\.(\d+)\.atp\..+")

TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT = tuple(Qwen2_5_VLTextConfig.__annotations__)
VISION = tuple(Qwen2_5_VLVisionConfig.__annotations__)
OWN = tuple(
    name
    for name in PhotonConfig.__annotations__
    if name not in ("text_config", "vision_config", "tie_word_embeddings", *TOKENS)
)
"""Fields of config.json that mean something to the converted model; others stay with the published file."""


@dataclass(frozen=True)
class Conversion:
    """How one folder of weights becomes one of the other format.

    Attributes:
        config: text of its config.json.
        names: weight of the source -> its name afterwards; None where nothing there has a place for it.
        shapes: by the name afterwards; the numbers keep their order.
        equal: pairs of the source's weights that must be equal, because the model ties them.
        volume: how volumes are prepared, where that is not as the preset says.
        files: further files of the new folder, name -> text.
    """

    config: str
    names: dict[str, str | None]
    shapes: dict[str, Shape]
    equal: tuple[tuple[str, str], ...] = ()
    volume: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def published_name(key: str, layers: Sequence[int]) -> str:
    """The published name of one of our weights.

    Args:
        layers: the model's scheduling layers. The published code counts the layer whose queries and keys are
            read, ours those before tokens are dropped: its 8 is our 9.

    Raises:
        ValueError: tokens are dropped before the first layer, which the published format cannot say.
    """
    if key == PATCH_WEIGHT:
        return PATCH
    if predictor := OUR_PREDICTOR.fullmatch(key):
        return f"model.layers.{_read_layer(layers[int(predictor[1])])}.atp.predictor.{predictor[2]}"
    for ours, theirs in PREFIXES.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def unused_name(layer: int) -> str:
    """The published weight beside the threshold predictor of a scheduling layer that nothing reads."""
    return f"model.layers.{_read_layer(layer)}.atp.pos_proj.weight"


def _read_layer(layer: int) -> int:
    if layer < 1:
        raise ValueError("scheduling.layers: 0 has no name in published checkpoints, which begin at 1")
    return layer - 1


def published_shape(key: str, shape: Shape, config: PhotonConfig) -> Shape:
    """The published shape of one of our weights: ``(V, d h w)`` is ``(V, 1, d, h, w)`` there."""
    return (shape[0], config.patches.channels, *config.patches.size) if key == PATCH_WEIGHT else shape


def our_shapes(config: PhotonConfig) -> dict[str, Shape]:
    """Name and shape of every weight of a model, without making one."""
    with torch.device("meta"):
        model = PhotonForConditionalGeneration(config)
    return {key: tuple(weight.shape) for key, weight in model.state_dict().items()}


# --- from published to ours ---------------------------------------------------------------------------------


def from_published(values: dict[str, Any], shapes: dict[str, Shape]) -> Conversion:
    """How a published checkpoint becomes a model of ours.

    Args:
        values: its config.json. shapes: its weights.

    Raises:
        ValueError: in one line, which keys are missing, are not expected or have other shapes, or whose
            checkpoint it is instead.
    """
    if PATCH not in shapes:
        raise ValueError(_not_published(shapes))
    layers = sorted({int(found[1]) + 1 for found in map(SCHEDULED.fullmatch, shapes) if found})
    config = our_config(values, shapes, layers)
    ours = our_shapes(config)
    names: dict[str, str | None] = {published_name(key, layers): key for key in ours}
    names |= {unused_name(layer): None for layer in layers}
    expected = {published_name(key, layers): published_shape(key, shape, config) for key, shape in ours.items()}
    tied = {TIED} if config.tie_word_embeddings else set()
    check_shapes({key: shape for key, shape in shapes.items() if names.get(key, key) is not None}, expected, tied)
    equal = ((TIED, TIED_TO),) if TIED in shapes and tied else ()
    return Conversion(config.to_json_string(), {key: names[key] for key in shapes}, ours, equal)


def _not_published(keys: Iterable[str]) -> str:
    """Whose checkpoint it is instead."""
    if BACKBONE_PATCH in keys:
        return f"no {PATCH} in it but {BACKBONE_PATCH}: a Qwen2.5-VL checkpoint; train photon.phase1 from it"
    if PATCH_WEIGHT in keys:
        return f"no {PATCH} in it but {PATCH_WEIGHT}: not a published checkpoint but one in our format already"
    return f"no {PATCH} in it, so it is no published Photon checkpoint; it has {listed(keys)}"


def our_config(values: dict[str, Any], shapes: dict[str, Shape], layers: Sequence[int]) -> PhotonConfig:
    """Our configuration of a published checkpoint.

    What config.json says of patches is the backbone's; the weights' shapes have the word on patches and on the
    threshold predictor. Fields of the text model may stand at the top (transformers 4.51) or in ``text_config``.

    Raises:
        ValueError: config.json is not of Qwen2.5-VL's kind, or the patch embedding is not ``(V, 1, d, h, w)``.
    """
    kernel = shapes[PATCH]
    if len(kernel) != 5 or kernel[1] != 1:
        raise ValueError(f"{PATCH}: {kernel} is not the shape (width, 1, depth, height, width) of a 3D kernel")
    vision = values.get("vision_config")
    if not isinstance(vision, dict):
        raise ValueError("config.json: no vision_config in it, so it is not of Qwen2.5-VL's kind; copy it again")
    try:
        text = values.get("text_config") or values
        tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings", TIED not in shapes))
        backbone = Qwen2_5_VLConfig(
            text_config=_pick(text, (*TEXT, "rope_scaling", "rope_theta")),
            vision_config=_pick(vision, VISION),
            tie_word_embeddings=tied,
            **_pick(values, TOKENS),
        )
        config = photon_config({**backbone.to_dict(), **_pick(values.get("photon") or {}, OWN)})
        config.dtype = values.get("dtype", values.get("torch_dtype"))
    except Exception as error:  # for a value of the wrong type the library raises nothing more special
        raise ValueError(f"config.json: {error}; copy it again") from error
    config = patched_config(config, (kernel[2], kernel[3], kernel[4]), kernel[1], config.temporal_step)
    config.architectures = [PhotonForConditionalGeneration.__name__]
    if layers:
        config.scheduling = _scheduling(config, shapes, layers).to_dict()
    return config


def _scheduling(config: PhotonConfig, shapes: dict[str, Shape], layers: Sequence[int]) -> SchedulingSettings:
    """Settings under which the model has the checkpoint's predictors; what the weights leave open stays."""
    text: Any = config.text_config
    settings = config.scheduling_settings or SchedulingSettings(centrality_floor=1.0)  # as the published code has it
    if layer_numbers(settings.layers, text.num_hidden_layers) != tuple(layers):
        settings = replace(settings, layers=tuple(layers))
    first = shapes.get(f"model.layers.{layers[0] - 1}.atp.predictor.mlp.0.weight", ())
    if first and first[0] != text.hidden_size // 8:
        settings = replace(settings, predictor_width=first[0])
    return settings


def _pick(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


# --- from ours to published ---------------------------------------------------------------------------------


def to_published(config: PhotonConfig, shapes: dict[str, Shape]) -> Conversion:
    """How a model of ours becomes a checkpoint with the published names; ``from_published`` the other way.

    Args:
        config: of the model. shapes: its weights.

    Raises:
        ValueError: in one line, which keys are missing, are not expected or have other shapes, or what about the
            model the published format cannot say.
    """
    _check_kind(config)
    expected = our_shapes(config)
    tied = {TIED} if config.tie_word_embeddings else set()
    check_shapes(shapes, expected, tied)
    layers = config.scheduling_layers
    names: dict[str, str | None] = {key: published_name(key, layers) for key in shapes}
    theirs = {published_name(key, layers): published_shape(key, expected[key], config) for key in shapes}
    text = json.dumps(published_config(config), indent=2, sort_keys=True) + "\n"
    return Conversion(text, names, theirs)


def _check_kind(config: PhotonConfig) -> None:
    family = config.to_dict()["text_config"]["model_type"]
    if family != "qwen2_5_vl_text":
        raise ValueError(f"config.json: text_config is of {family}; published checkpoints are of Qwen2.5-VL")
    patches = config.patches
    if patches.channels != 1 or patches.slices_per_frame != 1:
        raise ValueError(
            f"config.json: {patches.size} patches over {patches.channels} channels; published checkpoints have the "
            "3D patch embedding of one channel, which photon.phase1 trains"
        )


def published_config(config: PhotonConfig) -> dict[str, Any]:
    """Our configuration as transformers 4.51 lays it out, with what only we have under ``photon``."""
    values = config.to_dict()
    text, vision = values["text_config"], values["vision_config"]
    rope = dict(text["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    rope["type"] = "mrope" if kind == "default" else kind
    return {
        **{name: text[name] for name in TEXT if name not in ("rope_parameters", "layer_types") and name in text},
        "rope_theta": theta,
        "rope_scaling": rope,
        "vision_config": {
            **{name: vision[name] for name in VISION if name != "rope_parameters" and name in vision},
            "in_chans": vision["in_channels"],
            "model_type": "qwen2_5_vl",
        },
        **_pick(values, (*TOKENS, "tie_word_embeddings")),
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": values.get("dtype"),
        "photon": _pick(values, OWN),
    }


# --- errors -------------------------------------------------------------------------------------------------


def check_shapes(found: dict[str, Shape], expected: dict[str, Shape], optional: set[str]) -> None:
    """Every weight, and no other, in its shape."""
    other = [
        f"{key} {found[key]} for {expected[key]}" for key in expected if found.get(key, expected[key]) != expected[key]
    ]
    problems = {
        "missing": [key for key in expected if key not in found and key not in optional],
        "not expected": [key for key in found if key not in expected],
        "of another shape": other,
    }
    named = "; ".join(f"{len(keys)} {what}: {listed(keys)}" for what, keys in problems.items() if keys)
    if named:
        raise ValueError(f"the weights do not fit config.json ({named}); copy both again")


def listed(keys: Iterable[str]) -> str:
    """The first few keys and how many there are more."""
    keys = list(keys)
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


# --- folders ------------------------------------------------------------------------------------------------


class PublishedPhoton:
    """Both ways for folders of files; what ``mllm3d convert`` finds under ``photon``."""

    volume_preset: ClassVar[str] = "photon"
    """How the published models' volumes were prepared (A.1.1)."""

    @staticmethod
    def from_published(folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """See :func:`from_published`."""
        file = folder / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError("config.json: missing or damaged; copy it again") from error
        if not isinstance(values, dict):
            raise ValueError("config.json: not a mapping; copy it again")
        return from_published(values, shapes)

    @staticmethod
    def to_published(folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """See :func:`to_published`."""
        try:
            config = read_config(folder)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError("config.json: damaged; copy it again") from error
        if PATCH_WEIGHT not in shapes:
            raise ValueError(f"no {PATCH_WEIGHT} in it, so it is no Photon model of ours; it has {listed(shapes)}")
        return to_published(config, shapes)

    @staticmethod
    def complete(folder: Path) -> None:
        """Write the processor of a converted folder, which has config.json and the tokenizer's files.

        Raises:
            ValueError: the tokenizer is missing, damaged or another model's, or has no chat template.
        """
        config = PhotonConfig.from_pretrained(folder)
        tokenizer = read_tokenizer(folder, config)
        if tokenizer.chat_template is None:
            raise ValueError(
                "tokenizer_config.json: no chat template in it, nor in chat_template.json; copy them again"
            )
        for name, value in token_fields(tokenizer).items():
            if value is None:
                raise ValueError(f"tokenizer.json: has no {name.removesuffix('_id')} of Qwen's chats; copy it again")
            if name not in TOKENS:  # those stand in published files
                setattr(config, name, value)
        config.save_pretrained(folder)
        PhotonProcessor.from_config(config, tokenizer).to_json_file(folder / "processor_config.json")

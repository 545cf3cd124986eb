"""The authors' published checkpoints, DCFormer-SigLIP (stage 1) and Med3DVLM (stage 3): their names, and ours.

A weight's numbers are the same in both formats: it is renamed, and two scalars get an axis or lose it, so that a
conversion and its way back are exact. How the authors' code nests its modules is in ``PREFIXES`` and ``SCALARS`` alone.
It is known from that code; no published file was at hand to check it against.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from med3dvlm.configuration_med3dclip import Med3DCLIPConfig
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.dcformer import VARIANTS
from med3dvlm.encoders import VolumeEncoder, build_encoder
from med3dvlm.lora import MARK
from med3dvlm.modeling_med3dclip import Med3DCLIPModel
from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from med3dvlm.processing_med3dclip import Med3DCLIPProcessor
from med3dvlm.processing_med3dvlm import Med3DVLMProcessor, image_token_id
from med3dvlm.projectors import ProjectorSettings

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

PREFIXES: dict[str, dict[str, str]] = {
    # Ours -> published, the first that fits. Stage 1 has the same names in both.
    "med3dclip": {},
    "med3dvlm": {
        "encoder.": "model.vision_tower.vision_tower.",
        "projector.": "model.mm_projector.",
        "language_model.model.": "model.",
        "language_model.": "",
    },
}
ENCODERS = {"med3dclip": "vision_encoder.", "med3dvlm": "encoder."}
"""Where the image encoder is in a model of ours."""

SCALARS = ("t_prime", "bias")
"""Of shape () there and (1,) here."""

CLIP_KEY, VLM_KEY = "mm_vision_proj.weight", "model.mm_projector."
TIED, TIED_TO = "lm_head.weight", "model.embed_tokens.weight"
SIZE = (128, 256, 256)
TEXT = tuple(Qwen2Config.__annotations__)
OWN = "med3d"
"""Key of a published config.json under which a model of ours keeps its own."""
SHOWN = 5
"""So many keys of each kind are named in an error."""


@dataclass(frozen=True)
class Conversion:
    """How one folder of weights becomes one of the other format.

    Attributes:
        config: text of its config.json.
        names: weight of the source -> its name afterwards.
        shapes: by the name afterwards; the numbers keep their order.
        equal: pairs of the source's weights that must be equal, because the model ties them.
        volume: how the model's volumes are prepared, beside the preset.
        files: further files of the new folder, name -> text.
    """

    config: str
    names: dict[str, str | None]
    shapes: dict[str, Shape]
    equal: tuple[tuple[str, str], ...] = ()
    volume: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def published_name(key: str, model_type: str) -> str:
    """The published name of one of our weights."""
    for ours, theirs in PREFIXES[model_type].items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def published_shape(key: str, shape: Shape) -> Shape:
    """The published shape of one of our weights."""
    return () if key in SCALARS else shape


def our_shapes(config: PreTrainedConfig) -> dict[str, Shape]:
    """Name and shape of every weight of a model, without making one."""
    kind: type[PreTrainedModel]
    kind = Med3DCLIPModel if config.model_type == "med3dclip" else Med3DVLMForConditionalGeneration
    with torch.device("meta"):
        model = kind(type(config).from_dict(config.to_dict()))
    return {key: tuple(weight.shape) for key, weight in model.state_dict().items()}


# --- from published to ours ---------------------------------------------------------------------------------


def from_published(values: Mapping[str, Any], shapes: Shapes) -> Conversion:
    """How a published checkpoint becomes a model of ours.

    Args:
        values: its config.json. shapes: its weights.

    Raises:
        ValueError: in one line, which keys are missing, are not expected or have other shapes, or whose checkpoint it
            is instead.
    """
    _must_be_published(shapes)
    read = _clip_config if CLIP_KEY in shapes else _vlm_config
    try:
        config = read(values, shapes)
        ours = our_shapes(config)
    except Exception as error:  # for a value of the wrong type the library raises nothing more special
        raise ValueError(f"config.json: {error}; copy it again") from error
    names = {published_name(key, config.model_type): key for key in ours}
    expected = {theirs: published_shape(key, ours[key]) for theirs, key in names.items()}
    tied = _tied(config)
    _check(shapes, expected, tied)
    return Conversion(
        config=config.to_json_string(use_diff=False),
        names={key: names[key] for key in shapes},
        shapes=ours,
        equal=((TIED, TIED_TO),) if tied & shapes.keys() else (),
        volume={"shape": _encoder_of(config)["size"]},
    )


def _must_be_published(shapes: Shapes) -> None:
    """Whose checkpoint it is instead."""
    if any(MARK in key for key in shapes):
        raise ValueError("the weights have LoRA adapters apart; merge them with the authors' program first")
    if any(key.startswith("projector.") for key in shapes) or shapes.get("t_prime") == (1,):
        raise ValueError("not a published checkpoint but one in our format already")
    if CLIP_KEY not in shapes and not any(key.startswith(VLM_KEY) for key in shapes):
        raise ValueError(
            f"neither {CLIP_KEY} nor {VLM_KEY}* in it, so it is neither a published DCFormer-SigLIP nor a published "
            f"Med3DVLM; it has {listed(shapes)}"
        )


def _clip_config(values: Mapping[str, Any], shapes: Shapes) -> Med3DCLIPConfig:
    """Published configs do not describe the text encoder: its weights do."""
    encoder = encoder_of(shapes, "vision_encoder.", values)
    if OWN in values:
        return Med3DCLIPConfig.from_dict(values[OWN])
    config = Med3DCLIPConfig(
        encoder=encoder.spec,
        text_config=_distilbert(shapes).to_dict(),
        projection_dim=shapes[CLIP_KEY][0],
        contrastive={"symmetric": True},  # as the authors trained it
    )
    return _described(config, values)


def _distilbert(shapes: Shapes) -> DistilBertConfig:
    """ClinicalBERT's kind, with the sizes of the weights; its heads are 64 wide."""
    words = shapes.get("language_encoder.embeddings.word_embeddings.weight")
    positions = shapes.get("language_encoder.embeddings.position_embeddings.weight")
    inner = shapes.get("language_encoder.transformer.layer.0.ffn.lin1.weight")
    if words is None or positions is None or inner is None:
        raise ValueError("the text encoder is no DistilBERT, as ClinicalBERT is")
    return DistilBertConfig(
        vocab_size=words[0],
        max_position_embeddings=positions[0],
        dim=words[1],
        hidden_dim=inner[0],
        n_layers=_count(shapes, r"language_encoder\.transformer\.layer\.(\d+)\."),
        n_heads=max(words[1] // 64, 1),
    )


def _vlm_config(values: Mapping[str, Any], shapes: Shapes) -> Med3DVLMConfig:
    encoder = encoder_of(shapes, "model.vision_tower.vision_tower.", values)
    if OWN in values:
        return Med3DVLMConfig.from_dict(values[OWN])
    text = Qwen2Config(**{name: values[name] for name in (*TEXT, "rope_theta", "rope_scaling") if name in values})
    text.tie_word_embeddings = values.get("tie_word_embeddings", TIED not in shapes)
    layers = _count(shapes, r"model\.mm_projector\.low_mixer\.(\d+)\.")
    projector = ProjectorSettings(
        name=f"{layers}xMLP-Mixer-H",
        low=encoder.low_shape,
        high=encoder.high_shape,
        mixed_tokens=2 * shapes.get(f"model.mm_projector.low_mixer.{layers - 1}.mlp1.mm_projector.0.weight", (128,))[0],
    )
    config = Med3DVLMConfig(
        text_config=text.to_dict(),
        encoder_config=encoder.spec,
        projector_config=projector.to_dict(),
        splice="published",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return _described(config, values)


def encoder_of(shapes: Shapes, prefix: str, values: Mapping[str, Any]) -> VolumeEncoder:
    """The DCFormer whose weights these are, without memory; their sizes have the word.

    Raises:
        ValueError: weights that its shape is read from are missing.
    """
    layers = [_count(shapes, rf"{re.escape(prefix)}encoder\.s{stage}\.(\d+)\.") for stage in range(5)]
    first = shapes.get(f"{prefix}encoder.s0.0.0.c1.0.weight")
    heads = [shapes.get(f"{prefix}encoder.s{stage}.0.dwconv.c1.0.weight") for stage in range(1, 5)]
    if first is None or None in heads:
        raise ValueError(f"no DCFormer under {prefix}encoder: s0.0.0.c1.0.weight or s1-s4.0.dwconv.c1.0.weight missing")
    widths = [first[0], *(head[0] for head in heads if head is not None)]
    known = [name for name, it in VARIANTS.items() if (list(it.layers), list(it.widths)) == (layers, widths)]
    size = values.get("input_size") or (*SIZE[1:], SIZE[0])  # there (H, W, D), as the authors' code has it
    spec = {
        "name": f"dcformer-{known[0] if known else 'small'}",
        "size": [size[2], size[0], size[1]],
        "channels": first[1],
        "layers": layers,
        "widths": widths,
        "kernels": [head[2] for head in heads if head is not None],
    }
    with torch.device("meta"):
        return build_encoder(spec)


def _described(config: Any, values: Mapping[str, Any]) -> Any:
    config.dtype = values.get("dtype", values.get("torch_dtype"))
    config.architectures = [
        "Med3DCLIPModel" if config.model_type == "med3dclip" else "Med3DVLMForConditionalGeneration"
    ]
    return config


def _count(shapes: Shapes, pattern: str) -> int:
    """How many layers have weights."""
    return max((int(found[1]) + 1 for found in map(re.compile(pattern).match, shapes) if found), default=0)


def _tied(config: Any) -> set[str]:
    tied = config.model_type == "med3dvlm" and config.text_config.tie_word_embeddings
    return {TIED} if tied else set()


def _encoder_of(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = config.encoder if config.model_type == "med3dclip" else config.encoder_config
    return found


# --- from ours to published ---------------------------------------------------------------------------------


def to_published(config: Any, shapes: Shapes) -> Conversion:
    """How a model of ours becomes a checkpoint with the published names; ``from_published`` the other way.

    Args:
        config: of the model. shapes: its weights.

    Raises:
        ValueError: in one line, which keys are missing, are not expected or have other shapes, or what about the
            model the published format cannot say.
    """
    _check_kind(config)
    kind = config.model_type
    try:
        expected = our_shapes(config)
    except Exception as error:  # for a value of the wrong type the libraries raise nothing more special
        raise ValueError(f"config.json: {error}; copy it again") from error
    names: dict[str, str | None] = {key: published_name(key, kind) for key in shapes}
    tied = {"language_model.lm_head.weight"} if _tied(config) else set()
    _check(shapes, expected, tied)
    theirs = {published_name(key, kind): published_shape(key, expected[key]) for key in shapes}
    return Conversion(json.dumps(published_config(config), indent=2, sort_keys=True) + "\n", names, theirs)


def _check_kind(config: Any) -> None:
    """Raises ValueError for what the authors' code does not have."""
    encoder = _encoder_of(config)
    if not encoder["name"].startswith("dcformer-") or encoder.get("residual"):
        raise ValueError(
            f"config.json: encoder {encoder['name']}; published checkpoints have DCFormer without residual"
        )
    if config.model_type == "med3dclip":
        if config.contrastive_settings.loss != "siglip":
            raise ValueError("config.json: contrastive.loss is clip; published checkpoints are of siglip")
        return
    if config.lora is not None:
        raise ValueError(
            "config.json: lora: published checkpoints have none apart; use mllm3d release --merge-lora first"
        )
    if not config.projector.kind.mixer:
        raise ValueError(f"config.json: projector {config.projector.name}; published checkpoints have MLP mixers")
    if config.splice != "published":
        raise ValueError("config.json: splice is correct; the authors' code would put image tokens elsewhere")
    if config.text_config.model_type != "qwen2":
        raise ValueError(f"config.json: text_config is of {config.text_config.model_type}; published ones are of qwen2")


def published_config(config: Any) -> dict[str, Any]:
    """Our configuration as the authors' classes read it, and itself under ``med3d``."""
    encoder = _encoder_of(config)
    depth, height, width = encoder["size"]
    values = {"input_size": [height, width, depth], "dim": encoder["widths"][-1], OWN: config.to_dict()}
    if config.model_type == "med3dclip":
        return values | {
            "architectures": ["DEC_CLIP"],
            "model_type": "dec_clip",
            "vision_encoder": "dcformer",
            "hidden_size": config.projection_dim,
            "loss_type": "sigmoid",
        }
    text, projector = config.text_config.to_dict(), config.projector
    return {name: text[name] for name in TEXT if name in text} | values | {
        "architectures": ["VLMQwenForCausalLM"],
        "model_type": "vlm_qwen",
        "vision_tower": "dcformer",
        "vision_select_layer": -2,
        "vision_select_feature": "cls_patch",
        "mm_projector_type": "mixer",
        "mm_mlp_depth": 2,
        "low_input_size": list(projector.low),
        "high_input_size": list(projector.high),
        "proj_out_num": projector.tokens,
        "torch_dtype": config.to_dict().get("dtype"),
    }  # fmt: skip


# --- errors -------------------------------------------------------------------------------------------------


def _check(found: Shapes, expected: Shapes, optional: set[str]) -> None:
    """Every weight, and no other, in its shape."""
    problems = {
        "missing": [key for key in expected if key not in found and key not in optional],
        "not expected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {found[key]} for {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
        ],
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


class PublishedMed3DVLM:
    """Both ways for folders of files, of either stage; what ``mllm3d convert`` finds under ``med3dvlm``."""

    volume_preset: ClassVar[str] = "med3dvlm"

    @staticmethod
    def from_published(folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """See :func:`from_published`."""
        return from_published(_values(folder), shapes)

    @staticmethod
    def to_published(folder: Path, shapes: dict[str, Shape]) -> Conversion:
        """See :func:`to_published`."""
        kinds: dict[Any, Any] = {"med3dclip": Med3DCLIPConfig, "med3dvlm": Med3DVLMConfig}
        found = _values(folder).get("model_type")
        if found not in kinds:
            raise ValueError(f"config.json: a model of type {found!r}; name a model of {' or '.join(kinds)}")
        try:
            config = kinds[found].from_pretrained(folder)
        except Exception as error:
            raise ValueError(f"config.json: damaged ({error}); copy it again") from error
        return to_published(config, shapes)

    @staticmethod
    def complete(folder: Path) -> None:
        """Write the processor of a converted folder, which has config.json and the tokenizer's files.

        Raises:
            ValueError: the tokenizer is missing or damaged, has more words than the model, or has no ``<im_patch>``.
        """
        if _values(folder)["model_type"] == "med3dclip":
            clip = Med3DCLIPConfig.from_pretrained(folder)
            assert clip.encoder is not None
            tokenizer = _tokenizer(folder, clip.text_config.vocab_size)
            longest = min(clip.text_config.max_position_embeddings, 512)
            Med3DCLIPProcessor(tokenizer, clip.encoder["size"], longest).to_json_file(folder / "processor_config.json")
            return
        config = Med3DVLMConfig.from_pretrained(folder)
        tokenizer = _tokenizer(folder, config.text_config.vocab_size)
        config.image_token_id = image_token_id(tokenizer)
        config.save_pretrained(folder)
        Med3DVLMProcessor.from_config(config, tokenizer).to_json_file(folder / "processor_config.json")
        if not (folder / "generation_config.json").is_file():  # without it, answers would not end
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            GenerationConfig(**ends).save_pretrained(folder)


def _values(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError("config.json: missing or damaged; copy it again") from error
    if not isinstance(values, dict):
        raise ValueError("config.json: not a mapping; copy it again")
    return values


def _tokenizer(folder: Path, rows: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError("tokenizer.json: missing or damaged; copy the tokenizer's files into the folder") from error
    if len(tokenizer) > rows:
        raise ValueError(f"tokenizer.json: {len(tokenizer)} words, the model knows {rows}; copy the right one")
    return tokenizer

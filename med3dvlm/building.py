"""Med3DVLM models from their parts, and saved ones read back."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import AddedToken

from med3dvlm.configuration_med3dclip import Med3DCLIPConfig
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.features import VolumeEncoder
from med3dvlm.lora import LoraSettings
from med3dvlm.modeling_med3dclip import Med3DCLIPModel
from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from med3dvlm.processing_med3dvlm import Med3DVLMProcessor, image_token_id
from med3dvlm.projectors import ProjectorSettings
from med3dvlm.splicing import IMAGE_TOKEN, Splice


def med3dvlm_from(
    encoder: VolumeEncoder,
    language_model: PreTrainedModel | str | Path,
    tokenizer: Any,
    projector: str = "2xMLP-Mixer-H",
    mixed_tokens: int = 256,
    splice: Splice = "correct",
    lora: LoraSettings | None = None,
    dtype: torch.dtype = torch.float32,
    **processing: Any,
) -> tuple[Med3DVLMForConditionalGeneration, Med3DVLMProcessor]:
    """A model with a fresh projector, and its processor.

    Args:
        encoder: with its weights: ``Med3DCLIPModel.from_pretrained(...).vision_encoder`` after the contrastive stage,
            or fresh from :func:`med3dvlm.encoders.build_encoder`.
        language_model, tokenizer: objects, or where to read them (path or hub name). Both are changed: the tokenizer
            gets ``<im_patch>`` and, if it has none, a padding token; the model gets a row for it where it has none.
        projector: one of :data:`med3dvlm.projectors.KINDS`; shapes come from encoder and language model.
        mixed_tokens: see :class:`med3dvlm.projectors.ProjectorSettings`.
        splice: see :mod:`med3dvlm.splicing`.
        dtype: of all weights. processing: other settings of the processor.

    Raises:
        ValueError: settings that cannot be, or LoRA targets that match nothing.
    """
    if isinstance(language_model, str | Path):
        language_model = read_language_model(language_model, dtype)
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    add_image_token(tokenizer, language_model)
    shapes = {"low": encoder.low_shape, "high": encoder.high_shape}
    config = Med3DVLMConfig(
        text_config=language_model.config.to_dict(),  # a copy: a configuration unsets the attention of what it is given
        encoder_config=encoder.spec,
        projector_config=ProjectorSettings(projector, **shapes, mixed_tokens=mixed_tokens).to_dict(),
        image_token_id=image_token_id(tokenizer),
        splice=splice,
        lora=None if lora is None else lora.to_dict(),
    )
    model = Med3DVLMForConditionalGeneration(config, encoder, language_model)
    model.to(dtype)
    model.generation_config = _ending(language_model.generation_config, tokenizer)
    return model, Med3DVLMProcessor.from_config(config, tokenizer, **processing)


def read_language_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model (path or hub name).

    Raises:
        ValueError: it is another kind of model, or weights are missing. OSError: it cannot be read.
    """
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"language_model: a checkpoint of {config.model_type!r}, which is no causal language model")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        named = ", ".join(missing[:3])
        raise ValueError(f"language_model: weights are missing ({named}); copy it again, or name a language model")
    found: PreTrainedModel = model
    return found


def read_clip(folder: str | Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Med3DCLIPModel:
    """A saved contrastive model, with changes of its configuration.

    Raises:
        ValueError: it is another model, or a weight is missing, is not expected or has another shape; but the bias may
            be missing or too much, as CLIP has none.
        OSError: it cannot be read.
    """
    _must_be(folder, Med3DCLIPConfig.model_type)
    model, report = Med3DCLIPModel.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **changes
    )
    wrong = {name: sorted(set(map(str, keys)) - {"bias"}) for name, keys in report.items()}
    if named := "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in wrong.items() if keys):
        raise ValueError(f"the weights do not fit config.json ({named}); export the checkpoint again")
    found: Med3DCLIPModel = model
    return found


def _must_be(folder: str | Path, model_type: str) -> None:
    found = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if found != model_type:
        raise ValueError(f"a checkpoint of {found!r}, expected {model_type!r}; name another folder")


def add_image_token(tokenizer: Any, language_model: PreTrainedModel | None = None) -> int:
    """Give a tokenizer ``<im_patch>`` if it lacks it, and a language model an embedding row for it; its id.

    Embedding tables are often longer than the vocabulary (152,064 rows for Qwen2.5's 151,665 tokens); then the token
    takes a row that is there.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if language_model is not None and len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer))
    return image_token_id(tokenizer)


def _ending(settings: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """The language model's way to generate, ending where our answers end."""
    settings = copy.deepcopy(settings)
    ends = settings.eos_token_id
    known = [] if ends is None else ends if isinstance(ends, list) else [ends]
    settings.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *known]))
    settings.pad_token_id = tokenizer.pad_token_id
    return settings


def read_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Med3DVLMForConditionalGeneration:
    """A saved Med3DVLM model.

    Raises:
        ValueError: it is another model, or a weight is missing, is not expected or has another shape.
        OSError: it cannot be read.
    """
    _must_be(folder, Med3DVLMConfig.model_type)
    return Med3DVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def read_processor(folder: str | Path, config: Med3DVLMConfig) -> Med3DVLMProcessor:
    """The processor of a saved model.

    Raises:
        ValueError: it is missing, is damaged, or is another model's.
    """
    try:
        processor: Med3DVLMProcessor = Med3DVLMProcessor.from_pretrained(folder)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError("processor_config.json, tokenizer.json: missing or damaged; copy them again") from error
    size = list((config.encoder_config or {})["size"])
    found = (processor.image_token_id, processor.image_tokens, processor.size)
    if found != (config.image_token_id, config.image_tokens, size):
        raise ValueError("processor_config.json: missing, or of another model than config.json; copy it again")
    return processor

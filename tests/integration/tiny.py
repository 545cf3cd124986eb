"""Photon models of some thirty thousand weights, and configs that train them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from mllm3d.config import VolumeConfig
from photon import PhotonConfig, PhotonForConditionalGeneration, PhotonProcessor
from photon.building import with_patches, with_scheduling
from photon.patch_embedding import Scale
from photon.scheduling import SchedulingSettings
from photon.tokenization import SPECIAL_TOKENS, token_fields, train_tokenizer

SHAPE = (16, 32, 32)
VOLUME = VolumeConfig(window_hu=(-200.0, 300.0), shape=SHAPE, mean=0.5, std=0.5)
SCALE = Scale(VOLUME.mean, VOLUME.std)
PATCH = (4, 8, 8)
"""4 x 4 x 4 = 64 tokens for a volume of SHAPE."""


def save_backbone(folder: Path, texts: Iterable[str]) -> Path:
    """A random slice-video model: patches of 2 frames of 2 slices each, repeated on 3 channels."""
    tokenizer = train_tokenizer(texts, 400)
    torch.manual_seed(0)
    model = PhotonForConditionalGeneration(backbone_config(tokenizer))
    return save(model, tokenizer, folder)


def save_photon(folder: Path, backbone: Path) -> Path:
    """The backbone as phase 2 would leave it, but untrained: 3D patches, a threshold predictor, preprocessing."""
    torch.manual_seed(1)
    source = PhotonForConditionalGeneration.from_pretrained(backbone)
    model = with_patches(source, PATCH, 1, "inflate", SCALE, [SCALE] * 3, 1.0)
    model = with_scheduling(model, SchedulingSettings(predictor_bias=-1.0))
    processor = PhotonProcessor.from_pretrained(backbone)
    save(model, processor.tokenizer, folder)
    (folder / "preprocessing.json").write_text(VOLUME.model_dump_json())
    return folder


def save(model: PhotonForConditionalGeneration, tokenizer: Any, folder: Path) -> Path:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    PhotonProcessor.from_config(model.config, tokenizer).save_pretrained(folder)
    return folder


def backbone_config(tokenizer: Any) -> PhotonConfig:
    """Decoder: 4 layers of width 16. Vision: 2 blocks of width 16 over patches of 2 x 8 x 8."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    width, heads = 16, 2
    shape = {"hidden_size": width, "intermediate_size": 24, "initializer_range": width**-0.5}
    return PhotonConfig(
        text_config={
            **shape,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 4,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [2, 1, 1]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            **shape,
            "depth": 2,
            "num_heads": heads,
            "out_hidden_size": width,
            "in_channels": 3,
            "temporal_patch_size": 2,
            "patch_size": 8,
            "spatial_merge_size": 1,
            "fullatt_block_indexes": [0, 1],
            "window_size": 64,
        },
        slices_per_frame=2,
        temporal_step=1.0,
        tie_word_embeddings=True,
        **token_fields(tokenizer),
    )


# --- configs ------------------------------------------------------------------------------------------------

OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.05, "warmup": 1.0}


def phase1(manifest: Path, checkpoint: Path, output: Path, **training: Any) -> dict[str, Any]:
    model = {"patch_size": list(PATCH), "temporal_step": 1.0}
    return _config("photon.phase1", manifest, output, {"checkpoint": str(checkpoint), **model}, training)


def phase2(manifest: Path, checkpoint: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Of 6 steps 2 with all tokens, 2 with soft masking, 2 with dropping."""
    model = {
        "checkpoint": str(checkpoint),
        "scheduling": {"predictor_bias": -1.0, "soft_from": 2.0, "hard_from": 4.0},
        "band": {"low": 0.1, "high": 0.4},
        "robustness": {"probability": 0.0},
    }
    return _config("photon.phase2", manifest, output, model, training)


def _config(
    recipe: str, manifest: Path, output: Path, model: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "run": {"output": str(output), "seed": 3, "threads": 1},
        "volume": VOLUME.model_dump(mode="json", exclude_unset=True),
        "data": {"manifest": str(manifest), "questions_per_volume": 3},
        "model": model,
        "training": {
            "max_steps": 6,
            "accumulation": 2,
            "precision": "fp32",
            "log_every": 1,
            "optimizer": OPTIMIZER,
            **training,
        },
    }


def write_config(file: Path, config: dict[str, Any]) -> str:
    """The config as a YAML file; its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    return str(file)

"""Small Qwen2.5-VL and Qwen3-VL as folders that the framework loads, and scans for them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mllm3d.config import VolumeConfig
from photon.tokenization import token_fields, train_tokenizer
from tests.medpruner.tiny_slicewise import MROPE, TEXT, VISION, louder

KINDS = ("qwen2_5_vl", "qwen3_vl")
QUESTIONS = ["Is there a pleural effusion?", "Which side is it on?", "How many lesions are there in the liver?"]
SHAPE = (8, 16, 24)
TOKENS = 4 * 2 * 3
"""Of a volume of that shape: patches of 2 x 4 x 4 voxels, merged 2 x 2."""
VOLUME = VolumeConfig(window_hu=(-200.0, 300.0), shape=SHAPE, mean=0.5, std=0.5)
SETTINGS = {"slices_per_frame": 1, "seconds_per_grid": 1.0, "pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}


@cache
def tokenizer() -> Any:
    return train_tokenizer([*QUESTIONS, "yes", "no", "<0.5 seconds>"], 320)


@cache
def _model(kind: str) -> Any:
    known = token_fields(tokenizer())
    tokens = {name: known[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    tokens |= {"vision_end_token_id": known["vision_end_token_id"], "tie_word_embeddings": False}
    text = {**TEXT, "vocab_size": len(tokenizer()), "eos_token_id": tokenizer().eos_token_id}
    torch.manual_seed(0)
    if kind == "qwen3_vl":
        vision = {**VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        text |= {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
        return louder(Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)))
    vision = {**VISION, "fullatt_block_indexes": [1, 2], "window_size": 16, "tokens_per_second": 2}
    text |= {"rope_parameters": MROPE}
    return louder(
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    )


def saved(kind: str, folder: Path, settings: dict[str, Any] | None = SETTINGS, volume: VolumeConfig = VOLUME) -> Path:
    """The folder, with `slicewise.json` if there are settings."""
    _model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessing.json").write_text(volume.model_dump_json())
    if settings is not None:
        (folder / "slicewise.json").write_text(json.dumps(settings))
    return folder


def scan(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """In model units, its third and fourth slice of four nearly as the first two."""
    array = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    for slab in range(2, shape[0] - 1, 4):
        array[slab : slab + 2] = array[slab - 2 : slab] + 0.001
    return array

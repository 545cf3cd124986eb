"""A small Gemma 3 as a folder that the framework loads, and scans for it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GemmaTokenizer

from mllm3d.config import VolumeConfig
from tests.medpruner.tiny_gemma import gemma

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
BEGIN, END, IMAGE = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
QUESTIONS = ["Is there an effusion?", "Which side is it on?", "How many lesions are there in the liver?"]
VOLUME = VolumeConfig(window_hu=(-1100.0, 1200.0), mean=0.5, std=0.25)
SCALE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CHAT = """\
{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}\
{% for part in message['content'] %}\
{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}\
{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
"""As Gemma's: text as it is, or parts that are trimmed and joined."""


@cache
def tokenizer() -> Any:
    """Letter by letter."""
    letters = ["\n", "\u2581", *map(chr, range(33, 127))]
    words = {token: number for number, token in enumerate([*SPECIAL, BEGIN, END, IMAGE, *letters])}
    extra = {"boi_token": BEGIN, "eoi_token": END, "image_token": IMAGE}
    made = GemmaTokenizer(vocab=words, merges=[], extra_special_tokens=extra)
    made.add_tokens(list(SPECIAL[5:]), special_tokens=True)
    made.chat_template = CHAT
    return made


@cache
def _model() -> Any:
    known = tokenizer()
    model = gemma(known.image_token_id, vocabulary=len(known))
    model.config.boi_token_index, model.config.eoi_token_index = known.boi_token_id, known.eoi_token_id
    model.generation_config.eos_token_id = [known.eos_token_id, known.convert_tokens_to_ids("<end_of_turn>")]
    return model


def saved(folder: Path, volume: VolumeConfig = VOLUME) -> Path:
    """The folder, as one from Google with `preprocessing.json` added."""
    _model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessing.json").write_text(volume.model_dump_json())
    (folder / "preprocessor_config.json").write_text(json.dumps(SCALE))
    return folder


def scan(shape: tuple[int, int, int] = (4, 32, 32), seed: int = 0, volume: VolumeConfig = VOLUME) -> np.ndarray:
    """HU from -150 to 250 in model units, every second slice nearly as the one before."""
    hu = np.random.default_rng(seed).uniform(-150, 250, shape)
    hu[1::2] = hu[: shape[0] // 2 * 2 : 2] + 0.1
    low, high = volume.window_hu
    return (((hu - low) / (high - low) - volume.mean) / volume.std).astype(np.float32)

"""Small random Photon models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from photon import PhotonConfig, PhotonForConditionalGeneration, PhotonProcessor
from photon.tokenization import SPECIAL_TOKENS, token_fields, train_tokenizer
from tests.photon.tiny_recipes import Recipes

TEXTS = ["Is there a pleural effusion?", "Which side is it on?", "How many lesions?", "yes", "no", "left", "two"]


def turn(question: str, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def tiny_config(tokenizer: Any, **changes: Any) -> PhotonConfig:
    """4 decoder layers of width 64, 2 vision blocks of width 32, one with windows."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "patch_size": 4,
        "temporal_patch_size": 4,
        "in_channels": 1,
        "window_size": 16,
        "tokens_per_second": 2,
        **changes.pop("vision", {}),
    }
    return PhotonConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **token_fields(tokenizer),
        **changes,
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def tiny(tokenizer: Any) -> Any:
    """Builds a model and its processor; larger weights than the initial ones, so that tokens differ."""

    def build(seed: int = 0, **changes: Any) -> tuple[PhotonForConditionalGeneration, PhotonProcessor]:
        torch.manual_seed(seed)
        changes.setdefault("scheduling", {"predictor_bias": 0.0})
        config = tiny_config(tokenizer, **changes)
        model = PhotonForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and "threshold" not in name:
                    parameter.mul_(5)
        return model, PhotonProcessor.from_config(config, tokenizer)

    return build


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    return Recipes(tmp_path)


@pytest.fixture
def backbone(recipes: Recipes) -> Path:
    """A saved backbone after the vision stage, with larger weights than the initial ones, so that tokens differ."""
    torch.manual_seed(0)
    recipe = recipes.backbone("vision")
    module = recipe.build()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return recipes.save(recipe, module, "backbone")

"""Tiny recipes from YAML configs, and batches for them."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor, nn

from mllm3d.config import load
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import Row, write_manifest
from mllm3d.data.preprocess import Prepared
from mllm3d.registry import recipe_class
from mllm3d.training.recipe import Recipe
from photon.processing_photon import VolumeChats

SHAPE = (8, 16, 24)
TOKENS = 2 * 4 * 6
"""Of the volume, in patches of 4 x 4 x 4 voxels without merging."""
LIVER, LESION = 16, 45
ASKED = [
    ("v0", "existence", "pleural effusion", "Is there a pleural effusion?", "yes"),
    ("v0", "existence", "fatty liver", "Is the liver fatty?", "no"),
    ("v0", "counting", "pleural effusion", "How many lesions are there?", "twelve"),
    ("v1", "existence", "fatty liver", "Is the liver fatty?", "yes"),
]
ROWS = [
    Row(
        id=f"q{number}",
        case=volume,
        split="train",
        volume=f"{volume}.npy",
        labels=f"{volume}_labels.npy",
        question=question,
        answer=answer,
        task=task,
        meta={"finding": finding},
    )
    for number, (volume, task, finding, question, answer) in enumerate(ASKED)
]


class Recipes:
    """Configs, recipes and saved models in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_manifest(folder / "manifest.jsonl", ROWS)

    def recipe(self, name: str, model: dict[str, Any], **changes: Any) -> Any:
        """The recipe of a config that was read from YAML; keywords are `section__key=value`."""
        config: dict[str, Any] = {
            "recipe": name,
            "volume": {"shape": list(SHAPE), "window_hu": [-200.0, 300.0], "mean": 0.5, "std": 0.5},
            "data": {"manifest": str(self.folder / "manifest.jsonl"), "questions_per_volume": 3},
            "model": model,
            "training": {
                "max_steps": 10,
                "precision": "fp32",
                "zero_stage": 0,
                "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
            },
        }
        for key, value in changes.items():
            *outer, last = key.split("__")
            section = config
            for part in outer:
                section = section[part]
            section[last] = value
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        loaded = load(file)
        return recipe_class(loaded.recipe)(loaded)

    def backbone(self, stage: str, checkpoint: Path | None = None, **changes: Any) -> Any:
        model: dict[str, Any] = {
            "stage": stage,
            "vocabulary": 320,
            "patch_size": [2, 4, 4],
            "slices_per_frame": 2,
            "text": {"hidden_size": 32, "layers": 4, "heads": 2, "mlp": 48},
            "vision": {"hidden_size": 32, "layers": 2, "heads": 2, "mlp": 48, "merge": 1},
            "classes": [LIVER, LESION],
            "small_classes": [LESION],
            "findings": ["pleural effusion", "fatty liver"],
            "dense_weight": 4.0,
            "findings_weight": 0.25,
        }
        if checkpoint is not None:
            model["checkpoint"] = str(checkpoint)
        return self.recipe("photon.backbone", model, **changes)

    def phase1(self, checkpoint: Path, **changes: Any) -> Any:
        model = {"checkpoint": str(checkpoint), "patch_size": [4, 4, 4], "temporal_step": 1.0}
        return self.recipe("photon.phase1", model, **changes)

    def phase2(self, checkpoint: Path, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        scheduling = {"predictor_bias": 0.0, "soft_from": 0.2, "hard_from": 0.5}
        values = {
            "checkpoint": str(checkpoint),
            "scheduling": scheduling,
            "band": {"low": 0.1, "high": 0.2},
            "robustness": {"probability": 0.0},
        }
        return self.recipe("photon.phase2", {**values, **(model or {})}, **changes)

    def save(self, recipe: Recipe, module: nn.Module, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        recipe.save(module, None, folder)
        return folder


def items() -> list[GroupItem]:
    """Two volumes: three questions about the first, one about the second."""
    made = []
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        random = np.random.default_rng(number)
        array = random.uniform(-1, 1, SHAPE).astype(np.float32)
        labels = np.zeros(SHAPE, np.uint8)
        labels[:4, :4, :4] = LIVER  # all of the first token
        labels[4, 4, 4] = LESION  # one voxel of 64
        made.append(GroupItem([Prepared(array, np.eye(4), SHAPE, np.eye(4))], rows, [labels]))
    return made


def run(recipe: Any, module: nn.Module, step: int = 9, total: int = 10, chosen: list[GroupItem] | None = None) -> Any:
    """Batch, its counts, and the output of `losses` with weights as on one rank."""
    batch = recipe.collate(items() if chosen is None else chosen)
    counts = recipe.counts(batch)
    weights = {name: 1 / count for name, count in counts.items()}
    return batch, counts, recipe.losses(module, batch, step, total, weights)


def separate_losses(recipe: Any, module: nn.Module) -> list[Tensor]:
    """Cross-entropy of each row alone, through the model's own forward pass."""
    found = []
    for item in items():
        for row in item.rows:
            chat = [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}]
            batch = recipe.processor.batch([VolumeChats([item.volumes[0].array], [chat])])
            found.append(module(**batch, reduction="none").token_losses)
    return found

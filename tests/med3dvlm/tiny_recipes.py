"""Tiny recipes of Med3DVLM's stages from YAML configs, batches for them, and runs as the trainer leaves them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from mllm3d.config import load
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import Row, write_manifest
from mllm3d.data.preprocess import Prepared
from mllm3d.registry import recipe_class
from mllm3d.training.recipe import Recipe
from tests.med3dvlm.tiny_med3dvlm import ENCODER, SIZE

IMAGE_TOKENS = 4
OPTIONS = ["liver", "left kidney", "spleen"]
ASKED = [
    ("v0", "report", "Describe the scan.", "The liver holds a large lesion.", None),
    ("v0", "organ", "Which organ holds it?", "liver", OPTIONS),
    ("v1", "report", "Describe the scan.", "Nothing in the spleen or the left kidney.", None),
    ("v1", "organ", "Which organ does the small lesion lie in?", "spleen", OPTIONS),
    ("v1", "existence", "Is there a cyst?", "no", None),
]
REPORTS = {"v0": "The liver holds a large lesion.", "v1": "Nothing in the spleen or the left kidney."}
ROWS = [
    Row(
        id=f"q{number}", case=volume, split="train", volume=f"{volume}.npy", question=question, answer=answer,
        options=options, task=task, report=REPORTS[volume],
    )
    for number, (volume, task, question, answer, options) in enumerate(ASKED)
]  # fmt: skip
TEXT = {"vocabulary": 310, "hidden_size": 16, "layers": 2, "heads": 2, "mlp": 24, "max_length": 48}
LORA = {"rank": 2, "alpha": 8, "dropout": 0.0}


class Recipes:
    """Configs, recipes and runs in one folder."""

    def __init__(self, folder: Path, runs: Path | None = None) -> None:
        """`runs`: where earlier stages are, by default this folder."""
        self.folder, self.runs = folder, runs or folder
        write_manifest(folder / "manifest.jsonl", ROWS)

    def recipe(self, name: str, model: dict[str, Any], **changes: Any) -> Any:
        """The recipe of a config that was read from YAML; keywords are `section__key=value`."""
        config: dict[str, Any] = {
            "recipe": name,
            "volume": {"shape": list(SIZE), "window_hu": [-200.0, 300.0]},
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

    def text(self, kind: str, **changes: Any) -> Any:
        return self.recipe("med3dvlm.text", {"kind": kind, **TEXT}, **changes)

    def contrastive(self, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        values = {"encoder": _encoder(), "text_encoder": str(self.runs / "bert"), "projection_dim": 6}
        return self.recipe("med3dvlm.contrastive", {**values, "text_tokens": 48, **(model or {})}, **changes)

    def projector(self, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        values: dict[str, Any] = {"mixed_tokens": IMAGE_TOKENS, "max_length": 160}
        values |= {"encoder": str(self.runs / "contrastive"), "language_model": str(self.runs / "decoder")}
        return self.recipe("med3dvlm.projector", {**values, **(model or {})}, **changes)

    def finetune(self, model: dict[str, Any] | None = None, **changes: Any) -> Any:
        values = {"checkpoint": str(self.runs / "projector"), "lora": LORA, "max_length": 160}
        return self.recipe("med3dvlm.finetune", {**values, **(model or {})}, **changes)

    def of(self, stage: str, **changes: Any) -> Any:
        """The recipe of a stage by name."""
        if stage in ("bert", "decoder"):
            return self.text("encoder" if stage == "bert" else "decoder", **changes)
        return getattr(self, stage)(**changes)

    def save(self, recipe: Recipe, module: nn.Module, name: str) -> Path:
        """A run folder with one step."""
        model = self.folder / name / "checkpoints" / "step_1" / "model"
        model.mkdir(parents=True)
        recipe.save(module, None, model)
        (self.folder / name / "checkpoints" / "latest").write_text("step_1\n")
        (self.folder / name / "preprocessing.json").write_text(recipe.config.volume.model_dump_json())
        return self.folder / name


def _encoder() -> dict[str, Any]:
    return {name: value for name, value in ENCODER.items() if name != "size"}


def model_folder(run: Path) -> Path:
    return run / "checkpoints" / "step_1" / "model"


def all_stages(folder: Path) -> dict[str, Path]:
    """A run of each stage after the other; weights are larger than the initial ones, and none stays where it was."""
    recipes, found = Recipes(folder), {}
    for number, stage in enumerate(("bert", "decoder", "contrastive", "projector", "finetune")):
        recipe = recipes.of(stage)
        torch.manual_seed(number)
        module = recipe.build()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.ndim == 2:
                    parameter.mul_(3)
                if parameter.ndim <= 2 and name not in ("t_prime", "bias"):
                    parameter.add_(0.05 * torch.randn_like(parameter))
        found[stage] = recipes.save(recipe, module, stage)
    return found


def items() -> list[GroupItem]:
    """Two volumes: two questions about the first, three about the second."""
    made = []
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        array = np.random.default_rng(number).uniform(0, 1, SIZE).astype(np.float32)
        made.append(GroupItem([Prepared(array, np.eye(4), SIZE, np.eye(4))], rows, None))
    return made


def single() -> list[GroupItem]:
    """The same volumes, one row of each."""
    return [item._replace(rows=item.rows[:1]) for item in items()]


def given(stage: str) -> list[GroupItem]:
    """What a stage's batches are made from."""
    return single() if stage in ("bert", "contrastive") else items()


def run(recipe: Any, module: nn.Module, chosen: list[GroupItem], step: int = 0) -> Any:
    """Batch, its counts, and the output of `losses` with weights as on one rank."""
    batch = recipe.collate(chosen)
    counts = recipe.counts(batch)
    return batch, counts, recipe.losses(module, batch, step, 10, {name: 1 / n for name, n in counts.items()})

"""A recipe with a few hundred parameters, for tests of the trainer: numbers in, digits out."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mllm3d.config import Settings
from mllm3d.data.dataset import GroupItem
from mllm3d.training.recipe import Batch, Description, FrozenEncoder, ParameterGroup, Recipe, StepOutput, Term

IGNORED = -100


class ToySettings(Settings):
    """Besides the width: what a test wants to go wrong.

    encoded: a file that gets a line for each volume that is encoded to be cached: its rank and its first voxel.
    """

    width: int = 8
    dropout: float = 0.0
    poison: Literal["none", "loss", "gradient"] = "none"
    poison_step: int = 0
    use_side: Literal["always", "even_ranks"] = "always"
    ignore_answers: bool = False
    cache_features: bool = False
    encoded: str = ""


def check_weight(weight: float, gradient: Tensor) -> None:
    """What a recipe is told that a unit weighs is what it weighs in the backward pass."""
    torch.testing.assert_close(gradient, torch.full_like(gradient, weight))


class ToyModel(nn.Module):
    """(volumes, 64) voxels and (questions,) numbers 0-7 -> (questions, 10) logits of digits."""

    def __init__(self, settings: ToySettings) -> None:
        super().__init__()
        width = settings.width
        self.frozen = nn.Linear(64, width).requires_grad_(False)
        self.ask = nn.Embedding(8, width)
        self.hidden = nn.Linear(width, width)
        self.side = nn.Linear(width, width)
        self.drop = nn.Dropout(settings.dropout)
        self.head = nn.Linear(width, 10)

    def forward(self, read: Tensor, ask: Tensor, owner: Tensor, with_side: bool = True) -> Tensor:
        """`read`: voxels, or what the frozen layer makes of them."""
        read = read.to(self.frozen.weight.dtype)
        features = (self.frozen(read) if read.shape[1] == self.frozen.in_features else read)[owner] + self.ask(ask)
        features = features + torch.tanh(self.hidden(features))
        if with_side:
            features = features + torch.tanh(self.side(features))
        return self.head(self.drop(features))


class ToyRecipe(Recipe):
    """Answers are strings of digits: one label token each, so that batches differ in tokens."""

    Settings = ToySettings
    model: ToyModel | None = None

    @property
    def settings(self) -> ToySettings:
        assert isinstance(self.config.model, ToySettings)
        return self.config.model

    def build(self, meta: bool = False) -> nn.Module:
        with torch.device("meta" if meta else "cpu"):
            self.model = ToyModel(self.settings)
        return self.model

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        optimizer = self.config.training.optimizer
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {
                "name": "matrices",
                "params": [p for name, p in trainable if p.ndim == 2 and "ask" not in name],
                "lr": optimizer.lr,
                "weight_decay": optimizer.weight_decay,
                "use_muon": True,
            },
            {
                "name": "rest",
                "params": [p for name, p in trainable if p.ndim != 2 or "ask" in name],
                "lr": 2 * optimizer.lr,
                "weight_decay": 0.0,
            },
        ]

    def frozen_encoder(self) -> FrozenEncoder | None:
        if not self.settings.cache_features:
            return None
        assert self.model is not None
        module = copy.deepcopy(self.model.frozen)
        return FrozenEncoder(module, str(hash(tuple(module.weight.flatten().tolist()))), self.encode)

    def encode(self, module: nn.Module, volume: Tensor) -> dict[str, Tensor]:
        """Also draws a number, as some encoder might."""
        torch.rand(1)
        with Path(self.settings.encoded).open("a") as stream:
            stream.write(f"{torch.distributed.get_rank()} {float(volume[0, 0, 0])}\n")
        return {"frozen": module(volume.flatten())}

    def collate(self, items: list[GroupItem]) -> Batch:
        rows = [(owner, row) for owner, item in enumerate(items) for row in item.rows]
        targets = [torch.tensor([int(digit) for digit in row.answer]) for _, row in rows]
        if self.settings.ignore_answers:
            targets = [torch.full_like(target, IGNORED) for target in targets]
        if self.settings.cache_features:
            voxels = [item.features[-1]["frozen"] for item in items]
        else:
            voxels = [torch.from_numpy(item.volumes[-1].array).flatten() for item in items]
        return {
            "voxels": torch.stack(voxels),
            "ask": torch.tensor([int(row.question) for _, row in rows]),
            "owner": torch.tensor([owner for owner, _ in rows]),
            "targets": nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            "ids": [row.id for _, row in rows],
        }

    def counts(self, batch: Batch) -> dict[str, int]:
        tokens = int((batch["targets"] != IGNORED).sum())
        return {"tokens": tokens, "questions": len(batch["ids"]), "volumes": len(batch["voxels"])}

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        rank = torch.distributed.get_rank()
        with_side = self.settings.use_side == "always" or rank % 2 == 0
        logits = model(batch["voxels"], batch["ask"], batch["owner"], with_side).float()
        targets = batch["targets"]
        everywhere = logits[:, None].expand(-1, targets.shape[1], -1).flatten(0, 1)
        answer = functional.cross_entropy(everywhere, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        size = 0.01 * logits.pow(2).mean(1).sum()
        if step == self.settings.poison_step and rank == torch.distributed.get_world_size() - 1:
            if self.settings.poison == "loss":
                answer = answer.detach() * float("nan") + answer
            if self.settings.poison == "gradient":
                size = size + 0 * torch.sqrt(logits.abs().sum() * 0)  # value 0, gradient 0 * inf
        if self.settings.poison == "none" and answer.requires_grad:
            answer.register_hook(partial(check_weight, weights["tokens"]))
        right = (logits.argmax(-1) == targets[:, 0]).sum()
        return StepOutput(
            {"answer": Term(answer, "tokens"), "size": Term(size, "questions")},
            {"accuracy": (right, len(targets)), "keep_rate": (0.5 * len(targets), len(targets))},
        )

    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
        weights = module.state_dict() if state_dict is None else state_dict
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"model_type": "toy"}))

    def describe(self) -> Description:
        return {"tokens_per_volume": 1, "flops_per_volume": 6.0 * 64 * self.settings.width}

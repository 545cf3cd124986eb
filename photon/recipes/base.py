"""What all of Photon's recipes share."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Strict
from torch import Tensor, nn
from transformers import AutoTokenizer

from mllm3d.data.dataset import GroupItem
from mllm3d.data.prompts import question_text, target_text
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.training.recipe import Batch, Description, ParameterGroup, Recipe
from photon.building import planned_config, read_config, read_model
from photon.configuration_photon import PhotonConfig
from photon.flops import forward_flops
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.packing import pack
from photon.processing_photon import PhotonProcessor, VolumeChats

PatchSize = Annotated[tuple[int, int, int], Strict(False)]
"""(depth, height, width); YAML gives a list."""


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    """One turn, and its answer where there is one to learn."""
    turn = [{"role": "user", "content": question}]
    return turn if answer is None else [*turn, {"role": "assistant", "content": answer}]


def checkpoint_folder(source: str) -> str:
    """The model folder of a run, or ``source`` itself where it is a model folder or a hub name."""
    path = Path(source)
    return str(open_checkpoint(path).model) if (path / "checkpoints").is_dir() else source


def from_step(start: float, total_steps: int) -> float:
    """A start given as a share of the run (below 1) or as optimizer steps."""
    return start * total_steps if start < 1 else start


class PhotonRecipe(Recipe):
    """What all of Photon's recipes share: batches, parameter groups, saving, figures."""

    processor: PhotonProcessor
    layout_config: PhotonConfig
    """Configuration by which batches are laid out; set with the processor when the model is built."""

    def adopt(self, model: PhotonForConditionalGeneration, tokenizer: Any) -> None:
        """Make batches for this model from now on."""
        self.processor = PhotonProcessor.from_config(model.config, tokenizer)
        self.layout_config = model.config

    def initial_config(self) -> PhotonConfig:
        """Configuration of the model to train, without its weights."""
        raise NotImplementedError

    def learning_rate(self, name: str) -> float:
        """Peak rate of a parameter by its name."""
        return self.config.training.optimizer.lr

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        """Groups by rate, decay (matrices only) and whether Muon may take them (hidden matrices)."""
        groups: dict[tuple[float, float, bool], ParameterGroup] = {}
        muon = self.config.training.optimizer.name == "muon"
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            decay = self.config.training.optimizer.weight_decay if parameter.ndim >= 2 else 0.0
            hidden = muon and parameter.ndim == 2 and any(part in name for part in (".blocks.", ".layers.", ".merger."))
            key = (self.learning_rate(name), decay, hidden)
            if key not in groups:
                label = f"lr{key[0]:g}-wd{decay:g}" + ("-muon" if hidden else "")
                groups[key] = ParameterGroup(name=label, params=[], lr=key[0], weight_decay=decay, use_muon=hidden)
            groups[key]["params"].append(parameter)
        return list(groups.values())

    def collate(self, items: list[GroupItem]) -> Batch:
        """Volume groups as tensors; the layout is made here, on the host."""
        groups = [
            VolumeChats([v.array for v in item.volumes], [chat(question_text(r), target_text(r)) for r in item.rows])
            for item in items
        ]
        batch: dict[str, Any] = self.processor.batch(groups)
        config = self.layout_config
        grids = batch.pop("video_grid_thw").tolist()
        batch["layout"] = pack(
            batch["input_ids"], batch.pop("attention_mask"), grids, batch.pop("group_index"), batch.pop("labels"),
            config.special_tokens, config.geometry,
        )  # fmt: skip
        return {
            **batch,
            "grids": grids,
            "volumes": len(items),
            "ids": [r.id for item in items for r in item.rows],
        }

    def counts(self, batch: Batch) -> dict[str, int]:
        layout = batch["layout"]
        return {"tokens": len(layout.targets), "questions": layout.rows, "volumes": batch["volumes"]}

    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
        module.save_pretrained(directory, state_dict=state_dict)  # type: ignore[operator]
        self.processor.save_pretrained(directory)

    def describe(self) -> Description:
        """Tokens of a volume and FLOPs of a training step on one volume (three forward passes)."""
        config = self.initial_config()
        shape = self.config.volume.shape or self.config.volume.crop
        if shape is None:
            raise UserError("volume.shape: needed to plan a run; give volume.shape or volume.preset")
        flops = forward_flops(config, shape, self.config.data.questions_per_volume, 48, 8, self.planned_keep_rate())
        return Description(tokens_per_volume=config.patches.tokens(shape), flops_per_volume=3 * flops)

    def planned_keep_rate(self) -> float | None:
        """Keep rate that the plan assumes; None without dropping."""
        return None

    def _load(self, source: str) -> tuple[PhotonForConditionalGeneration, Any]:
        """Model and tokenizer of a checkpoint, with one line for whatever is wrong with it."""
        try:
            folder = checkpoint_folder(source)
            model = read_model(folder)
            return model, AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"model.checkpoint: {source}: {' '.join(str(error).split())}") from error

    def _plan(self, source: str) -> PhotonConfig:
        """Configuration of a checkpoint for planning; a published backbone need not be at hand."""
        planned = planned_config(source)
        if planned is not None and not Path(source).is_dir():
            return planned
        try:
            return read_config(checkpoint_folder(source))
        except (OSError, ValueError) as error:
            raise UserError(f"model.checkpoint: {source}: {' '.join(str(error).split())}") from error


def on_meta(config: PhotonConfig) -> PhotonForConditionalGeneration:
    with torch.device("meta"):
        return PhotonForConditionalGeneration(config)


def token_metrics(
    token_losses: Tensor, logits: Tensor, targets: Tensor
) -> dict[str, tuple[Tensor | float, Tensor | float]]:
    """Share of label tokens whose most likely prediction is right."""
    return {"token_accuracy": ((logits.argmax(-1) == targets).sum(), float(len(targets)))}

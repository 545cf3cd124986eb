"""What all of Photon's recipes share."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Strict
from safetensors import SafetensorError
from torch import Tensor, nn

from mllm3d.data.dataset import GroupItem
from mllm3d.data.prompts import question_text, target_text
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import source_folder
from mllm3d.training.huggingface import save_pretrained, without_bars
from mllm3d.training.optim import parameter_groups
from mllm3d.training.recipe import Batch, Description, Metrics, ParameterGroup, Recipe
from photon.building import (
    PatchInit,
    planned_config,
    read_config,
    read_model,
    read_processor,
    read_tokenizer,
    with_patches,
)
from photon.configuration_photon import PhotonConfig
from photon.flops import forward_flops
from photon.geometry import Size3
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.packing import pack, volume_grids
from photon.patch_embedding import PixelScale, Scale
from photon.processing_photon import PhotonProcessor, VolumeChats

PLANNED_TEXT, PLANNED_ANSWER = 48, 8
"""Tokens of a question with its answer, and of the answer, that FLOPs are planned with."""

PatchSize = Annotated[tuple[int, int, int], Strict(False)]
"""(depth, height, width); YAML gives a list."""


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    """One turn, and its answer where there is one to learn."""
    turn = [{"role": "user", "content": question}]
    return turn if answer is None else [*turn, {"role": "assistant", "content": answer}]


def read_checkpoint(folder: str | Path, dtype: torch.dtype = torch.float32) -> PhotonForConditionalGeneration:
    """``read_model`` with every fault of the files as a ``ValueError``; only a download shows its progress."""
    try:
        with without_bars() if Path(folder).is_dir() else nullcontext():
            return read_model(folder, dtype)
    except SafetensorError as error:
        raise ValueError(f"the weights are damaged ({error}); copy them again") from error


def is_hidden(name: str) -> bool:
    """Whether a matrix of this name stands between other layers: what Muon may take."""
    return any(part in name for part in (".blocks.", ".layers.", ".merger."))


def from_step(start: float, total_steps: int) -> float:
    """A start given as a share of the run (below 1) or as optimizer steps."""
    return start * total_steps if start < 1 else start


class PhotonRecipe(Recipe):
    """What all of Photon's recipes share: batches, parameter groups, saving, figures."""

    takes_pixels: ClassVar[bool] = True
    processor: PhotonProcessor
    layout_config: PhotonConfig
    """Configuration by which batches are laid out; set with the processor when the model is built."""
    source_pixels: PixelScale | None = None
    """Of a checkpoint of grey patches: how it reads pixels, for a run that has no volumes to say it."""

    def adopt(self, model: PhotonForConditionalGeneration, tokenizer: Any) -> None:
        """Make batches for this model from now on."""
        volume, pixels = self.config.volume, None
        if model.config.patches.channels == 1:
            pixels = [Scale(volume.mean, volume.std)] if self.config.prepares_volumes else self.source_pixels
        self.processor = PhotonProcessor.from_config(model.config, tokenizer, pixels)
        for name in ("skip_background", "min_pixels", "max_pixels"):
            if hasattr(self.config.model, name):
                setattr(self.processor, name, getattr(self.config.model, name))
        self.layout_config = model.config

    def initial_config(self) -> PhotonConfig:
        """Configuration of the model to train, without its weights."""
        raise NotImplementedError

    def learning_rate(self, name: str) -> float:
        """Peak rate of a parameter by its name."""
        return self.config.training.optimizer.lr

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        return parameter_groups(model, self.config.training.optimizer, self.learning_rate, is_hidden)

    def collate(self, items: list[GroupItem]) -> Batch:
        """Groups as tensors; the layout is made here, on the host."""
        groups = [
            VolumeChats(
                [v.array for v in item.volumes],
                [chat(question_text(r), target_text(r)) for r in item.rows],
                item.images,
                item.videos,
            )
            for item in items
        ]
        batch: dict[str, Any] = self.processor.batch(groups)
        config = self.layout_config
        grids = batch.pop("video_grid_thw").tolist() if "video_grid_thw" in batch else []
        batch["layout"] = pack(
            batch["input_ids"], batch.pop("attention_mask"), grids, batch.pop("group_index"), batch.pop("labels"),
            config.special_tokens, config.geometry, batch.get("token_index"),
        )  # fmt: skip
        merge = config.patches.merge
        shown = volume_grids(grids, batch.get("token_index"), merge)
        counts = [v.tokens(merge) * merge**2 for v in shown]
        if not grids:
            # Under ZeRO-3 every rank must run the vision tower: an empty token, which the model multiplies by 0.
            grids = [[1, merge, merge]]
            batch["pixel_values_videos"] = torch.zeros(merge**2, config.patches.voxels)
        index = batch.pop("token_index", None)
        return {
            **batch,
            "token_index": None if index is None else index.tolist(),  # stays on the host
            "grids": grids,
            "patch_counts": counts,
            "volumes": len(items),
            "ids": [r.id for item in items for r in item.rows],
        }

    def counts(self, batch: Batch) -> dict[str, int]:
        layout = batch["layout"]
        return {
            "label_tokens": len(layout.targets),
            "tokens": len(layout.source),
            "questions": layout.rows,
            "volumes": batch["volumes"],
        }

    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
        save_pretrained(module, self.processor, state_dict, directory)

    def describe(self) -> Description:
        """Tokens of a volume and FLOPs of a step on it, where all volumes have one shape; the most of an image."""
        config = self.initial_config()
        described = Description()
        if most := getattr(self.config.model, "max_pixels", None):
            _, height, width = config.patches.token_shape
            described["most_tokens_per_image"] = most // (height * width)
        shape = self.config.volume.shape or self.config.volume.crop
        if shape is not None:
            described["tokens_per_volume"] = config.patches.tokens(shape)
            described["flops_per_volume"] = self.step_flops(config, shape)
        return described

    def step_flops(self, config: PhotonConfig, shape: Size3) -> float:
        """FLOPs of a forward and a backward pass on one volume with its questions; a backward pass is two."""
        questions, keep_rate = self.config.data.questions_per_volume, self.planned_keep_rate()
        return 3 * forward_flops(config, shape, questions, PLANNED_TEXT, PLANNED_ANSWER, keep_rate)

    def planned_keep_rate(self) -> float | None:
        """Keep rate that the plan assumes; None without dropping."""
        return None

    def _load(self, source: str) -> tuple[PhotonForConditionalGeneration, Any]:
        """Model and tokenizer of a checkpoint, with one line for whatever is wrong with it."""
        try:
            folder = source_folder(source)
            model = read_checkpoint(folder)
            if model.config.patches.channels == 1 and not self.config.prepares_volumes:
                self.source_pixels = read_processor(folder, model.config).reader.scale
            return model, read_tokenizer(folder, model.config)
        except (OSError, ValueError) as error:
            raise UserError(f"model.checkpoint: {source}: {' '.join(str(error).split())}") from error

    def renewed(
        self, model: PhotonForConditionalGeneration, size: Size3, init: PatchInit, temporal_step: float | None
    ) -> PhotonForConditionalGeneration:
        """The model with a 3D patch embedding for the run's volumes."""
        scale = Scale(self.config.volume.mean, self.config.volume.std)
        patches = model.config.patches
        # A slice-video backbone of our own saw the same grey scale that the volume has.
        pixels = [scale] * patches.channels if patches.slices_per_frame > 1 else None
        return with_patches(model, size, 1, init, scale, pixels, temporal_step)

    def _plan(self, source: str) -> PhotonConfig:
        """Configuration of a checkpoint for planning; a published backbone need not be at hand."""
        planned = planned_config(source)
        if planned is not None and not Path(source).is_dir():
            return planned
        try:
            return read_config(source_folder(source))
        except (OSError, ValueError) as error:
            raise UserError(f"model.checkpoint: {source}: {' '.join(str(error).split())}") from error


def on_meta(config: PhotonConfig) -> PhotonForConditionalGeneration:
    with torch.device("meta"):
        return PhotonForConditionalGeneration(config)


def token_metrics(token_losses: Tensor, logits: Tensor, targets: Tensor) -> Metrics:
    """Share of label tokens whose most likely prediction is right."""
    return {"token_accuracy": ((logits.argmax(-1) == targets).sum(), float(len(targets)))}

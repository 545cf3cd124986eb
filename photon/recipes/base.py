"""What all of Photon's recipes share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Strict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from mllm3d.data.dataset import GroupItem
from mllm3d.data.prompts import question_text, target_text
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.training.recipe import Batch, Description, Metrics, ParameterGroup, Recipe
from photon.building import PatchInit, planned_config, read_config, read_model, read_tokenizer, with_patches
from photon.configuration_photon import PhotonConfig
from photon.flops import forward_flops
from photon.geometry import Size3
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.packing import pack, volume_grids
from photon.patch_embedding import Scale
from photon.processing_photon import PhotonProcessor, VolumeChats

PLANNED_TEXT, PLANNED_ANSWER = 48, 8
"""Tokens of a question with its answer, and of the answer, that FLOPs are planned with."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

PatchSize = Annotated[tuple[int, int, int], Strict(False)]
"""(depth, height, width); YAML gives a list."""


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    """One turn, and its answer where there is one to learn."""
    turn = [{"role": "user", "content": question}]
    return turn if answer is None else [*turn, {"role": "assistant", "content": answer}]


def checkpoint_folder(source: str) -> str:
    """The model folder of a run or of one of its steps, or ``source`` itself: a model folder or a hub name."""
    path = Path(source)
    on_hub = HUB_NAME.fullmatch(source) and not path.parent.is_dir()
    if not path.exists() and not on_hub:
        raise UserError(f"model.checkpoint: {source}: no such folder; name a model folder, a run or a hub name")
    within = path.is_dir() and not (path / "config.json").is_file()
    return str(open_checkpoint(path).model) if within else source


@contextmanager
def without_bars() -> Iterator[None]:
    """Files on this machine are read and written without the library's progress bars, which break up the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_checkpoint(folder: str | Path, dtype: torch.dtype = torch.float32) -> PhotonForConditionalGeneration:
    """``read_model`` with every fault of the files as a ``ValueError``; only a download shows its progress."""
    try:
        with without_bars() if Path(folder).is_dir() else nullcontext():
            return read_model(folder, dtype)
    except SafetensorError as error:
        raise ValueError(f"the weights are damaged ({error}); copy them again") from error


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
        volume = self.config.volume
        pixels = [Scale(volume.mean, volume.std)] if model.config.patches.channels == 1 else None
        background = getattr(self.config.model, "skip_background", None)
        self.processor = PhotonProcessor.from_config(model.config, tokenizer, pixels, background)
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
        with without_bars():
            module.save_pretrained(directory, state_dict=state_dict)  # type: ignore[operator]
        try:
            self.processor.save_pretrained(directory)
        except OSError:
            raise
        except Exception as error:  # the tokenizers library has no other for a full disk
            raise OSError(f"{directory / 'tokenizer.json'}: {error}") from error

    def describe(self) -> Description:
        """Tokens of a volume and FLOPs of a training step on it, where all volumes have one shape."""
        config = self.initial_config()
        shape = self.config.volume.shape or self.config.volume.crop
        if shape is None:
            return Description()
        tokens = config.patches.tokens(shape)
        return Description(tokens_per_volume=tokens, flops_per_volume=self.step_flops(config, shape))

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
            folder = checkpoint_folder(source)
            model = read_checkpoint(folder)
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
            return read_config(checkpoint_folder(source))
        except (OSError, ValueError) as error:
            raise UserError(f"model.checkpoint: {source}: {' '.join(str(error).split())}") from error


def on_meta(config: PhotonConfig) -> PhotonForConditionalGeneration:
    with torch.device("meta"):
        return PhotonForConditionalGeneration(config)


def token_metrics(token_losses: Tensor, logits: Tensor, targets: Tensor) -> Metrics:
    """Share of label tokens whose most likely prediction is right."""
    return {"token_accuracy": ((logits.argmax(-1) == targets).sum(), float(len(targets)))}

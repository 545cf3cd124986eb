"""`photon.phase1` and `photon.phase2`: the paper's two training phases (A.1.1)."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from mllm3d.config import Settings
from mllm3d.errors import UserError
from mllm3d.training.recipe import Batch, Metrics, StepOutput, Term
from photon.building import PatchInit, patched_config, planned_config, with_scheduling
from photon.configuration_photon import PhotonConfig
from photon.geometry import Size3
from photon.losses import band_loss
from photon.modeling_photon import Reduction
from photon.packing import Layout
from photon.recipes.base import PatchSize, PhotonRecipe, from_step, on_meta, token_metrics
from photon.recipes.objective import Objective, ObjectiveSettings, TokenScheduling
from photon.scheduling import SchedulingSettings
from photon.stream import LossWeights

SKIP_BACKGROUND: Any = Field(
    default=None, description="Tokens of air around the body, up to this value in model units, are left out."
)


class PixelSettings(Settings):
    """Sizes of images and of videos' frames, in pixels; saved with the processor."""

    min_pixels: int = Field(default=56 * 56, gt=0, description="Smaller images and frames are enlarged to it.")
    max_pixels: int = Field(default=28 * 28 * 1280, gt=0, description="Larger ones are reduced to it, frame by frame.")

    @model_validator(mode="after")
    def _leaves_a_size(self) -> Self:
        if self.max_pixels < self.min_pixels:
            raise ValueError("max_pixels lies below min_pixels")
        return self


class Phase1Settings(PixelSettings):
    """Phase 1 (Photon A.1.1): only the 3D patch embedding learns."""

    checkpoint: str = Field(description="Backbone: a folder, a run, or a hub name of Qwen2.5-VL.")
    backbone: str | None = Field(default=None, description="What --dry-run plans with until the checkpoint is there.")
    patch_size: PatchSize = Field(default=(14, 14, 14), description="Voxels of a patch (D, H, W).")
    patch_init: PatchInit | None = Field(
        default="inflate",
        description="Start from the backbone's kernel (inflate) or at random (fresh, published). None keeps it.",
    )
    trains: Literal["patches", "vision"] = Field(
        default="patches", description="The patch embedding alone, or the whole vision tower (Table 4)."
    )
    temporal_step: float | None = Field(default=None, description="Rotary steps per slab; 2 per slice by default.")
    skip_background: float | None = SKIP_BACKGROUND


class Phase1(PhotonRecipe):
    """`photon.phase1`: align a 3D patch embedding with a frozen backbone."""

    Settings: ClassVar[type[Settings]] = Phase1Settings

    @property
    def settings(self) -> Phase1Settings:
        return self.config.model  # type: ignore[return-value]

    def initial_config(self) -> PhotonConfig:
        s = self.settings
        if s.patch_init is None and Path(s.checkpoint).is_dir():
            return self._plan(s.checkpoint)
        return patched_config(self._plan(s.backbone or s.checkpoint), s.patch_size, 1, s.temporal_step)

    def build(self, meta: bool = False) -> nn.Module:
        if meta:
            model = on_meta(self.initial_config())
        else:
            s = self.settings
            model, tokenizer = self._load(s.checkpoint)
            if s.patch_init is not None:
                model = self.renewed(model, s.patch_size, s.patch_init, s.temporal_step)
            self.adopt(model, tokenizer)
        model.requires_grad_(False)
        learns = model.model.visual.patch_embed if self.settings.trains == "patches" else model.model.visual
        learns.requires_grad_(True)
        return model

    def step_flops(self, config: PhotonConfig, shape: Size3) -> float:
        """Two forward passes' worth: a frozen weight needs no gradient, but what lies before it does."""
        return super().step_flops(config, shape) * 2 / 3

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        output = model(**model_inputs(batch), reduction="none")
        return StepOutput(
            {"ce": Term(output.token_losses.sum(), "label_tokens")},
            token_metrics(output.token_losses, output.logits, batch["layout"].targets),
        )


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What the model's forward takes of a batch."""
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values_videos", "layout")}
    inputs["video_grid_thw"] = torch.tensor(batch["grids"])
    if batch["token_index"] is not None:
        inputs["token_index"] = torch.tensor(batch["token_index"])
    return inputs


class Phase2Settings(ObjectiveSettings, PixelSettings):
    """Phase 2 (Photon A.1.1): all parameters learn, and tokens are dropped."""

    checkpoint: str = Field(description="Phase 1's run, a Photon checkpoint, or (Photon Max) a backbone.")
    backbone: str | None = Field(default=None, description="What --dry-run plans with until the checkpoint is there.")
    patch_size: PatchSize = Field(default=(14, 14, 14), description="Voxels of a patch in that plan, or renewed.")
    patch_init: PatchInit | None = Field(
        default=None, description="Without phase 1: renew the patch embedding (inflate, fresh). None keeps it."
    )
    vision_lr: float | None = Field(default=None, gt=0, description="Rate of the vision tower. None: the common one.")
    predictor_lr: float | None = Field(default=None, gt=0, description="Rate of the threshold predictors.")
    skip_background: float | None = SKIP_BACKGROUND
    scheduling: TokenScheduling | None = Field(
        default=TokenScheduling(), description="Token scheduling. None: every token is kept, without a predictor."
    )

    @model_validator(mode="after")
    def _flips_at_one_layer(self) -> Self:
        shared = self.scheduling is not None and self.scheduling.upper_layers == "union"
        if shared and (self.objective == "add" or len(self.scheduling.layers) > 1):  # type: ignore[union-attr]
            raise ValueError("scheduling.upper_layers: union needs one scheduling layer and objective: replace")
        if self.objective == "add" and self.scheduling is not None and len(self.scheduling.layers) > 1:
            raise ValueError(
                "objective: add flips at one scheduling layer; choose replace, or one of scheduling.layers"
            )
        return self


class Phase2(PhotonRecipe):
    """`photon.phase2`: task finetuning with instruction-conditioned token scheduling."""

    Settings: ClassVar[type[Settings]] = Phase2Settings

    @property
    def settings(self) -> Phase2Settings:
        return self.config.model  # type: ignore[return-value]

    def initial_config(self) -> PhotonConfig:
        s = self.settings
        # Phase 1's run folder is there before its first checkpoint is.
        signs = ("config.json", "model/config.json", "checkpoints/latest")
        if s.backbone is None or any((Path(s.checkpoint) / sign).is_file() for sign in signs):
            self._must_exist()
            config = self._plan(s.checkpoint)
            if s.patch_init is not None:
                config = patched_config(config, s.patch_size, 1, config.temporal_step)
        else:
            config = patched_config(self._plan(s.backbone), s.patch_size, 1)
        scheduling = self.scheduling
        config.scheduling = None if scheduling is None else scheduling.to_dict()
        return config

    @property
    def scheduling(self) -> SchedulingSettings | None:
        """The model's part of the scheduling settings."""
        return None if self.settings.scheduling is None else self.settings.scheduling.settings()

    def build(self, meta: bool = False) -> nn.Module:
        if meta:
            return on_meta(self.initial_config())
        self._must_exist()
        s = self.settings
        source, tokenizer = self._load(s.checkpoint)
        if s.patch_init is not None:
            source = self.renewed(source, s.patch_size, s.patch_init, source.config.temporal_step)
        model = with_scheduling(source, self.scheduling)
        self.adopt(model, tokenizer)
        return model

    def _must_exist(self) -> None:
        source = self.settings.checkpoint
        if not Path(source).exists() and planned_config(source) is None:
            raise UserError(
                f"model.checkpoint: {source}: no such folder; train photon.phase1 first, "
                "or name a Photon checkpoint or a published backbone"
            )

    def learning_rate(self, name: str) -> float:
        s, rate = self.settings, self.config.training.optimizer.lr
        if ".visual." in name:
            return s.vision_lr or rate
        return (s.predictor_lr or rate) if "threshold_predictor" in name else rate

    def planned_keep_rate(self) -> float | None:
        s = self.settings
        if s.scheduling is None:
            return None
        return s.scheduling.keep_ratio or (s.band.low + s.band.high) / 2

    def reduction(self, step: int, total_steps: int) -> Reduction:
        """Which of the three stages a step belongs to (Photon A.2.4)."""
        s = self.settings.scheduling
        if s is not None and step >= from_step(s.hard_from, total_steps):
            return "hard"
        return "soft" if s is not None and step >= from_step(s.soft_from, total_steps) else "none"

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        s, layout, inputs = self.settings, batch["layout"], model_inputs(batch)
        reduction = self.reduction(step, total_steps)
        scheduling = self.scheduling
        objective = Objective(
            s,
            predicts=scheduling is not None and scheduling.predicts,
            perturbing=step >= from_step(s.robustness.start, total_steps),
            flipping=reduction == "hard" and step >= from_step(s.flip.start, total_steps),
        )
        patches = inputs["pixel_values_videos"]
        inputs["pixel_values_videos"] = objective.volumes(patches, batch["patch_counts"], self.processor.channels)
        output = model(
            **inputs,
            reduction=reduction,
            flip=objective.flip,
            learn_scheduling=objective.learns_scheduling,
            # Validation leaves the random state alone.
            seeds=None if torch.is_grad_enabled() else torch.arange(layout.rows),
            weights=LossWeights(token=weights["label_tokens"], row=weights["questions"]),
        )
        return StepOutput(objective.terms(output, layout), self._metrics(output, layout, objective, reduction))

    def _metrics(self, output: Any, layout: Layout, objective: Objective, reduction: Reduction) -> Metrics:
        """Figures 5 and 6 of the paper come from these. Of a spoilt or flipped batch only that it was one counts."""
        perturbed, flipped = objective.kind.perturbation is not None, objective.kind.flip
        metrics: Metrics = {"perturbed": (float(perturbed), 1.0), "flipped": (float(flipped), 1.0)}
        if perturbed or objective.flip == "replace":
            return metrics
        metrics |= token_metrics(output.token_losses, output.logits, layout.targets)
        if output.mean_probability is None:
            return metrics | {"keep_rate": (1.0, 1.0)}
        seen, chooses = (layout.in_input_order(rows) for rows in (layout.sees, layout.chooses))
        rows = seen.sum()
        if objective.banded:
            band = self.settings.band
            outside = band_loss(output.mean_probability.detach(), band.low, band.high)
            metrics["band_triggered"] = (((outside > 0).any(1) & chooses).sum(), chooses.sum())
        hard = reduction == "hard"
        kept = output.kept if hard else layout.visual_at >= 0
        metrics["keep_rate"] = (torch.where(seen, output.keep_rate, 0).sum() if hard else rows, rows)
        return metrics | {"kept_tokens": (kept.sum(), rows)}

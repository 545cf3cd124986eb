"""`photon.phase1` and `photon.phase2`: the paper's two training phases (A.1.1)."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from mllm3d.config import Settings
from mllm3d.errors import UserError
from mllm3d.training.recipe import Batch, StepOutput, Term
from photon.building import PatchInit, patched_config, read_config, with_patches, with_scheduling
from photon.configuration_photon import PhotonConfig
from photon.geometry import Size3
from photon.losses import band_loss
from photon.modeling_photon import LossWeights, PhotonForConditionalGeneration, Reduction
from photon.recipes.base import PatchSize, PhotonRecipe, checkpoint_folder, from_step, on_meta, token_metrics
from photon.scheduling import SchedulingSettings
from photon.surrogate import SurrogateSettings


class Phase1Settings(Settings):
    """Phase 1 (Photon A.1.1): only the 3D patch embedding learns."""

    checkpoint: str = Field(description="Backbone: a folder, a run, or a hub name of Qwen2.5-VL.")
    patch_size: PatchSize = Field(default=(14, 14, 14), description="Voxels of a patch (D, H, W).")
    patch_init: PatchInit = Field(
        default="inflate",
        description="Start from the backbone's kernel (inflate) or at random (fresh, published).",
    )
    temporal_step: float | None = Field(default=None, description="Rotary steps per slab; 2 per slice by default.")


class Phase1(PhotonRecipe):
    """`photon.phase1`: align a 3D patch embedding with a frozen backbone."""

    Settings: ClassVar[type[Settings]] = Phase1Settings

    @property
    def settings(self) -> Phase1Settings:
        return self.config.model  # type: ignore[return-value]

    def _renewed(self, model: PhotonForConditionalGeneration, grey: bool) -> PhotonForConditionalGeneration:
        s, std = self.settings, self.config.volume.std
        channels = model.config.patches.channels
        image_std = (std,) * channels if grey else None
        return with_patches(model, s.patch_size, 1, s.patch_init, std, image_std, s.temporal_step)

    def initial_config(self) -> PhotonConfig:
        s = self.settings
        return patched_config(self._plan(s.checkpoint), s.patch_size, 1, s.temporal_step)

    def build(self, meta: bool = False) -> nn.Module:
        if meta:
            model = on_meta(self.initial_config())
        else:
            source, tokenizer = self._load(self.settings.checkpoint)
            # A slice-video backbone of our own saw the same grey scale that the volume has.
            model = self._renewed(
                source, grey=read_config(checkpoint_folder(self.settings.checkpoint)).slices_per_frame > 1
            )
            self.adopt(model, tokenizer)
        model.requires_grad_(False)
        model.model.visual.patch_embed.requires_grad_(True)
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
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values_videos", "layout") if name in batch}
    return {**inputs, "video_grid_thw": torch.tensor(batch["grids"])}


class BandSettings(Settings):
    """Soft retention band (Photon Eq. 18)."""

    low: float = Field(default=0.3, ge=0, le=1, description="r_min.")
    high: float = Field(default=0.8, ge=0, le=1, description="r_max.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the band's loss.")


class TokenScheduling(Settings):
    """Token scheduling (Photon Sec. 3.2) and when it begins."""

    layer: int | None = Field(default=None, description="Decoder layers before tokens are dropped. None: a quarter.")
    temperature: float = Field(default=0.2, gt=0, description="tau_ce of Eq. 8.")
    threshold_scale: float = Field(default=0.9, gt=0, le=1, description="The predicted threshold is multiplied by it.")
    predictor_width: int | None = Field(default=None, description="Hidden units of the predictor. None: width / 8.")
    predictor_bias: float = Field(default=-5.0, description="Start of the predictor's last bias.")
    detach: bool = Field(default=True, description="No gradient through saliency.")
    keep_ratio: float | None = Field(default=None, gt=0, le=1, description="Fixed share to keep; no predictor.")
    soft_from: float = Field(default=4000, ge=0, description="Start of soft masking: steps, or a share below 1.")
    hard_from: float = Field(default=8000, ge=0, description="Start of dropping: steps, or a share below 1.")
    beta: float = Field(default=0.8, description="Eq. 17.")
    eps_std: float = Field(default=3e-3, gt=0, description="Eq. 13.")
    clip: float = Field(default=1.5, gt=0, description="c of Eq. 13.")
    s_min: float = Field(default=0.5, description="Eq. 16.")
    s_max: float = Field(default=2.0, description="Eq. 16.")
    eps_sat: float = Field(default=5e-3, description="Eq. 17.")
    importance: Literal["paper", "removal"] = Field(default="paper", description="Sign of eta (Eq. 12, A.1.4).")
    statistics: Literal["kept", "all"] = Field(default="kept", description="Tokens of the means in Eq. 13 and 16.")
    centre: bool = Field(default=False, description="Subtract the row mean of the direction (published code).")

    def settings(self) -> SchedulingSettings:
        """The model's part of these settings."""
        values = self.model_dump()
        surrogate = {name: values.pop(name) for name in SurrogateSettings.__dataclass_fields__}
        for name in ("soft_from", "hard_from"):
            values.pop(name)
        return SchedulingSettings(surrogate=SurrogateSettings(**surrogate), **values)


class Phase2Settings(Settings):
    """Phase 2 (Photon A.1.1): all parameters learn, and tokens are dropped."""

    checkpoint: str = Field(description="Folder of phase 1's run, or of a Photon checkpoint.")
    backbone: str | None = Field(default=None, description="What --dry-run plans with until the checkpoint is there.")
    patch_size: PatchSize = Field(default=(14, 14, 14), description="Voxels of a patch in that plan.")
    vision_lr: float | None = Field(default=None, gt=0, description="Rate of the vision tower. None: the common one.")
    predictor_lr: float | None = Field(default=None, gt=0, description="Rate of the threshold predictor.")
    scheduling: TokenScheduling = Field(default=TokenScheduling(), description="Token scheduling.")
    band: BandSettings = Field(default=BandSettings(), description="Soft retention band.")


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
        else:
            config = patched_config(self._plan(s.backbone), s.patch_size, 1)
        config.scheduling = s.scheduling.settings().to_dict()
        return config

    def build(self, meta: bool = False) -> nn.Module:
        if meta:
            return on_meta(self.initial_config())
        self._must_exist()
        source, tokenizer = self._load(self.settings.checkpoint)
        model = with_scheduling(source, self.settings.scheduling.settings())
        self.adopt(model, tokenizer)
        return model

    def _must_exist(self) -> None:
        if not Path(self.settings.checkpoint).exists():
            raise UserError(
                f"model.checkpoint: {self.settings.checkpoint}: no such folder; train photon.phase1 first, "
                "or name a Photon checkpoint"
            )

    def learning_rate(self, name: str) -> float:
        s, rate = self.settings, self.config.training.optimizer.lr
        if ".visual." in name:
            return s.vision_lr or rate
        return (s.predictor_lr or rate) if "threshold_predictor" in name else rate

    def planned_keep_rate(self) -> float | None:
        return self.settings.scheduling.keep_ratio or (self.settings.band.low + self.settings.band.high) / 2

    def reduction(self, step: int, total_steps: int) -> Reduction:
        """Which of the three stages a step belongs to (Photon A.2.4)."""
        s = self.settings.scheduling
        if step >= from_step(s.hard_from, total_steps):
            return "hard"
        return "soft" if step >= from_step(s.soft_from, total_steps) else "none"

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        band = self.settings.band
        reduction = self.reduction(step, total_steps)
        scale = LossWeights(token=weights["label_tokens"], row=weights["questions"])
        output = model(**model_inputs(batch), reduction=reduction, weights=scale)
        terms = {"ce": Term(output.token_losses.sum(), "label_tokens")}
        metrics = token_metrics(output.token_losses, output.logits, batch["layout"].targets)
        if output.mean_probability is not None and self.settings.scheduling.keep_ratio is None:
            outside = band_loss(output.mean_probability, band.low, band.high)
            terms["band"] = Term(band.weight * outside.sum(), "questions")
            metrics["band_triggered"] = ((outside > 0).sum(), float(len(outside)))
        rate = 1.0 if reduction != "hard" else output.keep_rate.sum()
        metrics["keep_rate"] = (rate, 1.0 if reduction != "hard" else float(len(output.keep_rate)))
        return StepOutput(terms, metrics)

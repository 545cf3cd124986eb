"""Settings of phase 2's token scheduling and of its losses, and the losses of one batch (Photon Sec. 3.4)."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mllm3d.config import Settings
from mllm3d.training.recipe import Term
from photon.losses import BatchKind, Combination, band_loss, draw_batch_kind, entropy, flip_loss, loss_terms
from photon.modeling_photon import Flip, PhotonOutput
from photon.packing import Layout
from photon.perturbation import perturb
from photon.scheduling import SchedulingSettings
from photon.surrogate import SurrogateSettings


class BandSettings(Settings):
    """Soft retention band (Photon Eq. 18)."""

    low: float = Field(default=0.3, ge=0, le=1, description="r_min.")
    high: float = Field(default=0.8, ge=0, le=1, description="r_max.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the band's loss.")


class TokenScheduling(Settings):
    """Token scheduling (Photon Sec. 3.2) and when it begins."""

    layers: list[int | str] = Field(
        default=["n/4"], description="Decoder layers before tokens are dropped, each time: numbers, n/4, 3n/4, ..."
    )
    self_affinity: bool = Field(default=True, description="Weigh instruction tokens by Eq. 3-4, else all alike.")
    centrality_floor: float = Field(default=1e-6, gt=0, description="Eq. 4 divides by no less; 1 as published.")
    threshold: float | None = Field(default=None, ge=0, le=1, description="Fixed theta; no predictor.")
    selection: Literal["saliency", "random"] = Field(
        default="saliency", description="random: as many tokens as saliency would keep, but drawn (a control)."
    )
    upper_layers: Literal["own", "union"] = Field(
        default="own", description="Above the drop: each question's own tokens, or a volume's questions share theirs."
    )
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
        values["layers"] = tuple(values["layers"])
        return SchedulingSettings(surrogate=SurrogateSettings(**surrogate), **values)


class RobustnessSettings(Settings):
    """Robustness regularizer (Photon Eq. 19): some batches have spoilt volumes and should leave the model unsure."""

    probability: float = Field(default=0.15, ge=0, le=1, description="Of perturbing a batch. 0: never.")
    start: float = Field(default=0, ge=0, description="From when on: steps, or a share below 1.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the entropy's loss.")


class FlipSettings(Settings):
    """Flip regularizer (Photon Eq. 20): some batches have the inverted mask and should not be answered right."""

    probability: float = Field(default=0.05, ge=0, le=1, description="Of flipping an unperturbed batch. 0: never.")
    start: float = Field(default=9000, ge=0, description="From when on: steps, or a share below 1.")
    weight: float = Field(default=1.0, ge=0, description="Weight of the flip loss.")


class ObjectiveSettings(Settings):
    """Phase 2's losses besides the cross-entropy, and how they go together (Photon Eq. 21)."""

    objective: Combination = Field(
        default="replace",
        description="A flipped batch has only its own loss (replace, published) or that besides the others (add).",
    )
    band: BandSettings = Field(default=BandSettings(), description="Soft retention band.")
    robustness: RobustnessSettings = Field(default=RobustnessSettings(), description="Robustness regularizer.")
    flip: FlipSettings = Field(default=FlipSettings(), description="Flip regularizer.")


class Objective:
    """What becomes of one batch, drawn from torch's own random state on the CPU, which checkpoints keep."""

    def __init__(self, settings: ObjectiveSettings, predicts: bool, perturbing: bool, flipping: bool) -> None:
        """`predicts`: thresholds are learned, so the band holds them. `perturbing`, `flipping`: it is late enough."""
        self.settings, self.banded = settings, predicts
        self.kind = BatchKind()
        # Validation, which has no gradient, sees every batch as it is and leaves the random state alone.
        if torch.is_grad_enabled():
            probability = settings.robustness.probability if perturbing else 0.0
            self.kind = draw_batch_kind(probability, settings.flip.probability, flipping, torch.default_generator)

    @property
    def flip(self) -> Flip:
        """How the model's pass flips the mask."""
        return self.settings.objective if self.kind.flip else "none"

    @property
    def learns_scheduling(self) -> bool:
        """On perturbed and flipped batches the scheduler gets no gradient."""
        return self.kind.perturbation is None and self.flip != "replace"

    def volumes(self, patches: Tensor, counts: Sequence[int], channels: int) -> Tensor:
        """Patches `(N, X)` of all volumes, `counts` of each, spoilt if this batch is to be."""
        if self.kind.perturbation is None or not counts:
            return patches
        return perturb(patches, counts, self.kind.perturbation, torch.default_generator, channels=channels)

    def terms(self, output: PhotonOutput, layout: Layout) -> dict[str, Term]:
        """Losses of the batch.

        A row without a volume has nothing to spoil, and one without a volume or a question nothing to flip or to keep
        in a band: its cross-entropy counts.
        """
        s, named = self.settings, loss_terms(self.kind, self.settings.objective)
        seen, chosen = (rows[layout.label_rows] for rows in (layout.sees, layout.chooses))
        losses = output.token_losses
        assert losses is not None and output.logits is not None
        counted = losses if "ce" in named else torch.where(chosen if self.kind.flip else seen, 0, losses)
        terms = {"ce": Term(counted.sum(), "label_tokens")}
        if "robust" in named:
            spread = -entropy(output.logits)
            terms["robust"] = Term(s.robustness.weight * torch.where(seen, spread, 0).sum(), "label_tokens")
        if "flip" in named:
            flipped = losses if output.flipped_losses is None else output.flipped_losses
            terms["flip"] = Term(s.flip.weight * torch.where(chosen, flip_loss(flipped), 0).sum(), "label_tokens")
        if "band" in named and self.banded and output.mean_probability is not None:
            outside = band_loss(output.mean_probability, s.band.low, s.band.high).mean(1)
            chooses = layout.in_input_order(layout.chooses)
            terms["band"] = Term(s.band.weight * torch.where(chooses, outside, 0).sum(), "questions")
        return terms

"""`med3dvlm.contrastive`: image and text encoder learn which scan belongs to which report (Med3DVLM, stage 1)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer

from med3dvlm.building import read_clip
from med3dvlm.configuration_med3dclip import Med3DCLIPConfig
from med3dvlm.contrastive import ContrastiveSettings as LossSettings
from med3dvlm.contrastive import Loss, Start, contrastive_sum
from med3dvlm.modeling_med3dclip import Med3DCLIPModel
from med3dvlm.processing_med3dclip import Med3DCLIPProcessor
from med3dvlm.recipes.base import EncoderSpec, Med3DRecipe, counted_flops, encoder_flops
from mllm3d.config import Settings
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import Row
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import source_folder
from mllm3d.training.huggingface import without_reports
from mllm3d.training.recipe import Batch, Description, StepOutput, Term


class ContrastiveSettings(Settings):
    """Stage 1 (Med3DVLM Sec. 3.3): SigLIP, or CLIP as in Table 5."""

    encoder: EncoderSpec = Field(
        default="dcformer-small",
        description="dcformer-<variant>, vit3d or timm:<model>, or a mapping of name and settings.",
    )
    text_encoder: str = Field(
        default="medicalai/ClinicalBERT", description="A Hugging Face encoder: a folder or a hub name."
    )
    checkpoint: str | None = Field(default=None, description="A run of this stage to go on from; wins over encoders.")
    text_tokens: int = Field(default=512, gt=0, description="Longer reports lose their end.")
    projection_dim: int = Field(default=768, gt=0, description="Width of the common space.")
    loss: Loss = Field(default="siglip", description="siglip (Eq. 5), or clip.")
    start: Start = Field(
        default="published",
        description="Temperature and bias at first: 1/0.07, 0, or the SigLIP paper's 10, -10.",
    )
    symmetric: bool = Field(default=False, description="Average the logits with their transpose (published code).")
    chunk: int = Field(default=1024, gt=0, description="Pairs of another rank that logits are computed for at a time.")

    def of_loss(self) -> dict[str, Any]:
        """The model's `contrastive` settings."""
        return {name: getattr(self, name) for name in LossSettings.__dataclass_fields__}


class Contrastive(Med3DRecipe):
    """`med3dvlm.contrastive`."""

    Settings: ClassVar[type[Settings]] = ContrastiveSettings

    @property
    def settings(self) -> ContrastiveSettings:
        return self.config.model  # type: ignore[return-value]

    def check_rows(self, rows: Sequence[Row]) -> None:
        """A text for each scan, and each scan once: the second text of a scan would be a wrong negative."""
        super().check_rows(rows)
        seen: dict[Any, str] = {}
        for row in rows:
            if not (row.report or "").strip():
                raise UserError(f"row {row.id}: report: is missing; choose rows that have one with data.where")
            if row.study in seen:
                raise UserError(
                    f"row {row.id}: {row.study} is in row {seen[row.study]} already; give one row for each scan "
                    "(data.where)"
                )
            seen[row.study] = row.id

    def build(self, meta: bool = False) -> nn.Module:
        s = self.settings
        key = "model.text_encoder" if s.checkpoint is None else "model.checkpoint"
        with self.under(key):
            if meta:
                with torch.device("meta"):
                    return Med3DCLIPModel(self._planned())
            folder = source_folder(s.text_encoder if s.checkpoint is None else s.checkpoint, key)
            if s.checkpoint is None:
                _must_be_encoder(folder)
                with without_reports():
                    model = Med3DCLIPModel.from_text_encoder(folder, **self._changes())
            else:
                with without_reports():
                    model = read_clip(folder, contrastive=s.of_loss())
                self.must_read(model.vision_encoder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Med3DCLIPProcessor(tokenizer, self.encoder_spec(s.encoder)["size"], s.text_tokens)
        return model

    def _changes(self) -> dict[str, Any]:
        """What this run's model has besides its text encoder."""
        s = self.settings
        return {
            "encoder": self.encoder_spec(s.encoder),
            "projection_dim": s.projection_dim,
            "contrastive": s.of_loss(),
        }

    def _planned(self) -> Med3DCLIPConfig:
        """Configuration for planning; the text encoder need not be at hand, it is a DistilBERT then."""
        s = self.settings
        if s.checkpoint is not None:
            return Med3DCLIPConfig.from_pretrained(source_folder(s.checkpoint, "model.checkpoint"))
        text = None
        if Path(s.text_encoder).is_dir():
            text = AutoConfig.from_pretrained(source_folder(s.text_encoder, "model.text_encoder"))
        return Med3DCLIPConfig(text_config=text, **self._changes())

    def collate(self, items: list[GroupItem]) -> Batch:
        with self.naming(items):
            batch = self.processor([item.volumes[-1].array for item in items], [item.rows[0].report for item in items])
        return {**batch, "ids": [item.rows[0].id for item in items]}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"volumes": len(batch["volumes"])}

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        found = model(**{name: batch[name] for name in ("volumes", "input_ids", "attention_mask")})
        loss = contrastive_sum(
            found.image_embeds, found.text_embeds, found.t_prime, found.bias, LossSettings(**self.settings.of_loss())
        )
        with torch.no_grad():
            nearest = (found.image_embeds @ found.text_embeds.T).argmax(1)
            right = (nearest == torch.arange(len(nearest), device=nearest.device)).sum()
        # Among the texts of this rank's batch: the fewer there are, the easier.
        return StepOutput({self.settings.loss: Term(loss, "volumes")}, {"batch_recall": (right, float(len(nearest)))})

    def parts(self, model: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        assert isinstance(model, Med3DCLIPModel)
        towers = {"image encoder": model.vision_encoder, "text encoder": model.language_encoder}
        found = {name: list(tower.parameters()) for name, tower in towers.items()}
        known = {id(parameter) for parameters in found.values() for parameter in parameters}
        return {**found, "projections": [p for p in model.parameters() if id(p) not in known]}

    def describe(self) -> Description:
        model = self.build(meta=True)
        assert isinstance(model, Med3DCLIPModel)
        text = torch.zeros(1, self.settings.text_tokens, dtype=torch.long, device="meta")
        flops = encoder_flops(model.vision_encoder) + counted_flops(model.language_encoder, text)
        return Description(tokens_per_volume=model.vision_encoder.high_shape[0], flops_per_volume=3 * flops)


def _must_be_encoder(folder: str) -> None:
    """Raises ValueError for what is no model of the transformers library; whether it is an encoder shows later."""
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_MAPPING or isinstance(config, Med3DCLIPConfig):
        raise ValueError(f"{folder}: a checkpoint of {config.model_type!r}, which is no text encoder; name one")

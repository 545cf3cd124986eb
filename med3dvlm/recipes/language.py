"""`med3dvlm.projector` and `med3dvlm.finetune`: a language model learns to read volumes (Med3DVLM, stages 2 and 3)."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, Strict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from med3dvlm.building import med3dvlm_from, read_clip, read_model, read_processor
from med3dvlm.configuration_med3dclip import Med3DCLIPConfig
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.features import VolumeEncoder
from med3dvlm.lora import LoraSettings, add_lora
from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from med3dvlm.processing_med3dvlm import PromptStyle, VolumeTexts, with_choices
from med3dvlm.projectors import ProjectorSettings
from med3dvlm.recipes.base import EncoderSpec, Med3DRecipe, counted_flops, encoder_flops, encoder_identity
from med3dvlm.splicing import Splice
from mllm3d.config import Settings
from mllm3d.data.dataset import GroupItem
from mllm3d.data.prompts import target_text
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import source_folder
from mllm3d.training.huggingface import without_bars, without_reports
from mllm3d.training.recipe import Batch, Description, FrozenEncoder, StepOutput, Term

Part = Literal["encoder", "projector", "embeddings", "language_model", "lora"]
Parts = Annotated[tuple[Part, ...], Strict(False)]
PLANNED_TEXT = 256
"""Tokens of a row besides its image tokens, for planning: what 512 leave."""


class LanguageSettings(Settings):
    """What both stages have."""

    train: Parts = Field(default=("projector",), description="Parts that learn; all others are frozen.")
    max_length: int = Field(default=512, gt=0, description="Tokens of a row, image tokens included.")
    prompt_style: PromptStyle = Field(default="plain", description="plain, as published, or the chat template.")
    cache_features: bool = Field(
        default=True, description="Keep what a frozen encoder says of a volume on disk, so that it runs once."
    )


class ProjectorStage(LanguageSettings):
    """Stage 2 (Med3DVLM Sec. 3.4): the projector learns, between frozen models."""

    encoder: EncoderSpec = Field(
        description="A run of med3dvlm.contrastive; or an encoder's name or mapping, for one with random weights. "
        "--dry-run plans with the paper's encoder until the run is there."
    )
    language_model: str = Field(
        default="Qwen/Qwen2.5-7B-Instruct", description="Any causal language model: a folder or a hub name."
    )
    projector: str = Field(
        default="2xMLP-Mixer-H", description="2xMLP, 2xMLP-H, 1xMLP-Mixer-H or 2xMLP-Mixer-H (Tables 6-8)."
    )
    mixed_tokens: int = Field(default=256, gt=1, description="Image tokens that a mixer makes.")
    splice: Splice = Field(default="correct", description="published: one place off, as in the published weights.")


class LoraConfig(Settings):
    """Low-rank adapters (Med3DVLM Eq. 8)."""

    rank: int = Field(default=16, gt=0, description="r.")
    alpha: float = Field(default=32, gt=0, description="Updates are multiplied by alpha / r.")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Before the adapters.")
    targets: Annotated[tuple[str, ...], Strict(False)] = Field(
        default=LoraSettings().targets, description="Layers that get one, by the last part of their names."
    )


class FinetuneStage(LanguageSettings):
    """Stage 3 (Med3DVLM Sec. 3.4): projector and adapters learn."""

    checkpoint: str = Field(
        description="A run of med3dvlm.projector, or any Med3DVLM checkpoint. --dry-run plans with the paper's shapes "
        "until it is there."
    )
    train: Parts = Field(default=("projector", "lora"), description="Parts that learn; all others are frozen.")
    lora: LoraConfig | None = Field(default=LoraConfig(), description="None: no adapters.")


class LanguageRecipe(Med3DRecipe):
    """What both stages do."""

    _encoder: VolumeEncoder | None = None
    """As the model was built with it, where features are cached."""

    def batch_texts(self, item: GroupItem) -> list[tuple[str, str | None]]:
        """Question and answer of each row, in the published words."""
        return [(with_choices(row.question, row.options or ()), target_text(row)) for row in item.rows]

    def collate(self, items: list[GroupItem]) -> Batch:
        known = all(item.features for item in items)
        groups = [VolumeTexts(self.batch_texts(i), None if known else i.volumes[-1].array) for i in items]
        with self.naming(items):
            batch: dict[str, Any] = self.processor.batch(groups)
        if known:
            batch["features"] = tuple(
                torch.stack([item.features[-1][stream] for item in items]) for stream in ("low", "high")
            )
        return {**batch, "count": len(items), "ids": [row.id for item in items for row in item.rows]}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {
            "label_tokens": int((batch["labels"][:, 1:] != -100).sum()),
            "tokens": int(batch["attention_mask"].sum()),
            "questions": len(batch["labels"]),
            "volumes": batch["count"],
        }

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        names = ("input_ids", "attention_mask", "labels", "group_index", "volumes", "features")
        output = model(**{name: batch[name] for name in names if name in batch})
        right = (output.logits.argmax(-1) == output.targets).sum()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "token_accuracy": (right, float(len(output.targets)))
        }
        return StepOutput({"ce": Term(output.token_losses.sum(), "label_tokens")}, metrics)

    def describe(self) -> Description:
        model = self.build(meta=True)
        assert isinstance(model, Med3DVLMForConditionalGeneration)
        config = model.config
        questions = self.config.data.questions_per_volume
        shared, row = (
            counted_flops(model.language_model.base_model, torch.zeros(1, n, dtype=torch.long, device="meta"))
            for n in (config.image_tokens, config.image_tokens + PLANNED_TEXT)
        )
        shapes = [torch.empty(1, *shape, device="meta") for shape in (config.projector.low, config.projector.high)]
        # Questions share the image tokens. Gradients pass through frozen weights, which have none themselves.
        forward = shared + questions * (row - shared) + counted_flops(model.projector, *shapes)
        encoded = 0.0 if self.caches_features else encoder_flops(model.encoder)
        return Description(tokens_per_volume=config.image_tokens, flops_per_volume=2 * forward + encoded)

    @property
    def language_settings(self) -> LanguageSettings:
        return self.config.model  # type: ignore[return-value]

    @property
    def caches_features(self) -> bool:
        """Whether training reads features in place of volumes."""
        return self.language_settings.cache_features and "encoder" not in self.language_settings.train

    def frozen_encoder(self) -> FrozenEncoder | None:
        if not self.caches_features:
            return None
        if self._encoder is None:
            self.build()
        assert self._encoder is not None
        # The trainer moves it to its device; it is not wanted there longer than it takes.
        encoder, self._encoder = self._encoder, None
        return FrozenEncoder(encoder, encoder_identity(encoder), _as_tensors)

    def parts(self, model: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        assert isinstance(model, Med3DVLMForConditionalGeneration)
        return model.parts()

    def finish(self, model: Med3DVLMForConditionalGeneration) -> Med3DVLMForConditionalGeneration:
        """Freeze what does not learn, and keep the encoder's own copy for the features of volumes."""
        if "lora" in self.language_settings.train and model.config.lora is None:
            raise UserError(
                "model.train: lora: the model has no adapters; set model.lora (med3dvlm.finetune), or leave lora out"
            )
        try:
            model.set_trainable(*self.language_settings.train)
        except ValueError as error:
            raise UserError(f"model.train: {error}") from error
        if self.caches_features and not next(model.encoder.parameters()).is_meta:
            self._encoder = copy.deepcopy(model.encoder)
        return model


def _as_tensors(encoder: nn.Module, volume: Tensor) -> dict[str, Tensor]:
    """Features of one volume ``(D, H, W)``."""
    low, high = encoder(volume[None, None].to(next(encoder.parameters()).dtype))
    return {"low": low[0], "high": high[0]}


class ProjectorRecipe(LanguageRecipe):
    """`med3dvlm.projector`."""

    Settings: ClassVar[type[Settings]] = ProjectorStage

    @property
    def settings(self) -> ProjectorStage:
        return self.config.model  # type: ignore[return-value]

    def build(self, meta: bool = False) -> nn.Module:
        if meta:
            with torch.device("meta"):
                return self.finish(Med3DVLMForConditionalGeneration(self._planned()))
        s = self.settings
        encoder = self.trained_encoder()
        folder = source_folder(s.language_model, "model.language_model")
        with self.under("model"), without_reports():
            model, self.processor = med3dvlm_from(
                encoder, folder, folder, s.projector, s.mixed_tokens, s.splice,
                max_length=s.max_length, prompt_style=s.prompt_style,
            )  # fmt: skip
        return self.finish(model)

    def trained_encoder(self) -> VolumeEncoder:
        """The encoder of the settings with its weights."""
        source = self.settings.encoder
        if isinstance(source, dict) or not _is_run(source):
            return self.fresh_encoder(source)
        with self.under(f"model.encoder: {source}"), without_reports():
            found = read_clip(source_folder(source, "model.encoder")).vision_encoder
        self.must_read(found)
        return found

    def _planned(self) -> Med3DVLMConfig:
        """Configuration for planning; the language model need not be at hand."""
        s = self.settings
        spec = s.encoder
        if isinstance(spec, str) and _is_run(spec):
            trained = Med3DCLIPConfig()  # the paper's, until the run is there
            if Path(spec).is_dir():
                trained = Med3DCLIPConfig.from_pretrained(source_folder(spec, "model.encoder"))
            spec = dict(trained.encoder or {})
        with torch.device("meta"):
            encoder = self.fresh_encoder(spec)
        text: PreTrainedConfig | None = None  # Qwen2.5-7B
        if Path(s.language_model).is_dir():
            text = AutoConfig.from_pretrained(source_folder(s.language_model, "model.language_model"))
        with self.under("model"):
            settings = ProjectorSettings(s.projector, encoder.low_shape, encoder.high_shape, s.mixed_tokens)
        return Med3DVLMConfig(text_config=text, encoder_config=encoder.spec, projector_config=settings.to_dict())


class Finetune(LanguageRecipe):
    """`med3dvlm.finetune`."""

    Settings: ClassVar[type[Settings]] = FinetuneStage

    @property
    def settings(self) -> FinetuneStage:
        return self.config.model  # type: ignore[return-value]

    def build(self, meta: bool = False) -> nn.Module:
        s = self.settings
        if meta:
            with self.under(f"model.checkpoint: {s.checkpoint}"), torch.device("meta"):
                return self.finish(Med3DVLMForConditionalGeneration(self._planned()))
        folder = source_folder(s.checkpoint)
        with self.under(f"model.checkpoint: {s.checkpoint}"):
            with without_bars():
                model = read_model(folder)
            self.processor = read_processor(folder, model.config)
        self.must_read(model.encoder)
        self.processor.max_length, self.processor.prompt_style = s.max_length, s.prompt_style
        if s.lora is not None and model.config.lora is None:
            with self.under("model"):
                add_lora(model, LoraSettings(**s.lora.model_dump()))
        return self.finish(model)

    def _planned(self) -> Med3DVLMConfig:
        """Configuration for planning; the checkpoint need not be at hand."""
        s, config = self.settings, Med3DVLMConfig()
        if Path(s.checkpoint).is_dir():
            config = Med3DVLMConfig.from_pretrained(source_folder(s.checkpoint))
        config.lora = config.lora or (None if s.lora is None else s.lora.model_dump())
        return config


def _is_run(source: str) -> bool:
    """Whether an encoder's setting names a folder and not an encoder."""
    return Path(source).is_dir() or "/" in source.removeprefix("timm:")

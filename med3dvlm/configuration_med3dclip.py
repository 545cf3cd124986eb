"""Configuration of Med3DVLM's contrastive model: an image encoder, a text encoder, a common width, a loss."""

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from med3dvlm.contrastive import ContrastiveSettings

ENCODER = {"name": "dcformer-small", "size": [128, 256, 256], "channels": 1}
"""The paper's image encoder; `size` is (D, H, W)."""


class Med3DCLIPConfig(PreTrainedConfig):
    """What a :class:`med3dvlm.modeling_med3dclip.Med3DCLIPModel` is made of.

    Attributes:
        encoder: the image encoder, as :func:`med3dvlm.encoders.build_encoder` takes it.
        text_config: configuration of any encoder of the library whose first token stands for the text. The paper's,
            ClinicalBERT, is a DistilBERT.
        projection_dim: width of both features.
        contrastive: settings of :class:`med3dvlm.contrastive.ContrastiveSettings`.

    Raises:
        ValueError: an unknown setting, or a text encoder whose first token knows nothing of the text.
    """

    model_type = "med3dclip"
    sub_configs = {"text_config": AutoConfig}

    encoder: dict | None = None
    text_config: Any = None
    projection_dim: int = 768
    contrastive: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "distilbert", **(self.text_config or {})})
        self.encoder = dict(self.encoder or ENCODER)
        self.contrastive = dict(self.contrastive or {})
        super().__post_init__(**kwargs)
        _check_text(self.text_config)
        _ = self.contrastive_settings

    @property
    def contrastive_settings(self) -> ContrastiveSettings:
        """Typed view of ``contrastive``."""
        given = self.contrastive or {}
        known = [field.name for field in fields(ContrastiveSettings)]
        for name in given:
            if name not in known:
                raise ValueError(f"contrastive.{name}: no such setting; known are {', '.join(known)}")
        try:
            return ContrastiveSettings(**given)
        except ValueError as error:
            raise ValueError(f"contrastive.{error}") from error


def _check_text(config: PreTrainedConfig) -> None:
    """A decoder's first token sees itself alone: every text would have the same features."""
    kind = type(config)
    left_to_right = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    if left_to_right or config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise ValueError(
            f"text_config.model_type: {config.model_type!r} is no encoder, its first token knows nothing of the text; "
            "give a model like BERT"
        )

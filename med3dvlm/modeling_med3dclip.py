"""Med3DVLM's first stage: an image encoder and a text encoder with features in one space (Sec. 3.2).

Legend: B volumes and as many texts, C channels, D H W the volume, T tokens of the image, E their width, L tokens of a
text, P width of the features.

Modules and parameters have the published names: ``vision_encoder``, ``language_encoder``, ``mm_vision_proj``,
``mm_language_proj``, ``t_prime``, ``bias``. The last two have shape (1,) for the published (): DeepSpeed (0.19) cannot
broadcast a parameter without axes.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from med3dvlm.configuration_med3dclip import Med3DCLIPConfig
from med3dvlm.contrastive import STARTS
from med3dvlm.encoders import build_encoder


@dataclass
class Med3DCLIPOutput(ModelOutput):
    """What :func:`med3dvlm.contrastive.contrastive_sum` needs.

    Attributes:
        image_embeds, text_embeds: ``(B, P)``, normalised, in float32 or more.
        t_prime: scalar, the logarithm of the temperature. bias: scalar; None with the CLIP loss.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    t_prime: Tensor | None = None
    bias: Tensor | None = None


class Med3DCLIPModel(PreTrainedModel):
    """Image tower, text tower, a linear map behind each, and the loss's temperature and bias."""

    config_class = Med3DCLIPConfig
    config: Med3DCLIPConfig
    base_model_prefix = ""
    main_input_name = "volumes"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Med3DCLIPConfig) -> None:
        super().__init__(config)
        assert config.encoder is not None
        self.vision_encoder = build_encoder(config.encoder)
        config.encoder = self.vision_encoder.spec  # with every setting, so that no default can change a saved model
        self._is_without_memory = any(parameter.is_meta for parameter in self.vision_encoder.parameters())
        self.language_encoder = without_pooler(AutoModel.from_config(config.text_config))
        self.mm_vision_proj = nn.Linear(self.vision_encoder.high_shape[1], config.projection_dim)
        self.mm_language_proj = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.t_prime = nn.Parameter(torch.empty(1))
        has_bias = config.contrastive_settings.loss == "siglip"
        self.bias = nn.Parameter(torch.empty(1)) if has_bias else None
        self.post_init()

    @classmethod
    def from_text_encoder(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> "Med3DCLIPModel":
        """A model whose text tower is a pretrained one; the rest is fresh.

        Args:
            path: of a Hugging Face encoder (folder or hub name); its heads and pooler are left out.
            dtype: of the parameters.
            settings: of the configuration besides ``text_config``.

        Raises:
            ValueError: weights of the encoder are missing in it, or it is no encoder. OSError: it cannot be read.
        """
        config = Med3DCLIPConfig(text_config=AutoConfig.from_pretrained(path), **settings)
        model = cls._from_config(config, dtype=dtype)
        tower, report = AutoModel.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
        weights = without_pooler(tower).state_dict()
        missing = sorted(report["missing_keys"] & weights.keys())
        if missing:
            raise ValueError(f"{path}: weights of the encoder are missing ({', '.join(missing[:5])}); copy it again")
        model.language_encoder.load_state_dict(weights)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """The text tower draws its own weights, and the image encoder has drawn its own where it was built."""
        if module is self:
            t_prime, bias = STARTS[self.config.contrastive_settings.start]
            nn.init.constant_(self.t_prime, t_prime)
            if self.bias is not None:
                nn.init.constant_(self.bias, bias)
        elif module in (self.mm_vision_proj, self.mm_language_proj):
            module.reset_parameters()

    def initialize_weights(self) -> None:
        """Also called after loading, for what was not in the file.

        The library builds a model without memory and fills it from the file. What of the image encoder was not found
        there, and buffers that are in no file, then come from an encoder that is built again.
        """
        super().initialize_weights()
        mine = _tensors(self.vision_encoder)
        lost = [name for name, tensor in mine.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if self._is_without_memory and lost:
            assert self.config.encoder is not None
            fresh = _tensors(build_encoder(self.config.encoder))
            for name in lost:
                mine[name].data.copy_(fresh[name])

    def train(self, mode: bool = True) -> "Med3DCLIPModel":
        """A tower that is frozen as a whole stays in eval mode: its batch-norm statistics must not drift."""
        super().train(mode)
        for tower in (self.vision_encoder, self.language_encoder):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def encode_image(self, volumes: Tensor) -> Tensor:
        """``(B, C, D, H, W)`` in [0, 1] -> ``(B, P)``: the mean of the last stage's tokens, mapped and normalised.

        Raises:
            ValueError: the volumes are not of the size that the encoder is made for.
        """
        weight = self.mm_vision_proj.weight
        tokens = self.vision_encoder(volumes.to(weight.dtype)).high
        return unit(self.mm_vision_proj(tokens.mean(1).to(weight.dtype)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``(B, L)`` -> ``(B, P)``: the first token ([CLS]) of the text tower's last layer, mapped and normalised.

        Raises:
            ValueError: the texts are longer than the tower's positions.
        """
        longest = getattr(self.config.text_config, "max_position_embeddings", None)
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(f"input_ids: {input_ids.shape[1]} tokens for {longest} positions; truncate the texts")
        hidden = self.language_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return unit(self.mm_language_proj(hidden[:, 0]))

    def forward(self, volumes: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Med3DCLIPOutput:
        """Features of B volumes and of the texts that belong to them, and what else the loss needs.

        The loss itself is computed outside, over all ranks: :func:`med3dvlm.contrastive.contrastive_sum`.
        """
        return Med3DCLIPOutput(
            image_embeds=self.encode_image(volumes),
            text_embeds=self.encode_text(input_ids, attention_mask),
            # Copies: under ZeRO 3 the parameters themselves are gone after the forward pass.
            t_prime=self.t_prime.clone()[0],
            bias=None if self.bias is None else self.bias.clone()[0],
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def unit(features: Tensor) -> Tensor:
    """Features divided by their length, in float32 or more."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def without_pooler(tower: Any) -> Any:
    """The tower, without a head that nothing here reads, where it can do without (DistilBERT has none)."""
    if "add_pooling_layer" in inspect.signature(type(tower).__init__).parameters:
        tower.pooler = None
    return tower

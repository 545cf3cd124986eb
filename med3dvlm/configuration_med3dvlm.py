"""Configuration of Med3DVLM: an encoder of volumes, a projector and any causal language model."""

from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig

from med3dvlm.lora import LoraSettings
from med3dvlm.projectors import ProjectorSettings
from med3dvlm.splicing import Splice

QWEN_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
"""Shapes of Qwen2.5-7B-Instruct, the published base, for planning a run before its weights are at hand."""

ENCODER = {"name": "dcformer-small", "size": [128, 256, 256], "channels": 1}


class Med3DVLMConfig(PreTrainedConfig):
    """What a Med3DVLM model consists of; the defaults are the published model's.

    Attributes:
        text_config: of any model that ``AutoModelForCausalLM`` knows.
        encoder_config: what :func:`med3dvlm.encoders.build_encoder` takes; ``size`` is (depth, height, width).
        projector_config: fields of :class:`med3dvlm.projectors.ProjectorSettings`.
        image_token_id: id of ``<im_patch>``.
        splice: where image tokens go, see :mod:`med3dvlm.splicing`.
        lora: fields of :class:`med3dvlm.lora.LoraSettings`, or None where the language model has no adapters.

    Raises:
        ValueError: a field that cannot be, naming it.
    """

    model_type = "med3dvlm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: Any = None
    encoder_config: dict | None = None
    projector_config: dict | None = None
    image_token_id: int = 151665
    splice: Splice = "correct"
    lora: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "qwen2", **(self.text_config or QWEN_7B)})
        self.encoder_config = dict(self.encoder_config or ENCODER)
        self.projector_config = ProjectorSettings.from_dict(self.projector_config or {}).to_dict()
        if self.lora is not None:
            self.lora = LoraSettings.from_dict(self.lora).to_dict()
        if self.splice not in get_args(Splice):
            raise ValueError(f"splice: {self.splice!r} is not one of {', '.join(get_args(Splice))}")
        super().__post_init__(**kwargs)

    @property
    def projector(self) -> ProjectorSettings:
        """Typed view of ``projector_config``."""
        return ProjectorSettings.from_dict(self.projector_config or {})

    @property
    def lora_settings(self) -> LoraSettings | None:
        """Typed view of ``lora``."""
        return None if self.lora is None else LoraSettings.from_dict(self.lora)

    @property
    def image_tokens(self) -> int:
        """How many ``<im_patch>`` a prompt has."""
        return self.projector.tokens

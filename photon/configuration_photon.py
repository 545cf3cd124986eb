"""Configuration of Photon: a backbone's (Qwen2.5-VL or Qwen3-VL), a 3D patch embedding and token scheduling."""

from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig

from photon.geometry import PatchGeometry
from photon.packing import Geometry, SpecialTokens, TextAfter
from photon.scheduling import SchedulingSettings, layer_numbers

VISION_2_5 = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
ROPE_2_5 = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}

BACKBONES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": ROPE_2_5,
        },
        "vision_config": {**VISION_2_5, "out_hidden_size": 2048},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": ROPE_2_5,
        },
        "vision_config": {**VISION_2_5, "out_hidden_size": 3584},
    },
    "Qwen/Qwen3-VL-2B-Instruct": {
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
}
"""Shapes of the published backbones, for planning a run before its weights are at hand."""


TEXT_MODELS = ("qwen2_5_vl_text", "qwen3_vl_text")


class PhotonConfig(PreTrainedConfig):
    """A backbone's configuration and what Photon adds.

    ``text_config`` and ``vision_config`` are those of Qwen2.5-VL or of Qwen3-VL, told apart by their
    ``model_type``. The patch embedding's kernel is
    ``(vision_config.temporal_patch_size, *vision_config.patch_size)`` over ``vision_config.in_channels`` channels:
    (14, 14, 14) over 1 for Photon, the backbone's own (2, 14, 14) over 3 for Photon Max.

    Attributes:
        scheduling: settings of :class:`photon.scheduling.SchedulingSettings`; None keeps every token.
        slices_per_frame: slices averaged into one frame before patches are cut (slice-video models).
        temporal_step: rotary steps from one depth slab to the next. By default one slice counts as one second in
            Qwen2.5-VL (``tokens_per_second * temporal_patch_size * slices_per_frame``); Qwen3-VL counts slabs.
        text_after: where rotary positions go on behind a volume, see :class:`photon.packing.Geometry`.
        turn_end_token_id: id of ``<|im_end|>``, which ends the instruction.
        user_turn_token_ids: ids of ``<|im_start|>user``, which with a line break begin a user's turn.
    """

    model_type = "photon"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False
    scheduling: dict | None = None
    slices_per_frame: int = 1
    temporal_step: float | None = None
    text_after: str = "maximum"
    turn_end_token_id: int = 151645
    user_turn_token_ids: list[int] | tuple[int, ...] = (151644, 872)

    def __post_init__(self, **kwargs: Any) -> None:
        for name, default in (("text_config", "qwen2_5_vl_text"), ("vision_config", "qwen2_5_vl_vision")):
            given = getattr(self, name)
            if not isinstance(given, PreTrainedConfig):
                given = {"model_type": default, **(given or {})}
                setattr(self, name, AutoConfig.for_model(**given))
        super().__post_init__(**kwargs)
        # Files of older versions of the library say so in text_config.
        if not self.tie_word_embeddings and getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        found = self.text_config.model_type
        if found not in TEXT_MODELS:
            raise ValueError(f"text_config.model_type: {found!r} is not one of {', '.join(TEXT_MODELS)}")
        if self.text_after not in get_args(TextAfter):
            raise ValueError(f"text_after: {self.text_after!r} is not one of {', '.join(get_args(TextAfter))}")

    @property
    def patches(self) -> PatchGeometry:
        """How volumes are cut."""
        vision = self.vision_config
        plane, depth = vision.patch_size, vision.temporal_patch_size
        height, width = (plane, plane) if isinstance(plane, int) else plane
        size = (depth if isinstance(depth, int) else depth[0], height, width)
        return PatchGeometry(size, vision.in_channels, vision.spatial_merge_size, self.slices_per_frame)

    @property
    def scheduling_settings(self) -> SchedulingSettings | None:
        """Typed view of ``scheduling``."""
        return None if self.scheduling is None else SchedulingSettings.from_dict(self.scheduling)

    @property
    def scheduling_layers(self) -> tuple[int, ...]:
        """Decoder layers before tokens are dropped, once for each time; empty without scheduling."""
        settings = self.scheduling_settings
        return () if settings is None else layer_numbers(settings.layers, self.text_config.num_hidden_layers)

    @property
    def geometry(self) -> Geometry:
        """What rotary positions depend on."""
        step = self.temporal_step
        if step is None:
            per_second = getattr(self.vision_config, "tokens_per_second", None)
            step = 1 if per_second is None else per_second * self.patches.size[0] * self.slices_per_frame
        return Geometry(self.vision_config.spatial_merge_size, step, self.text_after)  # type: ignore[arg-type]

    @property
    def special_tokens(self) -> SpecialTokens:
        """Ids that mark the parts of a row."""
        return SpecialTokens(
            self.video_token_id, self.vision_end_token_id, self.turn_end_token_id, tuple(self.user_turn_token_ids)
        )

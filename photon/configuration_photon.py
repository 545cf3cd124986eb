"""Configuration of Photon: Qwen2.5-VL's, with a 3D patch embedding and token scheduling."""

from typing import Any

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

from photon.geometry import PatchGeometry
from photon.packing import Geometry, SpecialTokens
from photon.scheduling import SchedulingSettings

BACKBONES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "tie_word_embeddings": False,
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    },
}
"""Shapes of the published backbones, for planning a run before its weights are at hand."""


class PhotonConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration and what Photon adds.

    The patch embedding's kernel is ``(vision_config.temporal_patch_size, *vision_config.patch_size)`` over
    ``vision_config.in_channels`` channels: (14, 14, 14) over 1 for Photon, (2, 14, 14) over 3 for the backbone
    and Photon Max.

    Attributes:
        scheduling: settings of :class:`photon.scheduling.SchedulingSettings`; None keeps every token.
        slices_per_frame: slices averaged into one frame before patches are cut (slice-video models).
        temporal_step: rotary steps from one depth slab to the next; by default one slice counts as one second:
            ``tokens_per_second * temporal_patch_size * slices_per_frame``.
        turn_end_token_id: id of ``<|im_end|>``, which ends the instruction.
    """

    model_type = "photon"

    scheduling: dict | None = None
    slices_per_frame: int = 1
    temporal_step: float | None = None
    turn_end_token_id: int = 151645

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
    def scheduling_layer(self) -> int:
        """Decoder layers before tokens are dropped."""
        settings = self.scheduling_settings or SchedulingSettings()
        layer = max(1, self.text_config.num_hidden_layers // 4) if settings.layer is None else settings.layer
        if not 1 <= layer < self.text_config.num_hidden_layers:
            raise ValueError(f"scheduling.layer: {layer} is not in 1..{self.text_config.num_hidden_layers - 1}")
        return layer

    @property
    def geometry(self) -> Geometry:
        """What rotary positions depend on."""
        step = self.temporal_step
        if step is None:
            step = self.vision_config.tokens_per_second * self.patches.size[0] * self.slices_per_frame
        return Geometry(self.vision_config.spatial_merge_size, step)

    @property
    def special_tokens(self) -> SpecialTokens:
        """Ids that mark the parts of a row."""
        return SpecialTokens(self.video_token_id, self.vision_end_token_id, self.turn_end_token_id)

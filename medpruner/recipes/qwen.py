"""Volumes and questions as Qwen2.5-VL and Qwen3-VL read them: a volume is a video.

Legend: V volumes, Q questions, L length of the longest prompt, C channels, D H W slices, rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from medpruner.recipes.reader import Reader, Shown, Size3
from medpruner.recipes.slicewise import Slicewise
from mllm3d.config import VolumeConfig
from mllm3d.inference.generation import grid_boxes

PAD, START, END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"


class QwenReader(Reader):
    """Patches of the shown volumes are in the tower's order, grids in patches."""

    def __init__(self, config: Any, tokenizer: Any, settings: Slicewise, volume: VolumeConfig) -> None:
        super().__init__(config, tokenizer, settings, volume)
        vision = config.vision_config
        self.frames, self.patch, self.merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
        self.scale = self._scales(volume.mean, volume.std)

    @property
    def channels(self) -> int:
        return int(self.config.vision_config.in_channels)

    @property
    def visual_token(self) -> int:
        return int(self.config.video_token_id)

    def _tokens_fit(self) -> bool:
        return bool(self.tokenizer.convert_tokens_to_ids(PAD) == self.visual_token)

    @property
    def token_shape(self) -> Size3:
        """Voxels (D, H, W) that one language-model token stands for."""
        side = self.patch * self.merge
        return (self.frames * self.settings.slices_per_frame, side, side)

    def boxes(self, shape: Size3) -> np.ndarray:
        """Boxes may reach past the volume's end."""
        return grid_boxes(shape, self.token_shape)

    @property
    def hu_per_pixel(self) -> float:
        """Not there for volumes whose window is not in HU."""
        if self.volume.window_percentile is not None:
            raise ValueError("gamma_unit: hu: the model's volumes have a window by percentiles; give gamma in pixels")
        low, high = self.volume.window_hu
        return (high - low) / float(np.mean([1 / std for std in self.settings.pixel_std]))

    def tokens(self, grid: Size3) -> int:
        """Language-model tokens of a volume."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    # --- volumes ------------------------------------------------------------------------------------------

    def _cut(self, volume: Tensor) -> tuple[Tensor, Size3]:
        """Patches (p, C x frames x patch x patch) and their grid.

        The volume is padded behind its end with its minimum (air) up to whole tokens.
        """
        unit = self.token_shape
        t, h, w = (-(-have // u) for have, u in zip(volume.shape, unit, strict=True))
        pad = [n for have, u in zip(reversed(volume.shape), reversed(unit), strict=True) for n in (0, -have % u)]
        padded = F.pad(volume, pad, value=float(volume.min()))
        frames = rearrange(padded, "(t f) h w -> t f h w", f=self.settings.slices_per_frame).mean(1)
        patches = rearrange(
            torch.stack([frames * scale + offset for scale, offset in self.scale]),
            "c (t d) (gh mh h) (gw mw w) -> (t gh gw mh mw) (c d h w)",
            d=self.frames, h=self.patch, w=self.patch, mh=self.merge, mw=self.merge,
        )  # fmt: skip
        return patches, (t, h * self.merge, w * self.merge)

    # --- questions ----------------------------------------------------------------------------------------

    def _visual(self, shown: Shown, ids: Tensor) -> dict[str, Any]:
        """`pixel_values_videos` of the volumes, `video_grid_thw` (Q V, 3) for each row, and for Qwen2.5-VL
        `second_per_grid_ts`."""
        inputs: dict[str, Any] = {
            "pixel_values_videos": shown.pixels,
            "video_grid_thw": torch.tensor(shown.grids * len(ids)),
        }
        if not self._has_timestamps:
            inputs["second_per_grid_ts"] = [self.seconds_per_grid] * len(shown.grids) * len(ids)
        return inputs

    @property
    def _has_timestamps(self) -> bool:
        return bool(self.config.model_type == "qwen3_vl")

    @property
    def seconds_per_grid(self) -> float:
        """Time from one temporal patch to the next."""
        return self.settings.seconds_per_grid or float(self.token_shape[0])

    def _content(self, question: str, grids: Sequence[Size3]) -> str:
        return "".join(self._placeholder(grid) for grid in grids) + question

    def _placeholder(self, grid: Size3) -> str:
        """A volume's text: for Qwen3-VL each temporal patch with the mean time of its frames before it."""
        if not self._has_timestamps:
            return START + PAD + END
        seconds, middle = self.seconds_per_grid, (self.frames - 1) / 2 / self.frames
        return "".join(f"<{(t + middle) * seconds:.1f} seconds>{START}{PAD}{END}" for t in range(grid[0]))

    def _counts(self, grid: Size3) -> list[int]:
        tokens = self.tokens(grid)
        return [tokens // grid[0]] * grid[0] if self._has_timestamps else [tokens]

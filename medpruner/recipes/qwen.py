"""Volumes and questions as Qwen2.5-VL and Qwen3-VL read them: a volume is a video.

Legend: V volumes, Q questions, L length of the longest prompt, C channels, D H W slices, rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from medpruner.recipes.slicewise import FILE, Slicewise
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError

PAD, START, END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class Shown:
    """Volumes of one call: patches in the tower's order, one volume after the other, and grids in patches."""

    patches: Tensor
    grids: list[Size3]


class QwenReader:
    """One model's way from scans and questions to inputs of `generate`.

    Args:
        config: of the model. settings: `slicewise.json`. volume: how the model's volumes are prepared.
    """

    def __init__(self, config: Any, tokenizer: Any, settings: Slicewise, volume: VolumeConfig) -> None:
        self.config, self.tokenizer, self.settings = config, tokenizer, settings
        vision = config.vision_config
        self.frames, self.patch, self.merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
        if len(settings.pixel_mean) != vision.in_channels:
            raise UserError(
                f"{FILE}: pixel_mean: {len(settings.pixel_mean)} numbers for a model of {vision.in_channels} channels"
            )
        if tokenizer.convert_tokens_to_ids(PAD) != config.video_token_id:
            raise UserError("tokenizer.json: missing, or of another model than config.json; copy it again")
        if tokenizer.chat_template is None:
            raise UserError("tokenizer_config.json: no chat template, nor chat_template.jinja; copy them again")
        # Model units are (x - volume.mean) / volume.std of x in [0, 1], pixels (x - pixel_mean) / pixel_std.
        scales = list(zip(settings.pixel_mean, settings.pixel_std, strict=True))
        self.scale = [(volume.std / std, (volume.mean - mean) / std) for mean, std in scales]
        self.volume = volume

    @property
    def token_shape(self) -> Size3:
        """Voxels (D, H, W) that one language-model token stands for."""
        side = self.patch * self.merge
        return (self.frames * self.settings.slices_per_frame, side, side)

    @property
    def hu_per_pixel(self) -> float:
        """HU of a difference of 1 in normalised pixels, averaged over channels as the slice filter averages them.

        Raises `ValueError` for volumes whose window is not in HU.
        """
        if self.volume.window_percentile is not None:
            raise ValueError("gamma_unit: hu: the model's volumes have a window by percentiles; give gamma in pixels")
        low, high = self.volume.window_hu
        return (high - low) / float(np.mean([1 / std for std in self.settings.pixel_std]))

    def tokens(self, grid: Size3) -> int:
        """Language-model tokens of a volume."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    # --- volumes ------------------------------------------------------------------------------------------

    def show(self, volumes: Sequence[np.ndarray]) -> Shown:
        """(D, H, W) volumes in model units, cut."""
        cut = [self._cut(torch.as_tensor(volume)) for volume in volumes]
        return Shown(torch.cat([patches for patches, _ in cut]), [grid for _, grid in cut])

    def _cut(self, volume: Tensor) -> tuple[Tensor, Size3]:
        """Patches (p, C x frames x patch x patch) and their grid.

        The volume is padded behind its end with its minimum (air) up to whole tokens.
        """
        if not bool(volume.isfinite().all()):
            raise UserError("volume: voxels that are nan or infinite; correct the scan")
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

    def ask(self, shown: Shown, questions: Sequence[str]) -> dict[str, Any]:
        """Inputs of a row for each question, padded on the left; pixels are there once, grids for each row.

        Returns:
            `input_ids` and `attention_mask` (Q, L), `pixel_values_videos` of the volumes, `video_grid_thw` (Q V, 3)
            and for Qwen2.5-VL `second_per_grid_ts`.
        """
        rows = [self._row(question, shown.grids) for question in questions]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            "pixel_values_videos": shown.patches,
            "video_grid_thw": torch.tensor(shown.grids * len(rows)),
        }
        if not self._has_timestamps:
            inputs["second_per_grid_ts"] = [self.seconds_per_grid] * len(shown.grids) * len(rows)
        return inputs

    @property
    def _has_timestamps(self) -> bool:
        return bool(self.config.model_type == "qwen3_vl")

    @property
    def seconds_per_grid(self) -> float:
        """Time from one temporal patch to the next."""
        return self.settings.seconds_per_grid or float(self.token_shape[0])

    def _row(self, question: str, grids: Sequence[Size3]) -> list[int]:
        """Token ids of one prompt, with a placeholder for each visual token."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        if found := next((token for token in special if token in question), None):
            raise UserError(f"question: {found} in it; take it out, it marks turns and volumes")
        content = "".join(self._placeholder(grid) for grid in grids) + question
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        counts = iter([n for grid in grids for n in self._counts(grid)])
        return [x for i in ids for x in ([i] * next(counts) if i == self.config.video_token_id else [i])]

    def _placeholder(self, grid: Size3) -> str:
        """A volume's text: for Qwen3-VL each temporal patch with the mean time of its frames before it."""
        if not self._has_timestamps:
            return START + PAD + END
        seconds, middle = self.seconds_per_grid, (self.frames - 1) / 2 / self.frames
        return "".join(f"<{(t + middle) * seconds:.1f} seconds>{START}{PAD}{END}" for t in range(grid[0]))

    def _counts(self, grid: Size3) -> list[int]:
        """Visual tokens of each placeholder of a volume."""
        tokens = self.tokens(grid)
        return [tokens // grid[0]] * grid[0] if self._has_timestamps else [tokens]

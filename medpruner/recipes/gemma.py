"""Volumes and questions as Gemma 3 reads them: a slice is an image, with a label before it (MedGemma 1.5).

A CT's images show three windows of HU. A volume whose window is by percentiles (MR has no HU) is shown in grey, the
same in all three colours. The reader goes by the checkpoint's `preprocessing.json`: an MR scan that is asked about with
a checkpoint for CT is taken for one of HU.

Of each volume at most `medpruner.windows.SLICES` slices are shown; the others have no tokens.

Legend: S slices that are shown, y, x rows and columns of tokens, Q questions, L length of the longest prompt.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medpruner.recipes.reader import Reader, Shown, Size3
from medpruner.recipes.slicewise import FILE, Slicewise
from medpruner.windows import WINDOWS, ct_images, ct_message, shown_slices
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import PREPROCESSING

GREY = ((0.0, 1.0),) * 3
WHOLE_WINDOW = (min(low for low, _ in WINDOWS), max(high for _, high in WINDOWS))

ANOTHER = "Now another scan of the same patient, slice by slice, numbered from 1 again:\n\n"
"""Before each volume but the first; too long for a slice's label, so that the pruner sees that a volume begins."""


class GemmaReader(Reader):
    """Pixels of the shown volumes are images (S, 3, rows, columns), grids (S, y, x) in tokens."""

    def __init__(self, config: Any, tokenizer: Any, settings: Slicewise, volume: VolumeConfig) -> None:
        super().__init__(config, tokenizer, settings, volume)
        self.side = isqrt(config.mm_tokens_per_image)
        self.scale = self._scales(0.5, 0.5)  # from what `ct_images` gives
        if settings.slices_per_frame != 1 or settings.seconds_per_grid is not None:
            raise UserError(
                f"{FILE}: slices_per_frame and seconds_per_grid are for videos, and Gemma's slices are images; "
                "take them out"
            )
        low, high = volume.window_hu
        if volume.window_percentile is None and not low <= WHOLE_WINDOW[0] < WHOLE_WINDOW[1] <= high:
            least = "[{:g}, {:g}]".format(*WHOLE_WINDOW)
            raise UserError(
                f"{PREPROCESSING}: window_hu: [{low:g}, {high:g}] leaves out HU that Gemma's images show; "
                f'write "window_hu": {least} there (or a window_percentile for MR)'
            )

    @property
    def channels(self) -> int:
        return int(self.config.vision_config.num_channels)

    @property
    def visual_token(self) -> int:
        return int(self.config.image_token_id)

    @property
    def hu_per_pixel(self) -> float:
        """Not there: each colour has its own, and only for HU within its window."""
        raise ValueError("gamma_unit: hu: each colour of Gemma's images has another window; give gamma in pixels")

    @property
    def _marks(self) -> list[int]:
        """An image's tokens: its begin, the visual token, its end."""
        return [self.config.boi_token_id, self.visual_token, self.config.eoi_token_id]

    def _tokens_fit(self) -> bool:
        known = self.tokenizer.added_tokens_decoder
        return all(token in known and known[token].special for token in self._marks)

    def boxes(self, shape: Size3) -> np.ndarray:
        """A slice deep, for shown slices alone.

        In plane a box is the voxels that its token has any part of: where rows or columns are no multiple of the
        tokens', boxes side by side share a voxel.
        """
        slices = shown_slices(shape[0]).nonzero().numpy()
        edges = [np.hstack([slices, slices + 1]), *(_covers(voxels, self.side) for voxels in shape[1:])]
        where = np.indices([len(ends) for ends in edges]).reshape(3, -1)
        return np.stack([ends[index] for ends, index in zip(edges, where, strict=True)], axis=1)

    # --- volumes ------------------------------------------------------------------------------------------

    def _cut(self, volume: Tensor) -> tuple[Tensor, Size3]:
        """Images, stretched to the tower's square."""
        size = int(self.config.vision_config.image_size)
        unit = volume * self.volume.std + self.volume.mean
        if self.volume.window_percentile is not None:
            images = ct_images(unit, size=size, windows=GREY)
        else:
            low, high = self.volume.window_hu
            images = ct_images(low + unit * (high - low), size=size)
        factor, offset = torch.tensor(self.scale).T[..., None, None]
        return images.mul_(factor).add_(offset), (len(images), self.side, self.side)

    # --- questions ----------------------------------------------------------------------------------------

    def _visual(self, shown: Shown, ids: Tensor) -> dict[str, Any]:
        """`pixel_values` of the volumes, and `token_type_ids` (Q, L): 1 where tokens see each other both ways."""
        return {"pixel_values": shown.pixels, "token_type_ids": (ids == self.visual_token).long()}

    def _content(self, question: str, grids: Sequence[Size3]) -> str:
        """As `Gemma3Processor` expands images. Text, not parts: a chat template joins parts without a gap."""
        image = "\n\n{}{}{}\n\n".format(*self.tokenizer.convert_ids_to_tokens(self._marks))
        last = len(grids) - 1
        parts = [
            part
            for v, (count, _, _) in enumerate(grids)
            for part in ct_message(count, question.strip() if v == last else "", ANOTHER if v else "")
        ]
        return "".join(part.get("text", image) for part in parts)

    def _counts(self, grid: Size3) -> list[int]:
        return [self.side**2] * grid[0]


def _covers(voxels: int, tokens: int) -> np.ndarray:
    """(tokens, 2): first and end voxel that each of so many equal parts has any part of."""
    ends = np.arange(tokens + 1) * voxels
    return np.stack([ends[:-1] // tokens, -(-ends[1:] // tokens)], axis=1)

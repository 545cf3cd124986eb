"""What readers of scans and questions share, whichever model they are for.

Legend: V volumes, Q questions, L length of the longest prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medpruner.recipes.slicewise import FILE, Slicewise
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError

Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class Shown:
    """Volumes of one call: pixels as the tower takes them, one volume after the other, and the grid of each."""

    pixels: Tensor
    grids: list[Size3]


class Reader(ABC):
    """One model's way from scans and questions to inputs of `generate`.

    Args:
        config: of the model. settings: `slicewise.json`. volume: how the model's volumes are prepared.

    Raises:
        UserError: they do not belong together.
    """

    def __init__(self, config: Any, tokenizer: Any, settings: Slicewise, volume: VolumeConfig) -> None:
        self.config, self.tokenizer, self.settings, self.volume = config, tokenizer, settings, volume
        if len(settings.pixel_mean) != self.channels:
            raise UserError(
                f"{FILE}: pixel_mean: {len(settings.pixel_mean)} numbers for a model of {self.channels} channels"
            )
        if not self._tokens_fit():
            raise UserError("tokenizer.json: missing, or of another model than config.json; copy it again")
        if tokenizer.chat_template is None:
            raise UserError("tokenizer_config.json: no chat template, nor chat_template.jinja; copy them again")

    # --- what each model has of its own -------------------------------------------------------------------

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of the tower's pixels."""

    @property
    @abstractmethod
    def visual_token(self) -> int:
        """The id that stands for a visual token in prompts."""

    @property
    @abstractmethod
    def hu_per_pixel(self) -> float:
        """HU of a difference of 1 in normalised pixels, averaged over channels as the slice filter averages them.

        Raises `ValueError` where there is no such number.
        """

    @abstractmethod
    def boxes(self, shape: Size3) -> np.ndarray:
        """Half-open voxel boxes (tokens, 3, 2) of a volume's language-model tokens, in their order."""

    @abstractmethod
    def _tokens_fit(self) -> bool:
        """Whether the tokenizer has the model's placeholders."""

    @abstractmethod
    def _cut(self, volume: Tensor) -> tuple[Tensor, Size3]:
        """Pixels of a (D, H, W) volume in model units, and their grid."""

    @abstractmethod
    def _content(self, question: str, grids: Sequence[Size3]) -> str:
        """The user's turn, with one placeholder for consecutive visual tokens."""

    @abstractmethod
    def _counts(self, grid: Size3) -> list[int]:
        """Visual tokens of each placeholder of a volume."""

    @abstractmethod
    def _visual(self, shown: Shown, ids: Tensor) -> dict[str, Any]:
        """What `generate` takes besides the prompts (Q, L) and their mask."""

    # --- volumes and questions ----------------------------------------------------------------------------

    def _scales(self, mean: float, std: float) -> list[tuple[float, float]]:
        """By channel: factor and offset from (x - mean) / std, with x in [0, 1], to the model's pixels."""
        pairs = zip(self.settings.pixel_mean, self.settings.pixel_std, strict=True)
        return [(std / of_pixels, (mean - middle) / of_pixels) for middle, of_pixels in pairs]

    def show(self, volumes: Sequence[np.ndarray]) -> Shown:
        """(D, H, W) volumes in model units, cut."""
        tensors = [torch.as_tensor(volume) for volume in volumes]
        shapes = [tuple(volume.shape) for volume in tensors]
        if not shapes or any(len(shape) != 3 or 0 in shape for shape in shapes):
            raise UserError(f"volumes: of shapes {shapes}; a slice-wise model is asked about one (D, H, W) or several")
        if not all(bool(volume.isfinite().all()) for volume in tensors):
            raise UserError("volume: voxels that are nan or infinite; correct the scan")
        cut = [self._cut(volume) for volume in tensors]
        return Shown(torch.cat([pixels for pixels, _ in cut]), [grid for _, grid in cut])

    def ask(self, shown: Shown, questions: Sequence[str]) -> dict[str, Any]:
        """Inputs of a row for each question, padded on the left; pixels are there once.

        Returns:
            `input_ids` and `attention_mask` (Q, L), and what else the model takes.
        """
        rows = [self._row(question, shown.grids) for question in questions]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, **self._visual(shown, ids)}

    def _row(self, question: str, grids: Sequence[Size3]) -> list[int]:
        """Token ids of one prompt, with a placeholder for each visual token."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        if found := next((token for token in special if token in question), None):
            raise UserError(f"question: {found} in it; take it out, it marks turns and volumes")
        chat = [{"role": "user", "content": self._content(question, grids)}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        counts = iter([n for grid in grids for n in self._counts(grid)])
        return [x for i in ids for x in ([i] * next(counts) if i == self.visual_token else [i])]

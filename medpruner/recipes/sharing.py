"""One encoding for all questions about the same volumes.

Legend: Q questions (rows of a batch), V volumes of each row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medpruner.backbones.base import Backbone, Encoded, Inputs
from medpruner.slices import Volume
from medpruner.towers import Reading

Memory = dict[tuple[Any, ...], Encoded]
"""What the tower said, by the slices that it was shown and the blocks that were read."""


class SharedTower:
    """A backbone whose rows all show the same volumes; pixels are given for the first row alone.

    Args:
        backbone: the model's own. rows: Q. memory: of other calls about the same volumes.
        text_after: see `medpruner.recipes.slicewise.Slicewise`.
    """

    def __init__(self, backbone: Backbone, rows: int, memory: Memory, text_after: str = "plane") -> None:
        self._backbone, self._rows, self._memory = backbone, rows, memory
        self._after_maximum = text_after == "maximum"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def volumes(self, inputs: Inputs, label_tokens: int) -> list[Volume]:
        """Of all rows, each of which shows what the first row's pixels are."""
        found: list[Volume] = []
        for row, ids in enumerate(inputs["input_ids"]):
            alone = self._backbone.volumes({**self._of_one_row(inputs), "input_ids": ids[None]}, label_tokens)
            found += [[replace(item, row=row) for item in volume] for volume in alone]
        return found

    def _of_one_row(self, inputs: Inputs) -> Inputs:
        """Pixels are there once anyway, grids for each row."""
        grids = {k: v[: len(v) // self._rows] for k, v in inputs.items() if k.endswith("_grid_thw")}
        return {**inputs, **grids}

    def pixels(self, inputs: Inputs, volumes: Sequence[Volume]) -> list[Tensor]:
        """Of all rows, from those of the first."""
        return self._backbone.pixels(inputs, volumes[: len(volumes) // self._rows]) * self._rows

    def encode(self, inputs: Inputs, wanted: Sequence[Tensor], blocks: Sequence[int]) -> Encoded:
        """The first row's slices through the tower, or from memory, and the same again for each other row."""
        first = wanted[: len(wanted) // self._rows]
        key = (*(tuple(flags.tolist()) for flags in first), tuple(blocks))
        if key not in self._memory:
            self._memory[key] = self._backbone.encode(self._of_one_row(inputs), first, blocks)
            return self._repeated(self._memory[key])
        return replace(self._repeated(self._memory[key]), reading_seconds=0.0)

    def _repeated(self, encoded: Encoded) -> Encoded:
        return Encoded(
            self._times(encoded.features),
            [self._times(x) for x in encoded.deep],
            self._times(encoded.patches),
            [self._times(x) for x in encoded.deep_patches],
            {b: Reading(self._times(r.received), self._times(r.keys)) for b, r in encoded.readings.items()},
            encoded.reading_seconds,
        )

    def _times(self, x: Tensor) -> Tensor:
        return x if self._rows == 1 else x.repeat(self._rows, *[1] * (x.ndim - 1))

    def positions(self, inputs: Inputs) -> Tensor:
        """The library's, or with the text behind each volume moved past all of the volume's own positions."""
        positions = self._backbone.positions(inputs)
        if not self._after_maximum:
            return positions
        moved = positions.clone()
        for volume in self.volumes(inputs, 0):
            row, start, end = volume[0].row, volume[0].start, volume[-1].end
            extent = positions[:, row, start:end].amax(1) - positions[:, row, start] + 1
            moved[:, row, end:] += torch.clamp(extent.max() - extent[1:].max(), min=0)
        return moved

"""What every image encoder of this package takes and gives, and how it is frozen.

Legend: B batch, C channels, D H W voxels, T tokens, E width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

Size3 = tuple[int, int, int]
"""Depth, height, width."""


class Features(NamedTuple):
    """What an encoder says of volumes, finer tokens and coarser ones; the same twice where it has one output.

    Attributes:
        low: ``(B, T_low, E_low)``. high: ``(B, T_high, E_high)``. Tokens in (depth, height, width) order.
    """

    low: Tensor
    high: Tensor


class VolumeEncoder(nn.Module, ABC):
    """Base of the encoders.

    Attributes:
        size: voxels (depth, height, width) of the volumes that it is made for. channels: of a volume.
        spec: what ``build_encoder`` makes the same encoder from, for a model's configuration: every setting, nothing
            about where weights came from.
        low_shape, high_shape: tokens and width of the two outputs.
        frozen: it neither learns nor leaves eval mode, see :meth:`freeze`.
    """

    low_shape: tuple[int, int]
    high_shape: tuple[int, int]

    def __init__(self, size: Sequence[int], channels: int, spec: dict[str, Any]) -> None:
        super().__init__()
        if len(size) != 3 or min(size) < 1 or channels < 1:
            raise ValueError(
                f"size: {list(size)} with {channels} channel(s); give voxels (depth, height, width), 1 or more"
            )
        depth, height, width = size
        self.size: Size3 = (depth, height, width)
        self.channels = channels
        self.spec = spec
        self.frozen = False

    def forward(self, volume: Tensor) -> Features:
        """``(B, C, D, H, W)`` in [0, 1] -> :class:`Features`.

        Raises:
            ValueError: the volume has another size than the encoder is made for.
        """
        if tuple(volume.shape[1:]) != (self.channels, *self.size):
            raise ValueError(
                f"volume: {_times(volume.shape)}, but the encoder is made for batches of {self.channels} x "
                f"{_times(self.size)} (channels, depth, height, width): resize the volume or change the encoder's size"
            )
        return self.encode(volume)

    @abstractmethod
    def encode(self, volume: Tensor) -> Features:
        """As :meth:`forward`, for a volume of the right size."""

    def freeze(self) -> Self:
        """No gradients, and eval mode from now on, also when a model that this is part of calls ``train()``.

        Statistics of batch norm would drift otherwise, and what was cached of a volume would no longer be true.
        """
        self.frozen = True
        self.requires_grad_(False)
        return self.train(False)

    def unfreeze(self) -> Self:
        """Learn again; ``train()`` decides about the mode again."""
        self.frozen = False
        return self.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)


def _times(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))

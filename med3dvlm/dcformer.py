"""DCFormer, an encoder of decomposed 3D convolutions (Med3DVLM Sec. 3.2.1).

Legend: B batch, C channels, D H W voxels or positions, T tokens, E width.

A stem divides each axis by four; each of four stages pools by two, widens, and runs blocks of a depthwise decomposed
convolution and a pointwise MLP. The last two stages are the outputs: for 128 x 256 x 256 voxels 256 and 32 tokens.

Two ways through the same parameters: the plain one is built of ``Conv3d`` and ``BatchNorm3d`` on ``(B, C, H, W, D)``,
as published, and is the reference; the fast one keeps channels last on ``(B, D, H, W, C)``, which is also the order of
the tokens. ``decomposed`` and ``stem`` say what it does. Hooks on convolutions and batch norms run in the plain one
only.

Parameter names are those of the published checkpoints (``encoder.s0.0.0.c1.0.weight``, ...).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from med3dvlm.decomposed import FORMS, DecomposedConv3d, wants_gradient
from med3dvlm.features import Features, Size3, VolumeEncoder
from med3dvlm.stem import POOL, Stem, max_pool


@dataclass(frozen=True)
class Variant:
    """Layers and widths of the stem and the four stages."""

    layers: tuple[int, int, int, int, int]
    widths: tuple[int, int, int, int, int]


VARIANTS = {
    "nano": Variant((1, 1, 1, 1, 1), (32, 32, 64, 128, 256)),
    "naive": Variant((1, 2, 2, 2, 2), (32, 64, 128, 256, 512)),
    "tiny": Variant((1, 2, 3, 3, 2), (64, 96, 192, 384, 768)),
    "small": Variant((1, 2, 3, 6, 2), (64, 96, 192, 384, 768)),
    "base": Variant((1, 2, 6, 6, 2), (64, 128, 256, 512, 1024)),
    "large": Variant((1, 2, 6, 12, 2), (64, 256, 512, 1024, 2048)),
}
SIZE: Size3 = (128, 256, 256)
KERNELS = (13, 11, 9, 7)
"""Of the stages' depthwise convolutions."""
LAYER_SCALE = 1e-6

CACHED_NUMBERS = 2**19
"""Numbers of an MLP's hidden layer that a CPU core's cache keeps."""


class Mlp(nn.Module):
    """Two linear maps with a GELU between them, four times as wide; the numbers 0 and 3 are the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width))

    @property
    def parts(self) -> tuple[nn.Linear, nn.Linear]:
        first, _, _, second = self.mlp
        return first, second  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Block(nn.Module):
    """One layer of a stage; the first one of a stage pools and widens before it."""

    def __init__(
        self, width_in: int, width: int, kernel: int, downsample: bool, residual: bool, layer_scale: float
    ) -> None:
        super().__init__()
        self.downsample = downsample
        if downsample:
            self.pool = nn.MaxPool3d(*POOL)
            self.proj = nn.Conv3d(width_in, width, 1, bias=False)
        self.dwconv = DecomposedConv3d(width, width, kernel, depthwise=True, residual=residual)
        self.mlp = Mlp(width)
        self.scale = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """The reference: ``(B, C, H, W, D) -> (B, E, H, W, D)``, half as long axes where it pools."""
        if self.downsample:
            x = self.proj(self.pool(x))
        y = self.mlp(self.dwconv(x).permute(0, 2, 3, 4, 1))
        return x + (self.scale * y).permute(0, 4, 1, 2, 3)

    def channels_last(self, x: Tensor, pooled: bool = False) -> Tensor:
        """``(B, D, H, W, C) -> (B, D, H, W, E)``; ``pooled``: the pooling has been done."""
        if self.downsample:
            x = F.linear(x if pooled else max_pool(x), self.proj.weight.flatten(1))
        y = self.dwconv.channels_last(x)
        if wants_gradient(self, x) or torch.is_autocast_enabled(x.device.type):
            return x + self.scale * self.mlp(y)
        return self._add_mlp(x, y)

    def _add_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + scale * mlp(y)`` without gradients, a piece at a time so that the hidden layer stays in the cache."""
        first, second = self.mlp.parts
        weight, bias = (second.weight * self.scale[:, None]).T, second.bias * self.scale
        flat, rest = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        rows = len(flat) if x.is_cuda else max(CACHED_NUMBERS // first.out_features, 1)
        pieces = [
            torch.addmm(some, F.gelu(F.linear(part, first.weight, first.bias)), weight).add_(bias)
            for part, some in zip(flat.split(rows), rest.split(rows), strict=True)
        ]
        return torch.cat(pieces).view(x.shape)


class DCFormer(VolumeEncoder):
    """The encoder: ``(B, C, D, H, W)`` in [0, 1] -> tokens of the last two stages.

    Args:
        size: voxels (depth, height, width). layers, widths: as in :class:`Variant`; the stem is one layer.
        kernels: of the four stages.
        residual: Eq. 4's ``X +`` in the depthwise convolutions; the published code and its checkpoints have none.
        layer_scale: by what each block's output is multiplied at first; it learns. Short trainings want more.
        form: ``auto`` picks the fastest way for the device at hand, ``plain`` is the reference; the others of
            ``decomposed.FORMS`` fix the form of the depthwise convolutions. None changes the result.

    Raises:
        ValueError: settings of the wrong length, an unknown form.
    """

    def __init__(
        self,
        size: Sequence[int] = SIZE,
        channels: int = 1,
        layers: Sequence[int] = VARIANTS["small"].layers,
        widths: Sequence[int] = VARIANTS["small"].widths,
        kernels: Sequence[int] = KERNELS,
        residual: bool = False,
        layer_scale: float = LAYER_SCALE,
        form: str = "auto",
        name: str = "dcformer-small",
    ) -> None:
        shape: dict[str, Any] = {"layers": list(layers), "widths": list(widths), "kernels": list(kernels)}
        spec = {"name": name, "size": list(size), "channels": channels, **shape, "residual": residual}
        spec |= {"layer_scale": layer_scale, "form": form}
        super().__init__(size, channels, spec)
        if len(layers) != 5 or len(widths) != 5 or len(kernels) != 4 or layers[0] != 1 or min(layers) < 1:
            raise ValueError(
                f"layers, widths, kernels: {shape}; give 5 layers (the stem's 1 and the stages'), 5 widths, 4 kernels"
            )
        stages: dict[str, nn.Module] = {"s0": nn.Sequential(Stem(channels, widths[0]))}
        for i, kernel in enumerate(kernels, start=1):
            width_in, width = widths[i - 1], widths[i]
            stages[f"s{i}"] = nn.Sequential(
                *(
                    Block(width if j else width_in, width, kernel, j == 0, residual, layer_scale)
                    for j in range(layers[i])
                )
            )
        self.encoder = nn.ModuleDict(stages)
        self.low_shape, self.high_shape = ((_positions(self.grid(i)), widths[i]) for i in (3, 4))
        self.form = "auto"
        self.set_form(form)

    def grid(self, stage: int) -> Size3:
        """Positions (depth, height, width) behind a stage; 0 is the stem."""
        depth, height, width = (-(-n // (4 * 2**stage)) for n in self.size)
        return depth, height, width

    def set_form(self, form: str) -> None:
        """Change the way of computing, see ``form`` above."""
        if form not in FORMS:
            raise ValueError(f"form: {form!r} is none of {', '.join(FORMS)}")
        self.form = form
        for module in self.modules():
            if isinstance(module, DecomposedConv3d):
                module.form = form if module.depthwise else "auto"

    def encode(self, volume: Tensor) -> Features:
        """Tokens of stage 3 and of stage 4."""
        volume = volume.to(self.encoder["s1"][0].scale.dtype)  # type: ignore[index]
        low, high = self._plain(volume) if self.form == "plain" else self._channels_last(volume)
        return Features(low, high)

    def stages(self, volume: Tensor) -> list[Tensor]:
        """Outputs of stem and stages by the plain way, ``(B, C, H, W, D)`` as published."""
        x, outputs = volume.permute(0, 1, 3, 4, 2), []
        for stage in self.encoder.values():
            x = stage(x)
            outputs.append(x)
        return outputs

    def _plain(self, volume: Tensor) -> list[Tensor]:
        return [rearrange(x, "b c h w d -> b (d h w) c") for x in self.stages(volume)[-2:]]

    def _channels_last(self, volume: Tensor) -> list[Tensor]:
        stem: Any = self.encoder["s0"][0]  # type: ignore[index]
        x, outputs = stem.pooled(volume), []
        for i in range(1, 5):
            blocks: Any = self.encoder[f"s{i}"]
            for j, block in enumerate(blocks):
                x = block.channels_last(x, pooled=i == 1 and j == 0)
            outputs.append(x.flatten(1, 3))
        return outputs[-2:]


def _positions(grid: Size3) -> int:
    return grid[0] * grid[1] * grid[2]

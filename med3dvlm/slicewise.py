"""A 2D image backbone of timm as an encoder of volumes: slice by slice, then averaged over depth ("2.5D").

Legend: B batch, C channels, D H W voxels, d h w tokens along each axis, E width.

timm is imported here alone, and only when such an encoder is built.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dvlm.features import Features, Size3, VolumeEncoder

PREFIX = "timm:"
SIZE: Size3 = (32, 256, 256)
DEPTH = 4
"""Tokens along depth by default: with a backbone of stride 32, 256 tokens of 256 x 256 voxels."""


class SliceEncoder(VolumeEncoder):
    """``timm:<model>``: the backbone's last feature map of every slice, averaged to a grid of tokens.

    Both outputs are the same. Voxels are scaled by the backbone's own mean and deviation.

    Args:
        name: ``timm:`` and a model's name. size: voxels (depth, height, width).
        grid: tokens (depth, height, width); by default four along depth and in the plane what the backbone gives.
        pretrained: load the weights that timm names; they are no part of ``spec``.
        options: further arguments of ``timm.create_model``, for example ``img_size`` of a vision transformer.

    Raises:
        ValueError: timm is not there, has no such model, or the model does not take slices of this size.
    """

    def __init__(
        self,
        name: str,
        size: Sequence[int] = SIZE,
        channels: int = 1,
        grid: Sequence[int] | None = None,
        pretrained: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        spec = {"name": name, "size": list(size), "channels": channels, "options": dict(options or {})}
        super().__init__(size, channels, spec)
        self.backbone = _create(name, channels, pretrained, dict(options or {}))
        config = getattr(self.backbone, "pretrained_cfg", None) or {}
        mean, deviation = config.get("mean") or (0.0,), config.get("std") or (1.0,)
        self.mean, self.deviation = sum(mean) / len(mean), sum(deviation) / len(deviation)
        natural = self._probe(name)
        depth, height, width = grid or (min(DEPTH, self.size[0]), *natural[1:])
        self.grid: Size3 = (depth, height, width)
        self.spec["grid"] = list(self.grid)
        self.low_shape = self.high_shape = (depth * height * width, natural[0])

    def encode(self, volume: Tensor) -> Features:
        """Averages over the slices and positions of each cell of the grid, twice the same."""
        slices = volume.to(next(self.backbone.parameters()).dtype).movedim(1, 2).flatten(0, 1)
        maps = self._maps((slices - self.mean) / self.deviation)
        maps = maps.unflatten(0, (len(volume), -1)).movedim(1, 2)  # (B, E, D, h, w)
        tokens = F.adaptive_avg_pool3d(maps, self.grid).flatten(2).transpose(1, 2)
        return Features(tokens, tokens)

    def _maps(self, slices: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, E, h, w)`` from whichever of timm's three layouts the backbone has."""
        backbone: Any = self.backbone
        features = backbone.forward_features(slices)
        if features.ndim == 3:  # (N, prefix tokens and h * w, E)
            tokens = features[:, getattr(backbone, "num_prefix_tokens", 0) :].transpose(1, 2)
            height = _rows(tokens.shape[-1], *self.size[1:])
            return tokens.unflatten(-1, (height, -1))
        if features.shape[1] != backbone.num_features and features.shape[-1] == backbone.num_features:
            return features.permute(0, 3, 1, 2)
        return features

    def _probe(self, name: str) -> tuple[int, int, int]:
        """Width, height and width of one slice's feature map."""
        mode, parameter = self.backbone.training, next(self.backbone.parameters())
        self.backbone.eval()
        try:
            with torch.no_grad():
                maps = self._maps(parameter.new_zeros(1, self.channels, *self.size[1:]))
        except (AssertionError, RuntimeError, ValueError) as error:
            height, width = self.size[1:]
            raise ValueError(
                f"encoder: {name} does not take slices of {height} x {width} ({error}); change size, or set options "
                "such as img_size"
            ) from error
        self.backbone.train(mode)
        return maps.shape[1], maps.shape[2], maps.shape[3]


def _rows(tokens: int, height: int, width: int) -> int:
    """Tokens along height, if they are laid out as the slice is."""
    rows = round((tokens * height / width) ** 0.5)
    if rows < 1 or tokens % rows:
        raise ValueError(f"{tokens} tokens are no grid of a slice of {height} x {width}")
    return rows


def _create(name: str, channels: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    model = name.removeprefix(PREFIX)
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"encoder: {name} needs timm, which cannot be imported ({reason}): pip install timm"
        ) from error
    if ":" not in model and not timm.is_model(model.partition(".")[0]):  # hf-hub:... and the like are no list of names
        near = difflib.get_close_matches(model, timm.list_models(), 1)
        hint = f", the nearest name is {near[0]}" if near else ""
        raise ValueError(f"encoder: timm has no model {model!r}{hint}")
    return timm.create_model(model, pretrained=pretrained, in_chans=channels, num_classes=0, **options)

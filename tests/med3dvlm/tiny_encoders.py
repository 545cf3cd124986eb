"""Small encoders whose every parameter and statistic matters."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from med3dvlm.dcformer import DCFormer

M = TypeVar("M", bound=nn.Module)
SIZE = (14, 36, 28)
"""4 x 9 x 7 positions behind the stem, so no axis is like another and halves are rounded."""


def randomised(module: M, seed: int = 0) -> M:
    """Statistics, layer scales, biases and gains that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + noise(buffer).square())
        for name, parameter in module.named_parameters():
            if name.endswith("scale"):
                parameter.copy_(0.5 * noise(parameter))
            elif parameter.ndim == 1:
                parameter.add_(0.3 * noise(parameter))
    return module


def tiny_dcformer(**changes: Any) -> DCFormer:
    torch.manual_seed(0)
    given = {"size": SIZE, "layers": (1, 2, 1, 1, 2), "widths": (6, 8, 10, 12, 14), **changes}
    return randomised(DCFormer(**given))


def volume(batch: int = 2, size: tuple[int, int, int] = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

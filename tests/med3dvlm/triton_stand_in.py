"""As much of triton as the fused kernel uses, on tensors of a CPU: its arithmetic can be tested where triton is not.

Where triton is installed, TRITON_INTERPRET=1 runs the kernel itself (``test_med3dvlm_decomposed``).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_place = [0, 0]


class Pointer:
    """An address in a tensor's memory, or many of them."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def _checked(self, mask: Tensor) -> Tensor:
        """Addresses; those that are masked may be anything, the others must be in the tensor."""
        addresses = self.offset.expand(mask.shape)
        assert bool(((addresses >= 0) & (addresses < self.memory.numel()))[mask].all()), "outside the tensor"
        return torch.where(mask, addresses, 0)

    def load(self, mask: Tensor, other: float) -> Tensor:
        shape = torch.broadcast_shapes(mask.shape, self.offset.shape)
        addresses = self._checked(mask.expand(shape))
        return torch.where(mask, self.memory[addresses], other)

    def store(self, value: Tensor, mask: Tensor) -> None:
        self.memory[self._checked(mask)[mask]] = value[mask]


class Kernel:
    """What ``triton.jit`` makes of a function: callable from others, and started on a grid."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def start(*args: Any, **settings: Any) -> None:
            given = [Pointer(a.view(-1)) if isinstance(a, Tensor) else a for a in args]
            for _place[0], _place[1] in product(range(grid[0]), range(grid[1])):
                self.function(*given, **settings)

        return start


@contextmanager
def stand_in() -> Iterator[None]:
    """``import triton`` gives the stand-in."""
    language = ModuleType("triton.language")
    vars(language).update(
        constexpr=int, float32=torch.float32, int64=torch.int64, static_range=range, arange=torch.arange,
        program_id=lambda axis: _place[axis],
        load=lambda pointer, mask, other: pointer.load(mask, other),
        store=lambda pointer, value, mask: pointer.store(value, mask),
    )  # fmt: skip
    triton = ModuleType("triton")
    vars(triton).update(jit=Kernel, cdiv=lambda a, b: -(-a // b), language=language)
    before = {name: sys.modules.get(name) for name in ("triton", "triton.language")}
    sys.modules.update({"triton": triton, "triton.language": language})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module

"""Values derived from a module's parameters, kept as long as those are frozen and the same."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Remembered(Generic[T]):
    """One value of a module that is in eval mode and has no parameter that learns.

    Learning parameters may change in ways that a tensor does not show (optimizers write through ``data``), so for
    them the value is made anew each time. A frozen parameter that is loaded, moved or changed in place is noticed.
    """

    def __init__(self) -> None:
        self._made_from: tuple[object, ...] = ()
        self._value: T | None = None

    def get(self, module: nn.Module, make: Callable[[], T]) -> T:
        """The value that ``make`` gives for the module as it is."""
        tensors = [*module.parameters(), *module.buffers()]
        if module.training or any(x.requires_grad or x.is_inference() for x in tensors):
            return make()
        # What is made in inference mode cannot be used outside of it.
        key = (torch.is_inference_mode_enabled(), *((x.data_ptr(), x._version, x.dtype) for x in tensors))
        if self._value is None or key != self._made_from:
            self._made_from, self._value = key, make()
        return self._value

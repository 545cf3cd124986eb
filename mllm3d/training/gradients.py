"""Gradients that arrive on all ranks in the same order, whatever part of the model a rank's batch used.

ZeRO 1 and 2 reduce gradients in flat buckets. A parameter that one rank's loss does not reach leaves that
rank's bucket shorter; and ZeRO 2 fills buckets as the backward pass delivers, so that even a branch taken in
another order adds one parameter's gradient to another's, without a word. So every trainable parameter gets a
gradient (zeros, if need be), and under ZeRO 2 they enter the buckets in one fixed order.

ZeRO 3 besides gathers a module's weights each time it is passed, so that all ranks have to pass the same modules
in the same order, forward and backward. That is up to the recipe; only the whole model's outputs are not.
"""

from typing import Any

import torch
from torch import Tensor, nn

SMALL = 100_000
"""Elements of a parameter whose gradient may wait for others."""


def reach_all(loss: Tensor, module: nn.Module) -> Tensor:
    """The loss, unchanged, with a gradient for every trainable parameter."""
    reached: Tensor = _ReachAll.apply(loss, *[p for p in module.parameters() if p.requires_grad])
    return reached


class _ReachAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        # Expanded scalars: zeros that take no memory.
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)
        return (gradients[0], *zeros)


class InOrder:
    """Stands before ZeRO 2's bucket: holds a gradient back until those before it in the order have passed.

    The order is the reverse of the parameters' registration, close to that of a backward pass, but with small
    parameters last: a few of them come late or early (Photon's threshold predictors are registered behind a decoder
    in whose middle they work), and large ones must not wait for them. It counts on `reach_all`: each trainable
    parameter arrives exactly once in a backward pass.
    """

    def __init__(self, zero_optimizer: Any, module: nn.Module) -> None:
        self._pass_on = zero_optimizer.reduce_independent_p_g_buckets_and_remove_grads
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        order = sorted(reversed(trainable), key=lambda parameter: parameter.numel() <= SMALL)
        self._places = {id(parameter): place for place, parameter in enumerate(order)}
        self._waiting: dict[int, tuple[nn.Parameter, int]] = {}
        self._next = 0
        zero_optimizer.reduce_independent_p_g_buckets_and_remove_grads = self

    def __call__(self, parameter: nn.Parameter, group: int) -> None:
        self._waiting[self._places[id(parameter)]] = (parameter, group)
        while self._next in self._waiting:
            self._pass_on(*self._waiting.pop(self._next))
            self._next += 1
        if self._next == len(self._places):
            self._next = 0


class _Untouched:
    """In place of the autograd function that DeepSpeed puts behind each of a module's outputs."""

    @staticmethod
    def apply(output: Tensor) -> Tensor:
        return output


def forget_outputs(model: nn.Module) -> None:
    """Keep ZeRO 3 from counting which outputs of the whole model a loss uses.

    It notes a backward pass of a module for each of its outputs that has a gradient, and the ranks' notes have to
    agree. Which terms a loss has can depend on a rank's batch, and with them the outputs. Behind the notes is the
    gathering of the module's own weights: a model that has them all in modules inside of it needs none.
    """
    if next(model.parameters(recurse=False), None) is None:
        model.pre_bwd_fn = _Untouched  # type: ignore[assignment]

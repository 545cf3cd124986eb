"""AdamW, or Muon for hidden matrices beside it, from a recipe's parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from mllm3d.config import OptimizerConfig
from mllm3d.errors import UserError
from mllm3d.training.recipe import ParameterGroup


def build_optimizer(model: nn.Module, groups: list[ParameterGroup], config: OptimizerConfig) -> Optimizer:
    """One optimizer over the groups, which hold each trainable parameter of the model once.

    `use_muon` counts only with `name: muon`.
    """
    groups = [group for group in groups if group["params"]]
    _check_groups(model, groups)
    if config.name == "muon":
        return MuonAdamW(groups, config)
    plain = [{key: value for key, value in group.items() if key != "use_muon"} for group in groups]
    return AdamW(plain, lr=config.lr, betas=config.betas, eps=config.eps)


def parameter_groups(
    model: nn.Module,
    config: OptimizerConfig,
    rate: Callable[[str], float] | None = None,
    is_hidden: Callable[[str], bool] = lambda name: False,
) -> list[ParameterGroup]:
    """The trainable parameters by rate, decay (matrices only), and whether Muon may take them.

    rate: peak rate of a parameter by its name; `config.lr` by default. is_hidden: whether a matrix of this name stands
    between other layers.
    """
    groups: dict[tuple[float, float, bool], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        muon = config.name == "muon" and parameter.ndim == 2 and is_hidden(name)
        key = (config.lr if rate is None else rate(name), decay, muon)
        if key not in groups:
            label = f"lr{key[0]:g}-wd{decay:g}" + ("-muon" if muon else "")
            groups[key] = ParameterGroup(name=label, params=[], lr=key[0], weight_decay=decay, use_muon=muon)
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _check_groups(model: nn.Module, groups: list[ParameterGroup]) -> None:
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise UserError("model: nothing to train, all parameters are frozen; choose another recipe or unfreeze a part")
    if len({id(parameter) for parameter in parameters}) != len(parameters):
        raise ValueError("a parameter stands in two parameter groups")
    if not all(parameter.requires_grad for parameter in parameters):
        raise ValueError("a frozen parameter stands in a parameter group")
    known = {id(parameter) for parameter in parameters}
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]:
        raise ValueError(f"trainable parameters in no parameter group: {', '.join(left)}")


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` for the groups marked `use_muon` (2-D matrices), AdamW for the others.

    Muon's update is scaled to AdamW's usual size (`match_rms_adamw`), so one learning rate serves both.
    Groups and state are this object's own, so that schedules and checkpoints see one ordinary optimizer.
    ZeRO stage 0 only: the other stages hand an optimizer flat pieces, and Muon needs whole matrices.
    """

    def __init__(self, groups: list[ParameterGroup], config: OptimizerConfig) -> None:
        unused = [torch.zeros(1, 1)]  # the parts want parameters when they are made; they get ours at each step
        self._parts: dict[bool, Optimizer] = {
            True: Muon(unused, lr=config.lr, adjust_lr_fn="match_rms_adamw"),
            False: AdamW(unused, lr=config.lr, betas=config.betas, eps=config.eps),
        }
        full = [{**self._parts[bool(g.get("use_muon"))].defaults, "use_muon": False, **g} for g in groups]
        for group in full:
            if group["use_muon"] and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError(f"parameter group {group['name']}: Muon takes 2-D matrices only")
        super().__init__(full, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for marked, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["use_muon"] is marked]
            part.state = self.state
            part.step()


def trainable_and_frozen(model: nn.Module) -> tuple[int, int]:
    """Numbers of elements in trainable and in frozen parameters."""
    return count_trainable(model.parameters())


def count_trainable(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Numbers of elements in those that train and in those that do not."""
    sizes = {True: 0, False: 0}
    for parameter in parameters:
        # ZeRO-3 leaves an empty tensor in place of a parameter, and its size beside it.
        sizes[parameter.requires_grad] += int(getattr(parameter, "ds_numel", parameter.numel()))
    return sizes[True], sizes[False]

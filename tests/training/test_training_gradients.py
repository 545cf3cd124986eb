"""In which order gradients enter ZeRO 2's buckets, and what ZeRO 3 no longer counts."""

import random

import pytest
import torch
from torch import nn

from mllm3d.training import gradients
from mllm3d.training.gradients import InOrder, forget_outputs

HOOK = "pre_bwd_fn"


class Buckets:
    """What `InOrder` needs of DeepSpeed's optimizer: what enters the buckets is noted."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int]] = []

    def reduce_independent_p_g_buckets_and_remove_grads(self, parameter: nn.Parameter, group: int) -> None:
        self.entered.append((id(parameter), group))


@pytest.fixture
def model() -> nn.ModuleDict:
    """Two large matrices with a small bias each, and behind them (in the registration) a small predictor."""
    return nn.ModuleDict({"lower": nn.Linear(20, 20), "upper": nn.Linear(20, 20), "predictor": nn.Linear(20, 1)})


def test_gradients_enter_in_one_order_whichever_they_arrive_in(model: nn.ModuleDict) -> None:
    parameters = list(model.parameters())
    model["lower"].weight.requires_grad_(False)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    orders = []
    for seed in range(4):
        buckets = Buckets()
        in_order = InOrder(buckets, model)
        for _ in range(2):  # backward passes
            for parameter in random.Random(seed).sample(trained, len(trained)):
                in_order(parameter, parameter.ndim)
        orders.append(buckets.entered)
    assert all(order == orders[0] for order in orders)
    assert sorted(orders[0]) == sorted([(id(p), p.ndim) for p in trained] * 2)
    assert orders[0][:5] == orders[0][5:]


def test_large_gradients_do_not_wait_for_small_ones(model: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Photon, where predictors work between the layers: their gradients come after those of the upper ones."""
    monkeypatch.setattr(gradients, "SMALL", 100)
    buckets = Buckets()
    in_order = InOrder(buckets, model)
    named = dict(model.named_parameters())
    upper, lower = ((id(named[f"{part}.weight"]), 0) for part in ("upper", "lower"))
    steps: list[tuple[str, list[tuple[int, int]]]] = [
        ("upper.bias", []),
        ("upper.weight", [upper]),
        ("predictor.weight", [upper]),
        ("lower.weight", [upper, lower]),
    ]
    for name, entered in steps:
        in_order(named[name], 0)
        assert buckets.entered == entered, name
    for name in ("predictor.bias", "lower.bias"):
        in_order(named[name], 0)
    assert len(buckets.entered) == len(named)


def test_only_a_model_without_weights_of_its_own_has_its_outputs_forgotten() -> None:
    whole, owner = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    for model in (whole, owner):
        setattr(model, HOOK, torch.autograd.Function)  # where DeepSpeed puts one of its own
        forget_outputs(model)
    assert getattr(owner, HOOK) is torch.autograd.Function
    given = torch.ones(2, requires_grad=True)
    assert getattr(whole, HOOK).apply(given) is given

"""Parts of the trainer that need no ranks: schedule, optimizer, loss, stored files, logs, estimate."""

import copy
import hashlib
import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import nn

from mllm3d.config import Config, OptimizerConfig, config_to_yaml
from mllm3d.data.manifest import Row
from mllm3d.errors import UserError
from mllm3d.training import random_state
from mllm3d.training.distributed import World
from mllm3d.training.estimate import count_steps, memory, report
from mllm3d.training.gradients import reach_all
from mllm3d.training.logging import drop_after
from mllm3d.training.optim import MuonAdamW, build_optimizer
from mllm3d.training.recipe import StepOutput, Term, to_device
from mllm3d.training.schedule import build_schedule, rate
from mllm3d.training.step import step_loss
from mllm3d.training.stored import StateFiles
from mllm3d.training.trainer import data_fingerprint, peak_speed
from tests.training.toy_recipe import ToyRecipe
from tests.training.toy_run import Planted, read_config

Make = Callable[..., dict[str, Any]]


def optimizer_config(**values: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 0.1, **values})


# --- schedule -----------------------------------------------------------------------------------------------


def test_warm_up_then_cosine() -> None:
    at = rate(optimizer_config(warmup=0.2, min_lr_ratio=0.1), total_steps=10)  # 2 of 10 steps
    assert [at(0), at(1), at(2)] == [0.5, 1.0, 1.0]
    assert at(6) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the 8 steps that are left
    assert at(10) == at(11) == pytest.approx(0.1)


def test_linear_and_constant() -> None:
    linear = rate(optimizer_config(schedule="linear", warmup=2.0), total_steps=6)
    assert [linear(step) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    constant = rate(optimizer_config(schedule="constant"), total_steps=6)
    assert [constant(step) for step in range(7)] == [1.0] * 7


def test_every_group_is_scaled_from_its_own_peak() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = build_schedule(optimizer, optimizer_config(schedule="linear"), total_steps=4)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.75, 0.075])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_steps": 7}, 7),
        ({"epochs": 1.0}, 4),  # 10 batches in steps of 3: the fourth reaches into the next epoch
        ({"epochs": 0.5}, 2),
        ({"epochs": 3.0, "max_steps": 7}, 7),
        ({"epochs": 3.0, "max_steps": 70}, 10),
    ],
)
def test_steps_of_a_run(toy_config: Make, tmp_path: Path, values: dict[str, Any], expected: int) -> None:
    changes = {"max_steps": None, "accumulation": 3, **values}
    config = read_config(toy_config(tmp_path, **{f"training__{key}": value for key, value in changes.items()}))
    assert count_steps(config.training, batches_per_epoch=10) == expected


# --- optimizer ----------------------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def groups_of(model: nn.Module) -> list[Any]:
    named = list(model.named_parameters())
    matrices, vectors = ([p for _, p in named if (p.ndim == 2) is flat] for flat in (True, False))
    return [
        {"name": "matrices", "params": matrices, "lr": 0.02, "weight_decay": 0.1, "use_muon": True},
        {"name": "vectors", "params": vectors, "lr": 0.01, "weight_decay": 0.0},
    ]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(5, 4, generator=generator)).pow(2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_muon_beside_adamw_is_the_two_of_torch() -> None:
    mine, theirs = small_model(), small_model()
    train(mine, [build_optimizer(mine, groups_of(mine), optimizer_config(name="muon"))], steps=3)
    matrices, vectors = groups_of(theirs)
    muon = torch.optim.Muon(matrices["params"], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    train(theirs, [muon, torch.optim.AdamW(vectors["params"], lr=0.01, weight_decay=0.0)], steps=3)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_state_survives_a_round_trip() -> None:
    whole, resumed = small_model(), small_model()
    config = optimizer_config(name="muon")
    optimizer = build_optimizer(whole, groups_of(whole), config)
    train(whole, [optimizer], steps=2)
    resumed.load_state_dict(whole.state_dict())
    loaded = build_optimizer(resumed, groups_of(resumed), config)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, [optimizer], steps=2, seed=1)
    train(resumed, [loaded], steps=2, seed=1)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_wrong_groups_are_refused() -> None:
    model = small_model()
    groups = groups_of(model)
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(model, [], optimizer_config())
    with pytest.raises(ValueError, match="two parameter groups"):
        build_optimizer(model, [groups[0], groups[0]], optimizer_config())
    with pytest.raises(ValueError, match=r"in no parameter group: 0\.bias, 2\.bias"):
        build_optimizer(model, groups[:1], optimizer_config())
    with pytest.raises(ValueError, match="2-D matrices only"):
        MuonAdamW([groups[1] | {"use_muon": True}], optimizer_config())
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen parameter"):
        build_optimizer(model, groups, optimizer_config())


# --- loss ---------------------------------------------------------------------------------------------------


def test_terms_are_divided_by_their_own_units() -> None:
    output = StepOutput({"a": Term(torch.tensor(6.0), "tokens"), "b": Term(torch.tensor(2.0), "volumes")})
    # 4 shares (2 ranks x 2 micro-batches), which DeepSpeed divides out again: 6 * 4 / 12 + 2 * 4 / 8
    assert step_loss(output, {"tokens": 4 / 12, "volumes": 4 / 8}).item() == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_no_finite_gradient(bad: float) -> None:
    weight = torch.ones(2, requires_grad=True)
    output = StepOutput({"a": Term(weight.sum(), "tokens"), "b": Term(torch.tensor(bad), "tokens")})
    step_loss(output, {"tokens": 1.0}).backward()
    assert weight.grad is not None and not weight.grad.isfinite().any()


def test_every_trainable_parameter_is_reached_and_the_loss_is_unchanged() -> None:
    used, unused, frozen = nn.Linear(4, 2), nn.Linear(3, 6), nn.Linear(2, 2).requires_grad_(False)
    loss = used(torch.ones(1, 4)).sum()
    (expected,) = torch.autograd.grad(loss, used.weight, retain_graph=True)
    reached = reach_all(loss, nn.ModuleList([used, unused, frozen]))
    reached.backward()
    assert reached.item() == loss.item()
    assert used.weight.grad is not None and torch.equal(used.weight.grad, expected)
    assert unused.weight.grad is not None and torch.equal(unused.weight.grad, torch.zeros(6, 3))
    assert frozen.weight.grad is None


def test_to_device_goes_through_containers() -> None:
    batch = {"a": torch.zeros(1), "b": [torch.zeros(2), "text"], "c": (torch.zeros(3), {"d": torch.zeros(4)})}
    moved = to_device(batch, torch.device("meta"))
    assert [t.device.type for t in (moved["a"], moved["b"][0], moved["c"][0], moved["c"][1]["d"])] == ["meta"] * 4
    assert moved["b"][1] == "text" and isinstance(moved["c"], tuple)


# --- files --------------------------------------------------------------------------------------------------


def test_state_files_refuse_pickles_that_run_code(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"module": Planted(tmp_path / "planted")}, file)
    with pytest.raises(UserError, match=r"state\.pt: refused"):
        StateFiles().load(str(file))
    assert not (tmp_path / "planted").exists()
    with file.open("rb") as stream, pytest.raises(pickle.UnpicklingError):
        torch.load(stream, weights_only=True)


def test_state_files_keep_members_of_enumerations(tmp_path: Path) -> None:
    files = StateFiles()
    files.save({"stage": ZeroStageEnum.gradients}, str(tmp_path / "state.pt"))
    assert not files.failures
    assert files.load(str(tmp_path / "state.pt"))["stage"] is ZeroStageEnum.gradients
    # Python 3.11.0 to 3.11.3 would write a call of getattr.
    assert b"getattr" not in (tmp_path / "state.pt").read_bytes()


def test_state_files_keep_a_failed_write_for_later(tmp_path: Path) -> None:
    files = StateFiles()
    files.save({"a": torch.ones(3)}, str(tmp_path / "state.pt"))
    assert torch.equal(files.load(str(tmp_path / "state.pt"))["a"], torch.ones(3)) and not files.failures
    files.save({"a": torch.ones(3)}, str(tmp_path / "absent" / "state.pt"))
    assert isinstance(files.failures[0], FileNotFoundError)


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()

    random_state.seed(1)
    draw()  # leaves half a pair of normal draws waiting in numpy and python
    random_state.save(tmp_path / "rank_0.safetensors")
    expected = draw()
    random_state.seed(2)
    random_state.load(tmp_path / "rank_0.safetensors")
    assert draw() == expected


def test_a_resumed_run_writes_its_metrics_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    drop_after(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_a_cpu_has_a_peak_only_where_the_config_names_it(toy_config: Make, tmp_path: Path) -> None:
    two_ranks = World(0, 2, torch.device("cpu"), control=None)  # type: ignore[arg-type]
    config = read_config(toy_config(tmp_path))
    assert peak_speed(config, ToyRecipe(config), two_ranks) is None
    assert "peak_tflops: null" in config_to_yaml(config)  # so it is not named in the run folder either
    named = read_config(toy_config(tmp_path, estimate__peak_tflops=1e-6))
    assert peak_speed(named, ToyRecipe(named), two_ranks) == pytest.approx(2 * 1e6 / (6 * 64 * 8))


# --- rows ---------------------------------------------------------------------------------------------------

USUAL = {"id": "q", "case": "c", "split": "train", "question": "?", "answer": "Yes", "task": "t"}


def test_runs_on_volumes_go_on_that_began_before_rows_had_images() -> None:
    """The fingerprint that a checkpoint keeps, of a row as it was written then."""
    before = (
        '{"id":"q","case":"c","split":"train","volume":"a.nii","prior":null,"question":"?","answer":"Yes",'
        '"options":null,"task":"t","subtask":null,"modality":"CT","labels":null,"report":null,"meta":{}}'
    )
    assert data_fingerprint([Row(**USUAL, volume="a.nii")]) == hashlib.sha256(before.encode()).hexdigest()[:16]
    shown: list[dict[str, Any]] = [{"images": ["1", "2"]}, {"images": ["2", "1"]}, {"video": "1"}]
    assert len({data_fingerprint([Row(**USUAL, **fields)]) for fields in shown}) == 3


def test_rows_that_a_recipe_cannot_be_given(toy_config: Make, tmp_path: Path) -> None:
    given = toy_config(tmp_path)
    recipe = ToyRecipe(read_config(given))
    recipe.check_rows([Row(**USUAL, volume="a.nii")])
    with pytest.raises(UserError, match="row q: 1.png, 2.png: .* takes volumes, no images or videos"):
        recipe.check_rows([Row(**USUAL, images=["1.png", "2.png"])])
    del given["volume"]
    with pytest.raises(UserError, match="volume: is missing, and row q has a volume"):
        ToyRecipe(read_config(given)).check_rows([Row(**USUAL, volume="a.nii")])


# --- estimate -----------------------------------------------------------------------------------------------


def dry_run(make: Make, tmp_path: Path, **changes: Any) -> dict[str, str]:
    config: Config = read_config(make(tmp_path / "run", **changes))
    lines = report(config, ToyRecipe(config)).splitlines()
    assert not (tmp_path / "run").exists()
    return {line[:17].strip(): line[19:] for line in lines}


def test_dry_run_counts(toy_config: Make, tmp_path: Path) -> None:
    machine = {"estimate__gpus": 2, "estimate__peak_tflops": 1e-6, "estimate__mfu": 0.5}
    found = dry_run(toy_config, tmp_path, training__max_steps=None, training__epochs=2.0, **machine)
    # ask 8x8, hidden and side 8x8+8, head 8x10+10; frozen 64x8+8
    assert found["parameters"] == "298 trainable, 520 frozen"
    assert found["tokens per volume"] == "1"
    assert found["data"].startswith("5 volumes, 20 questions (")
    # 10 groups on 2 ranks are 5 batches; 2 epochs in steps of 2 batches: 5 steps of 4 volumes
    assert found["steps"].startswith("5 of 4 volumes")
    # 20 volumes x 6 * 64 * 8 FLOPs / (2 GPUs x 1e6 FLOPS x 0.5) = 0.06 s
    assert float(found["hours"].split()[0]) == pytest.approx(20 * 3072 / 1e6 / 3600, rel=0.05)


def test_dry_run_without_the_manifest(toy_config: Make, tmp_path: Path) -> None:
    absent = {
        "data__manifest": str(tmp_path / "absent.jsonl"),
        "training__max_steps": None,
        "training__epochs": 1.0,
    }
    size = {"data__expected": {"volumes": 100, "questions": 350}, "data__questions_per_volume": 3}
    found = dry_run(toy_config, tmp_path, **absent, **size, estimate__gpus=1)
    assert "because" in found["data"] and "is not there yet" in found["data"]
    # 3.5 questions per volume in groups of 3: 2 groups each, 200 batches in steps of 2
    assert found["steps"].startswith("100 of 2 volumes")
    assert dry_run(toy_config, tmp_path, **absent)["steps"] == "unknown"


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        # 1,000 trainable and 500 frozen parameters on 4 GPUs: (weights, gradients, optimizer) in bytes
        (0, "bf16", (3000, 2000, 12000)),
        (1, "bf16", (3000, 4000, 3000)),
        (2, "bf16", (3000, 1000, 3000)),
        (3, "bf16", (750, 1000, 3000)),
        (0, "fp32", (6000, 4000, 8000)),
        (2, "fp32", (6000, 1000, 3000)),
    ],
)
def test_memory_per_gpu(
    toy_config: Make, tmp_path: Path, stage: int, precision: str, expected: tuple[float, ...]
) -> None:
    training = read_config(toy_config(tmp_path, training__zero_stage=stage, training__precision=precision)).training
    need = memory(training, gpus=4, trainable=1000, frozen=500)
    assert (need.weights, need.gradients, need.optimizer) == expected
    if stage == 0:
        assert memory(training, 4, 1000, 500, muon=400).optimizer == expected[2] - 1600
    else:
        offloaded = training.model_copy(update={"offload": "cpu"})
        assert memory(offloaded, 4, 1000, 500).optimizer == 0

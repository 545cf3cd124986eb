"""Photon's recipes under the three launchers. Launches are dear, so each fixture is one launch with many runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from photon.building import PATCH_WEIGHT
from tests.integration import tiny
from tests.integration.launching import (
    TORCHRUN,
    Run,
    assert_same,
    deepspeed,
    launch,
    launch_many,
    read_metrics,
    read_weights,
)

RUN_FOLDER = {
    *("config.yaml", "preprocessing.json", "environment.json", "README.md"),
    *("metrics.jsonl", "tensorboard", "checkpoints"),
}


def weights_of(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, phantoms: Path, backbone: Path) -> Path:
    """Runs under torchrun with 2 ranks: phase 1, then phase 2 in fp32 and bf16, whole and continued."""
    folder = tmp_path_factory.mktemp("two_ranks")
    often = {"save_every": 1, "keep_last": 6}
    start = tiny.write_config(
        folder / "phase1.yaml", tiny.phase1(phantoms, backbone, folder / "phase1", max_steps=2, **often)
    )
    plan: dict[str, dict] = {"phase1": {"train": ["--config", start]}}
    for precision in ("fp32", "bf16"):
        whole, continued = folder / precision, folder / f"{precision}_continued"
        config = tiny.phase2(phantoms, folder / "phase1", whole, precision=precision, **often)
        file = tiny.write_config(folder / f"{precision}.yaml", config)
        plan[precision] = {"train": ["--config", file]}
        plan[f"{precision} killed"] = {"interrupt": str(whole), "after": 3, "as": str(continued)}
        plan[f"{precision} continued"] = {"train": ["--config", file, "--resume", f"run.output={continued}"]}
    runs = launch_many(TORCHRUN, plan, folder / "plan")
    assert all(run.status == 0 for run in runs.values()), runs
    return folder


def test_phase_1_changes_the_patch_embedding_and_nothing_else(two_ranks: Path, backbone: Path) -> None:
    before = weights_of(backbone)
    first, last = (weights_of(two_ranks / "phase1" / "checkpoints" / f"step_{n}" / "model") for n in (1, 2))
    assert before.keys() == first.keys() == last.keys()
    assert first[PATCH_WEIGHT].shape == (16, 4 * 8 * 8) and before[PATCH_WEIGHT].shape == (16, 3 * 2 * 8 * 8)
    assert (first[PATCH_WEIGHT] != last[PATCH_WEIGHT]).float().mean() > 0.9
    assert [name for name in before if name != PATCH_WEIGHT and not torch.equal(before[name], last[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_phase_2_keeps_all_tokens_then_masks_then_drops(two_ranks: Path, precision: str) -> None:
    """The schedule is the global step's: continuing in the middle of the masking does not start it again."""
    for run in (two_ranks / precision, two_ranks / f"{precision}_continued"):
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert ["loss/band" in line for line in lines] == [False, False, True, True, True, True]
        rates = [line["keep_rate"] for line in lines]
        assert rates[:4] == [1.0] * 4 and all(0.0 < rate < 1.0 for rate in rates[4:])


def test_phase_2_trains_every_part(two_ranks: Path) -> None:
    before = weights_of(two_ranks / "phase1" / "checkpoints" / "step_2" / "model")
    after = read_weights(two_ranks / "fp32")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert {name for name in after if "threshold_predictor" in name} == after.keys() - before.keys() != set()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(two_ranks: Path, precision: str) -> None:
    assert_same(two_ranks / precision, two_ranks / f"{precision}_continued")
    assert not list((two_ranks / f"{precision}_continued" / "checkpoints").glob("*.tmp"))


def test_deepspeed_and_torchrun_give_the_same(two_ranks: Path, tmp_path: Path) -> None:
    output = tmp_path / "deepspeed"
    run = launch(deepspeed(ranks=2), "--config", str(two_ranks / "fp32.yaml"), f"run.output={output}")
    assert "2 ranks on cpu" in run.out and "keep=" in run.err
    assert json.loads((output / "environment.json").read_text())["world_size"] == 2
    assert_same(two_ranks / "fp32", output)


# --- the quickstart's runs, by python alone -----------------------------------------------------------------


def test_each_recipe_of_the_quickstart_trains_in_its_turn(quickstart: dict[str, Run], quickstart_folder: Path) -> None:
    for name in ("vision", "backbone", "phase1", "phase2"):
        run = quickstart_folder / name
        assert quickstart[name].status == 0, quickstart[name].err
        assert {path.name for path in run.iterdir()} == RUN_FOLDER
        assert json.loads((run / "environment.json").read_text())["world_size"] == 1
        assert all(torch.isfinite(torch.tensor(line["loss"])) for line in read_metrics(run))
    assert {"loss/dense", "loss/findings", "loss/ce"} <= read_metrics(quickstart_folder / "backbone")[0].keys()
    assert "loss/ce" not in read_metrics(quickstart_folder / "vision")[0]

"""Features of a frozen encoder: the same training with them, computed once, shared by ranks and validation."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.toy_launch import TORCHRUN, Outcome, launch, read_metrics, read_weights

LONG_AGO = 1_000_000_000
"""A date: names of entries are remembered only for files that have not changed for two seconds."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six volumes to train on, two to validate on, and a prior scan that is in no other row."""
    folder = tmp_path_factory.mktemp("features")
    random, rows = np.random.default_rng(1), []
    for volume in range(9):
        np.save(folder / f"v{volume}.npy", random.integers(-1000, 1000, (4, 4, 4)).astype(np.float32))
        os.utime(folder / f"v{volume}.npy", (LONG_AGO, LONG_AGO))
    for volume in range(8):
        split = "validation" if volume > 5 else "train"
        for question in range(2):
            digits = "".join(map(str, random.integers(0, 10, 2)))
            rows.append({"id": f"v{volume}q{question}", "case": f"c{volume}", "split": split, "task": "toy"})
            rows[-1] |= {"volume": f"v{volume}.npy", "question": str(question), "answer": digits}
            if volume == 0:
                rows[-1]["prior"] = "v8.npy"
    file = folder / "manifest.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


RUNS: dict[str, dict[str, Any]] = {
    "volumes": {"model__cache_features": False},
    "first": {},
    "second": {},
    "other_encoder": {"run__seed": 4},
    "bf16": {"training__precision": "bf16"},
    "bf16_again": {"training__precision": "bf16"},
    "blank": {},
    "other_encoder_blank": {"run__seed": 5},
}


class Runs:
    """What the runs left, and which volumes each encoded, by rank."""

    def __init__(self, folder: Path, outcome: Outcome) -> None:
        self.folder, self.outcome = folder, outcome
        self.errors = dict(zip(RUNS, outcome.errors, strict=True))

    def encoded(self, name: str) -> dict[str, list[str]]:
        file, found = self.folder / f"{name}.txt", dict[str, list[str]]({"0": [], "1": []})
        for line in file.read_text().splitlines() if file.is_file() else ():
            rank, value = line.split()
            found[rank].append(value)
        return found


@pytest.fixture(scope="module")
def runs(manifest: Path, toy_config: Callable[..., dict[str, Any]]) -> Runs:
    """All runs in one launch of two ranks, one after the other; scans are blank before the last two."""
    folder = manifest.parent
    plan: list[dict[str, Any]] = []
    for name, changes in RUNS.items():
        if name == "blank":
            plan.append({"blank": str(manifest)})
        values = {"model__cache_features": True, "model__encoded": str(folder / f"{name}.txt")}
        data = {"data__manifest": str(manifest), "data__validation_split": "validation"}
        settings = {**values, **data, "training__log_every": 1, **changes}
        plan.append({"config": toy_config(folder / name, **settings)})
    return Runs(folder, launch(TORCHRUN, plan, folder / "plan"))


def test_all_but_the_last_run_went_well(runs: Runs) -> None:
    assert {name for name, error in runs.errors.items() if error} == {"other_encoder_blank"}, runs.outcome.output


def test_training_is_the_same_with_features_as_with_volumes(runs: Runs) -> None:
    """Dropout included, though encoding draws numbers. In a batch, the frozen layer's sums are rounded otherwise."""
    with_volumes, with_features = (read_metrics(runs.folder / name) for name in ("volumes", "first"))
    for mine, theirs in zip(with_features, with_volumes, strict=True):
        for key in ("loss", "loss/answer", "accuracy", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key
    mine, theirs = (read_weights(runs.folder / name) for name in ("first", "volumes"))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_the_ranks_share_the_volumes(runs: Runs) -> None:
    """Those that are trained on, validated on, and prior scans; each of them once."""
    found = runs.encoded("first")
    assert len(found["0"]) in (4, 5) and len(found["1"]) in (4, 5)
    assert len({*found["0"], *found["1"]}) == 9


def test_a_second_run_computes_nothing_and_is_the_same_to_the_last_bit(runs: Runs) -> None:
    for name in ("second", "blank"):
        assert runs.encoded(name) == {"0": [], "1": []}
        mine, theirs = (read_weights(runs.folder / run) for run in (name, "first"))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        losses = [[line["loss"] for line in read_metrics(runs.folder / run)] for run in (name, "first")]
        assert losses[0] == losses[1]


def test_another_encoder_or_precision_reuses_nothing(runs: Runs) -> None:
    for name in ("other_encoder", "bf16"):
        assert sum(map(len, runs.encoded(name).values())) == 9, name
    assert runs.encoded("bf16_again") == {"0": [], "1": []}


def test_no_voxel_is_read_where_features_are_there(runs: Runs) -> None:
    """`blank` trained and validated though its scans hold nothing; an encoder that needs them says so."""
    assert runs.errors["blank"] is None and ".npy" in str(runs.errors["other_encoder_blank"])
    scores = [line for line in runs.outcome.output.splitlines() if "validation loss" in line]
    best = [json.loads(file.read_text())["progress"]["best_value"] for file in trainers(runs, "first", "blank")]
    assert scores and best[0] == best[1]


def trainers(runs: Runs, *names: str) -> list[Path]:
    return [runs.folder / name / "checkpoints" / "step_4" / "trainer.json" for name in names]

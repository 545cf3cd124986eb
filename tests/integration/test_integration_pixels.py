"""Volumes, studies of several images, single images and videos in one manifest: checked, trained, resumed, evaluated,
asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mllm3d.cli import main
from mllm3d.data.manifest import Row, read_manifest, write_manifest
from tests.data.pictures import picture, save
from tests.integration import tiny
from tests.integration.launching import PYTHON, Run, assert_same, launch_many, read_metrics

MODES = ("scheduled", "none", "random", "noisy", "evicted", "zeroed")
QUESTIONS = {"Is it bright?": "yes", "Which side is it on?": "left"}
TOKENS = {"volume": 64, "prior": 128, "images": 2 * 9, "image": 9, "five": 5 * 9, "video": 3 * 9, "both": 64 + 9}
"""Visual tokens of each kind of study: volumes of 4 x 4 x 4; images of 8 x 8 pixels a token, 24 x 24 after resizing;
a video of 9 frames in slabs of 4."""


def studies(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """One study of each kind; every file has other content."""
    seeds = iter(range(1000 * len(split), 10**6))

    def image(name: str) -> str:
        seed = next(seeds)
        save(folder / "images" / f"{split}_{name}", picture(30, 28, *[3] * (seed % 2), seed=seed))
        return f"images/{split}_{name}"

    def volume(name: str) -> str:
        array = np.random.default_rng(next(seeds)).normal(0, 300, (20, 20, 20)).round().astype(np.int16)
        array[:4] = -1000
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{split}_{name}.nii")
        return f"{split}_{name}.nii"

    for number in range(1, 10):
        save(folder / f"{split}_film" / f"{number}.png", picture(30, 28, seed=next(seeds)))
    return {
        "volume": {"volume": volume("a")},
        "prior": {"volume": volume("b"), "prior": volume("c")},
        "images": {"images": [image("1.png"), image("2.tif")]},
        "image": {"images": [image("3.bmp")]},
        "five": {"images": [image(f"{n}.webp") for n in range(4, 9)]},
        "video": {"video": f"{split}_film"},
        "both": {"volume": volume("d"), "images": [image("9.png")]},
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about each study; the splits share nothing."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [
        Row(
            id=f"{split}-{kind}-{n}", case=f"{split}-{kind}", split=split, question=question, answer=answer,
            task=kind, meta={"organ": f"organ {n}"}, **fields
        )
        for split in ("train", "test")
        for kind, fields in studies(folder, split).items()
        for n, (question, answer) in enumerate(QUESTIONS.items())
    ]  # fmt: skip
    write_manifest(folder / "manifest.jsonl", rows)
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def config(manifest: Path, photon_folder: Path) -> dict[str, Any]:
    """Phase 2 that drops from the first step, as Photon A.3 does."""
    made = tiny.phase2(manifest, photon_folder, manifest.parent / "run", max_steps=4, save_every=1, keep_last=9)
    made["model"] |= {
        "scheduling": {"predictor_bias": -1.0, "soft_from": 0, "hard_from": 0},
        "robustness": {"probability": 0.5},
        "flip": {"probability": 0.2, "start": 0},
        "min_pixels": 24 * 24,
        "max_pixels": 25 * 25,
    }
    made["data"] |= {"validation_split": "test", "workers": 1}
    made["training"]["volumes_per_batch"] = 2
    made["evaluation"] = {"modes": MODES, "max_new_tokens": 4}
    return made


@pytest.fixture(scope="module")
def run(config: dict[str, Any], manifest: Path) -> Path:
    """The run, and beside it `continued`, which was killed after step 2."""
    folder = manifest.parent
    file = tiny.write_config(folder / "config.yaml", config)
    continued = folder / "continued"
    plan = {
        "whole": {"train": ["--config", file]},
        "killed": {"interrupt": str(folder / "run"), "after": 2, "as": str(continued)},
        "continued": {"train": ["--config", file, "--resume", f"run.output={continued}"]},
    }
    runs = launch_many(PYTHON, plan, folder / "plan")
    assert all(done.status == 0 for done in runs.values()), runs
    return folder / "run"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def started(*arguments: object) -> Run:
        return Run(main([str(argument) for argument in arguments]), *capsys.readouterr())

    return started


def test_the_manifest_has_no_problems(command: Callable[..., Run], manifest: Path) -> None:
    done = command("data", "check", manifest)
    assert done.status == 0, done.err


def test_the_plan_counts_studies(command: Callable[..., Run], manifest: Path, config: dict[str, Any]) -> None:
    file = tiny.write_config(manifest.parent / "plan.yaml", config)
    lines = {
        line[:18].strip(): line[18:].strip()
        for line in command("train", "--config", file, "--dry-run").out.splitlines()
    }
    assert lines["data"].startswith("7 studies, 14 questions")
    assert lines["tokens per volume"] == "64"
    assert lines["tokens per image"] == "at most 9; of a video for each slab of frames"
    assert lines["hours"] == "unknown: images and videos differ in size"


def test_all_kinds_are_trained_on_with_dropping(run: Path) -> None:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert np.isfinite(line["loss"])
    rates = [line["keep_rate"] for line in lines if "keep_rate" in line]
    assert rates and all(0 < rate < 1 for rate in rates)


def test_a_run_that_was_killed_goes_on_with_the_same_batches(run: Path) -> None:
    assert_same(run, run.with_name("continued"))


@pytest.fixture(scope="module")
def evaluated(run: Path) -> Path:
    assert main(["eval", "--config", str(run / "config.yaml"), "--device", "cpu"]) == 0
    return run / "evaluation" / "test"


def test_every_question_is_answered_in_every_mode(evaluated: Path, manifest: Path) -> None:
    rows = {row.id: row for row in read_manifest(manifest) if row.split == "test"}
    for mode in MODES:
        lines = [json.loads(line) for line in (evaluated / f"predictions-{mode}.jsonl").read_text().splitlines()]
        assert {line["id"] for line in lines} == set(rows)
        for line in lines:
            assert line["tokens_before"] == TOKENS[line["task"]]
            assert (line["tokens_after"] == line["tokens_before"]) == (mode == "none")
            recorded = sum(np.prod(grid) for grid in line["kept"]["grids"])
            assert recorded == (64 if line["task"] == "both" else line["tokens_before"])
    assert "| five | 2 |" in (evaluated / "table.md").read_text()


def test_the_statistics_of_kept_tokens_are_there_for_images_too(evaluated: Path) -> None:
    found = json.loads((evaluated / "retention.json").read_text())["modes"]["scheduled"]
    assert found["questions"] == 14 and found["without_mask"] == 0
    (pair,) = [item for item in found["dissimilarity"] if item["organs"] == ["organ 0", "organ 1"]]
    assert pair["volumes"] == 7 and 0 <= pair["value"] <= 1
    assert {item["task"] for item in found["tasks"]} == set(TOKENS)


def test_a_checkpoint_keeps_the_sizes_and_is_asked_about_images(
    command: Callable[..., Run], run: Path, manifest: Path, tmp_path: Path
) -> None:
    saved = json.loads((run / "checkpoints" / "step_4" / "model" / "processor_config.json").read_text())
    assert (saved["min_pixels"], saved["max_pixels"]) == (24 * 24, 25 * 25)
    folder, drawn = manifest.parent, tmp_path / "kept.png"
    image, film = folder / "images" / "test_3.bmp", folder / "test_film"
    given = ("--checkpoint", run, "--question", "Is it bright?", "--max-new-tokens", 4, "--device", "cpu", "--json")
    done = command("predict", *given, "--image", image, "--video", film, "--evidence", drawn)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["tokens_before"] == 9 + 27 and list(found["keep_rates"]) == [str(image), str(film)]
    kept = sum(rate * tokens for rate, tokens in zip(found["keep_rates"].values(), (9, 27), strict=True))
    assert kept == pytest.approx(found["tokens_after"], abs=0.01)
    assert drawn.stat().st_size > 10_000


# --- what does not go together ------------------------------------------------------------------------------


def test_a_run_with_volumes_says_how_they_are_prepared(
    command: Callable[..., Run], config: dict[str, Any], tmp_path: Path
) -> None:
    file = tiny.write_config(tmp_path / "config.yaml", config)
    done = command("train", "--config", file, "--dry-run", "volume=null")
    assert done.line() == "error: volume: is missing, and row train-volume-0 has a volume; say how volumes are prepared"
    done = command("train", "--config", file, "--dry-run", "volume=null", "data.where={task: [images, video]}")
    assert done.status == 0 and "tokens per volume" not in done.out and "2 studies, 4 questions" in done.out


def test_a_recipe_of_volumes_refuses_images(command: Callable[..., Run], manifest: Path, tmp_path: Path) -> None:
    only = tmp_path / "images.jsonl"
    rows = [row for row in read_manifest(manifest) if row.task == "five"]
    write_manifest(only, rows)
    done = command("train", "--config", "quickstart/backbone", "--dry-run", f"data.manifest={only}", "data.where=null")
    assert done.line().startswith("error: row train-five-0: images/train_4.webp, images/train_5.webp, ")
    assert done.line().endswith(": photon.backbone takes volumes, no images or videos")


def test_sizes_must_leave_one(command: Callable[..., Run], config: dict[str, Any], tmp_path: Path) -> None:
    file = tiny.write_config(tmp_path / "config.yaml", config)
    done = command("train", "--config", file, "--dry-run", "model.min_pixels=1000")
    assert "model: max_pixels lies below min_pixels" in done.line()

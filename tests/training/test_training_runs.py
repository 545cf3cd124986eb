"""Runs under the three launchers. Each launch costs seconds of imports, so it does many runs one after the
other (see toy_run.py), and the tests look at what they left."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm3d.config import VolumeConfig
from mllm3d.data.cache import VolumeCache
from mllm3d.data.dataset import Reader
from mllm3d.data.manifest import Row, read_manifest
from mllm3d.data.samplers import batches_for_rank, make_groups
from tests.training.toy_launch import DEEPSPEED, PYTHON, TORCHRUN, Outcome, launch, read_metrics, read_weights
from tests.training.toy_recipe import ToyRecipe
from tests.training.toy_run import read_config

STAGES = [("fp32", 2), ("bf16", 2), ("fp32", 0), ("bf16", 0), ("bf16", 1), ("fp32", 3), ("bf16", 3)]
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{p}_{s}": {"training__precision": p, "training__zero_stage": s} for p, s in STAGES},
    "offload": {"training__precision": "bf16", "training__offload": "cpu"},
    "muon": {"training__optimizer__name": "muon", "training__zero_stage": 0},
    "muon_bf16": {
        "training__optimizer__name": "muon",
        "training__zero_stage": 0,
        "training__precision": "bf16",
    },
}
LINEAR = {"lr": 100.0, "betas": [0.0, 0.0], "eps": 1e4, "clip_norm": 0.0, "schedule": "constant"}
"""AdamW without memory and with an epsilon far above the gradients is w -= lr / eps * gradient: what the
weights have moved by is the gradient."""

Config = Callable[..., dict[str, Any]]


class Runs:
    """The runs of the launch: what was printed, and folders and errors by name."""

    def __init__(self, folder: Path, names: list[str], outcome: Outcome) -> None:
        self.folder, self.outcome = folder, outcome
        self.errors = dict(zip(names, outcome.errors, strict=True))
        self.moved = dict(zip(names, outcome.moved, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy_config: Config) -> Runs:
    folder = tmp_path_factory.mktemp("two_ranks")
    names: list[str] = []
    plan: list[dict[str, Any]] = []

    def add(name: str, resume: bool = False, output: str | None = None, **changes: Any) -> None:
        names.append(name)
        plan.append({"config": toy_config(folder / (output or name), **changes), "resume": resume})

    for name, changes in VARIANTS.items():
        add(name, **changes)
        plan.append({"copy": [str(folder / name), str(folder / f"{name}_resumed"), 2]})
        add(f"{name}_resumed", resume=True, **changes)

    one_step: dict[str, Any] = {
        "training__max_steps": 1,
        "training__optimizer": LINEAR,
        "model__dropout": 0.0,
    }
    add("gradient", **one_step)
    for stage in (0, 1, 2):
        add(f"side_{stage}", model__use_side="even_ranks", training__zero_stage=stage, **one_step)
    for stage in (0, 1, 2):
        halves: dict[str, Any] = {"training__precision": "bf16", "training__zero_stage": stage}
        add(f"side_bf16_{stage}", model__use_side="even_ranks", **halves, **one_step)
    for poison in ("loss", "gradient"):
        for stage in (0, 2):
            bad: dict[str, Any] = {
                "model__poison": poison,
                "model__poison_step": 2,
                "training__zero_stage": stage,
            }
            add(f"poison_{poison}_{stage}", training__log_every=1, **bad)

    plan.append({"copy": [str(folder / "fp32_2"), str(folder / "full"), 2]})
    plan.append({"limit_file_size": 4000, "rank": 1})
    add("full", resume=True)
    add("full_again", resume=True, output="full")
    add("empty_tokens", data__where={"id": ["v0q0"]}, training__max_steps=1, model__ignore_answers=True)
    return Runs(folder, names, launch(TORCHRUN, plan, folder / "plan"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, toy_config: Config, runs: Runs) -> Runs:
    """Runs of one rank, by plain python; most of them go wrong, each in its own way."""
    folder = tmp_path_factory.mktemp("one_rank")
    plan: list[dict[str, Any]] = [{"config": toy_config(folder / "whole")}]
    names = ["whole"]

    def add(name: str, *before: dict[str, Any], source: Path = folder / "whole", **changes: Any) -> None:
        names.append(name)
        copied = {"copy": [str(source), str(folder / name), 2]}
        plan.extend([copied, *before, {"config": toy_config(folder / name, **changes), "resume": True}])

    add("full", {"limit_file_size": 4000, "rank": 0})
    add("two_to_one", source=runs.folder / "fp32_2")
    add("other_model", model__width=12)
    add("other_recipe", recipe="toys")
    add("planted", {"plant": str(folder / "planted")})
    add("cut", {"cut": str(folder / "cut")})
    add("resumed", training__log_every=1)
    add("slower", training__optimizer={"lr": 0.001, "schedule": "constant"}, training__max_steps=5)
    broken = {"data__manifest": str(folder / "broken.jsonl"), "data__workers": 1}
    plan.append({"config": toy_config(folder / "unreadable", **broken)})
    names.append("unreadable")
    row = {"id": "a", "case": "a", "split": "train", "task": "toy", "question": "1", "answer": "2"}
    (folder / "broken.jsonl").write_text(json.dumps({**row, "volume": "absent.npy"}) + "\n")
    names += ["best", "checkpointed"]
    scores = {"1": 0.1, "2": 0.7, "3": 0.7, "4": 0.3}
    often: dict[str, Any] = {"training__save_every": 1, "training__keep_last": 1, "training__keep_best": 2}
    plan.append({"config": toy_config(folder / "best", **often), "scores": scores})
    plan.append({"config": toy_config(folder / "checkpointed", training__activation_checkpointing=True)})
    plan.append({"config": toy_config(folder / "validated", data__validation_split="train")})
    names.append("validated")
    names += ["again", "nothing_to_resume", "other_files", "second_try"]
    plan.append({"config": toy_config(folder / "whole")})
    plan.append({"config": toy_config(folder / "absent"), "resume": True})
    (folder / "other_files").mkdir()
    (folder / "other_files" / "notes.txt").touch()
    plan.append({"config": toy_config(folder / "other_files")})
    plan.append({"config": toy_config(folder / "unreadable")})
    return Runs(folder, names, launch(PYTHON, plan, folder / "plan"))


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_gives_bit_for_bit_what_an_uninterrupted_run_gives(runs: Runs, name: str) -> None:
    assert runs.errors[name] is None and runs.errors[f"{name}_resumed"] is None
    whole, resumed = read_metrics(runs.folder / name), read_metrics(runs.folder / f"{name}_resumed")
    assert [line["step"] for line in whole] == [line["step"] for line in resumed] == [1, 2, 3, 4]
    for key in ("loss", "loss/answer", "loss/size", "lr", "grad_norm", "accuracy", "epoch"):
        assert [line[key] for line in whole] == [line[key] for line in resumed], key
    expected, found = read_weights(runs.folder / name), read_weights(runs.folder / f"{name}_resumed")
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_runs_reach_the_second_epoch_and_learn(runs: Runs) -> None:
    lines = read_metrics(runs.folder / "fp32_2")
    # 5 volumes x 4 questions in groups of 2 are 10 groups; 2 ranks x 2 micro-batches take 4 a step: an epoch
    # is 2.5 steps. A step counts to the epoch of its last batch.
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("name", ["fp32_0", "fp32_3"])
def test_stages_agree_in_fp32(runs: Runs, name: str) -> None:
    """The same mathematics; sums in another order, so equal to fp32's rounding over 4 steps."""
    for mine, other in zip(read_metrics(runs.folder / "fp32_2"), read_metrics(runs.folder / name), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_bf16_follows_fp32(runs: Runs) -> None:
    """bf16 has 8 bits: 1 part in 256 per value; the loss is a mean over some 40 tokens."""
    for name in ("bf16_0", "bf16_1", "bf16_2", "bf16_3"):
        first, exact = read_metrics(runs.folder / name)[0], read_metrics(runs.folder / "fp32_2")[0]
        assert first["loss"] == pytest.approx(exact["loss"], rel=0.02), name
        assert first["loss"] != exact["loss"], name


def first_step_rows(manifest: Path) -> list[list[Row]]:
    """Rows of the four micro-batches (2 ranks x accumulation 2) of the first step, seed 3."""
    rows = read_manifest(manifest)
    groups = make_groups(rows, 2, seed=3, epoch=0)
    batches = [batch for rank in range(2) for batch in batches_for_rank(groups, 1, rank, 2, seed=3, epoch=0)[:2]]
    return [[rows[index] for group in batch for index in group.rows] for batch in batches]


def test_loss_is_divided_by_the_tokens_of_all_ranks_and_micro_batches(runs: Runs, toy_manifest: Path) -> None:
    """Gradients of 2 ranks x 2 micro-batches are those of one process that has all rows in one batch."""
    import numpy as np

    from tests.training.toy_recipe import ToyRecipe
    from tests.training.toy_run import read_config

    batches = first_step_rows(toy_manifest)
    tokens = [sum(len(row.answer) for row in batch) for batch in batches]
    assert len(set(tokens)) > 1, "unequal counts, or the test can't tell a mean of means"
    config = read_config(json.loads((runs.folder / "plan" / "plan.json").read_text())[0]["config"])
    torch.manual_seed(3)
    model = ToyRecipe(config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})).build()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    answer, size, questions = torch.zeros(()), torch.zeros(()), 0
    for row in [row for batch in batches for row in batch]:
        voxels = np.load(toy_manifest.parent / row.volume).clip(-1000, 1000)
        voxels = (np.rint((voxels + 1000) / 2000 * 65535) / 65535).astype(np.float32)
        logits = model(torch.from_numpy(voxels).flatten()[None], torch.tensor([int(row.question)]), torch.tensor([0]))
        answer = answer - sum(logits[0].log_softmax(0)[int(digit)] for digit in row.answer)
        size, questions = size + 0.01 * logits.pow(2).mean(), questions + 1
    loss = answer / sum(tokens) + size / questions  # per token and per question of the whole step
    loss.backward()

    line = read_metrics(runs.folder / "gradient")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in model.parameters() if p.grad is not None))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    after = read_weights(runs.folder / "gradient")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 0.01 if parameter.ndim == 2 and name != "ask.weight" else 0.02  # lr / eps; group "rest" has 2 lr
            torch.testing.assert_close((before[name] - after[name]) / rate, parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_parameter_that_one_rank_does_not_use_gets_the_other_ranks_gradient(runs: Runs) -> None:
    """Stage 0 goes parameter by parameter and fills in zeros itself: the reference for those with buckets."""
    expected = read_weights(runs.folder / "side_0")
    always = read_weights(runs.folder / "gradient")
    assert not torch.equal(expected["side.weight"], always["side.weight"])
    for stage in (1, 2):
        assert runs.errors[f"side_{stage}"] is None
        for name, weight in read_weights(runs.folder / f"side_{stage}").items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
        mine, other = (read_metrics(runs.folder / f"side_bf16_{s}")[0]["grad_norm"] for s in (stage, 0))
        assert mine == pytest.approx(other, rel=0.01)  # bf16 sums: 8 bits


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_all_ranks_before_the_optimizer(runs: Runs, poison: str, stage: int) -> None:
    name = f"poison_{poison}_{stage}"
    what = "loss term answer on rank 1 (samples v" if poison == "loss" else "gradient norm (samples v"
    error = runs.errors[name]
    assert error is not None and "\n" not in error
    assert error.startswith("optimizer step 3: not finite: ") and what in error
    assert runs.moved[name] == 0.0, "the weights are still those of step_2"
    assert [line["step"] for line in read_metrics(runs.folder / name)] == [1, 2]


def test_a_full_disk_on_one_rank_leaves_the_last_checkpoint(runs: Runs) -> None:
    error = runs.errors["full"]
    assert error is not None and "\n" not in error
    assert "step_4: could not be saved: " in error and "step_2 is intact" in error
    assert runs.errors["full_again"] is None, "with space again, --resume goes on from step_2"
    assert sorted(path.name for path in (runs.folder / "full" / "checkpoints").iterdir()) == [
        "latest",
        "step_2",
        "step_4",
    ]
    expected, found = read_weights(runs.folder / "fp32_2"), read_weights(runs.folder / "full")
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_a_step_without_label_tokens_is_an_error_that_names_its_samples(runs: Runs) -> None:
    assert runs.errors["empty_tokens"] == (
        "optimizer step 1: no tokens in its batches (samples v0q0, v0q0, v0q0, v0q0); correct these rows"
    )


def test_deepspeed_and_torchrun_give_the_same(runs: Runs, toy_config: Config, tmp_path: Path) -> None:
    outcome = launch(DEEPSPEED, [{"config": toy_config(tmp_path / "run")}], tmp_path / "plan")
    assert outcome.status == 0 and outcome.errors == [None], outcome.output
    by_torchrun, by_deepspeed = read_metrics(runs.folder / "fp32_2"), read_metrics(tmp_path / "run")
    for key in ("loss", "grad_norm", "accuracy"):
        assert [line[key] for line in by_torchrun] == [line[key] for line in by_deepspeed]
    expected, found = read_weights(runs.folder / "fp32_2"), read_weights(tmp_path / "run")
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_python_alone_trains_and_resumes(alone: Runs) -> None:
    assert alone.errors["whole"] is None and alone.errors["resumed"] is None
    whole, resumed = (read_metrics(alone.folder / name) for name in ("whole", "resumed"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in resumed]


def test_a_run_folder_whose_first_attempt_took_no_step_is_used_again(alone: Runs) -> None:
    assert alone.errors["unreadable"] is not None and alone.errors["second_try"] is None


def test_a_run_folder_says_what_was_run(alone: Runs) -> None:
    run = alone.folder / "whole"
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "preprocessing.json", "environment.json", "README.md"),
        *("metrics.jsonl", "tensorboard", "checkpoints"),
    }
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["world_size"] == 1
    assert VolumeConfig.model_validate_json((run / "preprocessing.json").read_text()) == VolumeConfig()
    assert (run / "preprocessing.json").read_text() == (run / "checkpoints/step_4/model/preprocessing.json").read_text()
    assert f"deepspeed train.py --config {run}/config.yaml --resume" in (run / "README.md").read_text()
    assert list((run / "tensorboard").glob("events.*"))
    line = read_metrics(run)[0]
    # 2 micro-batches of 1 volume with 2 questions each; log_every 2, so both lines share the speed.
    assert line["questions_per_s"] == pytest.approx(2 * line["volumes_per_s"])
    assert line["volumes_per_s"] == pytest.approx(2 / line["seconds_per_step"])
    assert line["keep_rate"] == 0.5 and line["mfu"] is None


def test_a_resumed_run_takes_its_learning_rate_from_its_config(alone: Runs) -> None:
    rates = [(line["lr/matrices"], line["lr/rest"]) for line in read_metrics(alone.folder / "slower")]
    assert rates[2:] == [(0.001, 0.002)] * 3


def test_the_best_checkpoint_is_kept_beside_the_last(alone: Runs) -> None:
    """Values 0.1, 0.7, 0.7, 0.3 at steps 1 to 4, two best and one last; the first of two equals is the best."""
    folder = alone.folder / "best" / "checkpoints"
    assert alone.errors["best"] is None
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_2", "step_3", "step_4"]
    progress = json.loads((folder / "step_4" / "trainer.json").read_text())["progress"]
    assert (progress["best_step"], progress["best_value"]) == (2, 0.7)


def test_the_validation_loss_is_the_mean_over_the_split_and_decides_which_is_best(
    alone: Runs, toy_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer token weighs the same, and every question: as if the split were one batch."""
    assert alone.errors["validated"] is None
    run = alone.folder / "validated"
    progress = json.loads((run / "checkpoints" / "step_4" / "trainer.json").read_text())["progress"]
    recipe = ToyRecipe(read_config(toy_config(run)))
    model = recipe.build().eval()
    best = run / "checkpoints" / f"step_{progress['best_step']}" / "model" / "model.safetensors"
    model.load_state_dict(load_file(best))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    rows = read_manifest(recipe.config.data.manifest)
    groups = make_groups(rows, 4, seed=0, epoch=0)
    cache = VolumeCache(run / "cache")
    root = recipe.config.data.manifest.parent
    reader = Reader(root, cache, recipe.config.volume)
    batch = recipe.collate([reader.load(group, rows) for group in groups])
    with torch.no_grad():
        terms = recipe.losses(model, batch, 0, 4, {"tokens": 1.0}).terms
    counts = recipe.counts(batch)
    loss = sum(float(term.value) / counts[term.per] for term in terms.values())
    assert progress["best_value"] == pytest.approx(-loss, rel=1e-5)


def test_only_the_last_checkpoints_are_kept(alone: Runs) -> None:
    assert sorted(path.name for path in (alone.folder / "whole" / "checkpoints").iterdir()) == [
        "latest",
        "step_2",
        "step_4",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("full", ("step_4: could not be saved: ", "step_2 is intact", "--resume")),
        (
            "two_to_one",
            ("trainer.json: saved with number of ranks 2, but this run has 1", "resume with the same"),
        ),
        ("other_model", ("trainer.json: saved with model ",)),
        ("other_recipe", ("trainer.json: saved with recipe toy, but this run has toys",)),
        ("planted", ("mp_rank_00_model_states.pt: refused: ",)),
        ("cut", ("mp_rank_00_model_states.pt: missing or cut short",)),
        (
            "again",
            ("run.output: ", "is not empty; continue it with --resume, or choose another run.output"),
        ),
        ("unreadable", ("absent.npy: ",)),
        ("checkpointed", ("training.activation_checkpointing: this model does not offer it",)),
        ("other_files", ("is not empty; delete it, for it has no checkpoint, or choose another run.output",)),
        ("nothing_to_resume", ("run.output: ", "no checkpoint to resume; start without --resume")),
    ],
)
def test_what_cannot_go_on_is_one_clear_line(alone: Runs, name: str, words: tuple[str, ...]) -> None:
    error = alone.errors[name]
    assert error is not None and "\n" not in error
    assert all(word in error for word in words), error
    assert not (alone.folder / name / "planted").exists()
    assert not list((alone.folder / name).glob("checkpoints/*.tmp"))

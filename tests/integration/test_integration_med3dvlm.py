"""Med3DVLM from text models to a release: trained in five steps as its quickstart does, evaluated, released, asked."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mllm3d.cli import main
from mllm3d.data.manifest import Row, read_manifest
from mllm3d.data.preprocess import prepare
from mllm3d.data.prompts import target_text
from mllm3d.data.volumes import read_volume
from mllm3d.inference.checkpoint import open_checkpoint
from tests.integration.launching import PYTHON, TORCHRUN, Run, launch_many, read_metrics, read_weights, start

STAGES = ("bert", "decoder", "contrastive", "projector", "finetune")
SHAPE = [32, 32, 64]
TEXT = ["model.hidden_size=16", "model.layers=2", "model.heads=2", "model.mlp=24", "model.vocabulary=400"]

LOAD = """
import json, sys

class Without:
    '''A finder that does not find them: to `import` and to `find_spec` they are not installed.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


BLOCKED = {"mllm3d", "deepspeed", "monai", "peft", "torchvision", "timm", "nibabel", "SimpleITK", "blosc2", "pydantic"}
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

import med3dvlm

folder, volume, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(np.load(volume), question)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(json.dumps([processor.decode(tokens, skip_special_tokens=True).strip(), sorted(BLOCKED & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, and a run of each stage in two steps."""
    folder = tmp_path_factory.mktemp("med3dvlm")
    options = ["--cases", "8", "--seed", "2", "--shape", "16,32,32", "--splits", "0.5,0.25,0.25", "--workers", "1"]
    tasks = ["--priors", "0", "--tasks", "report", "existence", "phase", "location", "organ", "abnormality"]
    done = start([sys.executable, "data/phantom/prepare.py", "--out", str(folder / "data"), *options, *tasks])
    assert done.status == 0, done.err
    return folder


def arguments(folder: Path, stage: str, name: str, *settings: str) -> list[str]:
    """Of train.py: a stage of the quickstart in two steps of two volumes."""
    where = [f"data.manifest={folder / 'data' / 'manifest.jsonl'}", f"run.output={folder / name}"]
    short = ["training.max_steps=2", "training.volumes_per_batch=2", "training.log_every=1", "run.threads=1"]
    return ["--config", f"quickstart/med3dvlm/{stage}", *where, f"volume.shape={SHAPE}", *short, *settings]


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    """The configs of the quickstart with numbers made small, and two of them again with other caching."""
    own = {
        "bert": TEXT,
        "decoder": TEXT,
        "contrastive": [
            "model.encoder={name: dcformer-nano, widths: [4, 4, 6, 8, 12], kernels: [3, 3, 3, 3]}",
            f"model.text_encoder={folder / 'bert'}",
        ],
        "projector": [
            f"model.encoder={folder / 'contrastive'}",
            f"model.language_model={folder / 'decoder'}",
            "model.mixed_tokens=4",
            "data.validation_split=validation",
        ],
        # Adam with this epsilon moves a weight by its gradient: rounding stays rounding where the gradient is near 0.
        # Muon would make as much of a gradient near 0 as of another.
        "finetune": [
            f"model.checkpoint={folder / 'projector'}",
            "training.optimizer={name: adamw, lr: 1e-3, eps: 0.01, schedule: cosine, warmup: 20}",
        ],
    }
    plan: dict[str, Any] = {}

    def add(stage: str, name: str, *more: str) -> None:
        plan[name] = {"train": arguments(folder, stage, name, *own[stage], *more)}

    for stage in STAGES:
        add(stage, stage, *(["training.save_every=1"] if stage == "finetune" else []))
    plan["killed"] = {"interrupt": str(folder / "finetune"), "after": 1, "as": str(folder / "continued")}
    add("finetune", "continued", "--resume", "training.save_every=1")
    add("finetune", "uncached", "model.cache_features=false")
    return launch_many(PYTHON, plan, folder / "plan")


@pytest.fixture(scope="module")
def trained(runs: dict[str, Run], folder: Path) -> Path:
    """The last run."""
    for name, run in runs.items():
        assert run.status == 0, (name, run.err)
    return folder / "finetune"


def test_every_stage_trains_and_says_what(trained: Path, runs: dict[str, Run]) -> None:
    for stage in STAGES:
        losses = [line["loss"] for line in read_metrics(trained.with_name(stage))]
        assert len(losses) == 2 and np.isfinite(losses).all()
    said = {stage: [" ".join(line.split()) for line in runs[stage].out.splitlines()] for stage in STAGES}
    assert any(line.startswith("text encoder ") and line.endswith(" trains") for line in said["contrastive"])
    for stage, parts in {"projector": {"projector"}, "finetune": {"projector", "lora"}}.items():
        known = ("encoder", "projector", "embeddings", "language_model", "lora")
        lines = [line.split() for line in said[stage] if line.startswith(known)]
        assert {line[0] for line in lines if line[-1] == "trains"} == parts
        assert {line[0] for line in lines if line[-1] == "frozen"} == {"encoder", "embeddings", "language_model"}


def test_a_resumed_run_is_the_same_to_the_last_bit(trained: Path) -> None:
    mine, theirs = read_weights(trained), read_weights(trained.with_name("continued"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_features_train_as_volumes_do(trained: Path) -> None:
    """Dropout of the adapters included. Encoded one by one and not in batches, sums are rounded in another order."""
    other = trained.with_name("uncached")
    for mine, theirs in zip(read_metrics(trained), read_metrics(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    mine, theirs = read_weights(trained), read_weights(other)
    before = read_weights(trained.with_name("projector"))
    moved = max(float((mine[name] - before[name]).abs().max()) for name in mine if name.startswith("projector."))
    assert moved > 1e-5
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-3 * moved, msg=name)


# --- two ranks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(trained: Path, folder: Path) -> dict[str, Path]:
    """The three stages on two ranks (stages 2 and 3 with a volume each), and stages 2 and 3 on one rank with both."""
    encoder = "model.encoder={name: dcformer-nano, widths: [4, 4, 6, 8, 12], kernels: [3, 3, 3, 3]}"
    adam = "training.optimizer={name: adamw, lr: 1e-3, eps: 0.01, schedule: cosine, warmup: 20}"

    def plan(stages: dict[str, str], volumes: int) -> dict[str, Any]:
        """stages: stage -> name of its run."""
        batch = f"training.volumes_per_batch={volumes}"
        encoded, projector = f"model.encoder={folder / 'contrastive_ranks'}", stages["projector"]
        language = [f"model.language_model={folder / 'decoder'}", "model.mixed_tokens=4"]
        own = {
            "contrastive": [encoder, f"model.text_encoder={folder / 'bert'}"],
            "projector": [encoded, *language, adam, batch],
            "finetune": [f"model.checkpoint={folder / projector}", "model.lora.dropout=0.0", adam, batch],
        }
        return {s: {"train": arguments(folder, s, name, *own[s])} for s, name in stages.items()}

    apart = {stage: f"{stage}_ranks" for stage in STAGES[2:]}
    together = {stage: f"{stage}_one" for stage in STAGES[3:]}
    for launcher, stages, volumes in ((TORCHRUN, apart, 1), (PYTHON, together, 2)):
        done = launch_many(launcher, plan(stages, volumes), folder / f"plan_{len(stages)}")
        for run in done.values():
            assert run.status == 0, run.err
    return {name: folder / name for name in (*apart.values(), *together.values())}


def test_two_ranks_train_as_one_with_their_volumes(ranks: dict[str, Path]) -> None:
    """Stage 1 has batch statistics of each rank's own volumes, so only the other two have an equal on one rank."""
    assert all(np.isfinite(line["loss"]) for line in read_metrics(ranks["contrastive_ranks"]))
    for stage in STAGES[3:]:
        mine, theirs = read_metrics(ranks[f"{stage}_ranks"]), read_metrics(ranks[f"{stage}_one"])
        assert len(mine) == 2
        for line, other in zip(mine, theirs, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)  # float32, summed in another order
        apart, together = read_weights(ranks[f"{stage}_ranks"]), read_weights(ranks[f"{stage}_one"])
        assert apart.keys() == together.keys()
        for name in apart:
            torch.testing.assert_close(apart[name], together[name], rtol=1e-5, atol=1e-6, msg=name)


# --- asked --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return [row for row in read_manifest(folder / "data" / "manifest.jsonl") if row.split == "test"]


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> Path:
    """Asked for a few tokens."""
    config = ["--config", str(trained / "config.yaml"), "evaluation.max_new_tokens=6"]
    assert main(["eval", *config, "evaluation.modes=[none,zeroed]", "--device", "cpu"]) == 0
    return trained / "evaluation" / "test"


def test_every_question_is_answered_with_the_volume_and_without(evaluated: Path, rows: list[Row]) -> None:
    asked = {row.id for row in rows}
    assert {row.task for row in rows} >= {"report", "existence", "abnormality"} and any(row.options for row in rows)
    for mode in ("none", "zeroed"):
        lines = [json.loads(line) for line in (evaluated / f"predictions-{mode}.jsonl").read_text().splitlines()]
        assert {line["id"] for line in lines} == asked
        assert {(line["tokens_before"], line["tokens_after"], line["kept"]) for line in lines} == {(4, 4, None)}
    table = (evaluated / "table.md").read_text()
    assert all(task in table for task in ("report", "existence", "abnormality"))
    modes = json.loads((evaluated / "retention.json").read_text())["modes"]
    assert modes == {}  # nothing is dropped


def test_questions_are_asked_as_they_were_trained(
    trained: Path, folder: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from med3dvlm.recipes.adapter import Med3DVLMAdapter

    asked: list[str] = []
    answer: Callable[..., Any] = Med3DVLMAdapter.answer

    def noted(self: Any, volumes: Any, questions: Any, *more: Any, **named: Any) -> Any:
        asked.extend(questions)
        return answer(self, volumes, questions, *more, **named)

    monkeypatch.setattr(Med3DVLMAdapter, "answer", noted)
    config = ["--config", str(trained / "config.yaml"), f"run.output={folder / 'asked'}"]
    only = ["evaluation.max_new_tokens=1", "evaluation.modes=[none]"]
    assert main(["eval", *config, *only, "--checkpoint", str(trained), "--device", "cpu"]) == 0
    closed = next(row for row in rows if row.options)
    listed = " ".join(target_text(closed.model_copy(update={"answer": option})) for option in closed.options or ())
    assert f"{closed.question} Choices: {listed}" in asked
    assert len(asked) == len(rows)


@pytest.fixture(scope="module")
def released(trained: Path) -> dict[str, Path]:
    """With adapters apart, and merged."""
    found = {name: trained.with_name(f"release_{name}") for name in ("apart", "merged", "clip")}
    assert main(["release", str(trained), str(found["apart"])]) == 0
    assert main(["release", str(trained), str(found["merged"]), "--merge-lora"]) == 0
    assert main(["release", str(trained.with_name("contrastive")), str(found["clip"])]) == 0
    return found


def scan(folder: Path, rows: list[Row]) -> Path:
    return folder / "data" / str(rows[0].volume)


def test_a_release_holds_the_adapters_apart_or_merged(released: dict[str, Path]) -> None:
    apart, merged = (load_file(released[name] / "model.safetensors") for name in ("apart", "merged"))
    assert any("lora_" in name for name in apart) and not any("lora_" in name for name in merged)
    assert merged.keys() == {name.replace(".base_layer", "") for name in apart if "lora_" not in name}
    assert json.loads((released["merged"] / "config.json").read_text())["lora"] is None
    assert json.loads((released["merged"] / "config.json").read_text())["dtype"] == "float32"
    name = next(name for name in apart if name.endswith("q_proj.base_layer.weight"))
    assert not torch.equal(apart[name], merged[name.replace(".base_layer", "")])


def test_a_merged_release_answers_without_peft_or_us(
    released: dict[str, Path], folder: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the answer of the adapters, which our command gives."""
    volume, question = scan(folder, rows), "Which organ holds the lesion?"
    given = ["predict", "--volume", str(volume), "--question", question, "--max-new-tokens", "8", "--device", "cpu"]
    answers = {}
    for name in ("apart", "merged"):
        capsys.readouterr()
        assert main([*given, "--checkpoint", str(released[name]), "--json"]) == 0
        answers[name] = json.loads(capsys.readouterr().out)["answer"]
    np.save(tmp_path / "volume.npy", prepare(read_volume(volume), open_checkpoint(released["merged"]).volume).array)
    done = start([sys.executable, "-c", LOAD, str(released["merged"]), str(tmp_path / "volume.npy"), question])
    assert done.status == 0, done.err
    assert json.loads(done.out) == [answers["merged"], []]
    assert answers["apart"] == answers["merged"]


def test_there_is_no_evidence_and_nothing_to_merge_twice(
    released: dict[str, Path], folder: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: object) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        run = Run(status, *capsys.readouterr())
        return run.line()

    volume, released_apart = scan(folder, rows), released["apart"]
    given = ("predict", "--volume", volume, "--question", "Where?", "--max-new-tokens", 2, "--device", "cpu")
    asked = (*given, "--checkpoint", released_apart)
    line = error(*asked, "--evidence", tmp_path / "kept.png")
    assert line == (
        "error: --evidence: release_apart: a model of type med3dvlm does not say which tokens it kept; leave it out"
    )
    assert error(*asked, "--evidence-nifti", tmp_path / "kept.nii.gz").startswith("error: --evidence-nifti: release")
    assert list(tmp_path.iterdir()) == []
    assert "Med3DVLM is asked about one; leave the prior scan out" in error(*asked, "--prior", volume)
    line = error("release", folder / "projector", tmp_path / "out", "--merge-lora")
    assert line.startswith("error: --merge-lora: ") and "has no adapters" in line
    line = error("release", folder / "contrastive", tmp_path / "out", "--merge-lora")
    assert line.startswith("error: --merge-lora: ") and "its kind of model has no adapters" in line
    assert list(tmp_path.iterdir()) == []

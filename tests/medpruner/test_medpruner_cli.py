"""Pruned slice-wise models from the command line: `mllm3d predict` and `eval.py`."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from mllm3d import cli, registry
from mllm3d.config import load, read_values
from mllm3d.data.manifest import Row, write_manifest
from mllm3d.errors import UserError
from mllm3d.evaluation.predictions import read
from mllm3d.evaluation.runner import predictions_file
from mllm3d.inference.predictor import Predictor
from tests.inference.fake_adapter import NAME, write_model
from tests.medpruner.saved_slicewise import QUESTIONS, TOKENS, VOLUME, saved, scan


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return saved("qwen2_5_vl", tmp_path_factory.mktemp("released") / "tiny")


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    """On disk as (W, H, D), in HU of the model's window."""
    hu = (scan() * 0.5 + 0.5) * 500 - 200
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(hu.T), np.eye(4)), tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


def run(*args: Any) -> int:
    return cli.main([*map(str, args), "--device", "cpu"])


def test_predict_prunes(model: Path, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("predict", "--checkpoint", model, "--volume", ct, "--question", QUESTIONS[0], "--max-new-tokens", 2)
    pruned = ("--pruner", "medpruner", "--pruner-set", "tau=0.5", "--pruner-set", "gamma=null")
    found = {}
    for name, given in (("whole", ()), ("none", (*pruned, "--mode", "none")), ("pruned", pruned)):
        assert run(*asked, *given, "--json") == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["whole"]["tokens_after"] == found["none"]["tokens_after"] == TOKENS
    assert found["whole"]["answer"] == found["none"]["answer"]
    assert found["whole"]["tokens_before"] == found["pruned"]["tokens_before"] == TOKENS
    assert 4 <= found["pruned"]["tokens_after"] < TOKENS  # every slice has one token at least: there is no filter
    assert "retention" not in found["whole"] and "retention" not in found["none"]
    stayed = found["pruned"]["retention"]
    assert stayed["slices"] == 1.0 and stayed["tokens"] == stayed["overall"] == found["pruned"]["keep_rate"]
    seconds = found["pruned"]["seconds"]
    assert list(seconds) == ["tower", "pruner", "prefill", "decode"] and min(seconds.values()) >= 0
    assert sum(seconds.values()) >= found["pruned"]["seconds_to_first_token"] - 0.001  # each is rounded
    half = ("--pruner", "uniform", "--pruner-set", "keep=0.5")
    assert run(*asked, *half, "--evidence-nifti", tmp_path / "kept.nii") == 0
    mask = np.asarray(nibabel.load(tmp_path / "kept.nii").dataobj)
    whole_slices = [bool(item.all()) for item in np.moveaxis(mask, 2, 0)]
    assert mask.mean() == 0.5 and sum(whole_slices) == 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--pruner-set", "tau=0.5"], "--pruner-set tau=0.5: of which method? give --pruner NAME too"),
        (["--pruner", "medpruner", "--pruner-set", "tau"], "must look like KEY=VALUE"),
        (["--pruner", "medpruner", "--pruner-set", "tau=1", "--pruner-set", "tau=2"], "tau is given twice"),
        (
            ["--pruner", "medpruner", "--pruner-set", "tau=high"],
            "pruner medpruner: tau: Input should be a valid number",
        ),
        (["--pruner", "medpruner", "--pruner-set", "tau=2"], "pruner medpruner: tau: 2, allowed is more than 0 to 1"),
        (["--pruner", "pruner"], "pruner 'pruner': unknown (known: medpruner, visionzip"),
    ],
)
def test_mistakes_are_one_line(
    model: Path, ct: Path, capsys: pytest.CaptureFixture[str], given: list[str], expected: str
) -> None:
    assert run("predict", "--checkpoint", model, "--volume", ct, "--question", "What?", *given) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_values_are_read_as_in_a_config() -> None:
    texts = ["a=0.5", "b=null", "c=true", "d=text", "e=1e-3", "f=x=y"]
    assert read_values(texts, "--set") == {"a": 0.5, "b": None, "c": True, "d": "text", "e": 1e-3, "f": "x=y"}


def test_other_models_have_no_pruners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "fake", NAME)
    folder = write_model(tmp_path / "released", VOLUME)
    with pytest.raises(UserError, match="a pruner is for slice-wise models .* not for one of type fake"):
        Predictor.load(folder, "cpu", pruner={"name": "medpruner"})


# --- eval ---------------------------------------------------------------------------------------------------


@pytest.fixture
def config(ct: Path) -> Path:
    rows = [
        Row(id=f"q{number}", case="c0", split="test", volume=ct.name, question=question, answer="yes", task="existence")
        for number, question in enumerate(QUESTIONS)
    ]
    write_manifest(ct.with_name("manifest.jsonl"), rows)
    values = {
        "recipe": "photon.phase2",
        "run": {"output": str(ct.with_name("run"))},
        "volume": VOLUME.model_dump(mode="json"),
        "data": {"manifest": str(ct.with_name("manifest.jsonl"))},
        "model": {"checkpoint": "unused"},
        "training": {"max_steps": 1, "optimizer": {"lr": 0.1}},
        "evaluation": {
            "modes": ["scheduled", "none", "random", "zeroed"],
            "max_new_tokens": 2,
            "pruner": {"name": "medpruner", "tau": 0.5, "gamma": 0.01},
        },
    }
    file = ct.with_name("asked.yaml")
    file.write_text(yaml.safe_dump(values))
    return file


def kept(config: Path, mode: str) -> list[int]:
    folder = load(config).run.output / "evaluation" / "test"
    return [sample.tokens_after for sample in read(predictions_file(folder, mode))]


def test_eval_prunes_and_never_mixes_settings(model: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "--config", config, "--checkpoint", model) == 0
    pruned = kept(config, "scheduled")
    assert len(pruned) == 3 and set(pruned) <= set(range(2, TOKENS // 2 + 1))
    assert kept(config, "none") == [TOKENS] * 3
    assert max(kept(config, "random")) < TOKENS
    assert max(kept(config, "zeroed")) <= 6  # one slice is left of a volume without change
    capsys.readouterr()
    again = ("eval", "--config", config, "--checkpoint", model)
    assert run(*again) == 0 and kept(config, "scheduled") == pruned
    assert "moved" not in capsys.readouterr().err
    assert run(*again, "evaluation.pruner.gamma=null", "evaluation.pruner.tau=1.0", "evaluation.modes=[scheduled]") == 0
    assert "earlier predictions of another checkpoint or setting moved" in capsys.readouterr().err
    assert kept(config, "scheduled") == [TOKENS] * 3
    assert run(*again, "evaluation.pruner=null", "evaluation.modes=[scheduled]") == 0
    assert "moved" in capsys.readouterr().err
    assert kept(config, "scheduled") == [TOKENS] * 3


def test_a_method_needs_its_name(model: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(config.read_text())
    del values["evaluation"]["pruner"]["name"]
    config.write_text(yaml.safe_dump(values))
    assert run("eval", "--config", config, "--checkpoint", model) == 2
    error = capsys.readouterr().err
    assert "evaluation.pruner: " in error and "name: which method?" in error

"""How a model wants to be asked, and what it need not be able to say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm3d import registry
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode, RawAnswer
from mllm3d.inference.predict import predict
from mllm3d.inference.predictor import Predictor
from tests.inference.fake_adapter import NAME, FakeAdapter, write_model


class Terse(FakeAdapter):
    """Wants questions in its own words, and keeps to itself which tokens it kept."""

    asked: Sequence[str] = ()

    def wording(self, question: str, options: Sequence[str] | None) -> str:
        return f"Q: {question} {'/'.join(options or ())}".strip()

    def answer(
        self, volumes: Sequence[np.ndarray], questions: Sequence[str], mode: Mode, max_new_tokens: int, seed: int
    ) -> list[RawAnswer]:
        Terse.asked = questions
        return [RawAnswer("Yes", 4, 4, 1, 0.1, 0.1, None) for _ in questions]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "fake", VolumeConfig(window_hu=(-200.0, 300.0)))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    array = np.zeros((8, 8, 8), np.float32)
    array[:2] = -1000
    np.save(tmp_path / "scan.npy", array)
    return tmp_path / "scan.npy"


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "fake", name)


def test_a_question_has_a_line_for_each_option_unless_a_model_says_otherwise(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, NAME)
    plain = Predictor.load(model, "cpu", torch.float32)
    assert plain.wording("Which?", ["left", "right"]) == "Which?\nA. left\nB. right"
    assert plain.wording("Which?") == plain.wording("Which?", None) == "Which?"
    use(monkeypatch, f"{__name__}:Terse")
    own = Predictor.load(model, "cpu", torch.float32)
    assert own.wording("Which?", ["left", "right"]) == "Q: Which? left/right"
    assert own.wording("Which?") == "Q: Which?"


def test_predict_asks_in_the_models_words(model: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, f"{__name__}:Terse")
    found = predict(model, scan, "Is it bright?", device="cpu")
    assert found["answer"] == "Yes" and found["keep_rate"] == 1.0
    assert Terse.asked == ["Q: Is it bright?"]


@pytest.mark.parametrize(("key", "name"), [("--evidence", "kept.png"), ("--evidence-nifti", "kept.nii.gz")])
def test_there_is_no_evidence_from_a_model_that_does_not_say(
    model: Path, scan: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    use(monkeypatch, f"{__name__}:Terse")
    files: dict[str, Any] = {key[2:].replace("-", "_"): scan.with_name(name)}
    with pytest.raises(UserError) as raised:
        predict(model, scan, "Is it bright?", device="cpu", **files)
    expected = f"{key}: fake: a model of type fake does not say which tokens it kept; leave it out"
    assert str(raised.value) == expected
    assert not scan.with_name(name).exists()

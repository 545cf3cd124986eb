"""Rows, commands and tables of benchmarks/med3dvlm_phantoms.py on made-up results; nothing is trained."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from med3dvlm.encoders import build_encoder
from mllm3d.config import load
from mllm3d.evaluation.results import Results
from mllm3d.evaluation.retrieval import Recall
from mllm3d.evaluation.retrieval_run import RetrievalResults
from mllm3d.evaluation.scoring import ModeSummary, Score, TableRow
from tests.benchmarks.fake_programs import replaced

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The program imports what lies beside it."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("med3dvlm_phantoms")
    sys.path.remove(str(FOLDER))


def write_retrieval(folder: Path, recall: float) -> None:
    ways = {k: recall for k in (1, 5, 10)}
    found = Recall(
        items=100, image_to_text=ways, text_to_image={k: 0.5 for k in ways}, chance={k: k / 100 for k in ways}
    )
    results = RetrievalResults(
        checkpoint="step_4", fingerprint="f", split="test", date="2026-01-01", device="cpu", items=100, recall=[found],
        zero_shot={}, unlabelled={}, one_sided=[],
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(results.model_dump_json())


def write_language(folder: Path) -> None:
    """Existence 0.9 in 300 questions, abnormality 0.5 in 100; zeroed 0.5 and 0.3; the best rule has 0.6 and 0.2."""

    def row(task: str, questions: int, value: float, zeroed: float, rule: float) -> TableRow:
        modes = {
            mode: Score(value=v, low=0, high=1, keep_rate=1, yes_no=None)
            for mode, v in (("none", value), ("zeroed", zeroed))
        }
        rules = {"majority per task": rule - 0.1, "majority per sub-task": rule}
        return TableRow(
            task=task, subtask=None, metric="accuracy", questions=questions, cases=10, chance=0.5, text_only=rules,
            modes=modes,
        )  # fmt: skip

    summary = ModeSummary(
        questions=400, keep_rate=1, tokens_before=16, tokens_after=16, seconds_total=1, seconds_per_question=0.1
    )
    results = Results(
        checkpoint="step_4", fingerprint="f", split="test", date="2026-01-01", device="cpu",
        modes={"none": summary, "zeroed": summary},
        rows=[
            row("existence", 300, 0.9, 0.5, 0.6), row("abnormality", 100, 0.5, 0.3, 0.2), row("phase", 9, 0.7, 0, 0.4)
        ],
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(results.model_dump_json())


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Programs are not run; what they would leave is written."""

    def others(call: list[str], output: Path | None) -> None:
        if call[0].endswith("score_reports.py"):
            figures = {f"{level} F1": {"model": 0.8, "random": 0.6} for level in ("organ", "finding with place")}
            Path(call[call.index("--json") + 1]).write_text(json.dumps({"figures": figures}))
            return
        assert output is not None
        if any(word.endswith("finetune.yaml") for word in call):
            write_language(output / "evaluation/test")
        else:
            write_retrieval(output / "evaluation/test", 0.2)

    return replaced(monkeypatch, others)


def test_a_projector_row_runs_what_it_needs_once(bench, programs, tmp_path):
    arguments = ["--out", str(tmp_path / "out"), "--rows", "2xMLP"]
    bench.main(arguments)
    names = [Path(word.partition("=")[2]).name for call in programs for word in call if word.startswith("run.output=")]
    encoder = ["dcformer-siglip-seed0"] * 2  # trained and asked
    assert names == ["bert-seed0", "decoder-seed0", *encoder, "2xMLP-projector-seed0", "2xMLP-seed0", "2xMLP-seed0"]
    given = {Path(word.partition("=")[2]).name for word in programs[5] if word.startswith("model.")}
    assert given == {"dcformer-siglip-seed0", "decoder-seed0", "2xMLP"}
    programs.clear()
    bench.main([*arguments, "dcformer-clip"])
    assert [call[0].rpartition("/")[2] for call in programs] == ["train.py", "eval.py"]
    assert {"model.loss=clip", "model.start=published"} <= set(programs[0])


def test_the_tables_hold_what_was_found(bench, programs, tmp_path):
    write_retrieval(tmp_path / "vit3d-clip-seed0/evaluation/test", 0.1)
    write_retrieval(tmp_path / "vit3d-clip-seed1/evaluation/test", 0.2)
    line = ["ViT-3D, CLIP", "2", "100", *["15.0 (10.0-20.0)"] * 3, *["50.0"] * 3, "1.0"]
    assert bench.retrieval_lines(tmp_path) == [line]
    bench.main(["--out", str(tmp_path / "out"), "--rows", "2xMLP-H"])
    # Of 400 closed questions: 300 x 0.9 + 100 x 0.5; 300 x 0.6 + 100 x 0.2; 300 x 0.5 + 100 x 0.3.
    closed = ["80.0", "50.0", "45.0"]
    assert bench.language_lines(tmp_path / "out") == [
        ["2xMLP-H", "1", "90.0", "50.0", "70.0", "-", "-", *closed, "80.0", "60.0", "80.0", "60.0"]
    ]
    assert (tmp_path / "out/retrieval.md").is_file() and (tmp_path / "out/language.md").is_file()
    assert len(bench.LANGUAGE_HEADER) == 14 and len(bench.RETRIEVAL_HEADER) == len(line)


def test_every_row_s_settings_are_valid(bench):
    config = bench.CONFIGS / "contrastive.yaml"
    for _, settings in bench.ENCODERS.values():
        build_encoder(load(config, settings).model.encoder)  # the file's own settings are of another encoder
    for name in bench.PROJECTORS:
        load(bench.CONFIGS / "projector.yaml", [f"model.projector={name}"])


def test_mistakes_are_one_line(bench, programs, tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        bench.main(["--out", str(tmp_path), "--table"])
    bench.main(["--out", str(tmp_path / "out"), "--rows", "vit3d-clip"])
    with pytest.raises(SystemExit, match="made with other settings"):
        bench.main(["--out", str(tmp_path / "out"), "--cases", "9"])

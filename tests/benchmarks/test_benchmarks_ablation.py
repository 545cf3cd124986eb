"""Table, rows and commands of benchmarks/phantom_ablation.py on made-up results; nothing is trained."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mllm3d.config import load
from mllm3d.evaluation.results import Results
from mllm3d.evaluation.retention import Coverage, ModeRetention, Retention
from mllm3d.evaluation.scoring import ModeSummary, Score, TableRow
from tests.benchmarks.fake_programs import replaced

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "phantom_ablation.py"


@pytest.fixture(scope="module")
def ablation() -> Iterator[Any]:
    """The program imports what lies beside it."""
    sys.path.insert(0, str(PROGRAM.parent))
    yield importlib.import_module("phantom_ablation")
    sys.path.remove(str(PROGRAM.parent))


def table_row(name: str | None, values: dict[str, float]) -> TableRow:
    scores = {mode: Score(value=value, low=0, high=1, keep_rate=0.1, yes_no=None) for mode, value in values.items()}
    return TableRow(
        task="existence", subtask=name, metric="accuracy", questions=10, cases=10, chance=0.5,
        text_only={"majority per task": 0.5, "majority per sub-task": 0.52}, modes=scores,
    )  # fmt: skip


def coverage(name: str | None, blocks: int, pooled: float) -> Coverage:
    return Coverage(
        of="finding", name=name, questions=5, absent=5, volumes=5, blocks=blocks, pooled=pooled, per_volume=pooled,
        voxels=pooled, random=0.1, random_per_volume=0.1, others=None,
    )  # fmt: skip


def write_run(folder: Path, small: float, modes: tuple[str, ...] = ("scheduled", "none", "random")) -> None:
    """An evaluation whose small findings have accuracy `small` as trained, and 0.9 and 0.6 with all and random tokens.

    Two small findings are `small` -+ 0.1; a large one is always right.
    """
    value = dict(zip(("scheduled", "none", "random"), (small, 0.9, 0.6), strict=True))
    rows = [
        table_row(None, {mode: 0.75 for mode in modes}),
        table_row("lung nodule", {mode: value[mode] - 0.1 for mode in modes}),
        table_row("liver lesion", {mode: value[mode] + 0.1 for mode in modes}),
        table_row("pleural effusion", {mode: 1.0 for mode in modes}),
    ]
    summary = ModeSummary(
        questions=10, keep_rate=0.1, tokens_before=336, tokens_after=33.6, seconds_total=1, seconds_per_question=0.1
    )
    results = Results(
        checkpoint="step_1", fingerprint="f", split="test", date="2026-01-01", device="cpu",
        modes={mode: summary for mode in modes}, rows=rows,
    )  # fmt: skip
    # By tokens: (30 x 0.2 + 10 x 0.6) / 40 = 0.3. The plain mean would be 0.4, and the effusion would lift both.
    regions = [coverage(None, 140, 0.8), coverage("lung nodule", 30, 0.2), coverage("liver lesion", 10, 0.6)]
    kept = ModeRetention(
        questions=10, without_mask=0, without_labels=0, tasks=[], dissimilarity=[],
        coverage=[*regions, coverage("pleural effusion", 100, 0.99)],
    )  # fmt: skip
    retention = Retention(
        split="test", fingerprint="f", block_share=0.02, modes={mode: kept for mode in modes if mode != "none"}
    )
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(results.model_dump_json())
    (folder / "retention.json").write_text(retention.model_dump_json())


def run_folder(out: Path, name: str) -> Path:
    return out / name / "evaluation" / "test"


def test_figures_of_a_run_are_those_of_small_findings(ablation, tmp_path):
    write_run(tmp_path / "run", small=0.7)
    found = ablation.read_outcome(tmp_path / "run", ablation.variants()["photon"])
    expected = ablation.Outcome(
        tokens=33.6, keep_rate=0.1, overall=0.75, small=0.7, majority=0.52, coverage=0.3, chance=0.1,
        all_tokens=0.9, random_tokens=0.6,
    )  # fmt: skip
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))


def test_a_run_without_dropping_covers_everything(ablation, tmp_path):
    write_run(tmp_path / "run", small=0.7, modes=("none",))
    found = ablation.read_outcome(tmp_path / "run", ablation.variants()["no-reduction"])
    assert (found.coverage, found.small, found.random_tokens) == (1.0, pytest.approx(0.9), None)


def test_table_has_means_and_extremes_of_seeds_in_the_order_of_rows(ablation, tmp_path, capsys):
    for seed, small in enumerate((0.6, 0.8)):
        write_run(run_folder(tmp_path, f"fixed-0.1-seed{seed}"), small)
    write_run(run_folder(tmp_path, "fixed-0.1-layer0-seed0"), 0.55)  # its name begins like the other row's
    write_run(run_folder(tmp_path, "photon-seed0"), 0.7)
    write_run(run_folder(tmp_path, "no-reduction-seed0"), 0.7, modes=("none",))
    ablation.main(["--out", str(tmp_path), "--table"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in (tmp_path / "table.md").open()]
    body = [line[:-1] for line in lines[2:]]  # behind the last | stands the end of the line
    assert [line[0] for line in body] == [
        "no reduction", "Photon (after n/4)", "fixed ratio 0.1, after n/4", "fixed ratio 0.1, before the first layer",
    ]  # fmt: skip
    assert body[2][1:5] == ["2", "34", "10.0", "75.0"]
    assert body[2][8] == "70.0 (60.0-80.0)"
    assert body[0][-1] == "-"
    assert "no reduction" in capsys.readouterr().out


def test_rows_are_chosen_by_name_or_group(ablation):
    rows = ablation.variants((0.3, 0.1))
    names = [row.name for row in ablation.chosen(["random", "photon"], rows)]
    assert names == ["photon", "random-0.3", "random-0.1", "random-0.3-layer0", "random-0.1-layer0"]
    assert ablation.chosen(["all"], rows) == list(rows.values())
    with pytest.raises(ablation.UserError, match="--rows cold: no such row"):
        ablation.chosen(["cold"], rows)


def test_settings_of_every_row_are_known_and_differ(ablation, tmp_path):
    """Each row's configuration is read as the program gives it."""
    start = tmp_path / "start"
    seen = {}
    for name, row in ablation.variants().items():
        settings = [f"model.checkpoint={start}", *row.settings]
        config = load(str(ablation.CONFIGS / "phase2.yaml"), [*settings, f"run.output={tmp_path / 'run'}"])
        seen[name] = config.model.model_dump_json() + row.start
    assert len(set(seen.values())) == len(seen)
    for stage in ("vision", "backbone", "phase1"):
        load(str(ablation.CONFIGS / f"{stage}.yaml"), [f"model.checkpoint={start}"])


@pytest.fixture
def programs(ablation, monkeypatch) -> list[list[str]]:
    """Programs that would have run, instead of running them; training leaves a checkpoint, asking its files."""

    def others(call: list[str], output: Path | None) -> None:
        assert output is not None and call[0].endswith("eval.py")
        modes = next(word.partition("=")[2] for word in call if word.startswith("evaluation.modes="))
        write_run(output / "evaluation/test", 0.7, tuple(json.loads(modes)))

    return replaced(monkeypatch, others)


def test_finished_parts_are_not_run_again(ablation, programs, tmp_path):
    def names() -> list[str]:
        found = [Path(word.partition("=")[2]).name for call in programs for word in call if "run.output=" in word]
        programs.clear()
        return found

    arguments = ["--out", str(tmp_path / "out"), "--rows", "photon", "no-reduction", "--seeds", "1"]
    ablation.main(arguments)
    once = ["no-reduction-seed0", "no-reduction-seed0", "photon-seed0", "photon-seed0"]  # trained and asked
    assert names() == ["vision", "backbone", "phase1", *once]
    ablation.main(arguments)
    assert names() == []
    shutil.rmtree(tmp_path / "out/photon-seed0/evaluation")
    shutil.rmtree(tmp_path / "out/no-reduction-seed0/evaluation")
    shutil.rmtree(tmp_path / "out/no-reduction-seed0/checkpoints")  # interrupted in training
    ablation.main([*arguments[:-1], "2"])
    assert names() == [*once[:3], *(name.replace("0", "1") for name in once)]


def test_each_run_starts_where_its_row_says(ablation, programs, tmp_path):
    ablation.main(["--out", str(tmp_path / "out"), "--rows", "photon", "no-phase1", "--seeds", "1"])
    trained = [call for call in programs if call[0].endswith("train.py")]
    starts = [word for call in trained for word in call if word.startswith("model.checkpoint=")]
    assert [Path(word).name for word in starts] == ["vision", "backbone", "phase1", "backbone"]
    assert "model.patch_init=fresh" in trained[-1]


def test_mistakes_are_one_line(ablation, programs, tmp_path, monkeypatch):
    ablation.main(["--out", str(tmp_path / "out"), "--quick", "--rows", "photon"])
    with pytest.raises(SystemExit, match="made with other settings"):
        ablation.main(["--out", str(tmp_path / "out"), "--rows", "photon"])
    with pytest.raises(SystemExit, match="no finished run"):
        ablation.main(["--out", str(tmp_path / "empty"), "--table"])

    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(SystemExit, match=r"prepare.py for data failed, see .*data.log"):
        ablation.main(["--out", str(tmp_path / "third")])

"""Answering a split: every question once, also after an interruption; then files, scores and the table."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from mllm3d import registry
from mllm3d.config import Config, Settings
from mllm3d.data.manifest import Row, read_manifest, write_manifest
from mllm3d.data.preprocess import Prepared
from mllm3d.errors import UserError
from mllm3d.evaluation.check_table import check
from mllm3d.evaluation.check_table import main as check_table
from mllm3d.evaluation.predictions import read
from mllm3d.evaluation.results import read_results
from mllm3d.evaluation.retention import Retention
from mllm3d.evaluation.runner import Shown, evaluate, group_by_study
from tests.inference.fake_adapter import NAME, FakeAdapter, write_model

MODES = ("scheduled", "none", "random", "zeroed")
VOLUME = {"window_hu": (-1000.0, 1000.0), "shape": (8, 8, 8)}


@pytest.fixture(autouse=True)
def fake_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "fake", NAME)
    monkeypatch.setattr(FakeAdapter, "calls", [])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """8 test cases, half of them bright, 3 questions each; a run with one checkpoint."""
    rows = []
    for number in range(8):
        bright, case = number % 2 == 0, f"c{number}"
        array = np.full((16, 16, 16), -1000, np.int16)
        array[8:, 8:, 8:] = 900 if bright else -990
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{case}.nii.gz")
        answer = "Yes" if bright else "No"
        for kind, wrong in (("nodule", False), ("cyst", False), ("chance", number % 4 == 0)):
            said = {"Yes": "No", "No": "Yes"}[answer] if wrong else answer
            rows.append(
                Row(
                    id=f"{case}-{kind}",
                    case=case,
                    split="test",
                    volume=f"{case}.nii.gz",
                    question=f"A {kind}?",
                    answer=said,
                    options=["No", "Yes"] if kind == "cyst" else None,
                    task="existence",
                    subtask=kind,
                )
            )
    train = [row.model_copy(update={"id": f"t{row.id}", "case": f"t{row.case}", "split": "train"}) for row in rows]
    write_manifest(tmp_path / "manifest.jsonl", [*rows, *train])
    config = make_config(tmp_path)
    write_step(config, 4)
    return config


def make_config(folder: Path, **evaluation: Any) -> Config:
    return Config.model_validate(
        {
            "recipe": "photon.phase2",
            "run": {"output": folder / "run"},
            "volume": VOLUME,
            "data": {"manifest": folder / "manifest.jsonl"},
            "model": Settings(),
            "training": {"max_steps": 1, "optimizer": {"lr": 0.1}},
            "evaluation": {"modes": MODES, "max_new_tokens": 4, **evaluation},
        }
    )


def write_step(config: Config, number: int, threshold: float = 0.5) -> None:
    checkpoints = config.run.output / "checkpoints"
    write_model(checkpoints / f"step_{number}" / "model", config.volume, threshold)
    (checkpoints / "latest").write_text(f"step_{number}\n")


def folder(config: Config) -> Path:
    return config.run.output / "evaluation" / "test"


def lines(config: Config, mode: str) -> list[dict[str, Any]]:
    text = (folder(config) / f"predictions-{mode}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_question_is_answered_in_every_mode_and_scored(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(config)
    assert FakeAdapter.calls.count((3, "scheduled")) == 16  # 8 volumes, as they are and zeroed; 3 questions a call
    assert FakeAdapter.calls.count((3, "none")) == FakeAdapter.calls.count((3, "random")) == 8
    assert len(FakeAdapter.calls) == 32
    for mode in MODES:
        assert [len({line["id"] for line in lines(config, mode)}), len(lines(config, mode))] == [24, 24]
    assert {line["prediction"] for line in lines(config, "zeroed")} == {"No", "A. No"}
    first = lines(config, "scheduled")[0]
    assert {key: first[key] for key in ("id", "prediction", "reference", "keep_rate", "tokens_before")} == {
        "id": "c0-nodule", "prediction": "Yes", "reference": "Yes", "keep_rate": 0.5, "tokens_before": 8
    }  # fmt: skip
    by_name = {row.subtask: row for row in results.rows}
    assert {name: by_name[name].modes["scheduled"].value for name in ("nodule", "cyst", "chance")} == {
        "nodule": 1, "cyst": 1, "chance": 0.75
    }  # fmt: skip
    assert by_name["nodule"].modes["zeroed"].value == by_name["nodule"].best_text_only == 0.5
    assert by_name[None].modes["random"].keep_rate == 0.5 and results.modes["none"].keep_rate == 1
    assert read_results(folder(config) / "results.json") == results
    table = (folder(config) / "table.md").read_text()
    assert "| existence | 24 | 50.0 |" in table and "| · chance | 8 | 50.0 | 75.0 | 75.0 |" in table
    assert "scheduled: 8.0 visual tokens before, 4.0 after" in table
    assert "0.250 s to the first token, 0.1000 s per further token" in table
    printed = capsys.readouterr().out
    assert "existence" in printed and "8.0 visual tokens before, 4.0 after" in printed


@pytest.mark.parametrize("tail", [b'{"id": "c1-nod', b"\0\0\0\n", b""], ids=["torn", "zeros", "whole"])
def test_it_goes_on_where_it_stopped(config: Config, tail: bytes) -> None:
    evaluate(config)
    before = {mode: lines(config, mode) for mode in MODES}
    FakeAdapter.calls.clear()
    file = folder(config) / "predictions-none.jsonl"
    kept = file.read_bytes().splitlines(keepends=True)[:4]
    file.write_bytes(b"".join(kept) + tail)
    evaluate(config)
    assert FakeAdapter.calls == [(2, "none"), *[(3, "none")] * 6]
    assert file.read_bytes().startswith(b"".join(kept))
    untimed = [[{**line, "seconds": 0} for line in each] for each in (lines(config, "none"), before["none"])]
    assert untimed[0] == untimed[1]
    assert lines(config, "scheduled") == before["scheduled"]


def test_rows_are_asked_together_if_their_study_prior_and_modality_are_the_same() -> None:
    given: list[dict[str, Any]] = [
        {"volume": "a"}, {"images": ["1", "2"]}, {"images": ["2", "1"]}, {"video": "v"}, {"volume": "a", "prior": "b"},
        {"volume": "a", "modality": "MR"}, {"volume": "a", "images": ["1"]},
    ]  # fmt: skip
    usual = {"case": "c", "split": "test", "question": "?", "answer": "Yes", "task": "t"}
    rows = [Row(id=f"{n}{k}", **usual, **fields) for k in range(3) for n, fields in enumerate(given)]
    found = [[row.id for row in work.rows] for work in group_by_study(rows, 2)]
    assert found == [ids for n in range(7) for ids in ([f"{n}0", f"{n}1"], [f"{n}2"])]


def test_an_emptied_study_has_nothing_to_see() -> None:
    array = np.arange(8, dtype=np.float32).reshape(2, 2, 2) - 1
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    shown = Shown([Prepared(array, np.eye(4), (2, 2, 2), np.eye(4))], [pixels[0]], [pixels])
    empty = shown.emptied()
    assert (empty.volumes[0].array == -1).all() and empty.volumes[0].array.shape == array.shape
    for before, after in ((shown.images[0], empty.images[0]), (shown.videos[0], empty.videos[0])):
        assert after.shape == before.shape and after.dtype == np.uint8 and not after.any()


def test_a_damaged_line_is_named(config: Config) -> None:
    evaluate(config)
    file = folder(config) / "predictions-none.jsonl"
    content = file.read_text().splitlines(keepends=True)
    file.write_text("".join([content[0], "nonsense\n", *content[1:]]))
    with pytest.raises(UserError, match=r"predictions-none\.jsonl:2: not a prediction"):
        read(file)


def test_predictions_of_another_checkpoint_are_moved_aside(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(config)
    write_step(config, 8, threshold=2.0)  # never sees anything
    results = evaluate(config)
    assert results.checkpoint == "step_8"
    assert {line["prediction"] for line in lines(config, "none")} == {"No", "A. No"}
    aside = config.run.output / "evaluation" / "test.step_4.1"
    assert read_results(aside / "results.json").checkpoint == "step_4"
    assert "test.step_4.1" in capsys.readouterr().err


def test_a_narrower_evaluation_is_part_of_a_wider_one(config: Config) -> None:
    whole = evaluate(config)
    FakeAdapter.calls.clear()
    narrow = make_config(config.data.manifest.parent, where={"subtask": ["cyst"]}, limit_volumes=3, modes=("none",))
    results = evaluate(narrow)
    assert FakeAdapter.calls == [] and results.modes["none"].questions == 3
    assert whole.modes["none"].questions == 24


def test_other_preprocessing_than_the_checkpoints_is_said(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(config.model_copy(update={"volume": config.volume.model_copy(update={"mean": 0.5})}))
    assert "volume.mean" in capsys.readouterr().err


def test_a_manifest_without_training_split_has_no_text_only_baseline(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config.data.model_copy(update={"train_split": "nothing"})
    results = evaluate(config.model_copy(update={"data": data}))
    assert results.rows[0].best_text_only is None
    assert "no text-only baseline" in capsys.readouterr().err
    file = str(folder(config) / "results.json")
    assert check_table([file, "--task", "existence", "--margin", "30", "--max-keep", "0.5"]) == 1


def test_questions_of_a_prior_scan_see_both_volumes_and_batches_are_limited(config: Config, tmp_path: Path) -> None:
    rows = [
        Row(
            id=str(number), case="a", split="test", volume="c1.nii.gz", prior="c0.nii.gz", question="Bright?",
            answer="Yes", task="static",
        )
        for number in range(5)
    ]  # fmt: skip
    write_manifest(tmp_path / "manifest.jsonl", [*rows, rows[0].model_copy(update={"id": "t", "split": "train"})])
    results = evaluate(make_config(tmp_path, modes=("scheduled",), batch_questions=2))
    assert FakeAdapter.calls == [(2, "scheduled"), (2, "scheduled"), (1, "scheduled")]
    assert results.modes["scheduled"].tokens_before == 16
    assert results.rows[0].modes["scheduled"].value == 1  # the prior is the bright one


# --- kept tokens --------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(config: Config, tmp_path: Path) -> Config:
    """The same questions with label maps: 1 where the bright token is, 2 in one that is dropped as dark."""
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[8:, 8:, 8:], labels[:8, :8, :8] = 1, 2
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "labels.nii.gz")
    meta = {"nodule": {"organ": "lung", "organ_labels": "1"}, "cyst": {"organ": "liver", "organ_labels": 2}}
    rows = [
        row.model_copy(update={"labels": "labels.nii.gz", "meta": meta.get(str(row.subtask), {})})
        for row in read_manifest(config.data.manifest)
    ]
    write_manifest(config.data.manifest, rows)
    return config


def retention(config: Config) -> Retention:
    return Retention.model_validate_json((folder(config) / "retention.json").read_text())


def test_statistics_of_kept_tokens_are_written(labelled: Config, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(labelled)
    assert lines(labelled, "scheduled")[0]["kept"] == {"grids": [[2, 2, 2]], "voxels": [4, 4, 4], "bits": "Dw=="}
    found = retention(labelled)
    assert (found.split, found.fingerprint, list(found.modes)) == (
        "test", results.fingerprint, ["scheduled", "random", "zeroed"]
    )  # fmt: skip
    scheduled = found.modes["scheduled"]
    assert (scheduled.questions, scheduled.without_mask) == (24, 0)
    lung, liver = (next(each for each in scheduled.coverage if each.name == name) for name in ("lung", "liver"))
    assert (lung.pooled, lung.voxels, lung.random, lung.others) == (1, 1, 0.5, 1)
    assert (liver.pooled, liver.voxels, liver.random, liver.volumes) == (0, 0, 0.5, 8)
    assert [(each.organs, each.value) for each in scheduled.dissimilarity] == [(("liver", "lung"), 0)]
    table = (folder(labelled) / "table.md").read_text()
    assert table.index("| existence | 24 |") < table.index("## Kept tokens (scheduled)")
    assert "| · lung | 8 | 8 | 0 | 100.0 | 50.0 | 100.0 | 100.0 | 50.0 | 100.0 |" in table
    assert "50.0 % of the tokens that hold the organ asked about are kept" in capsys.readouterr().out


def test_masks_need_not_be_kept(config: Config) -> None:
    off = make_config(config.data.manifest.parent, keep_masks=False, modes=("scheduled",))
    evaluate(off)
    assert lines(config, "scheduled")[0]["kept"] is None
    found = retention(config).modes["scheduled"]
    assert (found.questions, found.without_mask, found.coverage) == (0, 24, [])
    assert (found.tasks[0].tokens, found.tasks[0].keep_rate) == (4, 0.5)
    FakeAdapter.calls.clear()
    evaluate(make_config(config.data.manifest.parent, modes=("scheduled",)))
    assert FakeAdapter.calls == []  # answers are not asked for again to learn what was kept


def test_wrong_label_ids_are_found_before_any_answer(labelled: Config) -> None:
    with pytest.raises(UserError, match=r"row c0-nodule: meta\.subtask_labels: 'x' are no ids"):
        rows = read_manifest(labelled.data.manifest)
        write_manifest(
            labelled.data.manifest, [row.model_copy(update={"meta": {"subtask_labels": "x"}}) for row in rows]
        )
        evaluate(make_config(labelled.data.manifest.parent, finding_key="subtask"))
    assert FakeAdapter.calls == []


def test_a_label_map_of_another_grid_leaves_the_scores(labelled: Config, tmp_path: Path) -> None:
    nibabel.save(
        nibabel.Nifti1Image(np.ones((16, 16, 16), np.uint8), np.diag([2, 1, 1, 1])), tmp_path / "labels.nii.gz"
    )
    with pytest.raises(UserError, match="labels.nii.gz: this label map doesn't cover the same space"):
        evaluate(labelled)
    assert read_results(folder(labelled) / "results.json").modes["scheduled"].questions == 24


# --- check_table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--subtasks", "nodule,cyst"], 0, "scheduled 100.0, text-only 50.0, zeroed 50.0"),
        (["--subtasks", "chance"], 1, "wanted 30 points"),
        (["--subtasks", "nodule", "--max-keep", "0.4"], 1, "keep rate of at most 0.4"),
        (["--subtasks", "nodule", "--margin", "60"], 1, "wanted 60 points"),
        (["--subtasks", "tumour"], 2, "--subtasks tumour: not in the table"),
        (["--task", "phase"], 2, "--task phase: no sub-tasks of it in the table; known: existence"),
    ],
)
def test_the_table_is_checked(
    config: Config, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    evaluate(config)
    capsys.readouterr()
    usual = [
        str(folder(config) / "results.json"),
        "--task",
        "existence",
        "--margin",
        "30",
        "--max-keep",
        "0.5",
    ]
    assert check_table([*usual, *arguments]) == status
    shown = capsys.readouterr()
    assert says in (shown.out if status == 0 else shown.err)
    assert (shown.out + shown.err).count("\n") == 1


@pytest.mark.parametrize(("text_only", "zeroed", "holds"), [(0.5, 0.5, True), (0.8, 0.5, False), (0.5, 0.8, False)])
def test_both_baselines_have_to_be_beaten(config: Config, text_only: float, zeroed: float, holds: bool) -> None:
    results = evaluate(config)
    row = next(row for row in results.rows if row.subtask == "nodule")
    modes = row.modes | {"zeroed": row.modes["zeroed"].model_copy(update={"value": zeroed})}
    row = row.model_copy(update={"modes": modes, "text_only": {"a": 0.1, "b": text_only}})
    assert check(results.model_copy(update={"rows": [row]}), "existence", margin=30, max_keep=0.5)[0] is holds


def test_a_table_without_its_comparisons_fails(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evaluate(make_config(tmp_path, modes=("scheduled", "zeroed")))
    file = str(folder(config) / "results.json")
    assert check_table([file, "--task", "existence", "--margin", "30", "--max-keep", "0.5"]) == 1
    assert "no none, random in the table" in capsys.readouterr().err
    assert check_table([file + "x", "--task", "existence", "--margin", "30", "--max-keep", "0.5"]) == 2
    Path(file).write_text('{"checkpoint": 3}')
    assert check_table([file, "--task", "existence", "--margin", "30", "--max-keep", "0.5"]) == 2

"""benchmarks/pruners.py and pruner_accuracy.py: what they count and say of known results, and their quick paths."""

import dataclasses
import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import medpruner.methods
import medpruner.towers
from medpruner import METHODS, MedPruner
from mllm3d.config import VolumeConfig
from mllm3d.data.manifest import Row, write_manifest
from tests.medpruner.saved_slicewise import saved

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pruners(programs: None) -> Any:
    return importlib.import_module("pruners")


@pytest.fixture(scope="module")
def accuracy(programs: None) -> Any:
    return importlib.import_module("pruner_accuracy")


# --- speed ----------------------------------------------------------------------------------------------------


def a_scan(pruners: Any) -> Any:
    """Four slices of 2 x 2 tokens; the second and the fourth nearly repeat the one before."""
    slices = torch.rand(4, 16, 1176, generator=torch.Generator().manual_seed(0))
    slices[1::2] = slices[::2] + 0.01
    return pruners.Scan("scan", slices.flatten(0, 1), (4, 4, 4))


@pytest.fixture
def subject(pruners: Any) -> Any:
    return pruners.Subject(pruners.small_config(64, 2, 64, 4), a_scan(pruners), CPU, torch.float32)


def test_every_method_has_its_row(pruners: Any) -> None:
    rows = pruners.rows(0.2, 0.4)
    settings = [row.settings for row in rows if row.settings is not None]
    assert {s.name for s in settings} == set(METHODS)
    assert [row.name for row in rows if row.settings is None] == ["unpruned"] == [rows[0].name]
    by_name = {row.name: row.settings for row in rows}
    assert by_name["filtering"] == MedPruner(gamma=0.2)
    assert by_name["published"] == MedPruner(gamma=0.2, encode_dropped=True)
    assert by_name["medpruner"] == MedPruner()


def test_a_bisection_finds_what_rises_and_what_falls(pruners: Any) -> None:
    place, value = pruners.bisected(lambda x: x**2, 0.25, 0.0, 1.0)
    assert place == pytest.approx(0.5, abs=1e-3) and value == place**2
    assert pruners.bisected(lambda x: 1 - x, 0.25, 0.0, 1.0)[0] == pytest.approx(0.75, abs=1e-3)
    # Steps, and goals out of reach: the nearest that there is.
    assert pruners.bisected(lambda x: float(x > 0.3), 0.4, 0.0, 1.0)[1] == 0.0
    assert pruners.bisected(lambda x: 0.5 + x, 0.1, 0.0, 1.0) == (0.0, 0.5)


def test_the_filters_gamma_is_on_the_models_own_pixels(pruners: Any, tmp_path: Path) -> None:
    """A scan at two levels of the window, half of its slices: one change, of known size."""
    low, high = pruners.WINDOW
    array = np.full((32, 32, 8), low, np.float32)
    array[..., 4:] = low + 0.25 * (high - low)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "ct.nii")
    scan = pruners.read_scan(tmp_path / "ct.nii", None, 28, pruners.small_config())
    assert scan.grid == (4, 2, 2) and scan.pixels.shape == (16, 3 * 2 * 14 * 14)
    step = 0.25 * sum(1 / std for std in (0.26862954, 0.26130258, 0.27577711)) / 3  # mean over channels
    assert pruners.dropped_share(scan.slices, step - 1e-3) == 0.5
    assert pruners.dropped_share(scan.slices, step + 1e-3) == 0.75


def test_time_goes_to_the_part_that_takes_it(pruners: Any, subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only stands-in for work advance."""
    time = [0.0]

    def fake(_device: Any) -> float:
        return time[0]

    def advancing(owner: Any, name: str, by: float) -> None:
        function = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            time[0] += by
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(pruners, "now", fake)
    monkeypatch.setattr(sys.modules["measuring"], "now", fake)
    visual, language = subject.model.model.visual, subject.model.model.language_model
    advancing(visual.patch_embed, "forward", 100)
    advancing(language, "forward", 10_000)
    expected = {"tower": 100, "pruner": 0, "prefill": 10_000, "further tokens": 20_000, "together": 30_100}
    assert pruners.measure_once(subject, tokens=2) == expected
    advancing(medpruner.towers, "read", 1)
    advancing(medpruner.methods, "kept_slices", 2)
    with subject.pruning(pruners.Row("x", "x", MedPruner(gamma=0.05))):
        advancing(subject.model.medpruner, "_choose", 4)
        advancing(subject.model.medpruner.backbone, "positions", 1000)  # of the shorter prompt
        found = pruners.measure_once(subject, tokens=2)
    assert found == {**expected, "pruner": 1 + 2 + 4, "prefill": 11_000, "together": 31_107}


def made_up(pruners: Any, **rows: tuple[float, float, float]) -> dict[str, Any]:
    """Found by name from seconds of tower, pruner and rate of slices; two rounds, alike."""
    found = {}
    for name, (tower, pruner, slices) in rows.items():
        values = (tower, pruner, 4.0, 2.0, tower + pruner + 6.0)
        seconds = {phase: [value] * 2 for phase, value in zip(pruners.PHASES, values, strict=True)}
        found[name] = pruners.Found(seconds, peak=int(tower * 1e6), slices=5, tokens=20, slice_rate=slices)
    return found


@pytest.mark.parametrize(
    ("first", "overhead", "met"), [(6.5, 0.1, [True, True, False]), (6.0, 0.24, [True, False, True])]
)
def test_goals(pruners: Any, first: float, overhead: float, met: list[bool]) -> None:
    """Of 40 % dropped slices 36 % of the time have to be saved; the overhead has to be below 3 % of the tower's."""
    found = made_up(
        pruners, medpruner=(10.0, 0.1, 1.0), filtering=(first, overhead, 0.6), published=(10.0, overhead, 0.6)
    )
    checked = pruners.goals(found)
    assert [goal.met for goal in checked] == met
    assert "40.0% of the slices dropped" in checked[2].measured and checked[2].wanted == "at least 36.0%"
    assert checked[0].text == "pruner over tower (medpruner): 1.00% (goal below 3%): met"
    assert pruners.goals(made_up(pruners, unpruned=(1, 0, 1))) == []


def test_rows_show_medians_and_ratios(pruners: Any) -> None:
    found = made_up(pruners, unpruned=(10.0, 0.0, 1.0), medpruner=(5.0, 0.1, 0.5))
    found["medpruner"].seconds[pruners.TOWER] = [4.0, 6.0]
    chosen = [row for row in pruners.rows(0.2, 0.4) if row.name in found]
    plain, pruned = pruners.time_rows(chosen, found, 40)
    assert pruned[1:5] == ["5", "20", "50.0%", "5.000 (3.500-6.500)"] and len(plain) == len(pruned)
    plain, pruned = pruners.ratio_rows(chosen, found)
    assert plain[1:] == ["1.00", "1.00", "1.00", "1.00", "10", "1.00", ""]
    assert pruned[1:5] == ["0.50", "1.00", "1.00", f"{11.1 / 16:.2f}"] and pruned[5:7] == ["5", "0.50"]


def test_what_stays_is_counted(pruners: Any, subject: Any) -> None:
    rows = {row.name: row for row in pruners.rows(0.05, 0.5)}
    assert pruners.start(subject, rows["unpruned"]).tokens == 16
    found = pruners.start(subject, pruners.Row("x", "x", MedPruner(gamma=0.05, nucleus=False)))
    assert (found.slices, found.tokens, found.slice_rate) == (2, 8, 0.5) and found.peak > 0
    assert not hasattr(subject.model, "medpruner")


def test_interrupted_it_has_the_rounds_that_were_finished(
    pruners: Any, subject: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [row for row in pruners.rows(0.05, 0.5) if row.name in ("unpruned", "uniform")]
    calls: list[int] = []

    def measured(_subject: Any, _tokens: int) -> dict[str, float]:
        calls.append(len(calls))
        if len(calls) == limit:
            raise KeyboardInterrupt
        return dict.fromkeys(pruners.PHASES, float(len(calls)))

    monkeypatch.setattr(pruners, "measure_once", measured)
    limit = 4  # the second row's second time
    found = pruners.measure(subject, chosen, 3, 1)
    assert [found[row.name].seconds[pruners.TOWER] for row in chosen] == [[1.0], [2.0]]
    assert "interrupted: 1 of 3 rounds" in capsys.readouterr().out
    calls.clear()
    limit = 2
    with pytest.raises(KeyboardInterrupt):
        pruners.measure(subject, chosen, 3, 1)


def test_the_full_shape_is_the_3b_models(pruners: Any) -> None:
    config = pruners.full_config()
    assert (config.vision_config.depth, config.vision_config.hidden_size) == (32, 1280)
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (36, 2048)
    assert config.vision_config.out_hidden_size == 2048 and config.tie_word_embeddings


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pruners.py", *options])
    runpy.run_path(str(FOLDER / "pruners.py"), run_name="__main__")


def test_quick_path_of_the_speed(
    programs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "pruners.json"
    run(monkeypatch, "--quick", "--out", str(out))  # draws a phantom
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("| MedPruner") and "published" in line]) == 2
    assert printed.count("(goal ") == 3
    kept = json.loads(out.read_text())
    (scan,) = kept["scans"].values()
    assert set(scan["rows"]) == {row.name for row in sys.modules["pruners"].rows(0, 0)} and scan["grid"] == [10, 4, 4]
    for row in scan["rows"].values():
        assert all(len(times) == 1 for times in row["seconds"].values()) and row["peak"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", "photon"], "--rows: no photon"),
        (["--drop", "1"], "--drop"),
        (["--volume", "nowhere.nii.gz"], "--volume: nowhere.nii.gz"),
    ],
)
def test_options_that_make_no_sense(
    programs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "--quick", *options)
    assert left.value.code and says in f"{left.value} {capsys.readouterr().err}"


# --- accuracy -------------------------------------------------------------------------------------------------


def test_settings_keep_what_a_budget_says(accuracy: Any) -> None:
    for budget in accuracy.BUDGETS:
        for tokens in (64, 100, 36):
            keep = max(round(budget * tokens), 1)
            found = accuracy.counted(budget, tokens)
            assert int(found["hiprune"]["keep"] * tokens) == keep == round(found["random"]["keep"] * tokens)
            centres = int(found["visionzip"]["contextual"] * tokens)
            assert int(found["visionzip"]["keep"] * tokens) + centres == keep
            assert centres == round(keep * 5 / 70)


def test_what_chooses_for_itself_is_fitted(accuracy: Any) -> None:
    """Where the rate is known: tau squared, a tenth less without clusters, 1 less the threshold."""

    def rate(method: str, values: dict[str, Any]) -> float:
        if method == "hulu_l1":
            return float(max(1 - values["threshold"], 0.3))
        return float(values["tau"] ** 2 - (0 if values.get("clusters", True) else 0.1))

    clustered, alone, hulu = accuracy.fitted(0.25, rate)
    assert clustered.values["tau"] == pytest.approx(0.5, abs=1e-3) and clustered.values["centre_share"] == 0.025
    assert alone.values["tau"] == pytest.approx(0.35**0.5, abs=1e-3)
    assert rate("hulu_l1", hulu.values) == 0.3
    points = accuracy.at_budget(0.25, 64, rate)
    assert {point.method for point in points} == set(METHODS)
    assert [point.values["seed"] for point in points if point.method == "random"] == [0, 1, 2]


def outcome(accuracy: Any, group: str, name: str, mean: float, kept: float = 0.5) -> Any:
    findings = {finding: mean for finding in accuracy.FINDINGS}
    return accuracy.Outcome(
        accuracy.Point(group, name, "random"), kept, 1.0, mean, mean - 0.1, mean + 0.1, findings, 1.0
    )


@pytest.fixture
def outcomes(accuracy: Any) -> list[Any]:
    return [
        outcome(accuracy, "unpruned", "unpruned", 0.8, 1.0),
        outcome(accuracy, "budget 0.5", "medpruner", 0.75),
        *(outcome(accuracy, "budget 0.5", "random", mean) for mean in (0.5, 0.6, 0.7)),
        outcome(accuracy, "parts", "slice filter", 0.4),
        *(outcome(accuracy, "tau", f"{tau:g}", tau) for tau in (0.5, 0.9)),
    ]


def lines_of(text: str, title: str) -> dict[str, list[str]]:
    """A table's cells by the first one of their line."""
    table = text.partition(f"### {title}")[2].partition("\n### ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def test_tables(accuracy: Any, outcomes: list[Any]) -> None:
    text = accuracy.tables(outcomes)
    budget = lines_of(text, "Budget 0.5")
    assert budget[""] == ["unpruned", "medpruner", "random"]
    assert budget["splenomegaly"] == budget["mean"] == ["80.0", "75.0", "60.0"]  # draws averaged
    assert budget["interval"] == ["70.0-90.0", "65.0-85.0", "50.0-70.0"]  # of draws: the lowest and the highest
    assert budget["tokens kept"] == ["100.0", "50.0", "50.0"]
    assert lines_of(text, "Parts (Table 3)")["slice filter"][:4] == ["40.0", "30.0-50.0", "50.0", "50.0"]
    assert list(lines_of(text, "tau (Fig. 2)"))[2:] == ["unpruned", "0.5", "0.9"]


def test_results_are_read_again(
    accuracy: Any, outcomes: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy.keep(tmp_path / "accuracy.json", outcomes)
    assert accuracy.read_outcomes(tmp_path) == outcomes
    accuracy.show(tmp_path, outcomes)
    once = {name: (tmp_path / name).read_bytes() for name in ("table.md", "accuracy.png")}
    capsys.readouterr()
    accuracy.main(["--table", "--out", str(tmp_path)])
    assert "Budget 0.5" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in once} == once
    with pytest.raises(SystemExit, match="run without --table first"):
        accuracy.main(["--table", "--out", str(tmp_path / "empty")])


def test_quick_path_of_the_accuracy(accuracy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small model that knows nothing, and scans of noise: every point is asked, and kept tokens are as fitted."""
    (tmp_path / "volumes").mkdir()
    rows = []
    generator = np.random.default_rng(0)
    for number, split in enumerate(("validation", "test", "test", "test")):
        name = f"volumes/{number}.nii"
        array = generator.integers(-200, 300, (32, 32, 8)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name)
        for finding in (*accuracy.FINDINGS[:2], "lung nodule"):
            known = {"question": f"Is there {finding}?", "answer": "no", "task": "existence", "subtask": finding}
            meta = {"finding": finding}
            rows.append(Row(id=f"{number} {finding}", case=str(number), split=split, volume=name, meta=meta, **known))
    write_manifest(tmp_path / "manifest.jsonl", rows)
    volume = VolumeConfig(window_hu=(-200.0, 300.0), shape=(8, 32, 32), mean=0.5, std=0.5)
    folder = saved("qwen2_5_vl", tmp_path / "model", volume=volume)
    given = ["--checkpoint", str(folder), "--manifest", str(tmp_path / "manifest.jsonl"), "--out", str(tmp_path / "o")]
    accuracy.main(["--quick", *given])
    assert "2 volumes of 4 slices with 16 tokens, 4 questions" in capsys.readouterr().out
    found = accuracy.read_outcomes(tmp_path / "o")
    kept = {(of.point.group, of.point.name): of.kept for of in found}
    assert kept["unpruned", "unpruned"] == 1.0
    for method in ("visionzip", "hiprune", "random", "uniform"):
        assert kept["budget 0.5", method] == 0.5
    for method in ("medpruner", "medpruner, no clusters", "hulu_l1"):  # fitted on another volume, noise as this one
        assert kept["budget 0.5", method] == pytest.approx(0.5, abs=0.2)
    assert kept["tau", "0.5"] < kept["tau", "0.6"] < 1
    assert all(0 <= of.low <= of.mean <= of.high <= 1 for of in found)
    assert (tmp_path / "o/accuracy.png").stat().st_size > 10_000
    # Interrupted after five points: the others are as they were.
    accuracy.keep(tmp_path / "o/accuracy.json", found[:5])
    accuracy.main(["--quick", *given])
    again = [dataclasses.replace(of, seconds=0.0) for of in accuracy.read_outcomes(tmp_path / "o")]
    assert again == [dataclasses.replace(of, seconds=0.0) for of in found]
    with pytest.raises(SystemExit, match="made with other settings"):
        accuracy.main(given)

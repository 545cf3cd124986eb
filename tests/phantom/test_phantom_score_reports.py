"""Scores of generated reports, and of what they are compared with, on examples worked by hand."""

import json
from pathlib import Path

import pytest
import score_reports as program
from score_reports import ReportScores, score_reports

from mllm3d.data.manifest import Row, write_manifest
from mllm3d.errors import UserError
from mllm3d.evaluation.predictions import Sample, append

LEFT_CYST = "Solitary kidney cyst in the left kidney, 9 mm."
RIGHT_CYST = "Solitary kidney cyst in the right kidney, 9 mm."
RIGHT_TUMOUR = "One kidney tumour of 20 mm in the right kidney."
FATTY = "Fatty liver, 30 HU."
SPLEEN = "Splenomegaly with a volume of 400 ml."
NOTHING = "No liver lesion."
BROKEN = "the the spleen of"

TRAINING = [LEFT_CYST, RIGHT_CYST, f"{LEFT_CYST} {SPLEEN}", NOTHING]


def sample(number: int, reference: str, prediction: str, case: str | None = None, task: str = "report") -> Sample:
    return Sample(
        id=f"r{number}",
        case=case or f"c{number}",
        task=task,
        subtask="findings",
        question="Describe the findings.",
        options=None,
        reference=reference,
        prediction=prediction,
        keep_rate=1,
        tokens_before=8,
        tokens_after=8,
        seconds=1,
    )


SAMPLES = [sample(0, f"{LEFT_CYST} {RIGHT_TUMOUR}", f"{RIGHT_CYST} {FATTY}"), sample(1, SPLEEN, BROKEN)]


def figures(scores: ReportScores, of: str) -> dict[str, float]:
    return {name: getattr(figure, of) for name, figure in scores.figures.items()}


def expected(organ: tuple[float, float], finding: tuple[float, float], place: tuple[float, float]) -> dict[str, float]:
    """By name, from recall and precision; F1 is their harmonic mean."""
    found: dict[str, float] = {}
    for level, (recall, precision) in {"organ": organ, "finding": finding, "finding with place": place}.items():
        f1 = 2 / (1 / recall + 1 / precision) if recall and precision else 0.0
        found |= {f"{level} recall": recall, f"{level} precision": precision, f"{level} F1": f1}
    return found


def test_model_by_hand() -> None:
    """Organs: kidneys (right, and the place of two of three findings) and liver (wrong) are named."""
    scores = score_reports(SAMPLES, TRAINING)
    by_hand = expected(organ=(2 / 3, 1 / 2), finding=(1 / 3, 1 / 2), place=(0, 0))
    assert figures(scores, "model") == pytest.approx(by_hand)
    assert scores.figures["organ F1"].model == pytest.approx(4 / 7)
    assert (scores.reports, scores.broken, scores.training_reports) == (2, 1, 4)
    assert (scores.sentences, scores.known) == (3, 2)


def test_random_report_by_hand() -> None:
    """Named with probability: kidney cyst 3/4 (left 1/2, right 1/4), splenomegaly 1/4, in each of the two reports."""
    scores = score_reports(SAMPLES, TRAINING)
    organ = ((2 * 3 / 4 + 1 / 4) / 3, (3 / 4 + 1 / 4) / 2)
    finding = ((3 / 4 + 1 / 4) / 3, (3 / 4 + 1 / 4) / 2)
    place = ((1 / 2 + 1 / 4) / 3, (1 / 2 + 1 / 4) / 2)
    assert figures(scores, "random") == pytest.approx(expected(organ, finding, place))
    for figure in scores.figures.values():
        assert figure.difference == pytest.approx(figure.model - figure.random)


def test_random_recall_is_the_mean_over_all_training_reports() -> None:
    scores = score_reports(SAMPLES, TRAINING)
    every = [
        score_reports([one.model_copy(update={"prediction": text}) for one in SAMPLES], TRAINING) for text in TRAINING
    ]
    for name in ("organ recall", "finding recall", "finding with place recall"):
        mean = sum(one.figures[name].model for one in every) / len(every)
        assert scores.figures[name].random == pytest.approx(mean)


def test_most_frequent_by_hand() -> None:
    """Three of four training reports affirm a kidney cyst; only half of them one in the left kidney."""
    scores = score_reports(SAMPLES, TRAINING)
    by_hand = expected(organ=(2 / 3, 1 / 2), finding=(1 / 3, 1 / 2), place=(0, 0))
    assert figures(scores, "most_frequent") == pytest.approx(by_hand)


def test_both_sides_are_two_places_and_one_finding() -> None:
    both = "Bilateral pleural effusion, up to 20 mm thick."
    scores = score_reports([sample(0, both, "Left-sided pleural effusion, up to 9 mm thick.")], TRAINING)
    assert figures(scores, "model") == pytest.approx(expected((1, 1), (1, 1), place=(1 / 2, 1)))


def test_an_organ_with_two_findings_is_named_once() -> None:
    kidneys = f"{LEFT_CYST} {RIGHT_TUMOUR}"
    scores = score_reports([sample(0, LEFT_CYST, f"{kidneys} {FATTY}")], [kidneys, FATTY])
    assert (scores.figures["organ precision"].model, scores.figures["organ precision"].random) == (1 / 2, 1 / 2)


def test_training_reports_without_findings_score_nothing() -> None:
    scores = score_reports(SAMPLES, [NOTHING])
    assert set(figures(scores, "random").values()) == set(figures(scores, "most_frequent").values()) == {0.0}
    healthy = score_reports([sample(0, NOTHING, NOTHING)], [NOTHING])
    assert set(figures(healthy, "model").values()) == {0.0} and healthy.broken == 0


def test_interval_of_the_difference_resamples_patients() -> None:
    right, wrong = (SPLEEN, SPLEEN), (SPLEEN, FATTY)
    apart = [sample(number, *(right if number % 2 else wrong)) for number in range(40)]
    figure = score_reports(apart, [NOTHING]).figures["finding recall"]
    # Half of 40 are right: a standard error of 0.5 / sqrt(40) = 0.079, times 1.96.
    assert (figure.low, figure.high) == pytest.approx((0.5 - 0.155, 0.5 + 0.155), abs=0.03)
    together = [sample(number, *(right if number % 2 else wrong), case=f"c{number // 2}") for number in range(40)]
    figure = score_reports(together, [NOTHING]).figures["finding recall"]
    assert (figure.low, figure.high) == pytest.approx((0.5, 0.5))


def test_interval_is_of_the_difference_and_not_of_the_model() -> None:
    """What is always named, by the model as by a random report, leaves nothing to vary."""
    same = [sample(number, SPLEEN if number % 2 else FATTY, SPLEEN) for number in range(20)]
    for figure in score_reports(same, [SPLEEN]).figures.values():
        assert (figure.difference, figure.low, figure.high) == (0, 0, 0)


def test_only_reports_of_this_data_can_be_references() -> None:
    with pytest.raises(UserError, match="r3: .*not a report of"):
        score_reports([sample(3, f"{SPLEEN} Gallstones.", SPLEEN)], TRAINING)
    with pytest.raises(UserError, match="training report 2"):
        score_reports(SAMPLES, [SPLEEN, "Gallstones."])


# ---- the command ----


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and manifest of the example, with rows of other tasks and splits that must not count."""
    texts = [("train", text) for text in TRAINING] + [("validation", FATTY)]
    texts = [("test", one.reference) for one in SAMPLES] + texts
    rows = [
        Row(id=f"r{n}", case=f"c{n}", split=split, volume="v.nii.gz", question="?", answer=text, task="report")
        for n, (split, text) in enumerate(texts)
    ]
    other = Row(id="x", case="c3", split="train", volume="v.nii.gz", question="?", answer="yes", task="existence")
    write_manifest(tmp_path / "manifest.jsonl", [*rows, other])
    with (tmp_path / "none.jsonl").open("w") as stream:
        append(stream, [*SAMPLES, sample(9, "yes", "no", task="existence")])
    return tmp_path / "none.jsonl", tmp_path / "manifest.jsonl"


def run(predictions: Path, manifest: Path, *extra: str) -> None:
    program.main(["--predictions", str(predictions), "--manifest", str(manifest), *extra])


def test_command(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*files, "--json", str(tmp_path / "out" / "scores.json"))
    stored = ReportScores.model_validate(json.loads((tmp_path / "out" / "scores.json").read_text()))
    assert stored == score_reports(SAMPLES, TRAINING)
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.strip().startswith("organ recall"))
    assert row[2:5] == ["66.7", "58.3", "+8.3"] and row[-1] == "66.7"
    assert len([line for line in lines if line.strip().startswith(("organ", "finding"))]) == 9
    assert lines[-1] == (
        "2 reports, 1 of them without a known sentence; 2 of 3 sentences are known; 4 training reports"
    )


def test_wrong_files_are_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, manifest = files
    with pytest.raises(SystemExit, match=r"score_reports.py: .*gone.jsonl: no such file; run the evaluation first"):
        run(tmp_path / "gone.jsonl", manifest)
    with pytest.raises(SystemExit, match=r"gone.jsonl: cannot be read"):
        run(predictions, tmp_path / "gone.jsonl")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows if row["id"] != "r1"))
    with pytest.raises(SystemExit, match=r"r1 is not a report of .*other.jsonl"):
        run(predictions, other)
    other.write_text("".join(json.dumps(row) + "\n" for row in rows if row["split"] == "test"))
    with pytest.raises(SystemExit, match="2 predictions and 0 training reports"):
        run(predictions, other)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]

"""Rules of right and wrong, baselines, intervals: against figures worked out by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from mllm3d.data.manifest import Row
from mllm3d.evaluation.answers import first_number, mean_relative_accuracy, normalise, sample_score
from mllm3d.evaluation.predictions import Sample
from mllm3d.evaluation.scoring import bootstrap, mean_over_subtasks, score, summarise, yes_no
from mllm3d.evaluation.text_only import fit_rules


def sample(prediction: str, reference: str, **given: object) -> Sample:
    usual = {"id": "1", "case": "a", "task": "existence", "subtask": None, "question": "?", "options": None}
    cost = {"keep_rate": 0.5, "tokens_before": 8, "tokens_after": 4, "seconds": 0.5}
    return Sample.model_validate({**usual, **cost, "prediction": prediction, "reference": reference, **given})


def row(answer: str, question: str = "?", options: Sequence[str] | None = None, **given: object) -> Row:
    usual = {"id": "1", "case": "t", "split": "train", "volume": "v.nii", "task": "existence"}
    return Row.model_validate(
        {
            **usual,
            "question": question,
            "answer": answer,
            "options": list(options) if options else None,
            **given,
        }
    )


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        *[("B", 1), ("B. Left lung", 1), ("left lung", 1), ("(B)", 1)],
        *[("A", 0), ("Because of that", 0), ("B. Liver", 0), ("It is B", 0), ("", 0)],
    ],
)
def test_closed_answers_are_read_strictly(prediction: str, expected: float) -> None:
    assert sample_score(sample(prediction, "Left lung", options=["Liver", "Left lung"])) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"), [("Yes", 1), (" yes. ", 1), ("Yes, it does", 0), ("no", 0), ("", 0)]
)
def test_open_answers_match_but_for_case_and_edges(prediction: str, expected: float) -> None:
    assert sample_score(sample(prediction, "yes")) == expected


def test_normalise_keeps_what_is_inside() -> None:
    assert normalise('  "Right-sided,  1.5 mm."\n') == "right-sided, 1.5 mm"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("about 1,234.5 ml", 1234.5), ("-50 HU", -50), ("\u221250 HU", -50)],
        *[("L1-2", 1), ("10-15 mm", 10), ("none", None)],
    ],
)
def test_first_number(text: str, number: float | None) -> None:
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (100, 100, 1.0),
        (96, 100, 1.0),  # 0.04 is below all of 0.50 ... 0.05
        (95, 100, 0.9),  # 0.05 is not below 0.05
        (130, 100, 0.4),  # below 0.50, 0.45, 0.40, 0.35
        (150, 100, 0.0),
        (None, 100, 0.0),
        (-40, -50, 0.6),
        (1, 0, 0.0),  # the truth counts as 1e-6
        (0, 0, 1.0),
    ],
)
def test_mean_relative_accuracy(prediction: float | None, truth: float, expected: float) -> None:
    assert mean_relative_accuracy(prediction, truth) == pytest.approx(expected)


def test_only_the_nine_numeric_subtasks_are_scored_by_distance() -> None:
    assert sample_score(sample("96 ml", "100 ml", subtask="Organ volume_measurement")) == 1
    assert sample_score(sample("96 ml", "100 ml", subtask="ratio")) == 0
    assert sample_score(sample("100 ml", "100 ml", subtask="ratio")) == 1
    closed = sample("B", "100 ml", subtask="organ volume measurement", options=["10 ml", "100 ml"])
    assert sample_score(closed) == 1


def test_text_only_rules_say_the_most_frequent_training_answer() -> None:
    train = [
        *[row("Yes", "Is X there?", subtask="x")] * 3,
        *[row("No", "Any X?", subtask="x")] * 2,
        *[row("No", "Is Y there?", subtask="y")] * 4,
    ]
    rules = fit_rules(train)

    def answers(question: str, subtask: str) -> list[str]:
        return [rule.predict(row("?", question, subtask=subtask), "Yes") for rule in rules.values()]

    assert list(rules) == ["majority per task", "majority per sub-task", "majority per question"]
    assert answers("any x?", "x") == ["no", "yes", "no"]
    assert answers("Is X there?", "x") == ["no", "yes", "yes"]
    assert answers("Z?", "z") == ["no", "no", "no"]  # never seen: the task's majority


def test_text_only_rules_choose_among_the_options_by_text_and_use_the_median_of_numbers() -> None:
    train = [
        row("liver", options=["liver", "spleen"]),
        *[row(f"{n} ml", subtask="lesion counting") for n in (1, 4, 9)],
    ]
    rule = fit_rules(train)["majority per task"]
    assert rule.predict(row("Spleen", options=["Spleen", "Liver"]), "Spleen") == "Liver"
    assert rule.predict(row("aorta", options=["aorta", "heart"]), "heart") == "aorta"  # nothing known: the first
    assert rule.predict(row("5 ml", subtask="lesion counting"), "5 ml") == "4.0"


def test_baselines_never_see_the_evaluated_answers() -> None:
    items = [sample("Yes", "Yes", id=str(n), case=str(n)) for n in range(4)]
    found = score({"scheduled": items}, [row("No")])[0]
    assert found.best_text_only == 0 and found.modes["scheduled"].value == 1
    assert score({"scheduled": items}, [])[0].best_text_only is None


def test_a_task_is_the_plain_mean_of_its_subtasks() -> None:
    items = [
        sample("Yes", "Yes", id="1", case="a", subtask="x"),
        sample("Yes", "No", id="2", case="b", subtask="x"),
        sample("Yes", "No", id="3", case="a", subtask="x"),
        sample("Yes", "No", id="4", case="b", subtask="x"),
        sample("No", "No", id="5", case="a", subtask="y"),
    ]
    task, x, y = score({"scheduled": items, "none": items}, [row("No", subtask="x")])
    assert (task.subtask, x.subtask, y.subtask) == (None, "x", "y")
    assert (task.questions, task.cases, x.questions) == (5, 2, 4)
    assert [entry.modes["none"].value for entry in (task, x, y)] == [0.625, 0.25, 1.0]
    assert [entry.best_text_only for entry in (task, x, y)] == [0.875, 0.75, 1.0]
    assert task.chance == 0.5 and x.modes["scheduled"].keep_rate == 0.5
    figures = x.modes["scheduled"].yes_no
    assert figures is not None and y.modes["scheduled"].yes_no is None
    assert (figures.sensitivity, figures.specificity, figures.balanced_accuracy, figures.mcc) == (
        1,
        0,
        0.5,
        0,
    )


def test_matthews_correlation_by_hand() -> None:
    right = np.array([1, 1, 1, 0, 1, 0], float)
    figures = yes_no(right, ["yes"] * 4 + ["No"] * 2)  # tp 3, fn 1, tn 1, fp 1
    assert figures is not None
    assert figures.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert figures.mcc == pytest.approx((3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2))


def test_interval_of_independent_patients_is_that_of_a_proportion() -> None:
    values = np.array([1.0] * 80 + [0.0] * 20)
    low, high = bootstrap(values, [None] * 100, [str(n) for n in range(100)])
    assert (low, high) == pytest.approx((0.72, 0.88), abs=0.015)  # 0.8 -+ 1.96 * sqrt(0.8 * 0.2 / 100)


def test_interval_resamples_patients_not_questions() -> None:
    values = np.array([1.0] * 80 + [0.0] * 20)
    cases = [str(n // 20) for n in range(100)]  # 5 patients, 4 all right and 1 all wrong
    low, high = bootstrap(values, [None] * 100, cases)
    assert low <= 0.4 and high == 1


def test_interval_of_a_mean_over_subtasks_holds_it() -> None:
    values, subtasks = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), ["x", "x", "x", "y", "y"]
    low, high = bootstrap(values, subtasks, list("abcde"))
    mean = mean_over_subtasks(values, subtasks)
    assert mean == pytest.approx((2 / 3 + 1 / 2) / 2) and low < mean < high


def test_summary_adds_up() -> None:
    found = summarise([sample("a", "a", tokens_after=2, keep_rate=0.25), sample("a", "a", seconds=1.5)])
    assert (found.tokens_before, found.tokens_after, found.keep_rate) == (8, 3, 0.375)
    assert (found.seconds_total, found.seconds_per_question, found.questions) == (2.0, 1.0, 2)
    assert found.seconds_to_first_token is None and found.seconds_per_further_token is None


def test_first_and_further_tokens_are_timed_apart() -> None:
    samples = [
        sample("a", "a", seconds_first=0.2, seconds_last=1.0, new_tokens=5),
        sample("a", "a", seconds_first=0.4, seconds_last=0.4, new_tokens=1),
        sample("a", "a", seconds_first=0.9, seconds_last=1.1, new_tokens=2),
    ]
    found = summarise([*samples, sample("a", "a")])  # the last is of a file written before there were such times
    assert found.seconds_to_first_token == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    assert found.seconds_per_further_token == pytest.approx((0.8 + 0.2) / 5)
    assert summarise(samples[1:2]).seconds_per_further_token is None

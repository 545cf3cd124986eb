"""Scores per task and sub-task beside text-only baselines, from predictions alone.

A task's score is the plain mean over its sub-tasks, as 3D-RAD and DeepTumorVQA have it; intervals resample
patients.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field

from mllm3d.config import Settings
from mllm3d.evaluation.answers import is_numeric, normalise, sample_score
from mllm3d.evaluation.predictions import Sample
from mllm3d.evaluation.text_only import Answered, fit_rules

RESAMPLES = 2000
Name = TypeVar("Name")


class YesNo(Settings):
    """Figures for questions whose answer is yes or no; an answer that is neither counts as the wrong one."""

    sensitivity: float = Field(description="Share of the yes that were answered yes.")
    specificity: float = Field(description="Share of the no that were answered no.")
    balanced_accuracy: float = Field(description="Mean of the two.")
    mcc: float = Field(description="Matthews correlation coefficient; 0 where it is undefined.")


class Score(Settings):
    """One cell: a mean and its 95 % interval over patients, in [0, 1]."""

    value: float = Field(description="Plain mean over sub-tasks of the mean score.")
    low: float = Field(description="2.5th percentile over resampled patients.")
    high: float = Field(description="97.5th percentile.")
    keep_rate: float = Field(description="Mean share of visual tokens kept in the row's questions.")
    yes_no: YesNo | None = Field(description="Given where every reference is yes or no and both occur.")


class TableRow(Settings):
    """One task, or one sub-task of it."""

    task: str = Field(description="Task.")
    subtask: str | None = Field(description="Sub-task or finding; null: the whole task.")
    metric: Literal["accuracy", "mean relative accuracy", "both"] = Field(description="What the scores are.")
    questions: int = Field(description="Questions in the row.")
    cases: int = Field(description="Patients in the row.")
    chance: float = Field(description="Expected score of guessing among the options (0 for open questions).")
    text_only: dict[str, float] = Field(description="Score of each text-only rule, fitted on the training split.")
    modes: dict[str, Score] = Field(description="Score of the model per mode.")

    @property
    def best_text_only(self) -> float | None:
        """The best text-only rule's score; None if there was no training split to fit one on."""
        return max(self.text_only.values(), default=None)


class ModeSummary(Settings):
    """What answering in one mode took."""

    questions: int = Field(description="Questions answered.")
    keep_rate: float = Field(description="Mean share of visual tokens kept.")
    tokens_before: float = Field(description="Mean visual tokens per question before the scheduling layer.")
    tokens_after: float = Field(description="Mean visual tokens per question after it.")
    seconds_total: float = Field(description="Wall time of all answers.")
    seconds_per_question: float = Field(description="The same per question.")
    seconds_to_first_token: float | None = Field(
        default=None, description="Mean wait for an answer's first token, the encoding of the volumes included."
    )
    seconds_per_further_token: float | None = Field(default=None, description="Mean wait for each token after it.")


def score(samples: Mapping[str, Sequence[Sample]], train: Sequence[Answered]) -> list[TableRow]:
    """Rows by task, each followed by its sub-tasks. samples: mode -> the same questions in the same order."""
    first = next(iter(samples.values()))
    scores = {mode: np.array([sample_score(item) for item in items]) for mode, items in samples.items()}
    rules = {
        name: np.array([sample_score(item, rule.predict(item, item.reference)) for item in first])
        for name, rule in (fit_rules(train) if train else {}).items()
    }
    keep = {mode: np.array([item.keep_rate for item in items]) for mode, items in samples.items()}
    rows = []
    for task in _unique(item.task for item in first):
        subtasks = _unique(item.subtask for item in first if item.task == task)
        for subtask in [None, *(name for name in subtasks if name is not None)]:
            where = np.array([item.task == task and subtask in (None, item.subtask) for item in first])
            chosen = [item for item, inside in zip(first, where, strict=True) if inside]
            cells = {mode: _cell(scores[mode][where], keep[mode][where], chosen) for mode in samples}
            rows.append(_row(task, subtask, chosen, cells, {name: values[where] for name, values in rules.items()}))
    return rows


def summarise(samples: Sequence[Sample]) -> ModeSummary:
    """Mean tokens and the time of one mode."""
    seconds = float(sum(item.seconds for item in samples))
    first = [item.seconds_first for item in samples if item.seconds_first is not None]
    return ModeSummary(
        questions=len(samples),
        keep_rate=float(np.mean([item.keep_rate for item in samples])),
        tokens_before=float(np.mean([item.tokens_before for item in samples])),
        tokens_after=float(np.mean([item.tokens_after for item in samples])),
        seconds_total=seconds,
        seconds_per_question=seconds / len(samples),
        seconds_to_first_token=float(np.mean(first)) if first else None,
        seconds_per_further_token=_per_further_token(samples),
    )


def _per_further_token(samples: Sequence[Sample]) -> float | None:
    """Seconds between an answer's first and last token by the tokens after the first, over all answers."""
    seconds, tokens = 0.0, 0
    for item in samples:
        if item.seconds_first is not None and item.seconds_last is not None and item.new_tokens is not None:
            seconds += item.seconds_last - item.seconds_first
            tokens += item.new_tokens - 1
    return seconds / tokens if tokens else None


def mean_over_subtasks(values: np.ndarray, subtasks: Sequence[str | None]) -> float:
    """Mean per sub-task, then the plain mean of those."""
    names = np.array([name or "" for name in subtasks])
    return float(np.mean([values[names == name].mean() for name in _unique(names.tolist())]))


def bootstrap(values: np.ndarray, subtasks: Sequence[str | None], cases: Sequence[str]) -> tuple[float, float]:
    """95 % interval of `mean_over_subtasks` when patients are drawn again with replacement (seed fixed)."""
    _, case = np.unique(np.array(cases), return_inverse=True)
    _, subtask = np.unique(np.array([name or "" for name in subtasks]), return_inverse=True)
    sums, counts = (np.zeros((case.max() + 1, subtask.max() + 1)) for _ in range(2))
    np.add.at(sums, (case, subtask), values)
    np.add.at(counts, (case, subtask), 1)
    draws = _draws(len(sums))
    drawn = draws @ counts
    means = np.divide(draws @ sums, drawn, out=np.full(drawn.shape, np.nan), where=drawn > 0)
    low, high = np.percentile(np.nanmean(means, axis=1), [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _draws(cases: int) -> np.ndarray:
    """How often each patient is drawn in each resample, (RESAMPLES, cases)."""
    return np.random.default_rng(0).multinomial(cases, np.full(cases, 1 / cases), RESAMPLES)


def yes_no(values: np.ndarray, references: Sequence[str]) -> YesNo | None:
    """Figures from right (1) and wrong (0) per question; None unless the references are yes and no."""
    names = np.array([normalise(reference) for reference in references])
    if set(names.tolist()) != {"yes", "no"}:
        return None
    right_yes, right_no = values[names == "yes"], values[names == "no"]
    tp, tn = right_yes.sum(), right_no.sum()
    fn, fp = len(right_yes) - tp, len(right_no) - tn
    root = float(np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    sensitivity, specificity = float(right_yes.mean()), float(right_no.mean())
    return YesNo(
        sensitivity=sensitivity,
        specificity=specificity,
        balanced_accuracy=(sensitivity + specificity) / 2,
        mcc=float(tp * tn - fp * fn) / root if root else 0.0,
    )


def _cell(values: np.ndarray, keep: np.ndarray, samples: Sequence[Sample]) -> Score:
    subtasks = [item.subtask for item in samples]
    low, high = bootstrap(values, subtasks, [item.case for item in samples])
    return Score(
        value=mean_over_subtasks(values, subtasks),
        low=low,
        high=high,
        keep_rate=float(keep.mean()),
        yes_no=yes_no(values, [item.reference for item in samples]),
    )


def _row(
    task: str,
    subtask: str | None,
    samples: Sequence[Sample],
    cells: dict[str, Score],
    rules: Mapping[str, np.ndarray],
) -> TableRow:
    subtasks = [item.subtask for item in samples]
    numeric = [is_numeric(item.subtask, item.options, item.reference) for item in samples]
    return TableRow(
        task=task,
        subtask=subtask,
        metric="mean relative accuracy" if all(numeric) else "both" if any(numeric) else "accuracy",
        questions=len(samples),
        cases=len({item.case for item in samples}),
        chance=mean_over_subtasks(np.array([_chance(item) for item in samples]), subtasks),
        text_only={name: mean_over_subtasks(values, subtasks) for name, values in rules.items()},
        modes=cells,
    )


def _chance(sample: Sample) -> float:
    if sample.options is not None:
        return 1 / len(sample.options)
    return 0.5 if normalise(sample.reference) in ("yes", "no") else 0.0


def _unique(items: Iterable[Name]) -> list[Name]:
    """In the order of first appearance."""
    return list(dict.fromkeys(items))

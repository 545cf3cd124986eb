"""Score generated reports by what they affirm, beside reports that were written without looking.

    python data/phantom/score_reports.py --predictions runs/X/evaluation/test/predictions-none.jsonl --manifest MANIFEST

For organs, findings, and findings with their place: recall is the share of the reference's findings that the
report names (for organs: of those whose organ it calls abnormal), precision the share of what it names that the
reference names too. Both are pooled over all reports, and 0 where nothing is named. A report drawn at random
from the training split is scored by its expected counts over all training reports; "most frequent" affirms in
every report what more than half of them affirm. README.md tells more.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

try:
    from mllm3d.config import Settings
    from mllm3d.data.files import write_atomically
    from mllm3d.data.manifest import Row, read_manifest
    from mllm3d.errors import UserError
    from mllm3d.evaluation.predictions import Sample, read
    from mllm3d.evaluation.scoring import RESAMPLES
    from mllm3d.evaluation.tables import print_rows
except ModuleNotFoundError:
    sys.exit("score_reports.py: mllm3d is not installed; run `pip install .` in the repository's root")

from read_report import Reading, organ_of, read_report

TASK = "report"
MEASURES = ("recall", "precision", "F1")
LEVELS: dict[str, Callable[[Reading], Iterable[Hashable]]] = {
    "organ": lambda reading: [organ_of(finding) for finding in reading.findings],
    "finding": lambda reading: reading.findings,
    "finding with place": lambda reading: reading.affirmed,
}
"""What a report names at each level; an organ as often as it has findings."""


class Figure(Settings):
    """One measure, in [0, 1]."""

    model: float = Field(description="Of the predictions.")
    random: float = Field(description="Expected of a report drawn at random from the training split.")
    most_frequent: float = Field(description="Of what more than half of the training reports affirm.")
    difference: float = Field(description="The model less the random report.")
    low: float = Field(description="2.5th percentile of the difference over resampled patients.")
    high: float = Field(description="97.5th percentile.")


class ReportScores(Settings):
    """What the predictions' reports affirm against what they should."""

    reports: int = Field(description="Reports scored.")
    broken: int = Field(description="Those without a single sentence that report.py could have written.")
    sentences: int = Field(description="Sentences of all reports.")
    known: int = Field(description="Those that report.py could have written.")
    training_reports: int = Field(description="Reports that the comparisons are made of.")
    figures: dict[str, Figure] = Field(description='By level and measure: "organ recall".')


def score_reports(samples: Sequence[Sample], training: Sequence[str]) -> ReportScores:
    """Score predicted reports beside what the training reports would have scored in their place.

    Raises:
        UserError: no reports, or references that are not of ``report.py``.
    """
    if not samples or not training:
        raise UserError(f"{len(samples)} predictions and {len(training)} training reports of task {TASK}; give both")
    given = [read_report(sample.prediction) for sample in samples]
    references = [_reference(sample.reference, sample.id) for sample in samples]
    drawn = [_reference(text, f"training report {number}") for number, text in enumerate(training, 1)]
    cases = [sample.case for sample in samples]
    figures = {}
    for level, names in LEVELS.items():
        wanted, named, known = _count(*([names(reading) for reading in part] for part in (references, given, drawn)))
        for measure, figure in _figures(wanted, named > 0, known > 0, cases).items():
            figures[f"{level} {measure}"] = figure
    return ReportScores(
        reports=len(given),
        broken=sum(not reading.known for reading in given),
        sentences=sum(reading.sentences for reading in given),
        known=sum(reading.known for reading in given),
        training_reports=len(drawn),
        figures=figures,
    )


def _reference(text: str, name: str) -> Reading:
    reading = read_report(text)
    if reading.known < reading.sentences or not reading.known:
        raise UserError(f"{name}: {text[:60]!r} is not a report of data/phantom/report.py; score others by their text")
    return reading


def _count(*parts: Sequence[Iterable[Hashable]]) -> list[np.ndarray]:
    """How often each report names each key, (reports, keys) for each part; the keys are those of all parts."""
    keys = list(dict.fromkeys(key for part in parts for names in part for key in names))
    counted = [[Counter(names) for names in part] for part in parts]
    return [np.array([[counts[key] for key in keys] for counts in part]) for part in counted]


def _figures(wanted: np.ndarray, named: np.ndarray, known: np.ndarray, cases: Sequence[str]) -> dict[str, Figure]:
    """By measure.

    Args:
        wanted: (reports, keys) how often the reference names each key.
        named: (reports, keys) whether the predicted report does.
        known: (training reports, keys) whether the training report does.
        cases: the reports' patients.
    """
    share = known.mean(axis=0)
    model, random, frequent = (_counts(wanted, naming) for naming in (named, share, share > 0.5))
    values = np.stack([_measures(counts.sum(axis=0)) for counts in (model, random, frequent)], axis=1)
    intervals = zip(*_interval(model, random, cases), strict=True)
    return {
        measure: Figure(model=one, random=other, most_frequent=most, difference=one - other, low=low, high=high)
        for measure, (one, other, most), (low, high) in zip(MEASURES, values.tolist(), intervals, strict=True)
    }


def _counts(wanted: np.ndarray, naming: np.ndarray) -> np.ndarray:
    """Per report: findings wanted, those found, things named, those that are right, (reports, 4).

    wanted: (reports, keys) counts. naming: (reports, keys) or (keys,), the probability that a key is named;
    the counts are linear in it, so that they are the expected ones of a report that is drawn.
    """
    naming = np.broadcast_to(np.asarray(naming, float), wanted.shape)
    columns = (wanted, wanted * naming, naming, (wanted > 0) * naming)
    return np.stack([column.sum(axis=1) for column in columns], axis=1)


def _measures(counts: np.ndarray) -> np.ndarray:
    """(..., 4) counts to (..., 3) recall, precision and F1; 0 where there is nothing to divide by."""
    wanted, found, named, right = np.moveaxis(np.asarray(counts, float), -1, 0)
    recall, precision = _ratio(found, wanted), _ratio(right, named)
    return np.stack([recall, precision, _ratio(2 * recall * precision, recall + precision)], axis=-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _interval(model: np.ndarray, random: np.ndarray, cases: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each measure's difference when patients are drawn again with replacement (seed fixed)."""
    names, case = np.unique(np.array(cases), return_inverse=True)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    one, other = (_measures(drawn[:, case] @ counts) for counts in (model, random))
    low, high = np.percentile(one - other, [2.5, 97.5], axis=0)
    return low, high


def print_scores(scores: ReportScores) -> None:
    """The table, and a line on the reports."""
    header = ["", "model", "random report", "difference", "95 % from", "to", "most frequent"]
    rows = []
    for name, figure in scores.figures.items():
        model, random, most = (f"{100 * value:.1f}" for value in (figure.model, figure.random, figure.most_frequent))
        difference, low, high = (f"{100 * value:+.1f}" for value in (figure.difference, figure.low, figure.high))
        rows.append([name, model, random, difference, low, high, most])
    print_rows(header, rows)
    print(
        f"{scores.reports} reports, {scores.broken} of them without a known sentence; "
        f"{scores.known} of {scores.sentences} sentences are known; {scores.training_reports} training reports"
    )


def load(predictions: Path, manifest: Path) -> tuple[list[Sample], list[Row]]:
    """The predicted reports and the training split's rows of reports."""
    if not predictions.is_file():
        raise UserError(f"{predictions}: no such file; run the evaluation first")
    samples = [sample for sample in read(predictions) if sample.task == TASK]
    rows = {row.id: row for row in read_manifest(manifest) if row.task == TASK}
    for sample in samples:
        if sample.id not in rows:
            raise UserError(f"{predictions}: {sample.id} is not a report of {manifest}; give the manifest it was of")
    return samples, [row for row in rows.values() if row.split == "train"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predictions", type=Path, required=True, help="JSON Lines that an evaluation wrote")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest with the training split's reports")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args(arguments)
    try:
        samples, training = load(args.predictions, args.manifest)
        scores = score_reports(samples, [row.answer for row in training])
        if args.json:
            write_atomically(args.json, (scores.model_dump_json(indent=2) + "\n").encode())
    except UserError as error:
        sys.exit(f"score_reports.py: {error}")
    except OSError as error:
        sys.exit(f"score_reports.py: {error.filename or args.json}: {error.strerror}")
    print_scores(scores)


if __name__ == "__main__":
    main()

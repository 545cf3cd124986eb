"""Is one answer right? Strict rules: nothing is guessed from substrings or first letters."""

import re

from mllm3d.data.prompts import parse_choice
from mllm3d.evaluation.predictions import Sample

# DeepTumorVQA's nine numeric sub-types (FACTS: scored by mean relative accuracy when open).
NUMERIC_SUBTASKS = frozenset(
    {
        "lesion volume measurement",
        "organ hu measurement",
        "organ volume measurement",
        "largest lesion diameter",
        "largest lesion slice",
        "lesion count by location",
        "lesion counting",
        "organ aggregation",
        "tumor organ hu difference",
    }
)
_NUMBER = re.compile(r"(?:(?<![\w.])[-+\u2212])?\d+(?:,\d{3})*(?:\.\d+)?")
_EDGES = " \t\r\n.,;:!?'\"()[]"


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def first_number(text: str) -> float | None:
    """The first number in a text (`1,234.5 ml` -> 1234.5; the hyphen of `L1-2` is no sign), or None."""
    match = _NUMBER.search(text)
    return float(match.group().replace(",", "").replace("\u2212", "-")) if match else None


def mean_relative_accuracy(prediction: float | None, truth: float) -> float:
    """Mean over theta in {0.50, 0.55, ..., 0.95} of [relative error < 1 - theta]; 0 without a number."""
    if prediction is None:
        return 0.0
    error = abs(prediction - truth) / max(abs(truth), 1e-6)
    return sum(error < step / 20 for step in range(1, 11)) / 10


def is_numeric(subtask: str | None, options: list[str] | None, reference: str) -> bool:
    """Whether an answer is scored by its distance to a number instead of by its wording."""
    name = normalise(subtask or "").replace("_", " ").replace("-", " ")
    return options is None and name in NUMERIC_SUBTASKS and first_number(reference) is not None


def sample_score(sample: Sample, prediction: str | None = None) -> float:
    """1 right, 0 wrong, between them for numbers. `prediction` replaces the sample's own (for baselines)."""
    text = sample.prediction if prediction is None else prediction
    if sample.options is not None:
        return float(parse_choice(text, sample.options) == sample.options.index(sample.reference))
    if is_numeric(sample.subtask, sample.options, sample.reference):
        truth = first_number(sample.reference)
        assert truth is not None
        return mean_relative_accuracy(first_number(text), truth)
    return float(normalise(text) == normalise(sample.reference))

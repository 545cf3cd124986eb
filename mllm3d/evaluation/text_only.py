"""Rules that never look at a volume: what a score has to be compared with.

Each is fitted on the training split alone and says the most frequent training answer of a group of questions.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from mllm3d.evaluation.answers import first_number, is_numeric, normalise

Key = tuple[str, ...]


class Asked(Protocol):
    """What a rule may read: a manifest's row or an answered sample."""

    @property
    def task(self) -> str: ...
    @property
    def subtask(self) -> str | None: ...
    @property
    def question(self) -> str: ...
    @property
    def options(self) -> list[str] | None: ...


class Answered(Asked, Protocol):
    """A row of the training split."""

    @property
    def answer(self) -> str: ...


RULES: dict[str, Callable[[Asked], Key]] = {
    "majority per task": lambda asked: (asked.task,),
    "majority per sub-task": lambda asked: (asked.task, asked.subtask or ""),
    "majority per question": lambda asked: (asked.task, asked.subtask or "", normalise(asked.question)),
}


class Rule:
    """The majority answer per key; for numbers the median, which no single answer has to repeat."""

    def __init__(self, key: Callable[[Asked], Key], train: Sequence[Answered]):
        self._key = key
        self._counts: dict[Key, Counter[str]] = defaultdict(Counter)
        self._numbers: dict[Key, list[float]] = defaultdict(list)
        for row in train:
            for at in {key(row), (row.task,)}:  # the task's own counts serve keys that training never saw
                self._counts[at][normalise(row.answer)] += 1
                number = first_number(row.answer) if row.options is None else None
                if number is not None:
                    self._numbers[at].append(number)

    def predict(self, asked: Asked, reference: str) -> str:
        """The rule's answer. `reference` decides only whether a number is asked for."""
        at = self._key(asked) if self._key(asked) in self._counts else (asked.task,)
        counts = self._counts.get(at, Counter())
        if asked.options is not None:
            return max(asked.options, key=lambda option: counts[normalise(option)])
        if is_numeric(asked.subtask, asked.options, reference) and self._numbers.get(at):
            return str(median(self._numbers[at]))
        return counts.most_common(1)[0][0] if counts else ""


def fit_rules(train: Sequence[Answered]) -> dict[str, Rule]:
    """All text-only rules by name."""
    return {name: Rule(key, train) for name, key in RULES.items()}

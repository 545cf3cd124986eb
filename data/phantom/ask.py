"""From measured cases to manifest rows: which questions are asked of which case, in which words.

The balanced version asks closed questions in blocks (balance.py). The biased version copies 3D-RAD's
shortcuts: one answer makes up 80 % of each kind, options stand in a fixed order, and the history quoted in
longitudinal questions tells the answer four times in five.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from answers import ABSENT, REFRACTORY, RESOLVED
from balance import Candidate, category_blocks, far_apart, number_blocks, skew
from facts import Facts
from questions import EXISTENCE, KINDS, Kind
from regions import regions_of
from templates import TEMPLATES, plural, with_article

from mllm3d.data.manifest import Row

OPTIONS = 4
OPEN_SHARE = 0.3
"""Share of a kind's cases that is kept for open questions before blocks are formed."""
MAJORITY = 0.8


@dataclass(frozen=True)
class Entry:
    """A written case: its files relative to the manifest, what was measured, its report."""

    case: str
    split: str
    volume: str
    labels: str
    prior: str | None
    facts: Facts
    report: str


@dataclass(frozen=True)
class Asked:
    """A question to one case. ``options`` None: open, or plain yes/no; ``block`` None: not in a block."""

    candidate: Candidate
    question: str
    options: tuple[str, ...] | None
    closed: bool
    block: int | None = None


def make_rows(entries: Sequence[Entry], seed: int, tasks: Sequence[str], biased: bool = False) -> list[Row]:
    """All rows of a manifest, case by case in the order of ``entries``."""
    asked: dict[str, list[tuple[Kind, str, Asked]]] = {entry.case: [] for entry in entries}
    numbers = itertools.count()
    for split in dict.fromkeys(entry.split for entry in entries):
        facts = {entry.case: entry.facts for entry in entries if entry.split == split}
        for kind in KINDS:
            for subject in kind.subjects if kind.task.name in tasks else ():
                name = "|".join((str(seed), split, kind.task.name, str(kind.subtask), kind.name, subject))
                rng = random.Random(name)
                posed = _biased(kind, subject, facts, rng) if biased else _balanced(kind, subject, facts, rng, numbers)
                for question in posed:
                    asked[question.candidate.case].append((kind, subject, question))
    rows = []
    for entry in entries:
        named = [_row(entry, number, *item) for number, item in enumerate(asked[entry.case])]
        rows += named + ([_report_row(entry, seed)] if "report" in tasks else [])
    return rows


def _candidates(kind: Kind, subject: str, facts: dict[str, Facts]) -> list[Candidate]:
    values = {case: kind.value(known, subject) for case, known in facts.items()}
    return [Candidate(case, value, kind.text(value)) for case, value in values.items() if value is not None]


def _balanced(
    kind: Kind, subject: str, facts: dict[str, Facts], rng: random.Random, numbers: Iterator[int]
) -> Iterator[Asked]:
    left = _candidates(kind, subject, facts)
    kept: list[Candidate] = []
    if kind.asked == "both":
        kept = rng.sample(left, round(OPEN_SHARE * len(left)))
        cases = {candidate.case for candidate in kept}
        left = [candidate for candidate in left if candidate.case not in cases]
    if kind.asked != "open":
        form = number_blocks if kind.form == "number" else category_blocks
        blocks, left = form(left, OPTIONS, rng)
        for block in blocks:
            number = next(numbers)
            options = tuple(rng.sample([candidate.text for candidate in block], len(block)))
            question = _word(kind, subject, rng, history=_history(rng))
            for candidate in block:
                shown = None if kind.task == EXISTENCE else options
                yield Asked(candidate, question, shown, True, number)
    if kind.asked != "closed":
        for candidate in (*kept, *left):
            question = _word(kind, subject, rng, slices=facts[candidate.case].slices)
            yield Asked(candidate, question, None, False)


def _biased(kind: Kind, subject: str, facts: dict[str, Facts], rng: random.Random) -> Iterator[Asked]:
    left = _candidates(kind, subject, facts)
    template = kind.name
    if kind.name == "longitudinal":
        template = "longitudinal_biased"
        seen = [candidate for candidate in left if candidate.value in (REFRACTORY, RESOLVED)]
        unseen = [candidate for candidate in left if candidate not in seen]
        left = skew(seen, MAJORITY, rng, REFRACTORY) + skew(unseen, MAJORITY, rng, ABSENT)
    elif kind.form != "number":
        left = skew(left, MAJORITY, rng, kind.text(False) if kind.form == "yes_no" else None)
    every = tuple(sorted({candidate.text for candidate in left}))
    for candidate in left:
        before = candidate.value in (REFRACTORY, RESOLVED)
        history = _history(rng, last=before) if kind.name == "longitudinal" else _history(rng)
        question = _word(kind, subject, rng, history, facts[candidate.case].slices, template)
        options = _biased_options(kind, candidate, left, every, rng)
        closed = options is not None or kind.task == EXISTENCE
        if closed or kind.asked != "closed":
            yield Asked(candidate, question, options, closed)


def _biased_options(
    kind: Kind, candidate: Candidate, others: Sequence[Candidate], every: tuple[str, ...], rng: random.Random
) -> tuple[str, ...] | None:
    """The same options in the same order for every case; numbers in rising order around the answer."""
    openly = kind.asked == "open" or (kind.asked == "both" and rng.random() < OPEN_SHARE)
    if openly or kind.task == EXISTENCE:
        return None
    if kind.form == "yes_no":
        return kind.text(True), kind.text(False)
    if kind.form == "choice":
        wrong = [text for text in every if text != candidate.text]
        return tuple(sorted((candidate.text, *wrong[: OPTIONS - 1]))) if wrong else None
    chosen = [candidate]
    for other in rng.sample(list(others), len(others)):
        if len(chosen) < OPTIONS and all(far_apart(float(other.value), float(one.value)) for one in chosen):
            chosen.append(other)
    chosen.sort(key=lambda one: float(one.value))
    return tuple(one.text for one in chosen) if len(chosen) > 1 else None


def _history(rng: random.Random, last: bool | None = None) -> str:
    """Whether the finding was seen in one to four earlier scans. Drawn without a look at the case, unless
    ``last`` says what the latest of them showed; then an absent finding was never seen before."""
    scans = [rng.randint(0, 1) for _ in range(rng.randint(1, 4))]
    if last is not None:
        scans = [*scans[1:], 1] if last else [0] * len(scans)
    return str(scans)


def _word(kind: Kind, subject: str, rng: random.Random, history: str = "", slices: int = 0, template: str = "") -> str:
    phrasing = rng.choice(TEMPLATES[template or kind.name])
    return phrasing.format(x=subject, a=with_article(subject), xs=plural(subject), history=history, slices=slices)


def _row(entry: Entry, number: int, kind: Kind, subject: str, asked: Asked) -> Row:
    return Row(
        id=f"{entry.case}-{number:03d}",
        case=entry.case,
        split=entry.split,
        volume=entry.volume,
        prior=entry.prior if kind.needs_prior else None,
        question=asked.question,
        answer=asked.candidate.text,
        options=list(asked.options) if asked.options else None,
        task=kind.task.name,
        subtask=kind.subtask or subject,
        labels=entry.labels,
        meta={
            "finding": subject or None,
            "answer_value": asked.candidate.value,
            "source": kind.task.source,
            "kind": kind.name,
            "closed": asked.closed,
            "block": asked.block,
            **regions_of(kind.name, subject).meta(),
        },
    )


def _report_row(entry: Entry, seed: int) -> Row:
    rng = random.Random(f"{seed}|report|{entry.case}")
    return Row(
        id=f"{entry.case}-report",
        case=entry.case,
        split=entry.split,
        volume=entry.volume,
        question=rng.choice(TEMPLATES["report"]),
        answer=entry.report,
        task="report",
        subtask="findings",
        labels=entry.labels,
        report=entry.report,
        meta={"source": "m3d", "kind": "report", "closed": False},
    )

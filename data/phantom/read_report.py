"""What a findings report affirms, read by the phrases that ``report.py`` writes with.

The report may be one that a language model wrote: a sentence counts only if it is one of those phrases from its
first word to its last, with any numbers and with a place where the finding can lie.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import NamedTuple

from labels import FINDINGS, HOSTS, PHASES, STATES
from regions import regions_of
from report import NUMBERS, ONE, OTHER, PRESENT, SEVERAL
from templates import plural

HALVES = {"left half of the body": "left", "right half of the body": "right"}
SIDES = {"bilateral": ("left", "right"), "left-sided": ("left",), "right-sided": ("right",)}
NUMBER = r"-?\d+(?:\.\d+)?"
COUNT = "|".join((*NUMBERS[1:], r"\d+"))  # "no liver lesions" affirms none


class Affirmed(NamedTuple):
    """A finding and where it is: an organ ("left kidney"), or "left" or "right"."""

    finding: str
    place: str


@dataclass(frozen=True)
class Reading:
    """What a report affirms, the number of its sentences, and how many of those fit a phrase."""

    affirmed: frozenset[Affirmed]
    sentences: int
    known: int

    @property
    def findings(self) -> frozenset[str]:
        return frozenset(found.finding for found in self.affirmed)

    @property
    def organs(self) -> frozenset[str]:
        """The organs that it calls abnormal."""
        return frozenset(map(organ_of, self.findings))


def organ_of(finding: str) -> str:
    """The organ of a finding as in a row's ``meta`` (``regions.py``): paired ones are one, nodes are their own."""
    return regions_of("existence", finding).organ or "lymph nodes"


def read_report(text: str) -> Reading:
    """The findings that a report affirms, each with the place of the largest instance or, for pleural
    effusion, with each of its sides. What is denied or fits no phrase affirms nothing."""
    sentences = [" ".join(part.split()) for part in re.split(r"\.(?!\d)", text) if part.strip()]
    affirmed: set[Affirmed] = set()
    known = 0
    for sentence in sentences:
        found = _affirmed(sentence)
        affirmed |= found
        known += bool(found) or any(pattern.fullmatch(sentence) for pattern in _other_patterns())
    return Reading(frozenset(affirmed), len(sentences), known)


def _affirmed(sentence: str) -> set[Affirmed]:
    for finding, patterns in _patterns().items():
        for pattern in patterns:
            if match := pattern.fullmatch(sentence):
                return {Affirmed(finding, place) for place in _places(finding, match.groupdict())}
    return set()


def _places(finding: str, said: Mapping[str, str]) -> tuple[str, ...]:
    if "side" in said:
        return SIDES[said["side"].lower()]
    place = said.get("place", organ_of(finding)).lower()
    return (HALVES.get(place, place),)


@cache
def _patterns() -> dict[str, list[re.Pattern[str]]]:
    """By finding, a pattern for each phrase that affirms it."""
    return {
        finding: [_pattern(phrase, finding) for phrase in PRESENT.get(finding, ONE + SEVERAL)]
        for finding in (*FINDINGS, *STATES)
    }


@cache
def _other_patterns() -> list[re.Pattern[str]]:
    return [_pattern(phrase) for phrases in OTHER.values() for phrase in phrases]


def _pattern(phrase: str, finding: str = "") -> re.Pattern[str]:
    """The phrase with what may stand in its fields; a field that is not listed here is a number."""
    fields = {
        "name": finding,
        "names": plural(finding),
        "place": f"(?P<place>{'|'.join((*HOSTS.get(finding, ()), *HALVES))})",
        "side": f"(?P<side>{'|'.join(SIDES)})",
        "count": f"(?:{COUNT})",
        "foci": "(?:focus|foci)",
        "phase": f"(?:{'|'.join(PHASES)})",
    }
    parts = [
        re.escape(text) + (fields.get(field, NUMBER) if field else "")
        for text, field, _, _ in Formatter().parse(phrase.removesuffix("."))
    ]
    return re.compile("".join(parts), re.IGNORECASE)

"""Which organ and which findings a question is about, by name and by id in the label map (``labels.py``).

A row's ``meta`` has them as ``organ``, ``organ_labels`` and ``finding_labels``, the ids as text: "10,11,40".
Paired organs are one: a question about the left kidney is about the kidneys. An organ's ids include those of
the findings in it (``measure.PARTS``), as these stand in the map in its place.
"""

from typing import NamedTuple

from labels import FINDINGS, HOSTS, ORGANS
from measure import PARTS

_STATE_OF = {"cardiomegaly": "heart", "splenomegaly": "spleen", "fatty liver": "liver"}

_KIDNEY_LESIONS = ("kidney cyst", "kidney tumour")
_SAID_BY_KIND: dict[str, tuple[str, tuple[str, ...]]] = {
    "renal_lesion_type": ("kidneys", _KIDNEY_LESIONS),
    "liver_diagnosis": ("liver", ("liver lesion",)),
    "kidney_comparison": ("kidneys", ()),
    "kidney_asymmetry": ("kidneys", ()),
    "liver_halves": ("liver", ("liver lesion",)),
    "clustering": ("liver", ("liver lesion",)),
    "fatty_liver": ("liver", ()),
    "steatosis_grade": ("liver", ()),
    "splenomegaly_grade": ("spleen", ()),
    "lesion_class": ("kidneys", _KIDNEY_LESIONS),
    "renal_mass": ("kidneys", _KIDNEY_LESIONS),
}
"""Organ and findings of the kinds of question that name them without a subject. Kinds that are neither here nor
have a subject are about several organs or none."""


class Regions(NamedTuple):
    """The one organ that a question is about, if it is one, and the findings that it names."""

    organ: str | None
    findings: tuple[str, ...]

    def meta(self) -> dict[str, str | None]:
        """The part of a row's ``meta``."""
        return {
            "organ": self.organ,
            "organ_labels": _text(_organ_ids(self.organ)) if self.organ else None,
            "finding_labels": _text([FINDINGS[name] for name in self.findings]) if self.findings else None,
        }


def regions_of(kind: str, subject: str) -> Regions:
    """Of a kind's question about a subject: a finding, an organ, or "FINDING in the ORGAN"."""
    if not subject:
        return Regions(*_SAID_BY_KIND.get(kind, (None, ())))
    thing = subject.partition(" in the ")[0]
    if thing == "kidney lesion":
        return Regions("kidneys", _KIDNEY_LESIONS)
    if thing in FINDINGS:
        return Regions(_grouped(HOSTS[thing][0]) if HOSTS[thing] else None, (thing,))
    if thing in _STATE_OF:
        return Regions(_STATE_OF[thing], ())
    if " | " in thing:
        return Regions(None, ())
    return Regions(_grouped(thing), ())


def _grouped(organ: str) -> str:
    """The pair of a left or right organ ("lungs" of the left lung); any other name as it is."""
    side, _, pair = organ.partition(" ")
    return f"{pair}s" if side in ("left", "right") else organ


def _organ_ids(organ: str) -> list[int]:
    own = [name for name in ORGANS if _grouped(name) == organ]
    return [ORGANS[name] for name in own] + [FINDINGS[part] for name in own for part in PARTS.get(name, ())]


def _text(ids: list[int]) -> str:
    return ",".join(map(str, sorted(set(ids))))

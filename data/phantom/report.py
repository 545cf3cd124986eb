"""A findings report of one case from its measurements: a sentence or two per organ system.

The phrases stand in tables because ``read_report.py`` reads reports back by the same ones. A sentence begins
with a capital whatever it is filled with. ``{name}`` is the finding, ``{names}`` its plural.
"""

import random
from collections.abc import Callable

from facts import Facts, Instance
from templates import plural

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

ONE = (
    "Solitary {name} in the {place}, {mm:.0f} mm.",
    "In the {place} there is a single {name} of {mm:.0f} mm.",
    "{count} {name} of {mm:.0f} mm in the {place}.",
)
SEVERAL = (
    "{count} {names}, the largest {mm:.0f} mm in the {place}.",
    "There are {count} {names}; the largest measures {mm:.0f} mm and lies in the {place}.",
)
"""One and several instances of a finding that is not in ``PRESENT``."""

PRESENT: dict[str, tuple[str, ...]] = {
    "consolidation": ("Consolidation in the {place}, {ml:.0f} ml.", "The {place} shows consolidation of {ml:.0f} ml."),
    "pleural effusion": (
        "{side} pleural effusion, up to {mm:.0f} mm thick.",
        "There is a {side} pleural effusion with a thickness of {mm:.0f} mm.",
        "{side} pleural effusion of {ml:.0f} ml, {mm:.0f} mm at its thickest.",
    ),
    "cardiomegaly": (
        "Cardiomegaly, cardiothoracic ratio {ratio:.2f}.",
        "There is cardiomegaly with a ratio of {ratio:.2f}.",
    ),
    "pericardial effusion": (
        "Pericardial effusion, {mm:.0f} mm thick.",
        "There is a pericardial effusion of {mm:.0f} mm.",
    ),
    "arterial calcification": (
        "Arterial calcification of the aorta, {count} {foci}.",
        "The aorta shows arterial calcification ({count} {foci}).",
    ),
    "fatty liver": (
        "Fatty liver, {hu:.0f} HU.",
        "Attenuation of {hu:.0f} HU against the spleen indicates fatty liver.",
    ),
    "splenomegaly": ("Splenomegaly with a volume of {ml:.0f} ml.", "The spleen measures {ml:.0f} ml: splenomegaly."),
}
"""Sentences that affirm a finding."""

OTHER: dict[str, tuple[str, ...]] = {
    "without contrast": ("Non-contrast CT of chest and abdomen.", "CT of chest and abdomen without contrast."),
    "phase": ("CT of chest and abdomen in the {phase} phase.", "Contrast-enhanced chest-abdomen CT, {phase} phase."),
    "lungs": (
        "The lungs are clear.",
        "No lung nodule or consolidation.",
        "Lung parenchyma without focal abnormality.",
    ),
    "pleura": ("No pleural effusion.", "The pleural spaces are clear.", "Pleura unremarkable."),
    "heart": (
        "Heart size is normal, cardiothoracic ratio {ratio:.2f}.",
        "The heart is not enlarged (ratio {ratio:.2f}).",
    ),
    "pericardium": ("No pericardial effusion.", "The pericardium is unremarkable."),
    "aorta": ("No arterial calcification.", "The aorta is unremarkable.", "Aortic wall without plaques."),
    "nodes": ("No enlarged lymph nodes.", "Lymph nodes are not enlarged.", "No lymphadenopathy."),
    "liver": ("No liver lesion.", "No focal hepatic abnormality."),
    "parenchyma": (
        "Liver attenuation is regular ({hu:.0f} HU).",
        "Homogeneous liver parenchyma of {hu:.0f} HU.",
    ),
    "spleen": ("The spleen is of normal size ({ml:.0f} ml).", "Spleen not enlarged, {ml:.0f} ml."),
    "kidneys": ("Both kidneys are unremarkable.", "No kidney cyst or tumour.", "Kidneys without focal lesion."),
    "pancreas": ("The pancreas is unremarkable.", "No pancreatic lesion."),
    "not covered": (
        "The heart is not covered in full.",
        "The liver is not covered.",
        "The spleen is not covered.",
    ),
}
"""Sentences that affirm no finding."""

HEART_NOT_COVERED, LIVER_NOT_COVERED, SPLEEN_NOT_COVERED = OTHER["not covered"]


def write_report(facts: Facts, rng: random.Random) -> str:
    """The report, head to foot. Every finding that is present is named; absent ones may be denied."""
    systems: tuple[Callable[[Facts, random.Random], str], ...] = (
        _technique,
        _lungs,
        _pleura,
        _heart,
        _pericardium,
        _aorta,
        _nodes,
        _liver,
        _spleen,
        _kidneys,
        _pancreas,
    )
    return " ".join(system(facts, rng) for system in systems)


def _say(rng: random.Random, phrases: tuple[str, ...], **fields: object) -> str:
    """One of the phrases, filled in."""
    sentence = rng.choice(phrases).format(**fields)
    return sentence[0].upper() + sentence[1:]


def _technique(facts: Facts, rng: random.Random) -> str:
    if facts.phase == "non-contrast":
        return _say(rng, OTHER["without contrast"])
    return _say(rng, OTHER["phase"], phase=facts.phase)


def _lungs(facts: Facts, rng: random.Random) -> str:
    sentences = []
    if facts.present("lung nodule"):
        sentences.append(_lesions(facts, "lung nodule", rng))
    largest = facts.largest("consolidation")
    if largest is not None:
        place, volume = _place(largest), facts.total_ml("consolidation")
        sentences.append(_say(rng, PRESENT["consolidation"], place=place, ml=volume))
    return " ".join(sentences) if sentences else _say(rng, OTHER["lungs"])


def _pleura(facts: Facts, rng: random.Random) -> str:
    sides = facts.sides("pleural effusion")
    if not sides:
        return _say(rng, OTHER["pleura"])
    side = "bilateral" if len(sides) == 2 else f"{sides[0]}-sided"
    depth, volume = facts.thickness_mm["pleural effusion"], facts.total_ml("pleural effusion")
    return _say(rng, PRESENT["pleural effusion"], side=side, mm=depth, ml=volume)


def _heart(facts: Facts, rng: random.Random) -> str:
    ratio = facts.heart_ratio
    if facts.present("cardiomegaly"):
        return _say(rng, PRESENT["cardiomegaly"], ratio=ratio)
    return HEART_NOT_COVERED if ratio is None else _say(rng, OTHER["heart"], ratio=ratio)


def _pericardium(facts: Facts, rng: random.Random) -> str:
    if facts.present("pericardial effusion"):
        return _say(rng, PRESENT["pericardial effusion"], mm=facts.thickness_mm["pericardial effusion"])
    return _say(rng, OTHER["pericardium"])


def _aorta(facts: Facts, rng: random.Random) -> str:
    count = len(facts.instances["arterial calcification"])
    if not count:
        return _say(rng, OTHER["aorta"])
    foci = "focus" if count == 1 else "foci"
    return _say(rng, PRESENT["arterial calcification"], count=_number(count), foci=foci)


def _nodes(facts: Facts, rng: random.Random) -> str:
    if facts.present("enlarged lymph node"):
        return _lesions(facts, "enlarged lymph node", rng)
    return _say(rng, OTHER["nodes"])


def _liver(facts: Facts, rng: random.Random) -> str:
    if "liver" not in facts.organs:
        return LIVER_NOT_COVERED
    phrases = PRESENT["fatty liver"] if facts.present("fatty liver") else OTHER["parenchyma"]
    sentences = [_say(rng, phrases, hu=facts.hu["liver"])]
    if facts.present("liver lesion"):
        sentences.append(_lesions(facts, "liver lesion", rng))
    else:
        sentences.append(_say(rng, OTHER["liver"]))
    return " ".join(sentences)


def _spleen(facts: Facts, rng: random.Random) -> str:
    if "spleen" not in facts.organs:
        return SPLEEN_NOT_COVERED
    phrases = PRESENT["splenomegaly"] if facts.present("splenomegaly") else OTHER["spleen"]
    return _say(rng, phrases, ml=facts.organs["spleen"].volume_ml)


def _kidneys(facts: Facts, rng: random.Random) -> str:
    sentences = [_lesions(facts, name, rng) for name in ("kidney cyst", "kidney tumour") if facts.present(name)]
    return " ".join(sentences) if sentences else _say(rng, OTHER["kidneys"])


def _pancreas(facts: Facts, rng: random.Random) -> str:
    if facts.present("pancreatic lesion"):
        return _lesions(facts, "pancreatic lesion", rng)
    return _say(rng, OTHER["pancreas"])


def _lesions(facts: Facts, name: str, rng: random.Random) -> str:
    """A sentence on the instances of a finding: how many, where the largest lies, its size."""
    found = facts.instances[name]
    place, size, count = _place(found[0]), found[0].diameter_mm, _number(len(found))
    phrases = ONE if len(found) == 1 else SEVERAL
    return _say(rng, phrases, name=name, names=plural(name), place=place, mm=size, count=count)


def _place(instance: Instance) -> str:
    """Where an instance lies; nodes have no host organ."""
    return instance.host or f"{instance.side} half of the body"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)

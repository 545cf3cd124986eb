"""A findings report of one case from its measurements: a sentence or two per organ system."""

import random
from collections.abc import Callable

from facts import Facts, Instance
from templates import plural

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


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


def _technique(facts: Facts, rng: random.Random) -> str:
    if facts.phase == "non-contrast":
        return rng.choice(("Non-contrast CT of chest and abdomen.", "CT of chest and abdomen without contrast."))
    phrases = ("CT of chest and abdomen in the {} phase.", "Contrast-enhanced chest-abdomen CT, {} phase.")
    return rng.choice(phrases).format(facts.phase)


def _lungs(facts: Facts, rng: random.Random) -> str:
    sentences = []
    if facts.present("lung nodule"):
        sentences.append(_lesions(facts, "lung nodule", rng))
    largest = facts.largest("consolidation")
    if largest is not None:
        phrases = ("Consolidation in the {}, {:.0f} ml.", "The {} shows consolidation of {:.0f} ml.")
        sentences.append(rng.choice(phrases).format(_place(largest), facts.total_ml("consolidation")))
    clear = (
        "The lungs are clear.",
        "No lung nodule or consolidation.",
        "Lung parenchyma without focal abnormality.",
    )
    return " ".join(sentences) if sentences else rng.choice(clear)


def _pleura(facts: Facts, rng: random.Random) -> str:
    sides = facts.sides("pleural effusion")
    if not sides:
        return rng.choice(("No pleural effusion.", "The pleural spaces are clear.", "Pleura unremarkable."))
    side = "Bilateral" if len(sides) == 2 else f"{sides[0].capitalize()}-sided"
    depth, volume = facts.thickness_mm["pleural effusion"], facts.total_ml("pleural effusion")
    phrases = (
        "{} pleural effusion, up to {:.0f} mm thick.",
        "There is a {} pleural effusion with a thickness of {:.0f} mm.",
        "{} pleural effusion of {volume:.0f} ml, {:.0f} mm at its thickest.",
    )
    phrase = rng.choice(phrases)
    return phrase.format(side if phrase.startswith("{") else side.lower(), depth, volume=volume)


def _heart(facts: Facts, rng: random.Random) -> str:
    ratio = facts.heart_ratio
    if facts.present("cardiomegaly"):
        phrases = (
            "Cardiomegaly, cardiothoracic ratio {:.2f}.",
            "There is cardiomegaly with a ratio of {:.2f}.",
        )
        return rng.choice(phrases).format(ratio)
    if ratio is None:
        return "The heart is not covered in full."
    phrases = (
        "Heart size is normal, cardiothoracic ratio {:.2f}.",
        "The heart is not enlarged (ratio {:.2f}).",
    )
    return rng.choice(phrases).format(ratio)


def _pericardium(facts: Facts, rng: random.Random) -> str:
    if facts.present("pericardial effusion"):
        phrases = ("Pericardial effusion, {:.0f} mm thick.", "There is a pericardial effusion of {:.0f} mm.")
        return rng.choice(phrases).format(facts.thickness_mm["pericardial effusion"])
    return rng.choice(("No pericardial effusion.", "The pericardium is unremarkable."))


def _aorta(facts: Facts, rng: random.Random) -> str:
    count = len(facts.instances["arterial calcification"])
    if not count:
        return rng.choice(("No arterial calcification.", "The aorta is unremarkable.", "Aortic wall without plaques."))
    many = "focus" if count == 1 else "foci"
    phrases = (
        f"Arterial calcification of the aorta, {_number(count)} {many}.",
        f"The aorta shows arterial calcification ({_number(count)} {many}).",
    )
    return rng.choice(phrases)


def _nodes(facts: Facts, rng: random.Random) -> str:
    if facts.present("enlarged lymph node"):
        return _lesions(facts, "enlarged lymph node", rng)
    return rng.choice(("No enlarged lymph nodes.", "Lymph nodes are not enlarged.", "No lymphadenopathy."))


def _liver(facts: Facts, rng: random.Random) -> str:
    if "liver" not in facts.organs:
        return "The liver is not covered."
    sentences, attenuation = [], facts.hu["liver"]
    if facts.present("fatty liver"):
        phrases = (
            "Fatty liver, {:.0f} HU.",
            "Attenuation of {:.0f} HU against the spleen indicates fatty liver.",
        )
        sentences.append(rng.choice(phrases).format(attenuation))
    else:
        phrases = ("Liver attenuation is regular ({:.0f} HU).", "Homogeneous liver parenchyma of {:.0f} HU.")
        sentences.append(rng.choice(phrases).format(attenuation))
    if facts.present("liver lesion"):
        sentences.append(_lesions(facts, "liver lesion", rng))
    else:
        sentences.append(rng.choice(("No liver lesion.", "No focal hepatic abnormality.")))
    return " ".join(sentences)


def _spleen(facts: Facts, rng: random.Random) -> str:
    if "spleen" not in facts.organs:
        return "The spleen is not covered."
    volume = facts.organs["spleen"].volume_ml
    if facts.present("splenomegaly"):
        phrases = ("Splenomegaly with a volume of {:.0f} ml.", "The spleen measures {:.0f} ml: splenomegaly.")
    else:
        phrases = ("The spleen is of normal size ({:.0f} ml).", "Spleen not enlarged, {:.0f} ml.")
    return rng.choice(phrases).format(volume)


def _kidneys(facts: Facts, rng: random.Random) -> str:
    sentences = [_lesions(facts, name, rng) for name in ("kidney cyst", "kidney tumour") if facts.present(name)]
    clear = ("Both kidneys are unremarkable.", "No kidney cyst or tumour.", "Kidneys without focal lesion.")
    return " ".join(sentences) if sentences else rng.choice(clear)


def _pancreas(facts: Facts, rng: random.Random) -> str:
    if facts.present("pancreatic lesion"):
        return _lesions(facts, "pancreatic lesion", rng)
    return rng.choice(("The pancreas is unremarkable.", "No pancreatic lesion."))


def _lesions(facts: Facts, name: str, rng: random.Random) -> str:
    """A sentence on the instances of a finding: how many, where the largest lies, its size."""
    found = facts.instances[name]
    place, size, count = _place(found[0]), found[0].diameter_mm, _number(len(found))
    phrases: tuple[str, ...]
    if len(found) == 1:
        phrases = (
            f"Solitary {name} in the {place}, {size:.0f} mm.",
            f"In the {place} there is a single {name} of {size:.0f} mm.",
            f"{count.capitalize()} {name} of {size:.0f} mm in the {place}.",
        )
    else:
        phrases = (
            f"{count.capitalize()} {plural(name)}, the largest {size:.0f} mm in the {place}.",
            f"There are {count} {plural(name)}; the largest measures {size:.0f} mm and lies in the {place}.",
        )
    return rng.choice(phrases)


def _place(instance: Instance) -> str:
    """Where an instance lies; nodes have no host organ."""
    return instance.host or f"{instance.side} half of the body"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)

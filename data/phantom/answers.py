"""The right answers: pure functions of what was measured on a case's label map and of the subject.

None means that the question makes no sense for the case (the diameter of a lesion that isn't there). The
names of these functions are the names of the kinds of question (questions.py) and the keys of their wording
(templates.py).
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

from facts import Facts, Instance
from labels import FINDINGS

Value = str | float | bool
Told = TypeVar("Told", str, int)

FOCAL = ("lung nodule", "liver lesion", "kidney cyst", "kidney tumour", "pancreatic lesion")
CLEARLY = 1.25
"""Of two things one is called the larger if it is larger by this factor at least."""

PLANES = ("Axial", "Coronal", "Sagittal")

NEW, RESOLVED, REFRACTORY, ABSENT = (
    "New Lesion (Absent on the prior scan, now present)",
    "Resolved Lesion (Present on the prior scan, now absent)",
    "Refractory Lesion (Present on the prior scan, still present)",
    "No Abnormality (Absent on both scans)",
)


# ---- 3D-RAD ----


def existence(facts: Facts, subject: str) -> bool:
    return facts.present(subject)


def which_side(facts: Facts, subject: str) -> str | None:
    sides = facts.sides(subject)
    if not sides:
        return None
    organ = " lung" if subject in ("lung nodule", "consolidation") else ""
    organ = " kidney" if subject.startswith("kidney") else organ
    return f"Both {organ.strip() or 'side'}s" if len(sides) == 2 else f"{sides[0].capitalize()}{organ or ' side'}"


def more_prominent(facts: Facts, subject: str) -> str | None:
    """The side with clearly more of it."""
    if not facts.present(subject):
        return None
    volumes = {f"{side.capitalize()} side": facts.side_ml(subject, side) for side in ("left", "right")}
    return _clearly_first(volumes)


def renal_lesion_type(facts: Facts, subject: str) -> str:
    return _both(facts, ("kidney cyst", "Cyst"), ("kidney tumour", "Tumour"), "Cyst and tumour", "No lesion")


def enlarged_organ(facts: Facts, subject: str) -> str:
    return _both(facts, ("cardiomegaly", "Heart"), ("splenomegaly", "Spleen"), "Heart and spleen", "Neither")


def effusion_type(facts: Facts, subject: str) -> str:
    pleural, pericardial = ("pleural effusion", "Pleural"), ("pericardial effusion", "Pericardial")
    return _both(facts, pleural, pericardial, "Pleural and pericardial", "No effusion")


def liver_diagnosis(facts: Facts, subject: str) -> str:
    fatty, focal = ("fatty liver", "Fatty liver"), ("liver lesion", "Focal lesion")
    return _both(facts, fatty, focal, "Fatty liver with focal lesion", "No abnormality")


def _both(facts: Facts, first: tuple[str, str], second: tuple[str, str], both: str, neither: str) -> str:
    found = [text for finding, text in (first, second) if facts.present(finding)]
    return both if len(found) == 2 else (found or [neither])[0]


def single_or_multiple(facts: Facts, subject: str) -> str | None:
    count = len(facts.instances[subject])
    return None if count == 0 else "Single" if count == 1 else "Multiple"


def position(facts: Facts, subject: str) -> str | None:
    """Third of a lung, half of another organ, in which the largest instance's centre lies."""

    def part(instance: Instance) -> str:
        height = facts.organs[instance.host].height(instance.centre[0])
        if instance.host.endswith("lung"):
            return f"{('Lower', 'Middle', 'Upper')[min(int(height * 3), 2)]} third of the {instance.host}"
        return f"{('Lower', 'Upper')[height >= 0.5]} half of the {instance.host}"

    if any(instance.host not in facts.organs for instance in facts.instances[subject]):
        return None
    return _of_clear_largest(facts, subject, part)


def diameter(facts: Facts, subject: str) -> float | None:
    return _of_largest(facts, subject, lambda instance: instance.diameter_mm)


def ap_size(facts: Facts, subject: str) -> float | None:
    return _of_largest(facts, subject, lambda instance: instance.extent_mm[1])


def craniocaudal_size(facts: Facts, subject: str) -> float | None:
    return facts.organs[subject].extent_mm[0] if subject in facts.organs else None


def thickness(facts: Facts, subject: str) -> float | None:
    return facts.thickness_mm.get(subject)


def _of_largest(facts: Facts, subject: str, measure: Callable[[Instance], float]) -> float | None:
    largest = facts.largest(subject)
    return None if largest is None else measure(largest)


def _of_clear_largest(facts: Facts, subject: str, tell: Callable[[Instance], Told]) -> Told | None:
    """What ``tell`` says of the largest instance, unless one of nearly its size would say otherwise."""
    found = facts.instances[subject]
    told = {tell(instance) for instance in found if instance.volume_ml > found[0].volume_ml / CLEARLY}
    return told.pop() if len(told) == 1 else None


def _clearly_first(sizes: Mapping[str, float]) -> str | None:
    """The name with the largest size, if it is ``CLEARLY`` larger than the next."""
    ranked = sorted(sizes, key=lambda name: -sizes[name])
    if not ranked or (len(ranked) > 1 and sizes[ranked[0]] < CLEARLY * sizes[ranked[1]]):
        return None
    return ranked[0]


def status(facts: Facts, subject: str) -> str | None:
    """What became of a finding since the prior scan."""
    if facts.changes is None:
        return None
    return {"new": NEW, "gone": RESOLVED, "absent": ABSENT}.get(facts.changes[subject], REFRACTORY)


def size_change(facts: Facts, subject: str) -> str | None:
    """How a finding's extent changed; asked where it is in both scans and clear (``measure.change``)."""
    words = {"grown": "Increased", "shrunk": "Decreased", "unchanged": "Unchanged"}
    return None if facts.changes is None else words.get(facts.changes[subject])


# ---- DeepTumorVQA ----


def lesion_volume(facts: Facts, subject: str) -> float | None:
    return _of_largest(facts, subject, lambda instance: instance.volume_ml)


def organ_hu(facts: Facts, subject: str) -> float | None:
    return facts.hu.get(subject)


def organ_volume(facts: Facts, subject: str) -> float | None:
    """One organ, or a pair of organs ("kidneys", "lungs"); findings inside count as the organ."""
    names = (f"left {subject[:-1]}", f"right {subject[:-1]}") if subject in ("kidneys", "lungs") else (subject,)
    if any(name not in facts.organs for name in names):
        return None
    return sum(facts.organs[name].volume_ml for name in names)


def hu_ratio(facts: Facts, subject: str) -> float | None:
    liver, spleen = facts.hu.get("liver"), facts.hu.get("spleen")
    return liver / spleen if liver is not None and spleen else None


def tumor_burden(facts: Facts, subject: str) -> float | None:
    findings = [name for name in FOCAL if ORGAN_OF[name].lower() == subject]
    lesions, organ = sum(facts.total_ml(name) for name in findings), organ_volume(facts, subject)
    return 100 * lesions / organ if organ and lesions else None


def lesion_existence(facts: Facts, subject: str) -> bool:
    if subject == "kidney lesion":
        return facts.present("kidney cyst") or facts.present("kidney tumour")
    return facts.present(subject)


def count(facts: Facts, subject: str) -> float:
    return len(facts.instances[subject])


def count_by_location(facts: Facts, subject: str) -> float | None:
    """Subject: "FINDING in the ORGAN"."""
    finding, organ = subject.split(" in the ")
    if not facts.present(finding):
        return None
    return sum(instance.host == organ for instance in facts.instances[finding])


def attenuation(facts: Facts, subject: str) -> str | None:
    largest = facts.largest(subject)
    if largest is None or subject not in facts.hu or largest.host not in facts.hu:
        return None
    above = facts.hu[subject] - facts.hu[largest.host]
    return "Isoattenuating" if abs(above) < 10 else "Hyperattenuating" if above > 0 else "Hypoattenuating"


def hu_difference(facts: Facts, subject: str) -> float | None:
    largest = facts.largest(subject)
    if largest is None or subject not in facts.hu or largest.host not in facts.hu:
        return None
    return abs(facts.hu[subject] - facts.hu[largest.host])


def largest_slice(facts: Facts, subject: str) -> float | None:
    return _of_clear_largest(facts, subject, lambda instance: instance.widest_slice)


def kidney_comparison(facts: Facts, subject: str) -> str | None:
    """Asked where the volumes differ by 5 % of the larger one at least."""
    left, right = organ_volume(facts, "left kidney"), organ_volume(facts, "right kidney")
    if left is None or right is None or abs(left - right) < 0.05 * max(left, right):
        return None
    return "Left kidney" if left > right else "Right kidney"


def kidney_asymmetry(facts: Facts, subject: str) -> bool | None:
    left, right = organ_volume(facts, "left kidney"), organ_volume(facts, "right kidney")
    return None if left is None or right is None else abs(left - right) > 0.2 * max(left, right)


def enlargement(facts: Facts, subject: str) -> bool:
    return facts.present({"heart": "cardiomegaly", "spleen": "splenomegaly"}[subject])


def _liver_halves(facts: Facts) -> tuple[float, float]:
    """Lesion volume in the lower and the upper half of the liver, by lesion centres."""
    halves = [0.0, 0.0]
    for instance in facts.instances["liver lesion"]:
        halves[facts.organs["liver"].height(instance.centre[0]) >= 0.5] += instance.volume_ml
    return halves[0], halves[1]


def liver_halves(facts: Facts, subject: str) -> str | None:
    if "liver" not in facts.organs or not facts.present("liver lesion"):
        return None
    lower, upper = _liver_halves(facts)
    return _clearly_first({"Lower half": lower, "Upper half": upper})


def clustering(facts: Facts, subject: str) -> bool | None:
    if "liver" not in facts.organs or len(facts.instances["liver lesion"]) < 2:
        return None
    return 0.0 in _liver_halves(facts)


def burden_comparison(facts: Facts, subject: str) -> str | None:
    """Asked where two organs at least hold focal lesions."""
    burden: dict[str, float] = {}
    for name in FOCAL:
        if facts.present(name):
            burden[ORGAN_OF[name]] = burden.get(ORGAN_OF[name], 0.0) + facts.total_ml(name)
    return _clearly_first(burden) if len(burden) > 1 else None


def fatty_liver(facts: Facts, subject: str) -> bool:
    return facts.present("fatty liver")


def steatosis_grade(facts: Facts, subject: str) -> str | None:
    """By how far the liver lies below the spleen: 20, 35 and 45 HU part the grades."""
    liver, spleen = facts.hu.get("liver"), facts.hu.get("spleen")
    if liver is None or spleen is None:
        return None
    return _grade(spleen - liver, (20, 35, 45), 0)


def splenomegaly_grade(facts: Facts, subject: str) -> str | None:
    volume = organ_volume(facts, "spleen")
    if volume is None:
        return None
    return _grade(volume, (350, 550, 750), int(facts.present("splenomegaly")))


def _grade(value: float, bounds: tuple[int, int, int], least: int) -> str:
    return ("Absent", "Mild", "Moderate", "Severe")[max(sum(value >= bound for bound in bounds), least)]


def _largest_of(facts: Facts, findings: tuple[str, ...]) -> str | None:
    """Which of some findings the largest single instance is, if clearly so."""
    return _clearly_first({name: facts.instances[name][0].volume_ml for name in findings if facts.instances[name]})


def lesion_class(facts: Facts, subject: str) -> str | None:
    largest = _largest_of(facts, ("kidney cyst", "kidney tumour"))
    return None if largest is None else {"kidney cyst": "Cyst", "kidney tumour": "Tumour"}[largest]


def renal_mass(facts: Facts, subject: str) -> str | None:
    """Fluid (20 HU at most) or solid, by the largest renal mass's attenuation."""
    largest = _largest_of(facts, ("kidney cyst", "kidney tumour"))
    if largest is None or largest not in facts.hu:
        return None
    return "Fluid-filled, benign-appearing" if facts.hu[largest] <= 20 else "Solid, suspicious for malignancy"


# ---- M3D ----

ORGAN_OF = {
    "lung nodule": "Lungs",
    "liver lesion": "Liver",
    "kidney cyst": "Kidneys",
    "kidney tumour": "Kidneys",
    "pancreatic lesion": "Pancreas",
}


def plane(facts: Facts, subject: str) -> str | None:
    """The plane with the largest cross-section, if it is 5 % above the next."""
    if subject in FINDINGS:
        largest = facts.largest(subject)
        areas = largest.areas_mm2 if largest else None
    else:
        areas = facts.organs[subject].areas_mm2 if subject in facts.organs else None
    if areas is None:
        return None
    ranked = sorted(zip(areas, PLANES, strict=True), reverse=True)
    return ranked[0][1] if ranked[0][0] > 1.05 * ranked[1][0] else None


def phase(facts: Facts, subject: str) -> str:
    return facts.phase.capitalize()


def organ(facts: Facts, subject: str) -> str | None:
    largest = _largest_of(facts, FOCAL)
    return None if largest is None else ORGAN_OF[largest]


def abnormality(facts: Facts, subject: str) -> str | None:
    """Subject: findings joined by " | "; asked where exactly one of them is present."""
    present = [name for name in subject.split(" | ") if facts.present(name)]
    return present[0].capitalize() if len(present) == 1 else None


def location(facts: Facts, subject: str) -> str | None:
    return _of_clear_largest(facts, subject, lambda instance: instance.side.capitalize())

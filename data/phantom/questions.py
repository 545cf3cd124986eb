"""What is asked of a case: ``KINDS`` lists every kind of question with its task, its subjects and its answer.

Right answers are computed in answers.py, wording is in templates.py, options are chosen in balance.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import answers
from answers import FOCAL, Value
from facts import PLANE_ORGANS, Facts
from labels import FINDINGS, STATES

Answer = Callable[[Facts, str], Value | None]


class Task(NamedTuple):
    """A benchmark's task as the manifest names it, and the benchmark."""

    name: str
    source: Literal["3d-rad", "deeptumorvqa", "m3d"]


@dataclass(frozen=True)
class Kind:
    """One kind of question. ``subtask`` None means the subject itself; ``name`` is its key in templates.py.

    Yes/no, temporal and "which of these" questions are asked closed (with their options) only; all others are
    asked both ways. Numbers are shown with ``decimals`` and ``unit``.
    """

    task: Task
    subtask: str | None
    name: str
    form: Literal["yes_no", "choice", "number"]
    subjects: tuple[str, ...]
    answer: Answer
    unit: str = ""
    decimals: int = 0
    needs_prior: bool = False
    asked: Literal["open", "closed", "both"] = "both"

    def value(self, facts: Facts, subject: str) -> Value | None:
        """The right answer, numbers rounded as shown; None where the question can't be asked."""
        found = self.answer(facts, subject)
        if self.form != "number" or found is None:
            return found
        return round(float(found), self.decimals) + 0.0  # + 0.0: no minus zero

    def text(self, value: Value) -> str:
        """The answer as it is written: "18 mm", "Left lung", "yes"."""
        if self.form == "yes_no":
            words = ("no", "yes") if self.task == EXISTENCE else ("No", "Yes")
            return words[bool(value)]
        if self.form == "number":
            return f"{float(value):.{self.decimals}f} {self.unit}".strip()
        return str(value)


def yes_no(task: Task, subtask: str | None, answer: Answer, subjects: tuple[str, ...] = ("",)) -> Kind:
    return Kind(task, subtask, answer.__name__, "yes_no", subjects, answer, asked="closed")


def choice(task: Task, subtask: str, answer: Answer, subjects: tuple[str, ...] = ("",)) -> Kind:
    return Kind(task, subtask, answer.__name__, "choice", subjects, answer)


def number(
    task: Task, subtask: str, answer: Answer, subjects: tuple[str, ...], unit: str = "", decimals: int = 0
) -> Kind:
    return Kind(task, subtask, answer.__name__, "number", subjects, answer, unit, decimals)


def temporal(task: Task, name: str, answer: Answer) -> Kind:
    """A question about a finding with the prior scan beside the current one."""
    return Kind(task, None, name, "choice", EVERYTHING, answer, needs_prior=True, asked="closed")


EVERYTHING = (*FINDINGS, *STATES)
LESIONS = tuple(name for name in FOCAL if name != "lung nodule")
SIDED = ("lung nodule", "consolidation", "pleural effusion", "kidney cyst", "kidney tumour")
COUNTED = ("lung nodule", "liver lesion", "kidney cyst", "enlarged lymph node", "arterial calcification")
ABDOMINAL = ("liver", "spleen", "left kidney", "right kidney", "pancreas")
PLACED = ("lung nodule", "consolidation", "liver lesion", "kidney cyst", "kidney tumour")
COUNTED_PLACES = (
    *(f"lung nodule in the {side} lung" for side in ("left", "right")),
    *(f"kidney cyst in the {side} kidney" for side in ("left", "right")),
)
ABNORMALITIES = (
    "pleural effusion | splenomegaly | liver lesion | lung nodule",
    "cardiomegaly | consolidation | kidney cyst | fatty liver",
    "pericardial effusion | kidney tumour | arterial calcification | splenomegaly",
    "pleural effusion | cardiomegaly | pancreatic lesion | enlarged lymph node",
    "consolidation | fatty liver | kidney tumour",
    "lung nodule | kidney cyst | pericardial effusion",
    "cardiomegaly | splenomegaly",
    "pleural effusion | consolidation",
    "liver lesion | fatty liver",
)

OBSERVE = Task("image_observation", "3d-rad")
DETECT = Task("anomaly_detection", "3d-rad")
MEASURE = Task("measurement", "3d-rad")
EXISTENCE = Task("existence", "3d-rad")
STATIC = Task("static_temporal", "3d-rad")
LONGITUDINAL = Task("longitudinal_temporal", "3d-rad")
TUMOR = Task("tumor_measurement", "deeptumorvqa")
RECOGNISE = Task("tumor_recognition", "deeptumorvqa")
LOOK = Task("visual_reasoning", "deeptumorvqa")
REASON = Task("medical_reasoning", "deeptumorvqa")
M3D = {name: Task(name, "m3d") for name in ("plane", "phase", "organ", "abnormality", "location")}

THREE_D_RAD = (
    choice(OBSERVE, "anatomical_observation", answers.which_side, SIDED),
    choice(OBSERVE, "anatomical_observation", answers.more_prominent, ("pleural effusion",)),
    choice(OBSERVE, "pathological_observation", answers.renal_lesion_type),
    choice(OBSERVE, "pathological_observation", answers.enlarged_organ),
    choice(DETECT, "abnormality_feature", answers.single_or_multiple, COUNTED),
    choice(DETECT, "abnormality_position", answers.position, PLACED),
    choice(DETECT, "abnormality_type", answers.effusion_type),
    choice(DETECT, "diagnosis", answers.liver_diagnosis),
    number(MEASURE, "diameter", answers.diameter, (*FOCAL, "enlarged lymph node"), "mm"),
    number(MEASURE, "size", answers.ap_size, ("consolidation", "kidney tumour", "liver lesion"), "mm"),
    number(MEASURE, "size", answers.craniocaudal_size, ("spleen",), "mm"),
    number(MEASURE, "thickness", answers.thickness, ("pleural effusion", "pericardial effusion"), "mm"),
    yes_no(EXISTENCE, None, answers.existence, EVERYTHING),
    temporal(STATIC, "static", answers.status),
    temporal(STATIC, "static_change", answers.size_change),
    temporal(LONGITUDINAL, "longitudinal", answers.status),
    temporal(LONGITUDINAL, "longitudinal_change", answers.size_change),
)

DEEP_TUMOR_VQA = (
    number(TUMOR, "lesion volume measurement", answers.lesion_volume, LESIONS, "ml", 1),
    number(TUMOR, "organ HU measurement", answers.organ_hu, (*ABDOMINAL, "aorta"), "HU"),
    number(TUMOR, "organ volume measurement", answers.organ_volume, ABDOMINAL, "ml"),
    number(TUMOR, "organ HU ratio", answers.hu_ratio, ("",), decimals=2),
    number(TUMOR, "tumor burden percentage", answers.tumor_burden, ("liver", "kidneys", "pancreas"), "%", 1),
    yes_no(RECOGNISE, "liver lesion existence", answers.lesion_existence, ("liver lesion",)),
    yes_no(RECOGNISE, "kidney lesion existence", answers.lesion_existence, ("kidney lesion",)),
    yes_no(RECOGNISE, "kidney cyst existence", answers.lesion_existence, ("kidney cyst",)),
    yes_no(RECOGNISE, "kidney tumor existence", answers.lesion_existence, ("kidney tumour",)),
    yes_no(RECOGNISE, "pancreatic lesion existence", answers.lesion_existence, ("pancreatic lesion",)),
    yes_no(RECOGNISE, "splenomegaly detection", answers.enlargement, ("spleen",)),
    number(LOOK, "lesion counting", answers.count, COUNTED[:4]),
    number(LOOK, "lesion count by location", answers.count_by_location, COUNTED_PLACES),
    number(LOOK, "largest lesion diameter", answers.diameter, LESIONS, "mm"),
    choice(LOOK, "largest lesion location", answers.position, LESIONS[:3]),
    choice(LOOK, "largest lesion attenuation", answers.attenuation, LESIONS),
    # The question holds the scan's own slice count, so no two cases share a text and it is asked openly.
    replace(number(LOOK, "largest lesion slice", answers.largest_slice, LESIONS), asked="open"),
    number(LOOK, "organ aggregation", answers.organ_volume, ("kidneys", "lungs"), "ml"),
    choice(LOOK, "kidney volume comparison", answers.kidney_comparison),
    yes_no(LOOK, "bilateral kidney asymmetry", answers.kidney_asymmetry),
    yes_no(LOOK, "organ enlargement", answers.enlargement, ("heart", "spleen")),
    choice(LOOK, "inter-segment comparison", answers.liver_halves),
    yes_no(LOOK, "liver lesion clustering", answers.clustering),
    choice(LOOK, "multi-organ lesion burden comparison", answers.burden_comparison),
    number(LOOK, "tumor organ HU difference", answers.hu_difference, LESIONS, "HU"),
    yes_no(REASON, "fatty liver", answers.fatty_liver),
    choice(REASON, "hepatic steatosis grading", answers.steatosis_grade),
    choice(REASON, "splenomegaly grading", answers.splenomegaly_grade),
    choice(REASON, "lesion type classification", answers.lesion_class),
    choice(REASON, "renal mass characterization", answers.renal_mass),
)

M3D_FIVE = (
    choice(M3D["plane"], "plane", answers.plane, (*PLANE_ORGANS, *FOCAL)),
    choice(M3D["phase"], "phase", answers.phase),
    choice(M3D["organ"], "organ", answers.organ),
    replace(choice(M3D["abnormality"], "abnormality", answers.abnormality, ABNORMALITIES), asked="closed"),
    choice(M3D["location"], "location", answers.location, (*SIDED, "enlarged lymph node")),
)

KINDS: tuple[Kind, ...] = (*THREE_D_RAD, *DEEP_TUMOR_VQA, *M3D_FIVE)
TASKS: tuple[str, ...] = (*dict.fromkeys(kind.task.name for kind in KINDS), "report")

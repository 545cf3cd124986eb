"""What a row says about the organ and the findings of its question, against the list of labels read by eye."""

import pytest
from labels import FINDINGS, ORGANS
from questions import KINDS
from regions import _SAID_BY_KIND, regions_of

SEVERAL_OR_NONE = {"enlarged_organ", "effusion_type", "hu_ratio", "burden_comparison", "phase", "organ"}
"""Kinds without a subject that are about more than one organ, or about the whole scan."""


@pytest.mark.parametrize(
    ("kind", "subject", "organ", "organ_labels", "finding_labels"),
    [
        ("existence", "lung nodule", "lungs", "10,11,40,41", "40"),
        ("existence", "pleural effusion", "lungs", "10,11,40,41", "42"),
        ("existence", "pericardial effusion", "heart", "12", "43"),
        ("existence", "enlarged lymph node", None, None, "49"),
        ("existence", "fatty liver", "liver", "16,45", None),
        ("existence", "cardiomegaly", "heart", "12", None),
        ("organ_volume", "left kidney", "kidneys", "18,19,46,47", None),
        ("organ_volume", "lungs", "lungs", "10,11,40,41", None),
        ("organ_hu", "aorta", "aorta", "13,44", None),
        ("enlargement", "spleen", "spleen", "17", None),
        ("lesion_existence", "kidney lesion", "kidneys", "18,19,46,47", "46,47"),
        ("count_by_location", "kidney cyst in the left kidney", "kidneys", "18,19,46,47", "46"),
        ("clustering", "", "liver", "16,45", "45"),
        ("abnormality", "cardiomegaly | splenomegaly", None, None, None),
        ("phase", "", None, None, None),
    ],
)
def test_regions_by_hand(
    kind: str, subject: str, organ: str | None, organ_labels: str | None, finding_labels: str | None
) -> None:
    expected = {"organ": organ, "organ_labels": organ_labels, "finding_labels": finding_labels}
    assert regions_of(kind, subject).meta() == expected


def test_every_kind_of_question_is_accounted_for() -> None:
    """A new kind that names an organ without a subject would be left out of the statistics unseen."""
    without_subject = {kind.name for kind in KINDS if kind.subjects == ("",)}
    assert without_subject == set(_SAID_BY_KIND) | SEVERAL_OR_NONE
    assert not set(_SAID_BY_KIND) & SEVERAL_OR_NONE


def test_ids_are_those_of_the_label_map() -> None:
    known = {*ORGANS.values(), *FINDINGS.values()}
    organs = set()
    for kind in KINDS:
        for subject in kind.subjects:
            meta = regions_of(kind.name, subject).meta()
            organs.add(meta["organ"])
            for key in ("organ_labels", "finding_labels"):
                assert {int(label) for label in (meta[key] or "12").split(",")} <= known, (kind, subject)
    assert organs == {None, "lungs", "heart", "aorta", "liver", "spleen", "kidneys", "pancreas"}

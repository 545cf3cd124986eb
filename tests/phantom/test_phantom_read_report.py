"""Reading a report gives back the facts that it was written from, and nothing from broken text."""

import random

import pytest
from facts import Facts, Instance, Organ, Scan, facts_of
from hypothesis import given
from hypothesis import strategies as st
from labels import FINDINGS, HOSTS, ORGANS, PHASES, STATES
from read_report import Affirmed, organ_of, read_report
from report import write_report
from scene import SceneOptions, draw

STATE_OF = {"cardiomegaly": "heart", "splenomegaly": "spleen", "fatty liver": "liver"}


def made_up_case(rng: random.Random) -> Facts:
    """What reports are written from: organs may be cut off, a host unknown, lesions many, attenuation negative."""
    organs = {name: Organ(rng.uniform(60, 900), 0, 9, (9, 9, 9), None) for name in ORGANS if rng.random() < 0.9}

    def instance(finding: str) -> Instance:
        side = rng.choice(("left", "right"))
        hosts = [host for host in HOSTS[finding] if len(HOSTS[finding]) == 1 or host.startswith(side)]
        host = hosts[0] if hosts and rng.random() < 0.9 else ""
        return Instance(rng.uniform(1, 900), rng.uniform(3, 80), (9, 9, 9), (0, 0, 0), 1, (1, 1, 1), side, host)

    def instances(finding: str) -> tuple[Instance, ...]:
        if HOSTS[finding] == ("liver",) and "liver" not in organs:
            return ()
        return tuple(instance(finding) for _ in range(rng.choice((0, 0, 1, 1, 2, 3, 9))))

    return Facts(
        slices=50,
        phase=rng.choice(PHASES),
        hu={"liver": rng.uniform(-30, 120)},
        organs=organs,
        instances={name: instances(name) for name in FINDINGS},
        states=frozenset(name for name in STATES if STATE_OF[name] in organs and rng.random() < 0.5),
        thickness_mm={name: rng.uniform(5, 90) for name in FINDINGS if "effusion" in name},
        heart_ratio=rng.uniform(0.3, 0.7) if "heart" in organs else None,
    )


def written(facts: Facts) -> set[Affirmed]:
    """What a report on a case affirms, from its facts."""
    found = {Affirmed(name, STATE_OF[name]) for name in facts.states}
    for name in FINDINGS:
        largest = facts.largest(name)
        if largest is None:
            continue
        if name == "pleural effusion":
            found |= {Affirmed(name, side) for side in facts.sides(name)}
        elif name in ("pericardial effusion", "arterial calcification"):
            found.add(Affirmed(name, HOSTS[name][0]))
        else:
            found.add(Affirmed(name, largest.host or largest.side))
    return found


def check_round_trip(facts: Facts, rng: random.Random) -> set[Affirmed]:
    report = write_report(facts, rng)
    reading = read_report(report)
    assert reading.affirmed == written(facts), report
    assert reading.findings == {name for name in (*FINDINGS, *STATES) if facts.present(name)}
    assert reading.known == reading.sentences, report
    return set(reading.affirmed)


@given(st.integers(0, 2**32))
def test_round_trip_of_any_case(seed: int) -> None:
    rng = random.Random(seed)
    check_round_trip(made_up_case(rng), rng)


def test_round_trip_meets_every_finding_and_place() -> None:
    """Enough seeds that a phrase which is not read back can't be missed: each is drawn dozens of times."""
    seen: set[Affirmed] = set()
    for seed in range(600):
        rng = random.Random(seed)
        seen |= check_round_trip(made_up_case(rng), rng)
    hosts = {Affirmed(name, host) for name in FINDINGS for host in HOSTS[name]}
    sides = {Affirmed(name, side) for name in ("pleural effusion", "enlarged lymph node") for side in ("left", "right")}
    states = {Affirmed(*item) for item in STATE_OF.items()}
    assert seen >= {found for found in hosts if found.finding != "pleural effusion"} | sides | states


def test_round_trip_of_drawn_scans() -> None:
    seen: set[Affirmed] = set()
    for seed in range(15):
        case = draw(seed, SceneOptions(shape=(40, 80, 80)))
        facts = facts_of(Scan(case.labels, case.spacing_mm, case.painted_hu, case.phase))
        seen |= check_round_trip(facts, random.Random(seed))
    assert {found.finding for found in seen} == {*FINDINGS, *STATES}


def test_a_report_by_hand() -> None:
    reading = read_report(
        "Contrast-enhanced chest-abdomen CT, delayed phase. Lung parenchyma without focal abnormality. "
        "Bilateral pleural effusion of 348 ml, 63 mm at its thickest. The heart is not enlarged (ratio 0.47). "
        "No pericardial effusion. The aorta shows arterial calcification (two foci). "
        "Solitary enlarged lymph node in the right half of the body, 18 mm. Fatty liver, -4 HU. No liver lesion. "
        "Spleen not enlarged, 151 ml. Two kidney cysts, the largest 19 mm in the left kidney. "
        "No pancreatic lesion."
    )
    assert reading.affirmed == {
        ("pleural effusion", "left"),
        ("pleural effusion", "right"),
        ("arterial calcification", "aorta"),
        ("enlarged lymph node", "right"),
        ("fatty liver", "liver"),
        ("kidney cyst", "left kidney"),
    }
    assert reading.organs == {"lungs", "aorta", "lymph nodes", "liver", "kidneys"}
    assert (reading.sentences, reading.known) == (12, 12)


def test_organs_of_findings() -> None:
    """Paired organs are one; fluid counts to the organ that it surrounds."""
    assert {organ_of(name) for name in ("lung nodule", "consolidation", "pleural effusion")} == {"lungs"}
    assert {organ_of(name) for name in ("cardiomegaly", "pericardial effusion")} == {"heart"}
    assert {organ_of(name) for name in ("liver lesion", "fatty liver")} == {"liver"}
    assert {organ_of(name) for name in ("kidney cyst", "kidney tumour")} == {"kidneys"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " . .. ",
        "the the of liver 3 , splenomegaly",
        "Splenomegaly",
        "Splenomegaly with a volume of",
        "Splenomegaly with a volume of ml.",
        "Splenomegaly with a volume of 7",
        "No Splenomegaly with a volume of 700 ml.",
        "Splenomegaly with a volume of 700 ml is absent.",
        "No liver lesions, the largest 20 mm in the liver.",
        "There are no kidney cysts; the largest measures 8 mm and lies in the left kidney.",
        "Solitary kidney cyst in the liver, 12 mm.",
        "Solitary kidney cyst in the kidney, 12 mm.",
        "Two kidney cysts, the largest 19 mm in the left",
        "In the left lung there is a single left lung of 12 mm.",
        "Right-sided Right-sided pleural effusion, up to 20 mm thick.",
        "Fatty liver, 1.2.3 HU.",
    ],
)
def test_broken_text_affirms_nothing(text: str) -> None:
    reading = read_report(text)
    assert (reading.affirmed, reading.organs, reading.known) == (frozenset(), frozenset(), 0)


def test_denials_are_known_and_affirm_nothing() -> None:
    reading = read_report("No pleural effusion. Spleen not enlarged, 151 ml. No lung nodule or consolidation.")
    assert (reading.affirmed, reading.sentences, reading.known) == (frozenset(), 3, 3)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Splenomegaly with  a volume\nof 700 ml", None),
        ("splenomegaly with a volume of 700.5 ml.Splenomegaly with a", None),
        ("CT of liver. The spleen measures 0.7 ml: splenomegaly. No", None),
        ("garbage garbage. right-sided pleural effusion, up to 20 mm thick.", "right"),
        ("3 lung nodules, the largest 9 mm in the Left Lung.", "left lung"),
    ],
)
def test_whole_sentences_are_found_among_broken_ones(text: str, place: str | None) -> None:
    reading = read_report(text)
    assert [found.place for found in reading.affirmed] == [place or "spleen"]
    assert reading.known == 1

"""Phantom questions: answers recomputed from the files, no shortcut in the text, same seed same bytes."""

import json
import random
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import pytest
from ask import Entry, make_rows
from balance import Candidate, category_blocks, far_apart, number_blocks
from facts import Facts, Instance, Organ, Scan, _runs, facts_of
from labels import FINDINGS, HOSTS, ORGANS, PHASES, STATES
from measure import mirror
from questions import EVERYTHING, KINDS, TASKS, Kind
from report import write_report
from scene import draw
from storage import ORIENTATIONS, write_nifti
from templates import TEMPLATES, plural, with_article

from mllm3d.data.manifest import Row, read_manifest
from mllm3d.data.volumes import read_labels, read_volume

BY_KEY = {(kind.task.name, kind.name, subject): kind for kind in KINDS for subject in kind.subjects}


# ---- a data set on disk ----


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "data"
    make(out, "--cases", "36", "--priors", "0.5", "--splits", "0.7,0.1,0.2")
    return out


def make(out: Path, *extra: str, seed: int = 5) -> None:
    prepare.main(["--out", str(out), "--seed", str(seed), "--workers", "1", *extra])


@pytest.fixture(scope="module")
def rows(dataset: Path) -> list[Row]:
    return read_manifest(dataset / "manifest.jsonl")


@pytest.fixture(scope="module")
def recorded(dataset: Path) -> dict[str, dict[str, Any]]:
    lines = (dataset / "cases.jsonl").read_text().splitlines()
    return {record["case"]: record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def reread(dataset: Path, recorded: dict[str, dict[str, Any]]) -> dict[str, tuple[Scan, Facts]]:
    """The current scan of each case and its facts, from the written label maps and metadata alone."""

    def scan(name: str, metadata: dict[str, Any]) -> Scan:
        volume = read_labels(dataset / "labels" / f"{name}.nii.gz")
        return Scan(volume.array, volume.spacing_mm, metadata["painted_hu"], metadata["phase"])

    found = {}
    for case, record in recorded.items():
        scans = [scan(name, metadata) for name, metadata in record["scans"].items()]
        found[case] = (scans[-1], facts_of(scans[-1], prior=scans[0] if len(scans) == 2 else None))
    return found


def test_every_answer_follows_from_the_written_files(rows: list[Row], reread: dict[str, tuple[Scan, Facts]]) -> None:
    asked = [row for row in rows if row.task != "report"]
    assert {row.task for row in asked} == set(TASKS) - {"report"}
    for row in asked:
        kind = BY_KEY[row.task, row.meta["kind"], row.meta["finding"] or ""]
        value = kind.value(reread[row.case][1], row.meta["finding"] or "")
        assert value == row.meta["answer_value"], row
        assert kind.text(value) == row.answer, row


def test_reports_follow_from_the_written_files(rows: list[Row], reread: dict[str, tuple[Scan, Facts]]) -> None:
    reports = [row for row in rows if row.task == "report"]
    assert len({row.answer for row in reports}) == len(reports) == len(reread)
    for row in reports:
        assert row.report == row.answer
        assert row.answer == write_report(reread[row.case][1], random.Random(f"5|wording|{row.case}"))


def test_simple_answers_by_counting_voxels(rows: list[Row], reread: dict[str, tuple[Scan, Facts]]) -> None:
    """The same answers without facts.py or measure.py between."""
    seen = Counter[str]()
    for row in rows:
        scan, subject = reread[row.case][0], str(row.meta.get("finding"))
        if row.task == "existence" and subject in FINDINGS:
            assert row.answer == ("yes" if (scan.labels == FINDINGS[subject]).any() else "no")
        elif row.meta["kind"] == "organ_volume" and subject == "spleen":
            millilitres = (scan.labels == ORGANS["spleen"]).sum() * np.prod(scan.spacing_mm) / 1000
            assert row.answer == f"{millilitres:.0f} ml"
        elif row.meta["kind"] == "location" and subject == "pleural effusion":
            columns = np.nonzero(scan.labels == FINDINGS[subject])[2]
            spine = np.nonzero(scan.labels == ORGANS["spine"])[2].mean()
            left = (columns > spine).sum()  # W grows toward the patient's left
            assert row.answer == ("Left" if 2 * left > len(columns) else "Right")
        else:
            continue
        seen[row.task] += 1
    assert min(seen[task] for task in ("existence", "tumor_measurement", "location")) > 10


def test_volume_and_label_map_lie_on_each_other(dataset: Path, rows: list[Row]) -> None:
    pairs = {(row.volume, row.labels) for row in rows} | {
        (row.prior, row.prior.replace("volumes", "labels")) for row in rows if row.prior
    }
    assert len(pairs) == 36 + 18
    for volume, labels in pairs:
        assert labels is not None
        image, ids = read_volume(dataset / volume), read_labels(dataset / labels)
        np.testing.assert_array_equal(image.source_affine, ids.source_affine)
        for lung in ("left lung", "right lung"):
            assert np.median(image.array[ids.array == ORGANS[lung]]) < -600
        left, right = (np.nonzero(ids.array == ORGANS[f"{side} lung"])[2].mean() for side in ("left", "right"))
        assert left > right


def test_splits_are_by_case(rows: list[Row], dataset: Path) -> None:
    splits = defaultdict(set)
    for row in rows:
        splits[row.case].add(row.split)
        assert row.volume.startswith(f"volumes/{row.case}.")
        if row.prior:
            assert row.prior == f"volumes/{row.case}_prior.nii.gz"
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter(next(iter(found)) for found in splits.values())
    assert counts == {"train": 25, "validation": 4, "test": 7}
    summary = json.loads((dataset / "dataset.json").read_text())
    assert summary["splits"] == counts and summary["cases_with_prior"] == 18


def test_the_data_set_says_where_it_is_from_and_under_which_licence(dataset: Path) -> None:
    """A model card quotes both."""
    summary = json.loads((dataset / "dataset.json").read_text())
    assert (summary["source"], summary["licence"]) == ("drawn by data/phantom/prepare.py", "Apache-2.0")


def test_only_temporal_questions_show_the_prior_scan(rows: list[Row]) -> None:
    for row in rows:
        assert (row.prior is not None) == (row.task in ("static_temporal", "longitudinal_temporal"))


def test_several_phrasings(rows: list[Row]) -> None:
    for kind in KINDS:
        assert len(TEMPLATES[kind.name]) >= 2
    texts = {row.question for row in rows if row.task == "existence" and row.subtask == "cardiomegaly"}
    assert len(texts) >= 3


def test_stored_orientations_vary_and_read_back_alike(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    affines = set()
    for orientation in ORIENTATIONS:
        path = tmp_path / f"{orientation}.nii.gz"
        write_nifti(array, (5.0, 2.0, 1.5), orientation, path)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, array)
        assert volume.spacing_mm == (5.0, 2.0, 1.5)
        affines.add(volume.source_affine[:3, :3].tobytes())
    assert len(affines) == len(ORIENTATIONS) >= 4


def test_same_seed_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    small = ("--cases", "4", "--priors", "1", "--shape", "28,56,56", "--splits", "0.5,0.25,0.25")
    make(tmp_path / "one", *small)
    make(tmp_path / "two", *small, "--workers", "2")
    make(tmp_path / "other", *small, seed=6)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert len(one) == 2 * (4 + 4) + 3
    volumes = [path for path in one if path.startswith("volumes/")]
    assert all(one[path] != other.get(path) for path in volumes)


def test_rows_name_the_labels_of_what_they_ask_about(rows: list[Row], reread: dict[str, tuple[Scan, Facts]]) -> None:
    """Against the answers: a finding that is there has voxels with the ids that its row names, an absent one none."""
    counts = Counter[str]()
    for row in rows:
        labels = row.meta.get("finding_labels")
        if row.task not in ("existence", "tumor_recognition") or labels is None:
            continue
        named = np.isin(reread[row.case][0].labels, [int(label) for label in str(labels).split(",")])
        assert named.any() == (row.answer.lower() == "yes"), row
        counts[row.answer.lower()] += 1
    assert min(counts["yes"], counts["no"]) > 10


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--splits", "0.9,0.9,0.1"], "--splits"),
        (["--cases", "0"], "--cases 0"),
        (["--priors", "2"], "--priors 2"),
        (["--shape", "4,4,4"], "--shape"),
        (["--atlas", "x.nii.gz"], "--atlas-names"),
        (["--atlas", "x.nii.gz", "--atlas-names", "x.json"], "x.json"),
        (["--cases", "1", "--tasks", "phase", "--shape", "16,32,32", "--splits", "0,0,1"], None),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, extra: list[str], message: str | None) -> None:
    arguments = ["--out", str(tmp_path / "x"), "--cases", "2", "--seed", "0", "--workers", "1", *extra]
    if message is None:
        prepare.main(arguments)
        assert [row.answer.lower() in PHASES for row in read_manifest(tmp_path / "x" / "manifest.jsonl")] == [True]
        return
    with pytest.raises(SystemExit) as raised:
        prepare.main(arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "x").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit, match="exists already"):
        make(tmp_path, "--cases", "1")
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_an_atlas_is_painted_instead(tmp_path: Path) -> None:
    names = {
        "left lung": "lung_upper_lobe_left",
        "right lung": "lung_upper_lobe_right",
        "heart": "heart",
        "liver": "liver",
        "spleen": "spleen",
        "spine": "vertebrae_L1",
    }
    case = draw(3)
    kept = np.isin(case.labels, [ORGANS[name] for name in names])
    write_nifti(np.where(kept, case.labels, 0).astype(np.uint8), case.spacing_mm, "RAS", tmp_path / "a.nii.gz")
    (tmp_path / "a.json").write_text(json.dumps({ORGANS[name]: names[name] for name in names}))
    atlas = ("--atlas", str(tmp_path / "a.nii.gz"), "--atlas-names", str(tmp_path / "a.json"))
    make(tmp_path / "out", "--cases", "3", "--priors", "1", *atlas)
    for path in (tmp_path / "out" / "labels").iterdir():
        found = set(np.unique(read_labels(path).array))
        assert ORGANS["liver"] in found and ORGANS["left kidney"] not in found
    rows = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert {"report", "organ", "tumor_measurement"} <= {row.task for row in rows}


# ---- left and right ----


def swapped(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    turned = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub("left|right|Left|Right", lambda found: turned[found[0]], text)


def test_mirroring_the_label_map_swaps_left_and_right() -> None:
    sided = 0
    for seed in range(12):
        case = draw(seed)
        scan = Scan(case.labels, case.spacing_mm, case.painted_hu, case.phase)
        painted = {swapped(name): hu for name, hu in case.painted_hu.items()}
        facts, mirrored = (
            facts_of(scan),
            facts_of(Scan(mirror(case.labels), case.spacing_mm, painted, case.phase)),
        )
        for kind in KINDS:
            for subject in kind.subjects:
                value, turned = kind.value(facts, subject), kind.value(mirrored, swapped(subject))
                assert swapped(value) == turned, (seed, kind.name, subject)
                sided += swapped(value) != value
    assert sided > 40


# ---- no shortcut in the text ----


def made_up_facts(rng: random.Random) -> Facts:
    """A case without voxels: whatever a phantom may hold, drawn independently."""

    def organ() -> Organ:
        low, high = rng.randint(0, 9), rng.randint(20, 40)
        return Organ(rng.uniform(60, 900), low, high, extent(), (rng.random(), rng.random(), rng.random()))

    def extent() -> tuple[float, float, float]:
        return rng.uniform(20, 180), rng.uniform(20, 180), rng.uniform(20, 180)

    def instance(finding: str) -> Instance:
        side = rng.choice(("left", "right"))
        hosts = HOSTS[finding] or ("",)
        host = hosts[0] if len(hosts) == 1 else f"{side} {hosts[0].split()[1]}"
        areas = (rng.random(), rng.random(), rng.random())
        centre, size = (rng.uniform(5, 40), 50.0, 50.0), rng.lognormvariate(3, 0.5)
        return Instance(rng.lognormvariate(2, 1), size, extent(), centre, rng.randint(1, 50), areas, side, host)

    def instances(finding: str) -> tuple[Instance, ...]:
        found = [instance(finding) for _ in range(rng.randint(1, 4) if rng.random() < 0.45 else 0)]
        return tuple(sorted(found, key=lambda one: -one.volume_ml))

    changes = ("new", "gone", "absent", "absent", "absent", "grown", "shrunk", "unchanged")
    return Facts(
        slices=rng.randint(40, 60),
        phase=rng.choice(PHASES),
        hu={name: rng.gauss(80, 30) for name in (*ORGANS, *FINDINGS)},
        organs={name: organ() for name in ORGANS},
        instances={name: instances(name) for name in FINDINGS},
        states=frozenset(name for name in STATES if rng.random() < 0.3),
        thickness_mm={name: rng.uniform(5, 40) for name in FINDINGS if "effusion" in name},
        heart_ratio=rng.uniform(0.4, 0.6),
        changes={name: rng.choice(changes) for name in EVERYTHING} if rng.random() < 0.5 else None,
    )


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    rng = random.Random(11)
    split = ("train", "train", "train", "test")
    return [
        Entry(f"c{i}", split[i % 4], f"v{i}.nii.gz", f"l{i}.nii.gz", f"p{i}.nii.gz", made_up_facts(rng), f"r{i}")
        for i in range(200)
    ]


@pytest.fixture(scope="module")
def fair(entries: list[Entry]) -> list[Row]:
    return [row for row in make_rows(entries, 3, TASKS) if row.meta["closed"]]


@pytest.fixture(scope="module")
def biased(entries: list[Entry]) -> list[Row]:
    return [row for row in make_rows(entries, 3, TASKS, biased=True) if row.meta["closed"]]


RULES: dict[str, Callable[[Row], object]] = {
    "sub-task": lambda row: (row.task, row.subtask),
    "question": lambda row: (row.task, row.question),
    "options": lambda row: (row.task, tuple(sorted(row.options or ()))),
    "question and options": lambda row: (row.task, row.question, tuple(row.options or ())),
}


def majority_accuracy(fit: list[Row], test: list[Row], key: Callable[[Row], object]) -> float:
    """Accuracy of always giving the answer that was most frequent for the key where the rule was fitted."""
    seen: dict[object, Counter[str]] = defaultdict(Counter)
    for row in fit:
        seen[key(row)][row.answer] += 1
    hits = [
        row.answer == max(row.options or ("yes", "no"), key=lambda text: seen[key(row)][text])  # noqa: B023
        for row in test
    ]
    return sum(hits) / len(hits)


def by_task(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    for task in TASKS[:-1]:
        yield task, [row for row in rows if row.task == task]


def chance(rows: list[Row]) -> float:
    return sum(1 / len(row.options or ("yes", "no")) for row in rows) / len(rows)


@pytest.mark.parametrize("rule", RULES)
def test_text_alone_does_not_beat_chance(fair: list[Row], rule: str) -> None:
    for task, every in by_task(fair):
        train, test = ([row for row in every if row.split == split] for split in ("train", "test"))
        assert len(test) >= 20, task
        for fit, scored in ((train, train), (train, test), (test, test)):
            assert abs(majority_accuracy(fit, scored, RULES[rule]) - chance(scored)) < 0.05, (task, rule)


def test_numbers_have_no_favourite_place(fair: list[Row]) -> None:
    """Always taking the smallest, the largest or a middle option does not help either."""
    numeric = [row for row in fair if row.options and isinstance(row.meta["answer_value"], float)]
    for place in (0, 1, -1):
        hits = [sorted(row.options or (), key=first_number)[place] == row.answer for row in numeric]
        assert abs(sum(hits) / len(hits) - chance(numeric)) < 0.01


def first_number(text: str) -> float:
    return float(text.split()[0])


def test_a_block_is_one_text_with_every_answer_once(fair: list[Row]) -> None:
    blocks: dict[str, list[Row]] = defaultdict(list)
    for row in fair:
        blocks[str(row.meta["block"])].append(row)
    for block in blocks.values():
        texts = {(row.split, row.task, row.subtask, row.question, tuple(row.options or ())) for row in block}
        assert len(texts) == 1
        assert len({row.case for row in block}) == len(block)
        assert sorted(row.answer for row in block) == sorted(block[0].options or ("yes", "no"))


def test_option_letters_are_balanced(fair: list[Row]) -> None:
    four = [row for row in fair if row.options and len(row.options) == 4]
    letters = Counter(string.ascii_uppercase[(row.options or []).index(row.answer)] for row in four)
    assert set(letters.values()) == {len(four) // 4}
    order = {tuple(row.options or ()) for row in fair if row.task == "phase"}
    assert len(order) > 4


def test_numeric_options_are_a_quarter_apart(fair: list[Row], biased: list[Row], rows: list[Row]) -> None:
    checked = 0
    for row in (*fair, *biased, *rows):
        if row.options and isinstance(row.meta["answer_value"], float):
            numbers = sorted(map(first_number, row.options))
            for low, high in zip(numbers, numbers[1:], strict=False):
                assert high - low >= 0.25 * max(abs(low), abs(high)), row
            checked += 1
    assert checked > 500


def test_the_written_manifest_is_fair_too(rows: list[Row]) -> None:
    closed = [row for row in rows if row.meta["closed"]]
    for task, every in by_task(closed):
        for split in {row.split for row in every}:
            here = [row for row in every if row.split == split]
            best = max(majority_accuracy(here, here, key) for key in RULES.values())
            assert abs(best - chance(here)) < 0.05, (task, split)


def test_most_cases_are_asked_about_most_findings(fair: list[Row]) -> None:
    """Balance costs the surplus answers only."""
    existence = [row for row in fair if row.task == "existence"]
    assert {row.subtask for row in existence} == set(EVERYTHING)
    assert len(existence) > 0.55 * 13 * 200


def test_biased_version_can_be_answered_without_the_scan(biased: list[Row], fair: list[Row]) -> None:
    existence = [row for row in biased if row.task == "existence"]
    assert 0.75 < sum(row.answer == "no" for row in existence) / len(existence) < 0.85
    status = [row for row in biased if row.meta["kind"] == "longitudinal"]
    assert len(status) > 300

    def by_history(row: Row) -> bool:
        return row.answer.startswith("Refractory" if ", 1]" in row.question or "[1]" in row.question else "No Abn")

    assert 0.75 < sum(map(by_history, status)) / len(status) < 0.9
    fair_status = [row for row in fair if row.meta["kind"] == "longitudinal"]
    assert abs(sum(map(by_history, fair_status)) / len(fair_status) - chance(fair_status)) < 0.05


def test_biased_flag_reaches_the_manifest(tmp_path: Path) -> None:
    make(tmp_path / "b", "--cases", "12", "--shape", "28,56,56", "--biased", "--tasks", "existence")
    rows = [row for row in read_manifest(tmp_path / "b" / "manifest.jsonl") if row.split == "train"]
    assert json.loads((tmp_path / "b" / "dataset.json").read_text())["biased"] is True
    assert {row.task for row in rows} == {"existence"}
    assert sum(row.answer == "no" for row in rows) > 0.7 * len(rows)


# ---- parts ----


def test_blocks_use_every_answer_once_and_lose_nobody() -> None:
    rng = random.Random(0)
    cases = [Candidate(f"c{i}", word, word) for i, word in enumerate("aaaaabbbcc")]
    blocks, left = category_blocks(cases, 4, rng)
    assert [len(block) for block in blocks] == [3, 3, 2]
    assert all(len({one.text for one in block}) == len(block) for block in blocks)
    assert sorted(one.case for block in blocks for one in block) + sorted(one.case for one in left) != []
    assert {one.case for block in blocks for one in block} | {one.case for one in left} == {c.case for c in cases}


def test_number_blocks_are_far_apart() -> None:
    rng = random.Random(0)
    cases = [Candidate(f"c{i}", value, str(value)) for i, value in enumerate(rng.choices(range(-40, 90), k=101))]
    blocks, left = number_blocks(cases, 4, rng)
    assert sum(map(len, blocks)) + len(left) == 101 and len(blocks) >= 15
    for block in blocks:
        for i, one in enumerate(block):
            assert all(far_apart(float(one.value), float(other.value)) for other in block[i + 1 :])
    assert not far_apart(0, 0) and not far_apart(100, 80) and far_apart(100, 75) and far_apart(0, 1)


def test_runs() -> None:
    mask = np.array([[[1, 1, 0, 1, 1, 1, 0]]], bool)
    assert _runs(mask, 2).tolist() == [[[2, 2, 0, 3, 3, 3, 0]]]
    assert _runs(mask, 0).tolist() == mask.astype(int).tolist()


def test_thickness_is_that_of_a_slab() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[:, :, :10], labels[:, :, 10:] = ORGANS["right lung"], ORGANS["left lung"]
    labels[2:18, 12:16, 12:18] = FINDINGS["pleural effusion"]
    facts = facts_of(Scan(labels, (5.0, 2.0, 3.0), {}, "arterial"))
    assert facts.thickness_mm == {"pleural effusion": 8.0}
    assert facts.sides("pleural effusion") == ("left",)
    assert facts.total_ml("pleural effusion") == pytest.approx(16 * 4 * 6 * 30 / 1000)


def test_wording_of_names() -> None:
    assert plural("lung nodule in the left lung") == "lung nodules in the left lung"
    assert with_article("enlarged lymph node") == "an enlarged lymph node"
    assert with_article("cardiomegaly") == "cardiomegaly" and with_article("kidney cyst") == "a kidney cyst"


def test_reports_name_what_is_there_and_deny_what_is_not(entries: list[Entry]) -> None:
    for number, entry in enumerate(entries):
        report = write_report(entry.facts, random.Random(number))
        affirmed = " ".join(s for s in report.split(". ") if not re.search(r"\bno\b|\bnot\b|without", s.lower()))
        for finding in EVERYTHING:
            named = re.search(rf"\b{finding}s?\b", affirmed.lower()) is not None
            assert named == entry.facts.present(finding), (finding, report)


def test_every_kind_has_its_own_name_and_wording() -> None:
    keys = [(kind.task, kind.subtask, kind.name, subject) for kind in KINDS for subject in kind.subjects]
    assert len(set(keys)) == len(keys)
    for kind in KINDS:
        assert isinstance(kind, Kind)
        for phrasing in TEMPLATES[kind.name]:
            named = {part for _, part, _, _ in string.Formatter().parse(phrasing) if part}
            assert named <= {"x", "a", "xs", "history", "slices"}
            assert ("history" in named) == (kind.task.name == "longitudinal_temporal")

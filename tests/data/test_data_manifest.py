"""Manifests: strict rows, one line per mistake, paths that stay inside, selections that are not empty."""

import json
from pathlib import Path

import pytest

from mllm3d.data.manifest import Row, Study, parse_manifest, read_manifest, select, volume_path, write_manifest
from mllm3d.errors import UserError
from tests.data.scans import row

GOOD = row().model_dump(mode="json", exclude_defaults=True)
BARE = {key: value for key, value in GOOD.items() if key != "volume"}


def manifest(tmp_path: Path, *lines: str | dict[str, object]) -> Path:
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_rows_survive_writing_and_reading(tmp_path: Path) -> None:
    rows = [
        row("a", options=["Yes", "No"], meta={"age": 61, "dose": 1.5, "contrast": True, "note": None}),
        row(
            "b",
            answer="Größe 3 \u2028 mm",
            prior="volumes/p.nii.gz",
            modality="MR",
            labels="l.nii.gz",
            report="r",
        ),
        row("c", volume=None, images=["a/1.png", "2.jpg"]),
        row("d", volume=None, video="films/1"),
        row("e", images=["1.png"], video="films/1"),
    ]
    write_manifest(tmp_path / "new" / "m.jsonl", rows)
    assert read_manifest(tmp_path / "new" / "m.jsonl") == rows
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["m.jsonl"]
    assert len((tmp_path / "new" / "m.jsonl").read_bytes().splitlines()) == 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "object"),
        ({**GOOD, "anser": "x"}, "anser: unknown field; put it into meta, or did you mean answer?"),
        ({k: v for k, v in GOOD.items() if k != "question"}, "question: is missing"),
        ({**GOOD, "answer": "  "}, "answer: is empty"),
        ({**GOOD, "answer": 5}, "answer: Input should be a valid string"),
        ({**GOOD, "options": ["Yes"]}, "2 to 26 different choices"),
        ({**GOOD, "options": ["Yes", "Yes"]}, "2 to 26 different choices"),
        ({**GOOD, "options": ["No", "Maybe"]}, "'Yes' is not one of the options"),
        ({**GOOD, "modality": "PET"}, "modality"),
        ({**GOOD, "volume": "/data/x.nii.gz"}, "leaves the manifest's folder"),
        ({**GOOD, "volume": "../x.nii.gz"}, "leaves the manifest's folder"),
        ({**GOOD, "volume": "a/../../x.nii.gz"}, "leaves the manifest's folder"),
        ({**GOOD, "prior": "C:\\x.nii.gz"}, "leaves the manifest's folder"),
        ({**GOOD, "labels": "..\\x.nii.gz"}, "leaves the manifest's folder"),
        ({**GOOD, "volume": ""}, "no path"),
        ({**GOOD, "meta": {"list": [1]}}, "meta"),
        ({**BARE}, "volume, images or video: at least one of them is needed"),
        ({**BARE, "images": []}, "images: List should have at least 1 item"),
        ({**BARE, "images": "a.png"}, "images: Input should be a valid array"),
        ({**BARE, "images": ["a.png", "../b.png"]}, "images.1: '../b.png' leaves the manifest's folder"),
        ({**BARE, "video": "/films/1"}, "video: '/films/1' leaves the manifest's folder"),
        ({**BARE, "video": "v", "prior": "p.nii"}, "prior: belongs to a volume, and this row has none"),
        ({**BARE, "images": ["a.png"], "labels": "l.nii"}, "labels: belongs to a volume"),
    ],
)
def test_a_wrong_row_is_one_line_with_its_number(tmp_path: Path, line: str | dict[str, object], words: str) -> None:
    path = manifest(tmp_path, {**GOOD, "id": "first"}, "", line)
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and words in message and "\n" not in message, message


def test_all_problems_are_found_and_the_first_is_told(tmp_path: Path) -> None:
    path = manifest(tmp_path, GOOD, {**GOOD, "answer": ""}, "{", {**GOOD, "id": "q1"})
    rows, problems = parse_manifest(path)
    assert [number for number, _ in rows] == [1, 4]
    assert [problem.line for problem in problems] == [2, 3, 4]
    assert "already in line 1" in problems[2].message
    with pytest.raises(UserError, match=r":2: answer: is empty \(and 2 more: run `mllm3d data check"):
        read_manifest(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_manifest(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match="the manifest is empty"):
        read_manifest(manifest(tmp_path, content))


def test_a_missing_manifest_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.jsonl: cannot be read: No such file"):
        read_manifest(tmp_path / "gone.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not valid JSON"):
        read_manifest(tmp_path / "x.jsonl")


def test_paths_are_joined_to_the_manifests_folder(tmp_path: Path) -> None:
    assert volume_path(tmp_path, "a/b.nii.gz") == tmp_path / "a" / "b.nii.gz"
    with pytest.raises(ValueError, match="leaves"):
        volume_path(tmp_path, "../b.nii.gz")


ROWS = [
    row("1", task="existence", volume="a", meta={"slices": 20, "contrast": True}),
    row("2", task="measurement", volume="a", meta={"slices": 20, "contrast": False}),
    row("3", task="existence", volume="b", meta={}),
    row("4", task="existence", volume="c", split="test", subtask="nodule"),
    row("5", task="existence", volume="b", meta={"contrast": None}),
]


@pytest.mark.parametrize(
    ("split", "where", "limit", "wanted"),
    [
        ("train", {}, None, "1235"),
        ("test", None, None, "4"),
        ("train", {"task": ["existence"]}, None, "135"),
        ("train", {"task": ["existence", "measurement"], "slices": ["20"]}, None, "12"),
        ("train", {"contrast": ["true"]}, None, "1"),
        ("train", {"contrast": ["false", "null"]}, None, "235"),
        ("train", {"subtask": ["null"]}, 1, "12"),
        ("train", {"task": ["existence"]}, 2, "135"),
    ],
)
def test_select(split: str, where: dict[str, list[str]] | None, limit: int | None, wanted: str) -> None:
    assert "".join(found.id for found in select(ROWS, split, where, limit)) == wanted


@pytest.mark.parametrize(
    ("split", "where", "words"),
    [
        ("val", {}, "no row has split 'val'; the manifest's splits are: test, train"),
        (
            "train",
            {"taks": ["existence"]},
            "where.taks: neither a field of a row nor a key of its meta; did you mean task?",
        ),
        ("train", {"task": ["reports"]}, "where.task: no row of split 'train' is left with reports"),
    ],
)
def test_select_says_why_nothing_is_left(split: str, where: dict[str, list[str]], words: str) -> None:
    with pytest.raises(UserError) as caught:
        select(ROWS, split, where)
    assert words in str(caught.value)


def test_a_limit_counts_volumes_sets_of_images_and_videos() -> None:
    shown: list[dict[str, object]] = [
        {"images": ["1.png", "2.png"]},
        {"images": ["2.png", "1.png"]},  # another order is another study
        {"video": "film"},
        {"volume": "a", "video": "film"},
        {"volume": "a"},
    ]
    rows = [row(f"{n}{k}", **{"volume": None, **fields}) for k in "xy" for n, fields in enumerate(shown)]
    assert [found.id for found in select(rows, "train", limit_volumes=3)] == ["0x", "1x", "2x", "0y", "1y", "2y"]
    assert len({found.study for found in rows}) == 5
    assert rows[3].study == Study("a", (), "film") and str(rows[0].study) == "1.png, 2.png"
    assert [found.has_pixels for found in rows[:5]] == [True, True, True, True, False]


def test_every_field_is_described() -> None:
    assert all(field.description for field in Row.model_fields.values())

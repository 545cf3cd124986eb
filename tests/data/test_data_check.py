"""`mllm3d data check`: all problems at once, each at its line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm3d.data import check as check_module
from mllm3d.data.check import check_manifest, value_problem
from mllm3d.data.manifest import write_manifest
from mllm3d.data.volumes import Volume, read_volume
from mllm3d.errors import UserError
from tests.data.pictures import picture, save
from tests.data.scans import row, save_nifti, scan


def hu(seed: int = 0) -> np.ndarray:
    """Values as a CT has them: air, and tissue around 50."""
    random = np.random.default_rng(seed)
    array = random.normal(50, 20, (6, 8, 8))
    array[:, :2] = -1000
    return array.astype(np.int16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "v").mkdir()
    for n in range(3):
        save_nifti(tmp_path / "v" / f"{n}.nii.gz", hu(n))
    save_nifti(tmp_path / "v" / "labels.nii.gz", (hu() > 60).astype(np.uint8), axes=(0, 1, 2))
    return tmp_path


def problems(root: Path, *rows: dict[str, Any], workers: int = 0) -> list[tuple[int, str, str]]:
    write_manifest(root / "m.jsonl", [row(f"q{n}", **fields) for n, fields in enumerate(rows)])
    found = check_manifest(root / "m.jsonl", workers)
    assert all("\n" not in problem.text(root / "m.jsonl") for problem in found)
    return [(problem.line, problem.field, problem.message) for problem in found]


GOOD = [
    {"volume": "v/0.nii.gz", "labels": "v/labels.nii.gz", "case": "0", "report": "Clear lungs."},
    {"volume": "v/0.nii.gz", "prior": "v/1.nii.gz", "case": "0", "report": "Clear lungs."},
    {"volume": "v/2.nii.gz", "split": "test", "case": "2", "report": "A nodule."},
]


def test_a_good_manifest_has_no_problems_and_reads_each_file_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(path: Path) -> Volume:
        read.append(path.name)
        return read_volume(path)

    monkeypatch.setattr(check_module, "read_volume", reading)
    assert problems(root, *GOOD) == []
    assert sorted(read) == ["0.nii.gz", "1.nii.gz", "2.nii.gz"]


def test_everything_at_once_and_by_line(root: Path) -> None:
    """One manifest with each mistake; the same answer with worker processes."""
    volumes = root / "v"
    save_nifti(volumes / "unit.nii", (hu() - hu().min()) / np.float32(np.ptp(hu())))
    save_nifti(volumes / "raw.nii", hu() + np.int16(1024))
    save_nifti(volumes / "twice.nii", hu() - np.int16(1024))
    save_nifti(volumes / "empty.nii", np.zeros((4, 5, 6), np.int16))
    save_nifti(volumes / "nan.nii", np.where(hu() == -1000, np.nan, hu()).astype(np.float32))
    save_nifti(volumes / "small.nii", scan())
    (volumes / "copy.nii.gz").write_bytes((volumes / "0.nii.gz").read_bytes())
    (volumes / "cut.nii.gz").write_bytes((volumes / "0.nii.gz").read_bytes()[:-20])
    names = ["unit.nii", "raw.nii", "twice.nii", "empty.nii", "nan.nii", "cut.nii.gz", "gone.nii"]
    rows: list[dict[str, Any]] = [*GOOD, *({"volume": f"v/{name}", "case": name} for name in names)]
    rows += [
        {"volume": "v/0.nii.gz", "case": "0", "modality": "MR"},  # line 11
        {"volume": "v/1.nii.gz", "case": "2"},
        {"volume": "v/1.nii.gz", "case": "r", "split": "val", "report": "clear  LUNGS."},
        {"volume": "v/copy.nii.gz", "case": "copy", "split": "test"},
        {"volume": "v/2.nii.gz", "case": "2", "split": "test", "prior": "v/gone.nii"},
        {"volume": "v/small.nii", "case": "small", "labels": "v/labels.nii.gz"},
        {"volume": "v/1.nii.gz", "case": "3", "labels": "v/2.nii.gz"},
        {"volume": "v/1.nii.gz", "case": "2"},  # a leak is told once
    ]
    wanted = [
        (4, "volume", "not HU but scaled"),
        (5, "volume", "not HU (air is -1000)"),
        (6, "volume", "rescaled twice"),
        (7, "volume", "empty image"),
        (8, "volume", "NaN or infinite"),
        (9, "volume", "truncated"),
        (10, "volume", "no such file"),
        (11, "volume", "look like HU; is the modality CT?"),
        (12, "case", "case '2' is also in split 'test' (line 3)"),
        (13, "report", "the report is also in split 'train' (line 1)"),
        (13, "volume", "the volume is also in split 'train' (line 2)"),
        (14, "volume", "the volume is also in split 'train' (line 1)"),
        (16, "labels", "another grid"),
        (17, "labels", "not a label map"),
    ]
    found = problems(root, *rows)
    for (line, field, words), (found_line, found_field, message) in zip(wanted, found, strict=False):
        assert (line, field) == (found_line, found_field) and words in message, (
            found_line,
            found_field,
            message,
        )
    assert len(found) == len(wanted), found
    assert problems(root, *rows, workers=2) == found


def test_wrong_rows_stand_beside_wrong_volumes(root: Path) -> None:
    write_manifest(root / "m.jsonl", [row("q", volume="v/gone.nii")])
    path = root / "m.jsonl"
    path.write_text(path.read_text() + '{"id": 3}\nnot json\n' + path.read_text())
    found = check_manifest(path)
    assert [(problem.line, problem.field) for problem in found] == [
        (1, "volume"),
        *((2, field) for field in ("answer", "case", "id", "question", "split", "task")),
        (3, ""),
        (4, "id"),
    ]
    assert "no such file" in found[0].message and "(in 2 rows)" in found[0].message
    assert found[0].text(path).startswith(f"{path}:1: volume: ")


def test_images_and_videos_are_read_and_their_pixels_stay_in_one_split(root: Path) -> None:
    for name, seed in (("1.png", 1), ("copy.bmp", 1), ("2.png", 2), ("f/1.png", 3), ("f/2.png", 4)):
        save(root / "i" / name, picture(4, 6, 3, seed=seed))
    (root / "i" / "g").mkdir()
    for name in ("1", "2"):
        (root / "i" / "g" / f"{name}.png").write_bytes((root / "i" / "f" / f"{name}.png").read_bytes())
    (root / "i" / "bad.png").write_bytes(b"damaged")
    none: dict[str, Any] = {"volume": None}
    good: list[dict[str, Any]] = [
        {**none, "images": ["i/1.png", "i/2.png"], "case": "a"},
        {**none, "images": ["i/1.png"], "case": "a"},
        {**none, "video": "i/f", "case": "b"},
        {"volume": "v/0.nii.gz", "images": ["i/2.png"], "case": "c"},
    ]
    assert problems(root, *good) == []
    found = problems(
        root,
        *good,
        {**none, "images": ["i/2.png", "i/copy.bmp"], "case": "d", "split": "test"},
        {**none, "video": "i/g", "case": "e", "split": "test"},
        {**none, "images": ["i/bad.png", "i/gone.png"], "case": "f"},
        {**none, "images": ["i/bad.png"], "video": "i/1.png", "case": "g"},
    )
    assert [(line, field) for line, field, _ in found] == [
        (5, "images"), (5, "images"), (6, "video"), (7, "images"), (7, "images"), (8, "video")
    ]  # fmt: skip
    told = [message for _, _, message in found]
    assert told[0] == "the image i/2.png is also in split 'train' (line 1); keep it in one split"
    assert told[1] == "the image i/copy.bmp is also in split 'train' (line 1); keep it in one split"
    assert told[2] == "the video is also in split 'train' (line 3); keep it in one split"
    assert "bad.png: damaged, or no PNG file" in told[3] and told[3].endswith("(in 2 rows)")
    assert "gone.png: no such file" in told[4] and "1.png: a file; a video is a folder" in told[5]
    assert problems(root, *good, workers=2) == []


def test_an_empty_and_a_missing_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    (problem,) = check_manifest(tmp_path / "m.jsonl")
    assert problem.text("m.jsonl") == "m.jsonl: the manifest is empty: it has no rows"
    with pytest.raises(UserError, match="cannot be read"):
        check_manifest(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("low", "high", "modality", "wrong"),
    [
        (-1024, 3071, "CT", False),
        (-8192, 3071, "CT", False),
        (-1000, 1000, "CT", False),
        (-250, 300, "CT", False),
        (0, 4095, "CT", True),
        (0, 1, "CT", True),
        (-1, 1, "CT", True),
        (-1024, 65000, "CT", True),
        (-2048, -700, "CT", True),
        (0, 4095, "MR", False),
        (-47, 833, "MR", False),
        (0, 1, "MR", False),
        (-1024, 3071, "MR", True),
    ],
)
def test_value_ranges(low: float, high: float, modality: str, wrong: bool) -> None:
    array = np.linspace(low, high, 3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    assert (value_problem(array, modality) is not None) == wrong

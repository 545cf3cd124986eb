"""The picture of slice-wise pruning: shares along the volume, and what is shown of each slice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm3d import cli, registry
from mllm3d.config import VolumeConfig
from mllm3d.data.preprocess import Prepared, prepare
from mllm3d.data.volumes import Volume, read_volume
from mllm3d.inference.evidence import to_grey
from mllm3d.inference.evidence_slices import MOST_SHEETS, draw_slices, shade, slabs_of
from mllm3d.inference.generation import grid_boxes
from tests.inference.fake_adapter import NAME, write_model
from tests.inference.test_inference_evidence import store

UNIT = (4, 8, 8)
"""Voxels of a token."""


class Drawn:
    """What reaches matplotlib: planes, heights of columns, titles of panels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.axes import Axes

        self.planes: list[np.ndarray] = []
        self.heights: list[list[float]] = []
        self.titles: list[str] = []
        imshow, bar, set_title = Axes.imshow, Axes.bar, Axes.set_title

        def noted_imshow(axes: Axes, image: np.ndarray, **options: Any) -> object:
            self.planes.append(image)
            return imshow(axes, image, **options)

        def noted_bar(axes: Axes, places: Any, height: Any, **options: Any) -> object:
            self.heights.append(np.broadcast_to(height, np.shape(places)).tolist())
            return bar(axes, places, height, **options)

        def noted_title(axes: Axes, text: str, **options: Any) -> object:
            if text:
                self.titles.append(text)
            return set_title(axes, text, **options)

        for name, noted in (("imshow", noted_imshow), ("bar", noted_bar), ("set_title", noted_title)):
            monkeypatch.setattr(Axes, name, noted)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def a_scan(folder: Path, config: VolumeConfig) -> tuple[Volume, Prepared]:
    """16 planes of 16 x 16, each brighter than the one below it, and corners that span all grey levels."""
    array = np.zeros((16, 16, 16)) + 10 * np.arange(16)
    array[:2, :2], array[2:4, 2:4] = -300, 600
    volume = read_volume(store(folder / "scan.nii", array, (1.0, 1.0, 2.0), "LPS"))
    return volume, prepare(volume, config)


def test_slices_and_what_stayed_of_them() -> None:
    boxes = grid_boxes((10, 16, 16), UNIT)  # the third slice reaches past the volume
    kept = boxes[[0, 3, 8, 9, 10, 11]]
    assert slabs_of(boxes, kept) == [(0, 4, 4, 2), (4, 8, 4, 0), (8, 12, 4, 4)]
    assert [slab.share for slab in slabs_of(boxes, kept)] == [0.5, 0.0, 1.0]
    assert [slab.kept for slab in slabs_of(boxes, boxes[:0])] == [0, 0, 0]


@pytest.mark.parametrize("flip", [(), ("D", "W")])
def test_each_slice_is_drawn_at_its_middle_plane(tmp_path: Path, drawn: Drawn, flip: tuple[Any, ...]) -> None:
    """Twice as many planes for the model as in the file: a slice of 4 is two of them, the file's 0-1, 2-3, ..."""
    volume, prepared = a_scan(tmp_path, VolumeConfig(shape=(32, 16, 16), flip=flip))
    boxes = grid_boxes((32, 16, 16), UNIT)
    left = boxes[:, 2, 0] == 0  # on the model's grid
    slab = boxes[:, 0, 0] // 4
    kept = boxes[(left ^ (slab % 2 == 1)) & (slab != 2)]  # one half or the other of each slice but the third
    draw_slices(volume, prepared, boxes, kept, "title", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert drawn.heights == [[100.0], [50.0, 50.0, 0.0, 50.0, 50.0, 50.0, 50.0, 50.0]]
    assert drawn.titles[0].startswith("7 of 8 slices kept")
    assert "dropped" in drawn.titles[3] and drawn.titles[4].endswith(": 2 of 4")
    grey = to_grey(volume.array)
    for number, image in enumerate(drawn.planes):
        planes = {2 * number, 2 * number + 1} if not flip else {15 - 2 * number, 14 - 2 * number}
        stays = np.zeros((16, 16), bool)
        stays[:, slice(8, None) if bool(flip) ^ bool(number % 2) else slice(8)] = number != 2
        seen = np.full((16, 16), number != 2)
        found = [index for index in planes if np.allclose(image, shade(grey[index], stays, seen))]
        assert len(found) == 1, number
        assert f"(plane {found[0]})" in drawn.titles[1 + number]


def test_dropped_tokens_are_washed_out_and_dropped_slices_darkened() -> None:
    grey = np.array([0.0, 0.5, 1.0])
    yes, no = np.ones(3, bool), np.zeros(3, bool)
    np.testing.assert_allclose(shade(grey, yes, yes), grey)
    np.testing.assert_allclose(shade(grey, no, yes), [0.8, 0.9, 1.0])
    np.testing.assert_allclose(shade(grey, no, no), [0.0, 0.25, 0.5])


def test_long_volumes_show_slices_at_even_distance(tmp_path: Path, drawn: Drawn) -> None:
    array = np.random.default_rng(0).integers(-500, 500, (4, 4, 100))
    volume = read_volume(store(tmp_path / "scan.nii", array, (1.0, 1.0, 1.0), "RAS"))
    prepared = prepare(volume, VolumeConfig())
    boxes = grid_boxes((100, 4, 4), (2, 4, 4))
    draw_slices(volume, prepared, boxes, boxes[:0], "nothing stayed", tmp_path / "out.png")
    assert len(drawn.planes) == MOST_SHEETS
    assert drawn.heights[0] == [100.0] * 50 and not any(drawn.heights[1])
    numbers = [int(title.split()[0]) for title in drawn.titles[1:]]
    assert numbers[0] == 1 and numbers[-1] == 50 and set(np.diff(numbers)) <= {2, 3}


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a model whose tokens are cubes of 4 voxels, which keeps the brighter half."""
    monkeypatch.setitem(registry.ADAPTERS, "fake", NAME)
    released = write_model(tmp_path / "released", VolumeConfig(shape=(8, 8, 8)))
    for name in ("current", "earlier"):
        array = np.full((16, 16, 16), -1000)
        array[..., 8:] = 900  # the upper half
        store(tmp_path / f"{name}.nii.gz", array, (1.0, 1.0, 1.0), "RAS")
    monkeypatch.chdir(tmp_path)
    return ["predict", "--checkpoint", str(released), "--question", "Anything?", "--device", "cpu"]


def test_predict_draws_each_scan(
    command: list[str], tmp_path: Path, drawn: Drawn, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--volume", "current.nii.gz", "--prior", "earlier.nii.gz", "--evidence-slices", "kept.png"]
    assert cli.main([*command, *given]) == 0
    assert capsys.readouterr().err.splitlines() == ["wrote kept_prior.png", "wrote kept.png"]
    assert (tmp_path / "kept_prior.png").is_file() and (tmp_path / "kept.png").is_file()
    # Canonical depth grows towards the head: of both scans the second slice is the bright one.
    assert drawn.heights == [[100.0], [0.0, 100.0]] * 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--volume", "current.nii.gz", "--evidence-slices", "k.nii"], "--evidence-slices k.nii: must end in .png"),
        (["--image", "a.png", "--evidence-slices", "k.png"], "--evidence-slices k.png: only a --volume has slices"),
        (
            ["--volume", "current.nii.gz", "--evidence", "k.png", "--evidence-slices", "./k.png"],
            "--evidence-slices k.png: --evidence has this name",
        ),
        (["--volume", "current.nii.gz", "--evidence-slices", "no/k.png"], "its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert cli.main([*command, *given]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1

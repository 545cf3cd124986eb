"""Images and videos through `Predictor` and `mllm3d predict`: answers, keep rates, pictures, and what is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from mllm3d import cli, registry
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode, RawAnswer
from mllm3d.inference.evidence import Part, _panels
from mllm3d.inference.predictor import Predictor
from tests.data.pictures import picture, save
from tests.inference.fake_adapter import NAME, PATCH, FakeAdapter, write_model

CONFIG = VolumeConfig(window_hu=(-1000.0, 1000.0), shape=(8, 8, 8))


class FakePixelAdapter(FakeAdapter):
    """Halves the sides of pixels; its tokens are PATCH x PATCH of 2 frames, of which it keeps the brighter half."""

    takes_pixels: ClassVar[bool] = True
    shown: ClassVar[list[tuple[list[Any], list[Any], list[Any]]]] = []

    def answer(
        self,
        volumes: Sequence[np.ndarray],
        questions: Sequence[str],
        mode: Mode,
        max_new_tokens: int,
        seed: int,
        images: Sequence[np.ndarray] = (),
        videos: Sequence[np.ndarray] = (),
    ) -> list[RawAnswer]:
        self.shown.append(tuple([item.shape for item in items] for items in (volumes, images, videos)))  # type: ignore[arg-type]
        self.calls.append((len(questions), mode))
        frames = [*(image[None] for image in images), *videos]
        means = [np.zeros(len(self.token_boxes(volume.shape))) for volume in volumes]
        means += [means_of(pixels, self.pixel_boxes(pixels.shape[:3])) for pixels in frames]
        together = np.concatenate(means)
        return [self._one(question, together.max() > 200, together, mode, seed) for question in questions]

    def pixel_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        grid = np.indices([-(-shape[0] // 2), shape[1] // 2 // PATCH, shape[2] // 2 // PATCH]).reshape(3, -1).T
        size = np.array([2, PATCH, PATCH])
        return np.stack([grid * size, (grid + 1) * size], axis=-1)


def means_of(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    found = [frames[t0:t1, 2 * h0 : 2 * h1, 2 * w0 : 2 * w1].mean() for (t0, t1), (h0, h1), (w0, w1) in boxes.tolist()]
    return np.array(found)


@pytest.fixture(autouse=True)
def adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "fake", f"{__name__}:FakePixelAdapter")
    monkeypatch.setattr(FakePixelAdapter, "shown", [])


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return write_model(tmp_path / "released", CONFIG)


@pytest.fixture
def command(released: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        given = ["predict", "--checkpoint", released, "--question", "Bright?", "--device", "cpu", *arguments]
        status = cli.main([str(argument) for argument in given])
        return status, *capsys.readouterr()

    return run


def files(folder: Path) -> dict[str, Path]:
    """Two images, of which the second is darker, a film of 5 frames and a volume."""
    grey = picture(16, 24)
    save(folder / "a.png", np.maximum(grey, 128))
    save(folder / "b.jpg", np.minimum(picture(32, 16, 3), 100))
    for number in range(1, 6):
        save(folder / "film" / f"{number}.png", picture(16, 16, seed=number))
    np.save(folder / "ct.npy", (picture(16, 16, 16).astype(np.int16) * 8 - 1024))
    return {name.partition(".")[0]: folder / name for name in ("a.png", "b.jpg", "film", "ct.npy")}


def test_images_and_a_video_are_answered_about_together(tmp_path: Path, command: Callable[..., Any]) -> None:
    f = files(tmp_path)
    status, out, err = command("--image", f["a"], "--image", f["b"], "--video", f["film"], "--json")
    assert status == 0, err
    found = json.loads(out)
    assert FakePixelAdapter.shown == [([], [(16, 24), (32, 16, 3)], [(5, 16, 16)])]
    # 2 x 3 tokens, 4 x 2, and 3 slabs of 2 x 2.
    assert (found["tokens_before"], found["tokens_after"]) == (26, 13)
    assert (
        found["volume"] is None and found["images"] == [str(f["a"]), str(f["b"])] and found["video"] == str(f["film"])
    )
    rates = found["keep_rates"]
    assert list(rates) == [str(f["a"]), str(f["b"]), str(f["film"])]
    assert sum(rate * tokens for rate, tokens in zip(rates.values(), (6, 8, 12), strict=True)) == pytest.approx(
        13, abs=1e-3
    )
    assert rates[str(f["a"])] > rates[str(f["b"])]


def test_a_volume_may_stand_beside_an_image(tmp_path: Path, command: Callable[..., Any]) -> None:
    f = files(tmp_path)
    drawn, mask = tmp_path / "kept.png", tmp_path / "kept.nii.gz"
    status, out, err = command(
        "--volume", f["ct"], "--image", f["a"], "--json", "--evidence", drawn, "--evidence-nifti", mask
    )
    assert status == 0, err
    found = json.loads(out)
    assert FakePixelAdapter.shown == [([(8, 8, 8)], [(16, 24)], [])]
    assert list(found["keep_rates"]) == [str(f["a"])] and found["tokens_before"] == 8 + 6
    assert found["evidence"] == [str(drawn), str(tmp_path / "kept_pixels.png"), str(mask)]
    assert all(Path(file).stat().st_size > 10_000 for file in found["evidence"][:2]) and mask.is_file()


def test_a_picture_shows_what_was_kept(tmp_path: Path, command: Callable[..., Any]) -> None:
    f = files(tmp_path)
    drawn = tmp_path / "kept.png"
    status, out, err = command("--image", f["b"], "--video", f["film"], "--evidence", drawn)
    assert (status, out) == (0, "No\n") and f"wrote {drawn}" in err
    with Image.open(drawn) as image:
        assert min(image.size) > 300


def test_panels_are_frames_with_the_tokens_that_their_pixels_lie_in() -> None:
    """Frames of 8 x 12 pixels, resized to 4 x 6, in tokens of 2 frames of 2 x 2: each is 4 x 4 pixels."""
    frames = picture(5, 8, 12, 3)
    grid = np.indices((3, 2, 3)).reshape(3, -1).T * 2
    boxes = np.stack([grid, grid + 2], axis=-1)
    first, second, third = _panels("film", Part(frames, boxes, boxes[[1, 17]]))
    assert [panel[0] for panel in (first, second, third)] == [f"film, frame {n} of 5" for n in (1, 3, 5)]
    np.testing.assert_array_equal(second[1], frames[2])
    assert not second[2].any() and first[2].sum() == third[2].sum() == 16
    assert first[2][:4, 4:8].all() and third[2][4:, 8:].all()
    many = np.stack([np.array([[n, 0, 0], [n + 1, 4, 6]]).T for n in range(40)])
    assert len(list(_panels("film", Part(picture(40, 8, 12), many, many)))) == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--volume, --image or --video: nothing to ask about"),
        (["--image", "a.png", "--prior", "ct.npy"], "--prior ct.npy: needs a --volume"),
        (["--image", "a.png", "--evidence-nifti", "k.nii"], "--evidence-nifti k.nii: only a --volume has a mask"),
        (["--image", "a.png", "--evidence", "a.png"], "--evidence a.png: would be written over an image"),
        (
            ["--video", "film", "--evidence", "film/k.png"],
            "--evidence film/k.png: would be written over an image or into",
        ),
        (["--image", "gone.png"], "gone.png: no such file"),
        (["--image", "film"], "film: a folder; an image is one file"),
        (["--video", "a.png"], "a.png: a file; a video is a folder of frames"),
    ],
)
def test_requests_that_cannot_be_met_are_one_line(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*arguments)
    assert status == 2 and out == "" and err.startswith(f"error: {words}") and err.count("\n") == 1
    assert FakePixelAdapter.shown == []


def test_a_model_of_volumes_says_that_it_takes_no_pixels(
    tmp_path: Path, released: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "fake", NAME)
    status, _, err = command("--image", files(tmp_path)["a"])
    assert status == 2 and err.startswith("error: released: a model of type fake takes volumes, no images or videos")
    with pytest.raises(UserError, match="no images or videos"):
        Predictor.load(released, "cpu").answer([], ["?"], videos=[picture(2, 16, 16)])

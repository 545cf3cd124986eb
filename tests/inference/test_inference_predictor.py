"""Checkpoint folders, preprocessing by itself, answers, and what `mllm3d predict` prints."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import nibabel
import numpy as np
import pytest

from mllm3d import cli, registry
from mllm3d.config import VolumeConfig
from mllm3d.data.volumes import read_volume
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode
from mllm3d.inference.checkpoint import fingerprint, open_checkpoint
from mllm3d.inference.loaded import looks_like_hu
from mllm3d.inference.predict import of_prior, predict, predict_command
from mllm3d.inference.predictor import Predictor
from tests.inference.fake_adapter import NAME, FakeAdapter, write_model

CONFIG = VolumeConfig(window_hu=(-1000.0, 1000.0), shape=(8, 8, 8), flip=("W",))


@pytest.fixture(autouse=True)
def fake_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "fake", NAME)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return write_model(tmp_path / "released", CONFIG)


def scan(path: Path, low: int = -1000, high: int = 900) -> Path:
    """16 mm cube, `high` in its right, front, upper eighth (RAS: high indices)."""
    array = np.full((16, 16, 16), low, np.int16)
    array[8:, 8:, 8:] = high
    array[0, 0, 0] = low - 1 if low else 1
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_run_its_steps_and_a_release_all_open(tmp_path: Path, released: Path) -> None:
    run = tmp_path / "run"
    for step in ("step_2", "step_10"):
        write_model(run / "checkpoints" / step / "model")
    (run / "preprocessing.json").write_text(CONFIG.model_dump_json())
    (run / "checkpoints" / "latest").write_text("step_10\n")
    model = run / "checkpoints" / "step_10" / "model"
    for path in (run, model.parent, model):
        assert open_checkpoint(path).model == model
        assert open_checkpoint(path).name == "step_10"
        assert open_checkpoint(path).volume == CONFIG
    assert open_checkpoint(run / "checkpoints" / "step_2").name == "step_2"
    assert open_checkpoint(released).name == "released"
    assert open_checkpoint(released.rename(tmp_path / "model")).name == "model"


def test_a_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    first, second = (open_checkpoint(write_model(tmp_path / name, CONFIG)) for name in "ab")
    other_weights = open_checkpoint(write_model(tmp_path / "c", CONFIG, threshold=0.25))
    other_window = open_checkpoint(write_model(tmp_path / "d", CONFIG.model_copy(update={"mean": 0.5})))
    assert fingerprint(first) == fingerprint(second)
    assert len({fingerprint(item) for item in (first, other_weights, other_window)}) == 3


def test_wrong_folders_are_one_clear_line(tmp_path: Path, released: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            Predictor.load(path, "cpu")
        return one_line(error)

    assert "no such folder" in message(tmp_path / "nowhere")
    assert "neither config.json nor checkpoints/latest" in message(tmp_path)
    (released / "preprocessing.json").write_text('{"window_hu": [0, 1], "gamma": 2}')
    assert "preprocessing.json: gamma" in message(released)
    (released / "preprocessing.json").unlink()
    assert "preprocessing.json: missing" in message(released)
    (released / "model.safetensors").unlink()
    assert "no weights" in message(released)
    (released / "config.json").write_text('{"model_type": "llama"}')
    write_model(tmp_path / "other", CONFIG)
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert "llama" in message(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    assert "no model_type" in message(tmp_path / "other")
    stale = tmp_path / "stale"
    write_model(stale / "checkpoints" / "step_1" / "model", CONFIG)
    (stale / "checkpoints" / "latest").write_text("step_9")
    assert "step_9" in message(stale)


def test_preprocessing_comes_from_the_checkpoint(tmp_path: Path, released: Path) -> None:
    predictor = Predictor.load(released, "cpu")
    prepared = predictor.prepare(read_volume(scan(tmp_path / "ct.nii.gz")))
    assert prepared.array.shape == (8, 8, 8)
    # The patient's upper, front, right eighth; W grows to the left and is then reversed.
    assert prepared.array[4:, :4, 4:].min() > 0.9 > 0.1 > prepared.array[:4].max()


def test_answers_tokens_and_rates(tmp_path: Path, released: Path) -> None:
    predictor = Predictor.load(released, "cpu")
    path = scan(tmp_path / "ct.nii.gz")
    for mode, after in (("scheduled", 4), ("none", 8), ("random", 4)):
        bright, again = predictor.answer([path], ["Anything bright?", "Is it?\nA. No\nB. Yes"], mode)  # type: ignore[arg-type]
        assert (bright.text, again.text) == ("Yes", "B. Yes")
        assert (bright.tokens_before, bright.tokens_after, bright.keep_rate) == (8, after, after / 8)
        assert bright.seconds_per_further_token == pytest.approx(0.1)


def test_evidence_of_the_second_of_two_volumes(tmp_path: Path, released: Path) -> None:
    predictor = Predictor.load(released, "cpu")
    dark, bright = (predictor.prepare(read_volume(scan(tmp_path / f"{high}.nii", high=high))) for high in (0, 900))
    answer = predictor.answer([dark, bright], ["?"])[0]
    shapes = [(8, 8, 8), (8, 8, 8)]
    of_prior, of_current = (predictor.kept_boxes(answer, shapes, index) for index in (0, 1))
    assert len(of_prior) + len(of_current) == answer.tokens_after == 8
    assert [[4, 8], [0, 4], [4, 8]] in of_current.tolist()
    with pytest.raises(ValueError, match="16 tokens in the answer, 8 boxes"):
        predictor.kept_boxes(answer, shapes[:1])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-1000, 900, True), (0, 900, False), (-2024, -500, False), (-3024, 300, True)],
    ids=["ct", "mr", "rescaled twice", "padding"],
)
def test_hounsfield_units_are_recognised(tmp_path: Path, low: int, high: int, expected: bool) -> None:
    assert looks_like_hu(read_volume(scan(tmp_path / "x.nii", low, high)).array) is expected


def test_mr_given_to_a_ct_model_warns_once_and_answers(
    tmp_path: Path, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scan(tmp_path / "mr.nii.gz", low=0, high=90)
    assert predict(released, path, "Anything bright?")["answer"] == "Yes"  # a window of HU makes all of it grey
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "mr.nii.gz" in warning and "--modality mr" in warning
    assert predict(released, path, "Anything bright?", modality="mr")["answer"] == "Yes"
    assert capsys.readouterr().err == ""
    predictor = Predictor.load(released, "cpu")
    array = predictor.prepare(read_volume(path), "MR").array
    assert (array.min(), array.max()) == (0, 1)


def arguments(released: Path, volume: Path, **given: object) -> Namespace:
    names = {
        "prior": None,
        "image": None,
        "video": None,
        "modality": "ct",
        "mode": "scheduled",
        "pruner": None,
        "pruner_set": None,
        "max_new_tokens": 8,
        "device": "cpu",
    }
    extra = {
        "json": False,
        "evidence": None,
        "evidence_slices": None,
        "evidence_nifti": None,
        "question": "Anything bright?",
    }
    return Namespace(checkpoint=released, volume=volume, **(names | extra | given))


def test_text_output_is_the_answer_alone(tmp_path: Path, released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict_command(arguments(released, scan(tmp_path / "ct.nii.gz"))) == 0
    assert capsys.readouterr().out == "Yes\n"


def test_json_output_and_evidence(tmp_path: Path, released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scan(tmp_path / "ct.nii.gz")
    files = {"evidence": tmp_path / "out.png", "evidence_nifti": tmp_path / "kept.nii.gz"}
    predict_command(arguments(released, path, json=True, **files))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "answer": "Yes",
        "keep_rate": 0.5,
        "tokens_before": 8,
        "tokens_after": 4,
        "seconds_to_first_token": 0.25,
        "seconds_per_further_token": 0.1,
        "device": "cpu",
        "checkpoint": "released",
        "volume": str(path),
        "prior": None,
        "evidence": [str(file) for file in files.values()],
    }
    assert captured.err == ""
    assert files["evidence"].stat().st_size > 10_000
    kept = np.asarray(nibabel.load(files["evidence_nifti"]).dataobj)
    assert kept[8:, 8:, 8:].all() and kept.mean() == 0.5


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Those of the pictures that are drawn."""
    from matplotlib.figure import Figure

    found: list[str] = []
    original = Figure.suptitle

    def suptitle(figure: Figure, text: str, **options: Any) -> object:
        found.append(text)
        return original(figure, text, **options)

    monkeypatch.setattr(Figure, "suptitle", suptitle)
    yield found


def test_a_prior_scan_has_evidence_of_its_own(
    tmp_path: Path, released: Path, titles: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight tokens each; of all sixteen the brighter half stays, most of it in one of the scans."""
    dark, bright = scan(tmp_path / "dark.nii.gz", high=300), scan(tmp_path / "bright.nii.gz")
    files = {"evidence": tmp_path / "out.png", "evidence_nifti": tmp_path / "kept.nii.gz"}
    predict_command(arguments(released, bright, prior=dark, **files))
    captured = capsys.readouterr()
    written = [tmp_path / name for name in ("out_prior.png", "out.png", "kept_prior.nii.gz", "kept.nii.gz")]
    assert captured.out == "Yes\n"
    assert captured.err.splitlines() == [f"wrote {file}" for file in written]
    assert all(file.is_file() for file in written)
    kept = {name: np.asarray(nibabel.load(tmp_path / name).dataobj) for name in ("kept.nii.gz", "kept_prior.nii.gz")}
    assert kept["kept.nii.gz"][8:, 8:, 8:].all()
    # What each picture says is what its own mask shows: a token is an eighth of the scan.
    stayed = [round(8 * float(mask.mean())) for mask in kept.values()]
    assert sum(stayed) == 8 and len(set(stayed)) == 2
    current, prior = stayed
    assert titles == [
        f"Anything bright?\nYes   (prior scan: {prior} of 8 tokens kept)",
        f"Anything bright?\nYes   (current scan: {current} of 8 tokens kept)",
    ]


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        ("kept.png", "kept_prior.png"),
        ("kept.nii", "kept_prior.nii"),
        ("kept.nii.gz", "kept_prior.nii.gz"),
        ("a.png.nii.gz", "a.png_prior.nii.gz"),
        (".nii.gz", "_prior.nii.gz"),
    ],
)
def test_names_of_a_priors_evidence(name: str, prior: str) -> None:
    assert of_prior(Path("x") / name) == Path("x") / prior


def test_evidence_is_never_written_over_a_scan(tmp_path: Path, released: Path) -> None:
    volume, prior = scan(tmp_path / "kept.nii.gz"), scan(tmp_path / "kept_prior.nii.gz")
    before = [path.read_bytes() for path in (volume, prior)]
    other = scan(tmp_path / "other.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to(prior)
    for given in (
        {"volume": volume, "evidence_nifti": volume},
        {"volume": other, "prior": prior, "evidence_nifti": tmp_path / "kept.nii.gz"},  # would write kept_prior.nii.gz
        {"volume": other, "prior": prior, "evidence_nifti": tmp_path / "link.nii.gz"},
    ):
        with pytest.raises(UserError, match="would be written over a scan") as error:
            predict_command(arguments(released, **given))
        assert one_line(error).startswith("--evidence-nifti")
    assert [path.read_bytes() for path in (volume, prior)] == before


def test_the_command_offers_every_mode(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["predict", "--checkpoint", str(released), "--volume", str(scan(tmp_path / "ct.nii.gz"))]
    for mode in get_args(Mode):
        assert cli.main([*given, "--question", "Anything bright?", "--device", "cpu", "--mode", mode]) == 0
        assert capsys.readouterr().out == "Yes\n"
        assert FakeAdapter.calls[-1] == (1, mode)


def test_wrong_requests_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    nowhere, path = tmp_path / "nowhere", scan(tmp_path / "ct.nii.gz")
    for given, expected in (
        ({"question": " "}, "--question"),
        ({"evidence": tmp_path / "out.jpg"}, ".png"),
        ({"evidence_nifti": tmp_path / "out.png"}, ".nii"),
        ({"evidence": tmp_path / "absent" / "out.png"}, "does not exist"),
        ({"prior": tmp_path / "prior.nii"}, "prior.nii"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            predict_command(arguments(nowhere, path, **given))
        one_line(error)


@pytest.mark.parametrize(
    ("name", "modality", "warned"),
    [
        ("totalsegmentator/example_ct.nii.gz", "ct", False),
        ("sts_001/STS_001_CT_image.nii.gz", "ct", False),
        ("sts_001/STS_001_CT_dicom", "ct", False),
        ("sts_001/STS_001_MR_T1_image.nii.gz", "ct", True),
        ("sts_001/STS_001_MR_T1_image.nii.gz", "mr", False),
        ("totalsegmentator/example_mr_sm.nii.gz", "mr", False),
    ],
)
def test_real_scans_are_answered_with_evidence(
    real_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    modality: str,
    warned: bool,
) -> None:
    config = VolumeConfig(spacing_mm=(4.0, 4.0, 4.0), crop=(64, 64, 64), shape=(16, 16, 16))
    released, mask = write_model(tmp_path / "released", config), tmp_path / "kept.nii.gz"
    output = predict(
        released,
        real_data / name,
        "Anything bright?",
        modality=modality,
        evidence_nifti=mask,
        evidence=tmp_path / "p.png",
    )
    assert output["answer"] in ("Yes", "No") and output["keep_rate"] == 0.5
    assert bool(capsys.readouterr().err) is warned
    scan = read_volume(real_data / name)
    kept = nibabel.load(mask)
    assert kept.shape == scan.source_shape and np.allclose(kept.affine, scan.source_affine)
    assert 0 < np.asarray(kept.dataobj).mean() < 1

"""What a release holds, what its card says, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm3d import registry
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.release.export import release
from tests.inference.fake_adapter import NAME, write_model

VOLUME = VolumeConfig(shape=(8, 8, 8))
CONFIG = """\
recipe: photon.phase2
data: {manifest: MANIFEST, train_split: train, where: {task: [existence]}}
model: {checkpoint: PHASE1, layers: 4}
training: {max_steps: 20, optimizer: {lr: 0.0001}}
volume: {preset: phantom}
"""
PHASE1 = "recipe: photon.phase1\nmodel: {checkpoint: /home/someone/models/Start-3B}\n"
RESULTS = {"checkpoint": "step_20", "split": "test", "date": "2026-01-02", "device": "cpu"}


@pytest.fixture(autouse=True)
def fake_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "fake", NAME)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for number in (5, 20):
        step = folder / "checkpoints" / f"step_{number}"
        write_model(step / "model", VOLUME)
        progress = {"step": number, "best_step": 5}
        (step / "trainer.json").write_text(json.dumps({"progress": progress}))
    (folder / "checkpoints" / "latest").write_text("step_20\n")
    (folder / "preprocessing.json").write_text(VOLUME.model_dump_json())
    data = tmp_path / "phantoms"
    data.mkdir()
    (data / "dataset.json").write_text(json.dumps({"name": "Phantoms", "licence": "CC0-1.0", "seed": 3}))
    before = tmp_path / "phase1" / "checkpoints" / "step_9"
    before.mkdir(parents=True)
    (tmp_path / "phase1" / "config.yaml").write_text(PHASE1)
    config = CONFIG.replace("MANIFEST", str(data / "manifest.jsonl")).replace("PHASE1", str(before))
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "device": "cpu: x86"}))
    evaluation = folder / "evaluation" / "test"
    evaluation.mkdir(parents=True)
    (evaluation / "results.json").write_text(json.dumps(RESULTS))
    (evaluation / "table.md").write_text("| task | scheduled |\n| existence | 97.1 |\n")
    return folder


def test_a_release_opens_like_a_checkpoint_and_its_card_says_what_was_measured(run: Path, tmp_path: Path) -> None:
    out = release(run, tmp_path / "released")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "evaluation-test.json", "model.safetensors", "preprocessing.json"
    ]  # fmt: skip
    assert open_checkpoint(out).volume == VOLUME
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    for expected in (
        "# fake, step 20 of photon.phase2",
        "Data set: Phantoms",
        "CC0-1.0",
        "| existence | 97.1 |",
        "2026-01-02",
        "- `photon.phase2`, from `step_9`\n- `photon.phase1`, from `Start-3B`\n",
        "lr: 0.0001",
        "torch 2.13.0",
        "Not a medical device",
        '{"task": ["existence"]}',
    ):
        assert expected in card
    assert "/home/" not in card and str(tmp_path) not in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_others_may_read_a_release_and_are_told_how_to_load_it(run: Path, tmp_path: Path) -> None:
    model = run / "checkpoints" / "step_20" / "model"
    (model / "model.safetensors").chmod(0o600)  # as safetensors leaves it
    (model / "config.json").write_text(json.dumps({"model_type": "fake", "architectures": ["FakeModel"]}))
    out = release(run, tmp_path / "released")
    modes = {path.name: path.stat().st_mode for path in out.iterdir()}
    assert modes["model.safetensors"] == modes["README.md"]
    card = (out / "README.md").read_text()
    assert 'from tests import FakeModel\n\nmodel = FakeModel.from_pretrained("<this folder>")\n' in card


@pytest.mark.parametrize(("checkpoint", "step"), [("latest", 20), ("best", 5), ("5", 5), ("20", 20)])
def test_the_named_checkpoint_is_released(run: Path, tmp_path: Path, checkpoint: str, step: int) -> None:
    write_model(run / "checkpoints" / "step_5" / "model", VOLUME, threshold=0.125)
    out = release(run, tmp_path / "released", checkpoint)
    same = (run / "checkpoints" / f"step_{step}" / "model" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == same
    measured = "| existence | 97.1 |" in (out / "README.md").read_text()
    assert measured == (step == 20)  # the table is step 20's


def test_a_run_without_evaluation_or_data_set_notes_says_so(run: Path, tmp_path: Path) -> None:
    (run / "evaluation" / "test" / "results.json").unlink()
    (tmp_path / "phantoms" / "dataset.json").unlink()
    card = (release(run, tmp_path / "released") / "README.md").read_text()
    assert "without an evaluation" in card and "licence is not recorded" in card


def spoil(run: Path, what: str) -> None:
    model = run / "checkpoints" / "step_20" / "model"
    if what == "pickle":
        (model / "training_args.bin").write_bytes(b"")
    elif what == "no weights":
        (model / "model.safetensors").unlink()
    elif what == "no preprocessing":
        (model / "preprocessing.json").unlink()
        (run / "preprocessing.json").unlink()
    elif what == "wrong weights":
        save_file({"threshold": torch.tensor(0.5), "more": torch.tensor(1.0)}, model / "model.safetensors")
    elif what == "other model":
        (model / "config.json").write_text('{"model_type": "llama"}')
    elif what == "step gone":
        (run / "checkpoints" / "latest").write_text("step_30")
    elif what == "never saved":
        (run / "checkpoints" / "latest").unlink()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("pickle", "training_args.bin: a pickle"),
        ("no weights", "no weights"),
        ("no preprocessing", "preprocessing.json: missing"),
        ("wrong weights", "unexpected weights"),
        ("other model", "llama"),
        ("step gone", "latest: names step_30, which is gone or incomplete"),
        ("never saved", "the run has saved no checkpoint"),
    ],
)
def test_what_cannot_be_released_leaves_nothing_behind(run: Path, tmp_path: Path, what: str, says: str) -> None:
    spoil(run, what)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=says) as error:
        release(run, tmp_path / "released")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_wrong_names_are_refused(run: Path, tmp_path: Path) -> None:
    for arguments, says in (
        ((tmp_path / "nowhere", tmp_path / "out"), "no such run"),
        ((run, tmp_path / "out", "newest"), "must be latest, best or"),
        ((run, tmp_path / "out", "7"), "no complete step_7 in it; this run has step_5, step_20"),
        ((run, tmp_path / "absent" / "out"), "parent folder does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            release(*arguments)


def test_only_a_release_is_overwritten_and_only_if_asked(run: Path, tmp_path: Path) -> None:
    out = release(run, tmp_path / "released")
    (out / "stray.txt").write_text("of the old release")
    with pytest.raises(UserError, match="exists already"):
        release(run, out)
    assert (out / "stray.txt").is_file()
    release(run, out, overwrite=True)
    assert not (out / "stray.txt").exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a released model"):
        release(run, home, overwrite=True)
    assert (home / "thesis.tex").is_file()


def test_a_failed_overwrite_keeps_the_old_release(run: Path, tmp_path: Path) -> None:
    out = release(run, tmp_path / "released")
    before = (out / "model.safetensors").read_bytes()
    spoil(run, "wrong weights")
    with pytest.raises(UserError):
        release(run, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before

"""From a trained run to a released model that others load: evaluated, released, asked, and loaded without us."""

import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mllm3d.cli import main
from mllm3d.data.manifest import read_manifest
from mllm3d.data.preprocess import prepare
from mllm3d.data.volumes import read_volume
from mllm3d.inference.checkpoint import open_checkpoint
from tests.integration.launching import Run, start

QUESTION = "Is there a pleural effusion?"

LOAD = """
import json, sys

BLOCKED = {"mllm3d", "deepspeed", "monai", "peft", "torchvision", "timm", "nibabel", "SimpleITK", "blosc2", "pydantic"}


class Without:
    '''A finder that does not find them: to `import` and to `find_spec` they are not installed.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in BLOCKED:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is not blocked")

import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

import photon

folder, volume, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
assert type(model) is photon.PhotonForConditionalGeneration and type(processor) is photon.PhotonProcessor
inputs = processor([np.load(volume)], [{"role": "user", "content": question}])
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(json.dumps([processor.decode(tokens, skip_special_tokens=True).strip(), sorted(BLOCKED & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def run(quickstart: dict[str, Run], quickstart_folder: Path) -> Path:
    """The quickstart's last run, evaluated."""
    assert quickstart["phase2"].status == 0, quickstart["phase2"].err
    folder = quickstart_folder / "phase2"
    assert main(["eval", "--config", str(folder / "config.yaml"), "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def released(run: Path) -> Path:
    out = run.parent / "release"
    assert main(["release", str(run), str(out)]) == 0
    return out


@pytest.fixture
def scan(phantoms: Path) -> Path:
    """A scan of the test split."""
    return next(phantoms.parent / row.volume for row in read_manifest(phantoms) if row.split == "test")


def test_a_run_is_evaluated_on_every_question(run: Path, phantoms: Path) -> None:
    asked = [row for row in read_manifest(phantoms) if row.split == "test" and row.task == "existence"]
    assert asked
    folder = run / "evaluation" / "test"
    for mode in ("scheduled", "none", "random", "zeroed"):
        lines = (folder / f"predictions-{mode}.jsonl").read_text().splitlines()
        assert {json.loads(line)["id"] for line in lines} == {row.id for row in asked}
    assert "existence" in (folder / "table.md").read_text()


def test_a_release_holds_the_run_and_its_results(released: Path, run: Path) -> None:
    names = {path.name for path in released.iterdir()}
    needed = ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "preprocessing.json")
    assert names >= set(needed)
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert (released / "preprocessing.json").read_text() == (run / "preprocessing.json").read_text()
    card = (released / "README.md").read_text()
    assert "step 10 of photon.phase2" in card and "| existence" in card
    assert str(run.parent) not in card


def predicted(released: Path, scan: Path, cwd: Path, *more: str) -> dict[str, Any]:
    """What `mllm3d predict --json` prints, started elsewhere: nothing but JSON, nothing on stderr."""
    program = str(Path(sys.executable).with_name("mllm3d"))
    what = ["--checkpoint", str(released), "--volume", str(scan), "--question", QUESTION, "--max-new-tokens", "8"]
    done = start([program, "predict", *what, "--json", "--device", "cpu", *more], cwd=cwd)
    assert done.status == 0 and done.err == "", done.err
    return json.loads(done.out)


@pytest.fixture(scope="module")
def answer(released: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answer with its evidence, the files named relative to where the command runs."""
    folder = tmp_path_factory.mktemp("evidence")
    volume = next(phantoms.parent / row.volume for row in read_manifest(phantoms) if row.split == "test")
    found = predicted(released, volume, folder, "--evidence", "evidence.png", "--evidence-nifti", "kept.nii.gz")
    return found | {"folder": folder}


def test_predict_prints_answer_and_rates(answer: dict[str, Any], scan: Path) -> None:
    assert isinstance(answer["answer"], str) and answer["volume"] == str(scan)
    assert answer["tokens_before"] == 64 and 0 < answer["tokens_after"] < 64
    assert answer["keep_rate"] == round(answer["tokens_after"] / 64, 4)
    assert answer["seconds_to_first_token"] > 0


def test_evidence_lies_on_the_scan(answer: dict[str, Any], scan: Path) -> None:
    kept, original = nib.load(answer["folder"] / "kept.nii.gz"), nib.load(scan)
    assert kept.shape == original.shape and np.allclose(kept.affine, original.affine)
    values = np.asarray(kept.dataobj)
    assert set(np.unique(values)) == {0, 1}
    # Tokens are boxes of equal size on the model's grid; a scan's voxel belongs to the box that its centre lies in.
    assert values.mean() == pytest.approx(answer["keep_rate"], abs=0.1)
    png = (answer["folder"] / "evidence.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_a_release_loads_with_torch_and_transformers_alone(
    released: Path, scan: Path, answer: dict[str, Any], tmp_path: Path
) -> None:
    """And gives the answer that our command gives, for the same voxels."""
    np.save(tmp_path / "volume.npy", prepare(read_volume(scan), open_checkpoint(released).volume).array)
    done = start([sys.executable, "-c", LOAD, str(released), str(tmp_path / "volume.npy"), QUESTION])
    assert done.status == 0, done.err
    assert json.loads(done.out) == [answer["answer"], []]

"""Phantoms and tiny models, made once for all tests of this folder."""

import sys
from pathlib import Path

import pytest

from mllm3d.data.manifest import read_manifest
from mllm3d.data.prompts import question_text, target_text
from tests.integration import tiny
from tests.integration.launching import PYTHON, Run, launch_many, start


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 8 cases of 16 x 32 x 32 voxels, some of them with a prior scan."""
    folder = tmp_path_factory.mktemp("integration") / "phantoms"
    options = ["--cases", "8", "--seed", "0", "--shape", "16,32,32", "--splits", "0.75,0,0.25", "--workers", "1"]
    done = start([sys.executable, "data/phantom/prepare.py", "--out", str(folder), *options])
    assert done.status == 0, done.err
    return folder / "manifest.jsonl"


@pytest.fixture(scope="session")
def backbone(phantoms: Path) -> Path:
    """A slice-video model as a folder."""
    rows = read_manifest(phantoms)
    texts = {question_text(row) for row in rows} | {target_text(row) for row in rows}
    return tiny.save_backbone(phantoms.parent.parent / "backbone", texts)


@pytest.fixture(scope="session")
def photon_folder(backbone: Path) -> Path:
    """An untrained Photon that can be asked."""
    return tiny.save_photon(backbone.with_name("photon"), backbone)


@pytest.fixture(scope="session")
def quickstart_folder(phantoms: Path) -> Path:
    return phantoms.parent.parent / "quickstart"


@pytest.fixture(scope="session")
def quickstart(phantoms: Path, quickstart_folder: Path) -> dict[str, Run]:
    """The configs of the quickstart, one after the other as `make quickstart` does, with numbers made small."""
    text = "model.text={hidden_size: 16, layers: 4, heads: 2, mlp: 24}"
    vision = "model.vision={hidden_size: 16, layers: 2, heads: 2, mlp: 24, merge: 1}"
    slices = ["model.patch_size=[2, 8, 8]", "model.slices_per_frame=2", "model.vocabulary=400", text, vision]
    of_each = {
        "vision": slices,
        "backbone": [*slices, f"model.checkpoint={quickstart_folder / 'vision'}"],
        "phase1": ["model.patch_size=[4, 8, 8]", f"model.checkpoint={quickstart_folder / 'backbone'}"],
        "phase2": [f"model.checkpoint={quickstart_folder / 'phase1'}", "model.scheduling.predictor_bias=-1.0"],
    }
    plan = {}
    for name, own in of_each.items():
        where = [f"data.manifest={phantoms}", f"run.output={quickstart_folder / name}", "volume.shape=[16, 32, 32]"]
        short = ["training.max_steps=10", "training.volumes_per_batch=2", "training.log_every=1", "run.threads=1"]
        plan[name] = {"train": ["--config", f"quickstart/{name}", *where, *short, *own]}
    return launch_many(PYTHON, plan, quickstart_folder / "plan")

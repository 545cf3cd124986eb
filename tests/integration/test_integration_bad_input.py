"""Wrong inputs, through the commands: one line that names the file or key, status 2, no traceback."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm3d.cli import main
from photon import PhotonProcessor
from photon.recipes.phases import Phase2
from tests.integration import tiny
from tests.integration.launching import PYTHON, Run, launch_many

QUERY = "model.language_model.layers.2.self_attn.q_proj.weight"
ROW = {"id": "a", "case": "a", "split": "train", "task": "existence", "question": "Is it?", "answer": "yes"}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """A command of mllm3d in this process."""

    def run(*arguments: object) -> Run:
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Run(status, printed.out, printed.err)

    return run


# --- volumes ------------------------------------------------------------------------------------------------

VOLUMES = {
    "truncated.nii.gz": "truncated: its gzip stream has no end; copy it again",
    "truncated.nii": "truncated: 3708 bytes where the header asks for 3808; copy it again",
    "4d.nii.gz": "4-D image (12 x 12 x 12 x 3); one volume is needed: split it into 3-D files",
    "2d.nii.gz": "2-D image (12 x 12); a volume with several slices is needed",
    "nan.nii.gz": "1 of 1728 voxels are NaN or infinite; replace them",
    "absent.nii.gz": "no such file or folder; correct the path",
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of VOLUMES, each wrong as its name says."""
    folder = tmp_path_factory.mktemp("scans")
    array = np.random.default_rng(0).integers(-1000, 1000, (12, 12, 12)).astype(np.int16)
    holed = array.astype(np.float32)
    holed[3, 4, 5] = np.nan
    stored = {"4d": np.stack([array] * 3, axis=-1), "2d": array[..., 0], "nan": holed, "truncated": array}
    for name, values in stored.items():
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "truncated.nii")
    for file in folder.glob("truncated.*"):
        file.write_bytes(file.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize("name", VOLUMES)
def test_a_volume_that_cannot_be_asked_about(
    command: Callable[..., Run], scans: Path, photon_folder: Path, name: str
) -> None:
    run = command("predict", "--checkpoint", photon_folder, "--volume", scans / name, "--question", "Is it?")
    assert run.line().startswith(f"error: {scans / name}: {VOLUMES[name]}") and run.out == ""


def test_all_of_them_in_one_manifest(command: Callable[..., Run], scans: Path) -> None:
    manifest = scans / "all.jsonl"
    write_rows(manifest, *({"id": name, "case": name, "volume": name} for name in VOLUMES))
    run = command("data", "check", manifest)
    assert run.status == 2
    lines = run.err.splitlines()
    assert lines.pop() == f"error: {manifest}: {len(VOLUMES)} problems, listed above"
    for number, (line, (name, message)) in enumerate(zip(lines, VOLUMES.items(), strict=True), start=1):
        assert line.startswith(f"{manifest}:{number}: volume: {scans / name}: {message}")


def write_rows(manifest: Path, *rows: dict[str, str]) -> None:
    manifest.write_text("".join(json.dumps(ROW | row) + "\n" for row in rows))


# --- manifests ----------------------------------------------------------------------------------------------

MANIFESTS: dict[str, tuple[str, str]] = {
    "empty": ("", ": the manifest is empty: it has no rows"),
    "outside": (
        json.dumps(ROW | {"volume": "../secret.nii.gz"}),
        ":1: volume: '../secret.nii.gz' leaves the manifest's folder; give a path relative to it",
    ),
    "absolute": (
        json.dumps(ROW | {"volume": "/etc/hostname"}),
        ":1: volume: '/etc/hostname' leaves the manifest's folder; give a path relative to it",
    ),
    "not_json": ("id,volume\n", ":1: not valid JSON: "),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_cannot_be_checked(command: Callable[..., Run], tmp_path: Path, name: str) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(MANIFESTS[name][0])
    run = command("data", "check", manifest)
    assert run.line() == f"error: {manifest}: 1 problem, listed above"
    assert run.err.startswith(f"{manifest}{MANIFESTS[name][1]}") and run.err.count("\n") == 2


# --- checkpoints --------------------------------------------------------------------------------------------


def rewrite_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rename_model(folder: Path, model_type: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights (*.safetensors)"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "no weights (*.safetensors)",
    ),
    "missing_tensor": (
        lambda folder: rewrite_weights(folder, lambda weights: weights.pop(QUERY)),
        f"the weights do not fit config.json (missing keys: {QUERY}); export the checkpoint again",
    ),
    "other_shape": (
        lambda folder: rewrite_weights(folder, lambda weights: weights.update({QUERY: weights[QUERY][:3].clone()})),
        f"the weights do not fit config.json (mismatched keys: {QUERY} (3, 16) for (16, 16))",
    ),
    "surplus_tensor": (
        lambda folder: rewrite_weights(folder, lambda weights: weights.update(surplus=torch.zeros(2))),
        "the weights do not fit config.json (unexpected keys: surplus)",
    ),
    "cut_short": (lambda folder: cut(folder / "model.safetensors"), "the weights are damaged ("),
    "other_model": (lambda folder: rename_model(folder, "llama"), "'llama'"),
    "unknown_model": (lambda folder: rename_model(folder, "another3d"), "'another3d'"),
    "no_tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "cut_tokenizer": (lambda folder: cut(folder / "tokenizer.json"), "tokenizer.json"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, photon_folder: Path) -> Path:
    """Folders with the names of CHECKPOINTS, each a Photon that was spoiled in one way."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (spoil, _) in CHECKPOINTS.items():
        shutil.copytree(photon_folder, folder / name)
        spoil(folder / name)
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_asked(
    command: Callable[..., Run], checkpoints: Path, a_volume: Path, name: str
) -> None:
    run = command("predict", "--checkpoint", checkpoints / name, "--volume", a_volume, "--question", "Is it?")
    assert run.line().startswith(f"error: {checkpoints / name}") and run.err.count("\n") == 1
    assert CHECKPOINTS[name][1] in run.err and len(run.err) < 400


def test_a_processor_of_another_model_is_noticed(
    command: Callable[..., Run], tmp_path: Path, photon_folder: Path, a_volume: Path
) -> None:
    """Without its file the processor would cut patches of Photon's published size, in silence."""
    folder = tmp_path / "photon"
    shutil.copytree(photon_folder, folder)
    (folder / "processor_config.json").unlink()
    run = command("predict", "--checkpoint", folder, "--volume", a_volume, "--question", "Is it?")
    assert run.line().startswith(f"error: {folder}: processor_config.json: missing, or cuts volumes otherwise")


@pytest.fixture
def a_volume(phantoms: Path) -> Path:
    return phantoms.parent / "volumes" / "case_00000.nii.gz"


# --- configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("recipe: photon.phase2\n  run: {", ":2: "),
        ("recipe: photon.phase2\nmodel: [1\n", ":3: "),
        ("recipe: photon.phase2\nmodel: {checkpoint: x, schedulling: {}}\n", ":2: model.schedulling: unknown key"),
        ("recipe: photon.phase9\n", ":1: recipe 'photon.phase9': unknown; did you mean 'photon.phase"),
    ],
)
def test_a_config_that_cannot_be_read(command: Callable[..., Run], tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    run = command("train", "--config", file)
    assert run.status == 2 and run.out == "" and "Traceback" not in run.err
    assert any(line.startswith(f"error: {file}{expected}") for line in run.err.splitlines()), run.err


# --- train.py -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, scans: Path, checkpoints: Path, phantoms: Path, photon_folder: Path
) -> tuple[Path, dict[str, Run]]:
    """What train.py makes of each wrong input, all in one process; and the folder of the runs."""
    folder = tmp_path_factory.mktemp("wrong_runs")
    base = tiny.write_config(folder / "run.yaml", tiny.phase2(phantoms, photon_folder, folder / "run", max_steps=1))
    wrong = {f"checkpoint {name}": f"model.checkpoint={checkpoints / name}" for name in CHECKPOINTS}
    wrong["checkpoint absent"] = f"model.checkpoint={folder / 'absent'}"
    for name, (text, _) in MANIFESTS.items():
        (folder / f"{name}.jsonl").write_text(text)
        wrong[f"manifest {name}"] = f"data.manifest={folder / name}.jsonl"
    for name in VOLUMES:
        write_rows(scans / f"{name}.jsonl", {"volume": name})
        wrong[f"volume {name}"] = f"data.manifest={scans / name}.jsonl"
    plan: dict[str, Any] = {
        name: {"train": ["--config", base, override, f"run.output={folder / 'runs' / name.replace(' ', '_')}"]}
        for name, override in wrong.items()
    }
    plan["nothing to resume"] = {"train": ["--config", base, "--resume", f"run.output={folder / 'new'}"]}
    plan["good"] = {"train": ["--config", base]}
    plan["again"] = {"train": ["--config", base]}
    return folder, launch_many(PYTHON, plan, folder / "plan")


def test_training_names_what_is_wrong_with_its_checkpoint(
    trained: tuple[Path, dict[str, Run]], checkpoints: Path
) -> None:
    for name, (_, message) in CHECKPOINTS.items():
        line = trained[1][f"checkpoint {name}"].line()
        assert line.startswith(f"error: model.checkpoint: {checkpoints / name}: ") and message in line
        assert len(line) < 400, line
    absent = trained[1]["checkpoint absent"].line()
    assert absent.startswith(f"error: model.checkpoint: {trained[0] / 'absent'}: no such folder; ")


def test_training_names_what_is_wrong_with_its_data(trained: tuple[Path, dict[str, Run]], scans: Path) -> None:
    folder, runs = trained
    for name, (_, message) in MANIFESTS.items():
        assert runs[f"manifest {name}"].line().startswith(f"error: {folder / name}.jsonl{message}")
    for name, message in VOLUMES.items():
        assert runs[f"volume {name}"].line().startswith(f"error: {scans / name}: {message}")


def test_training_leaves_other_runs_alone(trained: tuple[Path, dict[str, Run]]) -> None:
    folder, runs = trained
    assert runs["good"].status == 0, runs["good"].err
    again, nothing = runs["again"].line(), runs["nothing to resume"].line()
    assert again.startswith(f"error: run.output: {folder / 'run'} is not empty; continue it with --resume")
    assert nothing.startswith(f"error: run.output: {folder / 'new'} has no checkpoint to resume; start without")
    assert not (folder / "new").exists()


def test_a_disk_that_is_full_when_the_tokenizer_comes_is_an_os_error(tmp_path: Path, photon_folder: Path) -> None:
    """That is what the trainer looks for, to keep the last checkpoint and say so on all ranks."""
    recipe = Phase2.__new__(Phase2)
    recipe.processor = PhotonProcessor.from_pretrained(photon_folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"tokenizer\.json: File too large"):
            recipe.save(SimpleNamespace(save_pretrained=lambda *args, **options: None), None, tmp_path)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

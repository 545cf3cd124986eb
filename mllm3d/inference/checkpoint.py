"""Where a checkpoint's files are, whichever folder of it a user names."""

import json
import re
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from pydantic import ValidationError

from mllm3d.config import VolumeConfig
from mllm3d.config.messages import first_problem
from mllm3d.errors import UserError
from mllm3d.rundirs import has_checkpoint, newest_step

PREPROCESSING = "preprocessing.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder in Hugging Face's format and how its volumes were prepared.

    model: the folder with config.json, safetensors and processor.
    name: what a reader recognises it by: `step_400` of a run, or the folder's name.
    model_type: config.json's, the key of the adapter.
    volume: the preprocessing the model was trained with.
    """

    model: Path
    name: str
    model_type: str
    volume: VolumeConfig


def open_checkpoint(path: Path) -> Checkpoint:
    """Accepts a released folder, RUN/checkpoints/step_N, its model/ folder, or a RUN (its newest step)."""
    model = _model_folder(path)
    model_of_a_step = model.name == "model" and model.absolute().parent.name.startswith("step_")
    name = (model.absolute().parent if model_of_a_step else model.resolve()).name
    return Checkpoint(model, name, _model_type(model), _preprocessing(model))


def source_folder(source: str, key: str = "model.checkpoint") -> str:
    """Where a setting's weights are: a model folder, that of a run or of one of its steps, or a hub name as it is.

    `key`: of the setting, for the error where there is no such folder.
    """
    path = Path(source)
    on_hub = HUB_NAME.fullmatch(source) and not path.parent.is_dir()
    if not path.exists() and not on_hub:
        raise UserError(f"{key}: {source}: no such folder; name a model folder, a run or a hub name")
    within = path.is_dir() and not (path / "config.json").is_file()
    try:
        return str(open_checkpoint(path).model) if within else source
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def fingerprint(checkpoint: Checkpoint) -> str:
    """One hash over configuration, weights and preprocessing: equal exactly if the answers can be equal."""
    total = sha256(checkpoint.volume.model_dump_json().encode())
    for file in sorted(checkpoint.model.iterdir()):
        if file.suffix in (".json", ".safetensors", ".txt", ".jinja"):
            with file.open("rb") as stream:
                total.update(file.name.encode() + file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def _model_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a released folder, a run, or RUN/checkpoints/step_N")
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if not has_checkpoint(path):
        raise UserError(
            f"{path}: neither config.json nor checkpoints/latest in it; "
            "give a released folder, a run that has saved a checkpoint, or RUN/checkpoints/step_N"
        )
    return newest_step(path, "model/config.json") / "model"


def _model_type(model: Path) -> str:
    file = model / "config.json"
    try:
        model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no model_type in it; export the checkpoint again") from error
    if not list(model.glob("*.safetensors")):
        raise UserError(f"{model}: no weights (*.safetensors); copy them there or export the checkpoint again")
    return str(model_type)


def _preprocessing(model: Path) -> VolumeConfig:
    """Beside the weights in a release; in the step's or the run's folder before it."""
    folders = [model] if model.name != "model" else [model, model.parent, model.absolute().parent.parent.parent]
    file = next((folder / PREPROCESSING for folder in folders if (folder / PREPROCESSING).is_file()), None)
    if file is None:
        raise UserError(
            f"{model / PREPROCESSING}: missing, so how to prepare volumes is unknown; "
            "copy it from the run folder or export the checkpoint again"
        )
    try:
        return VolumeConfig.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}; copy the file from the run folder again") from error

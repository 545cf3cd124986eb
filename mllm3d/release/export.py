"""`mllm3d release RUN DIR`: one checkpoint as a folder that others load with Hugging Face calls."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mllm3d.errors import UserError
from mllm3d.registry import EMBEDDERS, adapter_class, embedder_class
from mllm3d.release.card import write_card
from mllm3d.rundirs import newest_step, saved_steps

MODEL = "model/config.json"
PREPROCESSING = "preprocessing.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def release(
    run: Path, out: Path, checkpoint: str = "latest", overwrite: bool = False, merge_lora: bool = False
) -> Path:
    """Write `out`: safetensors, config, processor, preprocessing, results and a model card of a checkpoint.

    checkpoint: `latest`, `best`, or a step's number. merge_lora: add adapters to the weights that they adapt. The
    folder is made beside `out`, loaded once on the CPU with every weight accounted for, and only then renamed. Raises
    `UserError` if `out` exists (and `overwrite` is false), a file is missing, one is a pickle, or there are no adapters
    to merge. Returns `out`.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    _check_target(out, overwrite)
    step = find_step(run, checkpoint)
    temporary = out.absolute().parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        with TemporaryDirectory(prefix=f".{out.name}.", dir=temporary.parent) as merged:
            model = _merged(step / "model", Path(merged)) if merge_lora else step / "model"
            _copy(model, run, temporary)
        write_card(run, step, temporary)
        verify(temporary)
        _replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was released") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {step.name} of {run}, every weight accounted for")
    return out


def find_step(run: Path, checkpoint: str) -> Path:
    """The step folder of a run that `latest`, `best` or a number names; it must have a complete model."""
    if checkpoint == "latest":
        return newest_step(run, MODEL)
    steps = saved_steps(run)
    if checkpoint == "best":
        number = _best_step(newest_step(run, MODEL))
    elif checkpoint.isdecimal():
        number = int(checkpoint)
    else:
        raise UserError(f"checkpoint {checkpoint!r}: must be latest, best or a step's number")
    if number not in steps or not (steps[number] / MODEL).is_file():
        complete = ", ".join(step.name for step in steps.values() if (step / MODEL).is_file())
        raise UserError(f"{run}: no complete step_{number} in it; this run has {complete or 'none'}")
    return steps[number]


def _best_step(newest: Path) -> int:
    """The best step so far, as the trainer noted it in its newest checkpoint."""
    file = newest / "trainer.json"
    try:
        best = json.loads(file.read_text(encoding="utf-8"))["progress"]["best_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no best step in it; name a step or `latest`") from error
    if not isinstance(best, int):
        raise UserError(f"{file}: this run measured nothing to choose by; name a step or `latest`")
    return best


def verify(folder: Path) -> None:
    """Load the folder on the CPU as a user would; a missing or unexpected weight is an error there."""
    import torch

    _class_of(folder).load(folder, torch.device("cpu"), torch.float32)


def _class_of(model: Path) -> Any:
    """What loads a model folder: an adapter, or an embedder."""
    model_type = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
    return embedder_class(model_type) if model_type in EMBEDDERS else adapter_class(model_type)


def _merged(model: Path, folder: Path) -> Path:
    """The model without adapters, in an empty folder."""
    save = getattr(_class_of(model), "save_merged", None)
    if save is None:
        raise UserError(f"--merge-lora: {model}: its kind of model has no adapters; leave it out")
    save(model, folder)
    return folder


def _check_target(out: Path, overwrite: bool) -> None:
    """Only an earlier release may be overwritten: `out` could be a mistyped home folder."""
    if not out.exists():
        if not out.absolute().parent.is_dir():
            raise UserError(f"{out}: its parent folder does not exist; create it first")
        return
    if not overwrite:
        raise UserError(f"{out}: exists already; name another folder or give --overwrite")
    if not all((out / name).is_file() for name in ("config.json", PREPROCESSING, "README.md")):
        raise UserError(f"{out}: is not a released model, so it is not overwritten; name another folder")


def _copy(model: Path, run: Path, folder: Path) -> None:
    files = sorted(path for path in model.rglob("*") if path.is_file())
    pickles = [path for path in files if path.suffix in PICKLES]
    if pickles:
        raise UserError(f"{pickles[0]}: a pickle, which can run code when loaded; save it as safetensors instead")
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{model}: no weights (*.safetensors) in it; save the checkpoint again")
    settings = next((path for path in (model / PREPROCESSING, run / PREPROCESSING) if path.is_file()), None)
    if settings is None:
        raise UserError(f"{run / PREPROCESSING}: missing, so nobody could prepare volumes for the model; restore it")
    # Not with the modes of the originals: safetensors makes files that only their owner may read.
    shutil.copytree(model, folder, copy_function=shutil.copyfile)
    shutil.copyfile(settings, folder / PREPROCESSING)


def _replace(temporary: Path, out: Path) -> None:
    """Make the folder visible in one step; an old one is kept until the new one stands in its place."""
    old = temporary.with_name(f"{temporary.name}.old")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)

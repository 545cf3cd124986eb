"""The run folder: what it takes to repeat, resume, evaluate and release a run."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mllm3d.config import Config, config_to_yaml
from mllm3d.errors import UserError
from mllm3d.rundirs import has_checkpoint
from mllm3d.training.distributed import World

PACKAGES = ("torch", "transformers", "deepspeed", "monai", "numpy")


def open_run(config: Config, world: World, resume: bool) -> Path:
    """The run's folder, with everything in it that is known before the first step.

    Raises `UserError` where `--resume` is needed or impossible. What an attempt left that never took a step (a
    mistake in the config) is written over.
    """
    folder = config.run.output
    with world.together():
        if world.is_main:
            _check(folder, resume)
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "config.yaml", config_to_yaml(config))
            _write(folder / "preprocessing.json", config.volume.model_dump_json(indent=2) + "\n")
            _write(folder / "environment.json", json.dumps(environment(world), indent=2) + "\n")
            _write(folder / "README.md", readme(config))
    return folder


def _check(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output: {folder} is a file; name a folder")
    saved = has_checkpoint(folder)
    if resume and not saved:
        raise UserError(f"run.output: {folder} has no checkpoint to resume; start without --resume")
    if not resume and folder.is_dir() and any(not _is_from_start(path) for path in folder.iterdir()):
        remedy = "continue it with --resume" if saved else "delete it, for it has no checkpoint"
        raise UserError(f"run.output: {folder} is not empty; {remedy}, or choose another run.output")


def _is_from_start(path: Path) -> bool:
    """Whether a start leaves this, before the first step."""
    if path.name == "metrics.jsonl":
        return path.stat().st_size == 0
    return path.name in ("config.yaml", "preprocessing.json", "environment.json", "README.md", "tensorboard")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def environment(world: World) -> dict[str, Any]:
    """Versions, code and machine."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "git_commit": git_commit(),
        "world_size": world.size,
        "device": f"{world.device.type}: {device}",
        "threads_per_rank": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """Commit of the code that runs, with `+changes` if files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        tracked = git("ls-files", "--", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        return (commit + ("+changes" if git("status", "--porcelain") else "")) if tracked else None
    except (OSError, subprocess.CalledProcessError):
        return None


def readme(config: Config) -> str:
    """How to go on with this run."""
    folder = config.run.output
    return f"""# {folder.name}

Recipe `{config.recipe}`. The commands run from where training was started.

| to | type |
|---|---|
| resume | `deepspeed train.py --config {folder}/config.yaml --resume` (as many ranks as before) |
| evaluate | `python eval.py --config {folder}/config.yaml` |
| ask | `mllm3d predict --checkpoint {folder} --volume CT.nii.gz --question "..."` |
| release | `mllm3d release {folder} DIR` |

- `config.yaml`: every setting, resolved. `preprocessing.json`: how a scan becomes the model's input.
- `environment.json`: versions, git commit, machine. `metrics.jsonl`, `tensorboard/`: every optimizer step.
- `checkpoints/step_N/model`: the model in Hugging Face's format. `checkpoints/latest` names the newest step.
"""

"""Trains the toy recipe, several runs one after the other: what the launchers start in tests.

The plan is a JSON list of
    {"config": ..., "resume": bool}        one run; with "scores" {step: value}, evaluated to these
    {"copy": [from, to, step]}             a run folder as it was when `step` was saved
    {"limit_file_size": bytes, "rank": r}  the disk of rank r is full in the next run
    {"plant": run}                         the weights in its newest checkpoint become a pickle that runs code
    {"cut": run}                           the same file loses its last byte
    {"blank": manifest}                    its scans hold nothing any more, though size and date are the same, and
                                           prepared ones are gone
Rank 0 leaves the errors that a user would see in plan.json.errors (null for a run that went well), and in
plan.json.moved how far the weights of a poisoned run are from those in its newest checkpoint.
"""

import argparse
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from mllm3d.config import Config  # noqa: E402
from mllm3d.errors import UserError  # noqa: E402
from tests.training.toy_recipe import ToyRecipe, ToySettings  # noqa: E402


def read_config(values: dict[str, Any]) -> Config:
    settings = ToySettings(**values["model"])
    return Config.model_validate_json(json.dumps({**values, "model": {}})).model_copy(update={"model": settings})


def train(entry: dict[str, Any]) -> tuple[str | None, float]:
    """The error that a user sees, and the largest distance of a weight to the newest checkpoint."""
    from mllm3d.training.trainer import fit

    config = read_config(entry["config"])
    recipe = ToyRecipe(config)
    scores = entry.get("scores")
    evaluate = None if scores is None else (lambda engine, step: float(scores[str(step)]))
    try:
        fit(config, recipe, entry.get("resume", False), evaluate)
        error = None
    except UserError as caught:
        error = str(caught)
    except SystemExit:  # a rank other than 0, when all of them stop
        error = "silent"
    return error, distance(recipe, config.run.output / "checkpoints")


def distance(recipe: ToyRecipe, checkpoints: Path) -> float:
    latest = checkpoints / "latest"
    if recipe.settings.poison == "none" or recipe.model is None:
        return float("nan")
    saved = load_file(checkpoints / latest.read_text().strip() / "model" / "model.safetensors")
    return max(float((saved[name] - weight).abs().max()) for name, weight in recipe.model.state_dict().items())


def keep_until(source: Path, target: Path, step: int) -> None:
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (target / "checkpoints" / "latest").write_text(f"step_{step}\n")


class Planted:
    """Unpickling this makes the file `planted`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def damage(run: Path, how: str) -> None:
    step = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    name = "state/mp_rank_00_model_states.pt"
    file = step / name
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
        return
    torch.save({"module": Planted(run / "planted")}, file)
    trainer = json.loads((step / "trainer.json").read_text())
    trainer["files"][name] = file.stat().st_size
    (step / "trainer.json").write_text(json.dumps(trainer))


def blank(manifest: Path) -> None:
    for file in manifest.parent.glob("*.npy"):
        times = file.stat()
        file.write_bytes(bytes(times.st_size))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for file in manifest.parent.glob(".cache/*/*.b2"):
        file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher gives it
    parser.add_argument("plan", type=Path)
    plan = parser.parse_args().plan
    rank = int(os.environ.get("RANK", "0"))
    errors, moved = [], []
    for entry in json.loads(plan.read_text()):
        if "copy" in entry:
            if rank == 0:
                keep_until(Path(entry["copy"][0]), Path(entry["copy"][1]), entry["copy"][2])
        elif entry.keys() & {"plant", "cut"}:
            how, run = next(iter(entry.items()))
            damage(Path(run), how)
        elif "blank" in entry:
            if rank == 0:
                blank(Path(entry["blank"]))
        elif "limit_file_size" in entry:
            if rank == entry["rank"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (entry["limit_file_size"], resource.RLIM_INFINITY))
        else:
            error, distance = train(entry)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            errors.append(error)
            moved.append(distance)
    if rank == 0:
        Path(f"{plan}.errors").write_text(json.dumps(errors))
        Path(f"{plan}.moved").write_text(json.dumps(moved))
    return 2 if errors[-1] else 0


if __name__ == "__main__":
    sys.exit(main())

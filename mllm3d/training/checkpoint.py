"""Checkpoints of a run: complete or absent, and resumed bit for bit.

RUN/checkpoints/step_N/ holds
    model/               the model in Hugging Face's format, with preprocessing.json
    state/               DeepSpeed's weights, optimizer and schedule (see `stored`)
    rank_R.safetensors   random states of rank R
    trainer.json         step, sampler position, what the run must agree with, sizes of all files
and RUN/checkpoints/latest names the newest. A checkpoint is written as step_N.tmp, flushed to disk, renamed,
and only then named in `latest`.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from mllm3d.config import Config
from mllm3d.errors import UserError
from mllm3d.rundirs import CHECKPOINTS, LATEST, has_checkpoint, newest_step, saved_steps
from mllm3d.training import random_state
from mllm3d.training.distributed import World, one_line
from mllm3d.training.recipe import Recipe

STATE = "state"
TRAINER = "trainer.json"


@dataclass(frozen=True)
class Progress:
    """Where a run is: optimizer steps done, sampler position after them, best value so far and its step.

    best: (step, value) of the checkpoints that are kept for their value, the best first.
    """

    step: int = 0
    position: tuple[int, int] | None = None
    best_value: float | None = None
    best_step: int | None = None
    best: tuple[tuple[int, float], ...] = ()


def identity(config: Config, module: nn.Module, world: World, data: str) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must have in common, by the names a user knows."""
    shapes = [
        (name, tuple(getattr(parameter, "ds_shape", parameter.shape)), parameter.requires_grad)
        for name, parameter in module.named_parameters()
    ]
    training = config.training
    return {
        "recipe": config.recipe,
        "model": hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()[:16],
        "number of ranks": world.size,
        "training.zero_stage": training.zero_stage,
        "training.precision": training.precision,
        "training.optimizer.name": training.optimizer.name,
        "training.volumes_per_batch": training.volumes_per_batch,
        "training.accumulation": training.accumulation,
        "data.questions_per_volume": config.data.questions_per_volume,
        "run.seed": config.run.seed,
        "training data": data,
    }


class Checkpoints:
    """The folder of checkpoints of one run, as seen by one rank."""

    def __init__(self, run: Path, config: Config, identity: dict[str, Any], world: World) -> None:
        self.run, self.folder = run, run / CHECKPOINTS
        self.identity = identity
        self.keep_last = config.training.keep_last
        self.preprocessing = config.volume.model_dump_json(indent=2)
        self.world = world

    # --- saving ---------------------------------------------------------------------------------------------

    def save(self, engine: Any, recipe: Recipe, progress: Progress) -> None:
        """Save after `progress.step` steps. All ranks call it. On a full disk: one `UserError`, no half
        checkpoint, and the ones before stay as they are."""
        target = self.folder / f"step_{progress.step}"
        draft = target.with_name(target.name + ".tmp")
        with self.world.together():
            if self.world.is_main:
                shutil.rmtree(draft, ignore_errors=True)
                for name in ("model", STATE):
                    (draft / name).mkdir(parents=True)
        failure = self._write(engine, recipe, draft)
        failures = [text for text in self.world.gather(failure) if text]
        if failures:
            if self.world.is_main:
                shutil.rmtree(draft, ignore_errors=True)
            self.world.stop(f"{target}: could not be saved: {failures[0]}; {self._remedy()}")
        with self.world.together():
            if self.world.is_main:
                self._publish(draft, target, progress)

    def _write(self, engine: Any, recipe: Recipe, draft: Path) -> str | None:
        """Write this rank's files; the reason if that failed. Never leaves early: the ranks meet in here."""
        gathered = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_stage() == 3 else None
        engine.save_checkpoint(str(draft), tag=STATE, save_latest=False)
        failures: list[Exception] = engine.checkpoint_engine.failures
        try:
            random_state.save(draft / f"rank_{self.world.rank}.safetensors")
            if self.world.is_main:
                recipe.save(engine.module, gathered, draft / "model")
                (draft / "model" / "preprocessing.json").write_text(self.preprocessing + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            failures.append(error)
        reason = one_line(failures[0]) if failures else None
        failures.clear()
        return reason

    def _remedy(self) -> str:
        if not has_checkpoint(self.run):
            return "no checkpoint before it: free space there and start again"
        return f"{newest_step(self.run, TRAINER).name} is intact: free space there and --resume"

    def _publish(self, draft: Path, target: Path, progress: Progress) -> None:
        sizes = {str(f.relative_to(draft)): f.stat().st_size for f in sorted(draft.rglob("*")) if f.is_file()}
        content = {"progress": asdict(progress), "identity": self.identity, "files": sizes}
        try:
            (draft / TRAINER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for path in [*draft.rglob("*"), draft]:
                _flush(path)
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            _flush(self.folder)
            pointer = self.folder / f"{LATEST}.tmp"
            pointer.write_text(target.name + "\n", encoding="utf-8")
            _flush(pointer)
            os.replace(pointer, self.folder / LATEST)
            _flush(self.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise UserError(f"{target}: could not be saved: {one_line(error)}; {self._remedy()}") from error
        self._prune(progress)

    def _prune(self, progress: Progress) -> None:
        steps = saved_steps(self.run)
        newest = [step for step in steps if step <= progress.step][-self.keep_last :]
        keep = {*newest, *(step for step, _ in progress.best)}
        for step, folder in steps.items():
            if step not in keep:
                shutil.rmtree(folder)

    # --- resuming -------------------------------------------------------------------------------------------

    def load(self, engine: Any) -> Progress:
        """Weights, optimizer and schedule of the newest checkpoint into `engine`.

        Random states come last, by `restore_random_state`: what is built in between may draw numbers.
        """
        with self.world.together():
            folder = newest_step(self.run, TRAINER)
            progress = self._checked(folder)
        own = [dict(group) for group in engine.basic_optimizer.param_groups]
        path, _ = engine.load_checkpoint(str(folder), tag=STATE)
        if path is None:
            raise UserError(f"{folder / STATE}: DeepSpeed found nothing to load; restore the folder from a copy")
        _keep_own_settings(engine, own)
        return progress

    def restore_random_state(self) -> None:
        """This rank's random states as they were when the newest checkpoint was saved."""
        random_state.load(newest_step(self.run, TRAINER) / f"rank_{self.world.rank}.safetensors")

    def _checked(self, folder: Path) -> Progress:
        """Progress of a checkpoint that is complete and belongs to this run."""
        file = folder / TRAINER
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            saved, sizes, progress = content["identity"], content["files"], content["progress"]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{file}: damaged; restore it, or name an older step in {folder.parent / LATEST}"
            ) from error
        for key, mine in self.identity.items():
            if saved.get(key) != mine:
                raise UserError(
                    f"{file}: saved with {key} {saved.get(key)}, but this run has {mine}; "
                    f"resume with the same, or begin a new run from the weights in {folder / 'model'}"
                )
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or cut short; name an older step in {folder.parent / LATEST}")
        position = progress["position"]
        plain = {"position": None if position is None else (position[0], position[1])}
        return Progress(**{**progress, **plain, "best": tuple((step, value) for step, value in progress["best"])})


def _keep_own_settings(engine: Any, own: list[dict[str, Any]]) -> None:
    """Learning rates, decay and the like from this run's config: loading has set the checkpoint's, and a user
    who lowers the rate to get past a bad place means it."""
    schedule = engine.lr_scheduler
    schedule.base_lrs = [group["initial_lr"] for group in own]
    rates = [lr * at(schedule.last_epoch) for lr, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, before, lr in zip(engine.basic_optimizer.param_groups, own, rates, strict=True):
        group.update({key: value for key, value in before.items() if key != "params"}, lr=lr)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to this file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

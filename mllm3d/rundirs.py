"""Where the rooms find a run's checkpoints: RUN/checkpoints/step_N, and RUN/checkpoints/latest, which names one."""

from pathlib import Path

from mllm3d.errors import UserError

CHECKPOINTS, LATEST = "checkpoints", "latest"


def has_checkpoint(run: Path) -> bool:
    """Whether the run has saved: `latest` is written after the first checkpoint is complete."""
    return (run / CHECKPOINTS / LATEST).is_file()


def saved_steps(run: Path) -> dict[int, Path]:
    """The step folders by number, the earliest first; none that is still being written."""
    named = [(path.name.removeprefix("step_"), path) for path in (run / CHECKPOINTS).glob("step_*")]
    return dict(sorted((int(number), path) for number, path in named if number.isdecimal()))


def newest_step(run: Path, needed: str) -> Path:
    """The step folder that `latest` names.

    needed: a file without which the step is of no use to the caller. Raises `UserError` where nothing was
    saved, and where the step is gone or lacks that file.
    """
    pointer = run / CHECKPOINTS / LATEST
    if not has_checkpoint(run):
        raise UserError(f"{pointer}: missing; the run has saved no checkpoint")
    step = pointer.with_name(pointer.read_text(encoding="utf-8").strip())
    if not (step / needed).is_file():
        complete = ", ".join(path.name for path in saved_steps(run).values() if (path / needed).is_file())
        remedy = f"write another step's name into it ({complete})" if complete else "no other step is complete"
        raise UserError(f"{pointer}: names {step.name}, which is gone or incomplete; {remedy}")
    return step

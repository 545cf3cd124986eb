"""Programs of the repository that a benchmark would run, without running them."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def replaced(monkeypatch: pytest.MonkeyPatch, others: Callable[[list[str], Path | None], None]) -> list[list[str]]:
    """Calls that were made, from now on: training leaves a checkpoint, all else what `others` writes.

    others: given the call (program first) and its run folder, None where it names none.
    """
    calls: list[list[str]] = []

    def called(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        call = command[1:]
        calls.append(call)
        output = next((Path(word.partition("=")[2]) for word in call if word.startswith("run.output=")), None)
        if call[0].endswith("train.py"):
            assert output is not None
            (output / "checkpoints").mkdir(parents=True)
            (output / "checkpoints/latest").write_text("step_4")
        elif call[0].endswith("prepare.py"):
            Path(call[call.index("--out") + 1]).mkdir()
        else:
            others(call, output)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", called)
    return calls

"""Finding a run's checkpoints."""

from pathlib import Path

import pytest

from mllm3d.errors import UserError
from mllm3d.rundirs import has_checkpoint, newest_step, saved_steps


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 5 and 20, a third that is still being written, and a folder that is no step."""
    for name in ("step_20", "step_5", "step_30.tmp", "step_by_step"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "trainer.json").write_text("{}")
    (tmp_path / "checkpoints" / "latest").write_text("step_20\n")
    return tmp_path


def test_steps_are_in_order_and_complete(run: Path) -> None:
    assert list(saved_steps(run)) == [5, 20]
    assert saved_steps(run)[5] == run / "checkpoints" / "step_5"
    assert newest_step(run, "trainer.json") == run / "checkpoints" / "step_20"
    assert saved_steps(run / "elsewhere") == {}


def test_no_checkpoint_is_an_error_and_not_a_fresh_start(run: Path) -> None:
    (run / "checkpoints" / "latest").unlink()
    assert not has_checkpoint(run)
    with pytest.raises(UserError, match="latest: missing; the run has saved no checkpoint"):
        newest_step(run, "trainer.json")


def test_a_step_that_is_gone_or_incomplete_is_an_error_that_names_the_others(run: Path) -> None:
    (run / "checkpoints" / "step_20" / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"names step_20, which is gone or incomplete; .* \(step_5\)$"):
        newest_step(run, "trainer.json")
    (run / "checkpoints" / "latest").write_text("step_9\n")
    with pytest.raises(UserError, match="names step_9, which is gone or incomplete; no other step is complete"):
        newest_step(run, "model/config.json")

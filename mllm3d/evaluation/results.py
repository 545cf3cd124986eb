"""results.json: everything an evaluation found, as one validated file."""

from pathlib import Path

from pydantic import Field, ValidationError

from mllm3d.config import Settings
from mllm3d.config.messages import first_problem
from mllm3d.errors import UserError
from mllm3d.evaluation.scoring import ModeSummary, TableRow


class Results(Settings):
    """One evaluation of one checkpoint on one split."""

    checkpoint: str = Field(description="Name of the step or released folder.")
    fingerprint: str = Field(description="Hash of its weights, configuration and preprocessing.")
    split: str = Field(description="Split of the manifest.")
    date: str = Field(description="Day of the evaluation, UTC.")
    device: str = Field(description="What it ran on.")
    modes: dict[str, ModeSummary] = Field(description="Tokens and time per mode.")
    rows: list[TableRow] = Field(description="Scores per task and sub-task.")


def read_results(path: Path) -> Results:
    """Raises `UserError` if the file is missing or is not a results file."""
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the evaluation first") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; run the evaluation again") from error

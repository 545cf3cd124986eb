"""Predictions on disk: one JSON line per sample, appended as it is answered; all that scoring reads."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from mllm3d.config import Settings
from mllm3d.errors import UserError
from mllm3d.evaluation.masks import KeptTokens

if TYPE_CHECKING:
    from typing import TextIO


class Sample(Settings):
    """One question, what the manifest says and what the model said."""

    id: str = Field(description="Id of the manifest's row.")
    case: str = Field(description="Patient, the unit of resampling for intervals.")
    task: str = Field(description="Task of the row.")
    subtask: str | None = Field(description="Sub-task or finding of the row.")
    question: str = Field(description="The question as it stands in the manifest, without options.")
    options: list[str] | None = Field(description="Options of a closed question.")
    reference: str = Field(description="The manifest's answer.")
    prediction: str = Field(description="The model's answer, unedited.")
    keep_rate: float = Field(description="Share of the visual tokens that passed the scheduling layer.")
    tokens_before: int = Field(description="Visual tokens of all volumes of the question.")
    tokens_after: int = Field(description="Visual tokens after the scheduling layer.")
    seconds: float = Field(description="Wall time of the call, shared equally by the questions answered in it.")
    seconds_first: float | None = Field(
        default=None, description="Wall time from the start of the call to the first token, volumes included."
    )
    seconds_last: float | None = Field(default=None, description="The same to the answer's last token.")
    new_tokens: int | None = Field(default=None, description="Tokens of the answer, the end token included.")
    kept: KeptTokens | None = Field(default=None, description="Which tokens stayed; null: not recorded.")


def append(stream: "TextIO", samples: Iterable[Sample]) -> None:
    """Write and flush, so that an interrupted run loses at most the line it was writing."""
    try:
        for sample in samples:
            stream.write(sample.model_dump_json() + "\n")
        stream.flush()
    except OSError as error:
        raise UserError(f"{stream.name}: {error.strerror}; mend that and run again, it continues from here") from error


def read(path: Path) -> list[Sample]:
    """Samples of a file in the order they were answered; none if there is no file.

    A last line that was torn by an interruption is cut off the file, so that appending goes on cleanly.
    Any other unreadable line raises `UserError` with its number.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            samples.append(Sample.model_validate_json(line))
        except (ValidationError, ValueError) as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a prediction; delete the line and run again") from error
            with path.open("r+b") as stream:
                stream.truncate(len(content) - len(line))
    return samples

"""Manifests: JSON Lines, one question a line, what every data set becomes.

Paths in a row are relative to the manifest's folder and stay inside it: absolute ones and `..` are errors. A
symbolic link inside the folder is followed: whoever made it chose where it leads.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from mllm3d.config import Settings
from mllm3d.data.files import write_atomically
from mllm3d.errors import UserError


def _inside(value: str) -> str:
    parts = PurePosixPath(value).parts
    windows = PureWindowsPath(value)
    if not parts or "\0" in value:
        raise ValueError("no path")
    if parts[0] == "/" or windows.drive or "\\" in value or ".." in parts:
        raise ValueError(f"{value!r} leaves the manifest's folder; give a path relative to it, with / and without ..")
    return value


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return value


Inside = Annotated[str, AfterValidator(_inside)]
Filled = Annotated[str, AfterValidator(_filled)]


class Study(NamedTuple):
    """What a question is about: questions with equal studies share one encoding (if they have the same prior)."""

    volume: str | None = None
    images: tuple[str, ...] = ()
    video: str | None = None

    def __str__(self) -> str:
        """The files, for messages."""
        return ", ".join(name for name in (self.volume, *self.images, self.video) if name is not None)


class Row(Settings):
    """One question about one study: a volume, images in order, a video, or several of these."""

    id: Filled = Field(description="Unique in the manifest.")
    case: Filled = Field(description="Patient or case; a case is in one split only.")
    split: Filled = Field(description="train, validation, test or any other name.")
    volume: Inside | None = Field(default=None, description="The scan, relative to the manifest's folder.")
    prior: Inside | None = Field(default=None, description="An earlier scan of the same case.")
    images: list[Inside] | None = Field(
        default=None, min_length=1, description="Image files in the order in which they are shown."
    )
    video: Inside | None = Field(default=None, description="Folder of frames, one per second, in order of their names.")
    question: Filled = Field(description="The question, without its options.")
    answer: Filled = Field(description="The answer in words; with options, one of them.")
    options: list[Filled] | None = Field(default=None, description="Choices, in the order of their letters.")
    task: Filled = Field(description="Name of the benchmark's task.")
    subtask: str | None = Field(default=None, description="Sub-type within the task.")
    modality: Literal["CT", "MR"] = Field(default="CT", description="CT values are HU.")
    labels: Inside | None = Field(default=None, description="Label map of the volume, relative as above.")
    report: str | None = Field(default=None, description="Report of the case.")
    meta: dict[str, str | int | float | bool | None] = Field(
        default_factory=dict, description="Whatever else the data set knows."
    )

    @property
    def study(self) -> Study:
        """What rows are grouped by, limited by and counted by."""
        return Study(self.volume, tuple(self.images or ()), self.video)

    @property
    def has_pixels(self) -> bool:
        """Whether the study has images or a video."""
        return self.images is not None or self.video is not None

    @model_validator(mode="after")
    def _shows_something(self) -> Self:
        if self.volume is None and not self.has_pixels:
            raise ValueError("volume, images or video: at least one of them is needed")
        for name in ("prior", "labels"):
            if self.volume is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: belongs to a volume, and this row has none")
        return self

    @model_validator(mode="after")
    def _answer_is_an_option(self) -> Self:
        if self.options is None:
            return self
        if not 2 <= len(self.options) <= 26 or len(set(self.options)) < len(self.options):
            raise ValueError("options: 2 to 26 different choices are needed")
        if self.answer not in self.options:
            raise ValueError(f"answer: {self.answer!r} is not one of the options")
        return self


class Problem(NamedTuple):
    """What is wrong in a line of a manifest (line 0: the file as a whole)."""

    line: int
    field: str
    message: str

    def text(self, manifest: Path | str) -> str:
        """As one line: `file:line: field: message`."""
        place = f"{manifest}:{self.line}" if self.line else str(manifest)
        return f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"


def parse_manifest(path: str | Path) -> tuple[list[tuple[int, Row]], list[Problem]]:
    """Rows with their line numbers, and what is wrong with the others. `UserError` if it can't be read."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; data.manifest must name a JSON Lines file"
        ) from error
    rows: list[tuple[int, Row]] = []
    problems: list[Problem] = []
    lines_by_id: dict[str, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            problems += [_problem(number, details["loc"], details["msg"]) for details in error.errors()]
            continue
        if row.id in lines_by_id:
            problems.append(Problem(number, "id", f"{row.id!r} is already in line {lines_by_id[row.id]}"))
        lines_by_id.setdefault(row.id, number)
        rows.append((number, row))
    if not rows and not problems:
        problems.append(Problem(0, "", "the manifest is empty: it has no rows"))
    return rows, problems


def read_manifest(path: str | Path) -> list[Row]:
    """All rows in order. Raises `UserError` with the first wrong line and how many more there are."""
    rows, problems = parse_manifest(path)
    if problems:
        more = f" (and {len(problems) - 1} more: run `mllm3d data check {path}`)" if len(problems) > 1 else ""
        raise UserError(problems[0].text(path) + more)
    return [row for _, row in rows]


def write_manifest(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines without fields that have their default; complete or not at all."""
    lines = [row.model_dump_json(exclude_defaults=True) + "\n" for row in rows]
    write_atomically(Path(path), "".join(lines).encode())


def volume_path(root: str | Path, relative: str) -> Path:
    """Where a row's volume, image or folder of frames lies; `root` is the manifest's folder."""
    return Path(root) / _inside(relative)


def select(
    rows: Sequence[Row],
    split: str,
    where: Mapping[str, Sequence[str]] | None = None,
    limit_volumes: int | None = None,
) -> list[Row]:
    """Rows of a split with an allowed value in each key of `where`, of the first `limit_volumes` studies.

    Values are compared as text: numbers as written in JSON, `true`, `false`, `null`. Raises `UserError` for
    an unknown key and for an empty selection.
    """
    where = where or {}
    known = set(Row.model_fields) | {key for row in rows for key in row.meta}
    for key in where:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"where.{key}: neither a field of a row nor a key of its meta{hint}")
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        splits = ", ".join(sorted({row.split for row in rows})) or "none"
        raise UserError(f"data: no row has split {split!r}; the manifest's splits are: {splits}")
    for key, allowed in where.items():
        chosen = [row for row in chosen if _text(_value(row, key)) in allowed]
        if not chosen:
            raise UserError(f"where.{key}: no row of split {split!r} is left with {' or '.join(allowed) or 'no value'}")
    if limit_volumes is not None:
        first = set(list(dict.fromkeys(row.study for row in chosen))[:limit_volumes])
        chosen = [row for row in chosen if row.study in first]
    return chosen


def _value(row: Row, key: str) -> object:
    return getattr(row, key) if key in Row.model_fields else row.meta.get(key)


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _problem(line: int, location: tuple[int | str, ...], message: str) -> Problem:
    field = ".".join(str(part) for part in location)
    message = message.removeprefix("Value error, ").splitlines()[0]
    if message.startswith("Invalid JSON"):
        return Problem(line, "", f"not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    if message.startswith("Extra inputs"):
        near = difflib.get_close_matches(field, Row.model_fields, n=1)
        message = "unknown field; put it into meta" + (f", or did you mean {near[0]}?" if near else "")
    if message == "Field required":
        message = "is missing"
    return Problem(line, field, message)

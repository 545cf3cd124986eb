"""`mllm3d config NAME`: every resolved setting, where it came from, and what it means."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mllm3d.config.loading import Loaded
from mllm3d.config.messages import dotted, leaves
from mllm3d.config.sections import Config
from mllm3d.errors import UserError


def show(loaded: Loaded, explain: bool = False) -> str:
    """One line per setting: key, value, origin; with `explain` its description below."""
    values = loaded.config.model_dump(mode="json")
    rows = [(dotted(path), _value(values, path), loaded.origins[dotted(path)], path) for path in leaves(values)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"# {loaded.source}"]
    for key, value, origin, path in rows:
        lines.append(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}")
        if explain:
            lines.append(f"    {_description(loaded.config, path)}")
    return "\n".join(lines)


def write_preprocessing(config: Config, folder: Path) -> None:
    """How volumes are prepared, into the folder of a model that came without. Raises `UserError` if it has it."""
    file = folder / "preprocessing.json"
    if not folder.is_dir():
        raise UserError(f"--preprocessing {folder}: no such folder; give the model's")
    if file.exists():
        raise UserError(f"--preprocessing: {file} is there already; remove it first")
    file.write_text(config.volume.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _value(values: Any, path: tuple[str | int, ...]) -> str:
    for part in path:
        values = values[part]
    return "null" if values is None else str(values)


def _description(settings: Any, path: tuple[str | int, ...]) -> str:
    """Description of the deepest field on the path that has one."""
    text = ""
    for part in path:
        if not isinstance(settings, BaseModel):
            break
        text = type(settings).model_fields[str(part)].description or text
        settings = getattr(settings, str(part))
    return text

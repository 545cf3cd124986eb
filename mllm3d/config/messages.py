"""What is wrong with a config, as lines: `file:line: key: what is wrong; nearest right name`."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

KeyPath = tuple[str | int, ...]
"""Keys from the top down, with list positions as integers."""


def dotted(path: KeyPath) -> str:
    """`("data", "where", "task", 0)` -> `data.where.task[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def first_problem(error: ValidationError) -> str:
    """`key: what is wrong` of a file that a program wrote, where one line is enough."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


def error_lines(
    error: ValidationError,
    schema: type[BaseModel],
    values: dict[str, Any],
    origins: dict[KeyPath, str],
    source: str,
) -> list[str]:
    """One line for each key that is wrong, in the order of the files' lines."""
    found: dict[KeyPath, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _existing(tuple(item["loc"]), values, keep_last=item["type"] == "missing")
        text = _unknown_key(path, schema, values) if item["type"] == "extra_forbidden" else _describe(item)
        texts = found.setdefault(_single_leaf(path, values) if item["type"] == "extra_forbidden" else path, [])
        if text not in texts:
            texts.append(text)
    lines = [(_origin(path, origins, source), dotted(path), ", or ".join(texts)) for path, texts in found.items()]
    return [": ".join(filter(None, line)) for line in sorted(lines, key=lambda line: _by_line(line[0]))]


def leaves(values: dict[str, Any], path: KeyPath = ()) -> list[KeyPath]:
    """Paths of all values that are not mappings (an empty mapping is a value)."""
    found: list[KeyPath] = []
    for key, value in values.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]
    return found


def known_paths(schema: type[BaseModel], path: KeyPath = ()) -> list[KeyPath]:
    """Every key of a model and of the models within it."""
    found: list[KeyPath] = []
    for name, info in schema.model_fields.items():
        found.append((*path, name))
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += known_paths(part, (*path, name))
    return found


def _existing(loc: KeyPath, values: Any, keep_last: bool) -> KeyPath:
    """The part of pydantic's location that is in the file; the rest names branches of a union."""
    for depth, part in enumerate(loc):
        inside = isinstance(values, dict) and part in values
        inside = inside or (isinstance(values, list) and isinstance(part, int) and part < len(values))
        if not inside:
            return loc[: depth + 1] if keep_last else loc[:depth]
        values = values[part]
    return loc


def _single_leaf(path: KeyPath, values: Any) -> KeyPath:
    """Follow an unknown key down while there is only one way, so that the line names what was typed."""
    for part in path:
        values = values[part]
    while isinstance(values, dict) and len(values) == 1:
        key = next(iter(values))
        path, values = (*path, key), values[key]
    return path


def _unknown_key(path: KeyPath, schema: type[BaseModel], values: dict[str, Any]) -> str:
    known = known_paths(schema)
    siblings = [str(other[-1]) for other in known if other[:-1] == path[:-1]]
    below = _single_leaf(path, values)[len(path) :]
    near = difflib.get_close_matches(str(path[-1]), siblings, n=1)
    guesses = [(*path[:-1], near[0], *below)] if near else [other for other in known if other[-1] == path[-1]]
    allowed = f"allowed: {', '.join(siblings)}" if siblings else "this section takes no keys"
    if not guesses:
        return f"unknown key; {allowed}"
    return f"unknown key; did you mean {' or '.join(dotted(guess) for guess in guesses)}? ({allowed})"


def _describe(item: Any) -> str:
    if item["type"] == "missing":
        return "missing, and it has no default"
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if item["type"] == "value_error" and isinstance(item["input"], dict):
        return message
    if item["type"] == "path_type":
        message = "must be a path"
    return f"{message}, got {_short(item['input'])}"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _origin(path: KeyPath, origins: dict[KeyPath, str], source: str) -> str:
    """Where the key stands, or the nearest key above it."""
    for end in range(len(path), 0, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return source


def _by_line(origin: str) -> tuple[str, int]:
    file, _, line = origin.rpartition(":")
    return (file, int(line)) if line.isdigit() else (origin, 0)

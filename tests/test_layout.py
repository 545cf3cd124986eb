"""Sizes of files and functions, and what an installation makes importable."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mllm3d", "photon", "med3dvlm", "medpruner", "data", "tests", "benchmarks")
MAX_FILE, MAX_FUNCTION = 600, 80
REASON = "Longer than the limit because"
"""A file that begins with a docstring or comment saying so may be longer, or hold longer functions."""


def too_long(path: Path) -> list[str]:
    """What in a Python file is over the limits without a reason in its header."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if REASON in "\n".join(lines[:20]):
        return []
    problems = [f"{path}: {len(lines)} lines"] if len(lines) > MAX_FILE else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MAX_FUNCTION:
                problems.append(f"{path}:{node.lineno}: {node.name} has {size} lines")
    return problems


def test_long_files_and_functions_are_found(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    x = 1\n" * 80)
    assert too_long(path) == [f"{path}:1: f has 81 lines"]
    path.write_text("x = 1\n" * 601)
    assert too_long(path) == [f"{path}: 601 lines"]
    path.write_text(f'"""A table. {REASON} it is one table."""\n' + "x = 1\n" * 601)
    assert too_long(path) == []


def test_no_file_or_function_is_too_long():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert [problem for path in files for problem in too_long(path)] == []


@pytest.mark.parametrize("name", ["data", "tests", "configs", "benchmarks", "docs", "train"])
def test_only_the_packages_are_importable(name, tmp_path):
    """From another folder: an editable installation that put the checkout on the path would show them all."""
    code = f"from importlib.util import find_spec; print(find_spec({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout


def test_pins_meet_the_declared_ranges():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and line[0] != "#")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["eval"], *extras["gpu"]]
    for requirement in wanted:
        name, floor = requirement.split(">=")
        assert _numbers(pins[name]) >= _numbers(floor), requirement


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))

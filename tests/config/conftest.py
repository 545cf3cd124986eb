"""A recipe that exists only in these tests, and a folder to write configs in."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import Field

from mllm3d import registry
from mllm3d.config import Settings

MINIMAL = """\
recipe: test.recipe
volume:
  preset: phantom
data:
  manifest: manifest.jsonl
training:
  epochs: 3
  optimizer:
    lr: 1e-4
"""


class BandSettings(Settings):
    """A section within the recipe's section."""

    min: float = Field(default=0.3, description="Lower end.")


class RecipeSettings(Settings):
    """What `model:` may hold here."""

    checkpoint: str | None = Field(default=None, description="Weights to start from.")
    patch_size: tuple[int, int, int] = Field(default=(14, 14, 14), description="Patch (D, H, W).")
    band: BandSettings = Field(default=BandSettings(), description="Retention band.")


@pytest.fixture(autouse=True)
def recipe(monkeypatch):
    """Registers `test.recipe`."""
    module = ModuleType("recipe_of_the_config_tests")
    module.Recipe = type("Recipe", (), {"Settings": RecipeSettings})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.RECIPES, "test.recipe", f"{module.__name__}:Recipe")


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """Writes a config into the current directory, which is a temporary one."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str = MINIMAL) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file

"""Runs of Med3DVLM's stages, made once."""

from pathlib import Path

import pytest

from tests.med3dvlm.tiny_recipes import Recipes, all_stages


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of each stage; not to be changed."""
    return all_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def recipes(tmp_path: Path, stages: dict[str, Path]) -> Recipes:
    return Recipes(tmp_path, stages["bert"].parent)

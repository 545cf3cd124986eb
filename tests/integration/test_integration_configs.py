"""Every config for a real run passes the dry run: model on the meta device, steps, memory, hours."""

from pathlib import Path

import pytest

from mllm3d.config import load
from mllm3d.registry import recipe_class
from mllm3d.training.estimate import report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name != "quickstart"
)


def dry_run(name: str) -> dict[str, str]:
    config = load(name)
    lines = report(config, recipe_class(config.recipe)(config)).splitlines()
    return {line[:18].strip(): line[18:].strip() for line in lines if line[:18].strip()}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_passes_the_dry_run_without_weights_or_data(name: str) -> None:
    found = dry_run(name)
    assert found["recipe"].startswith("photon.")
    assert "unknown" not in " ".join(found.values())
    max_tokens = name in ("photon_max", "table4/qwen25vl") or name.startswith("table7/")
    assert found["tokens per volume"] == ("7,000" if max_tokens else "1,000")


@pytest.mark.parametrize(("name", "billions"), [("photon_7b_phase2", "8.29"), ("photon_qwen3_phase2", "2.13")])
def test_other_backbones_have_their_number_of_parameters(name: str, billions: str) -> None:
    """Of the published models with the larger patch embedding and the threshold predictor."""
    assert dry_run(name)["parameters"].startswith(f"{billions} G")
